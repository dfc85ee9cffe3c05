"""API of a rank: a training script reports steps to the launcher, and polls for requests to save or stop.

    from launch import worker                   # from gpt_launch import worker, if you have your own launch.py

    run = worker.attach()
    for step in range(first_step, steps):
        ...
        run.record(step, loss=loss, tokens=tokens)
        if run.stop_requested():
            save(run.checkpoint_dir, step)
            run.saved(step)
            break

The same script runs without the launcher: ``attach`` then returns a stand-in that writes nothing. Standard library
only. docs/scripts.md is the guide; ``gpt.train`` is the first user.
"""

# Relative imports: a rank may load this package as gpt_launch.launch, if the user has a launch.py.

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import parent_process
from pathlib import Path
from types import FrameType
from typing import Any

from ..runs.folder import RunFolder, is_newest_attempt, keep_unwritten, say, write_unwritten
from ..runs.process import BEAT_S, ENVIRONMENT, FROM_FILE, HeartbeatFile, Phase, Request, die_with_parent
from ..runs.records import FOLLOWED_S, LONGEST_S, RecordWriter

__all__ = ["STORE_PREFIX", "OutdatedAttemptError", "Run", "attach", "is_child", "run_of_environment"]

STORE_PREFIX = "LAUNCH_STORE_PREFIX"
"""Environment variable with a secret text, equal on all ranks.

The keys of the ranks in torch's store at MASTER_PORT begin with this text, since the store answers any process.
"""
PAUSES = (Phase.evaluating, Phase.saving)
"""Phases whose time is not part of a step."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that request a rank to save and leave. SIGUSR1 is not among them, because NCCL uses it."""
AGREEMENT_S = 10.0
"""Longest wait in seconds for the agents' agreement on a stop. The wait is shorter if the grace period is short."""
SAVE_AGREEMENT_S = 60.0
"""Longest wait in seconds for the agents' agreement on a save. A rank that waits less might miss the save."""
LOOK_S = 1.0
"""Seconds between two searches of the run folder for the files STOP and SAVE."""


# The way in which a process becomes a rank.


_attached: Run | None = None


def attach(handle_signals: bool = True) -> Run:
    """Return the ``Run`` of this process, the rank that the environment names. A second call returns the same object.

    Without the launcher, and in a process that multiprocessing started, the Run is a stand-in. It writes nothing, and
    ``stop_requested`` only follows signals of this process. Call this function early and in the main thread. Before the
    call, a request to stop ends the process.

    Args:
        handle_signals: True to handle SIGTERM, SIGUSR2 and SIGINT as requests to stop. If False, the script has to
            handle the signal that the launcher sends with a request to stop. The Run still receives the request itself.
    """
    global _attached
    if _attached is None:
        _attached = run_of_environment(os.environ)
        if handle_signals and not is_child():
            _attached.install_handlers()
        atexit.register(_attached._leave)
        os.register_at_fork(after_in_child=_attached._let_go)
    return _attached


def is_child() -> bool:
    """Return whether multiprocessing started this process, which is then a helper of a rank."""
    return parent_process() is not None


def run_of_environment(environment: Mapping[str, str]) -> Run:
    """Return the Run of the rank that ``environment`` names, with a heartbeat if an agent watches the rank.

    Without LAUNCH_RUN_DIR, and in a process that multiprocessing started, the Run is a stand-in that writes nothing.
    """
    defaults = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))  # torchrun sets these too
    rank, local_rank, size = (int(environment.get(name, default)) for name, default in defaults)
    folder = environment.get("LAUNCH_RUN_DIR")
    if folder is None or is_child():
        return Run(rank, local_rank, size)
    parent = os.getppid()  # Read before the heartbeat shows this rank: from then on its parent may end.
    agent, grace = environment.get("LAUNCH_AGENT_PID"), environment.get("LAUNCH_GRACE_S")
    heartbeats, heartbeat = environment.get(ENVIRONMENT), None
    if heartbeats is not None:
        try:
            heartbeat = HeartbeatFile(Path(heartbeats) / str(rank))
            heartbeat.open_for_rank()
        except OSError as error:  # A container may not see the node's folder for temporary files.
            say(f"launch.worker: no heartbeat, stops are not agreed on: {error}")
    run = Run(rank, local_rank, size, float(grace) if grace else None, heartbeat, agent is not None)
    run.open_folder(Path(folder), int(environment.get("LAUNCH_ATTEMPT", "1")))
    checkpoints = environment.get("LAUNCH_CHECKPOINT_DIR")
    if checkpoints:
        run.checkpoint_dir = Path(checkpoints)
    is_direct = agent is not None and parent == int(agent)
    if agent is not None and is_direct:
        die_with_parent(int(agent))
    if heartbeat is not None:
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # Standard error may be no file.
            # The agent of a rank without progress requests the stacks of its threads by this signal.
            faulthandler.register(signal.SIGQUIT)
            faulthandler.enable()  # a forked rank has not read PYTHONFAULTHANDLER
        # A killed wrapper between agent and rank, such as a shell or `uv run`, would leave the rank behind.
        wrapper = None if is_direct else parent
        threading.Thread(target=beat_on, args=(heartbeat, wrapper), name="heartbeat", daemon=True).start()
    return run


def beat_on(heartbeat: HeartbeatFile, parent: int | None) -> None:
    """Write heartbeats as long as this process runs.

    ``parent`` is the process id of a program between the agent and this rank, such as a shell; None if there is none.
    If this program ends, kill this process.
    """
    while True:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        heartbeat.beat()
        time.sleep(BEAT_S)


# The rank.


def plain_figure(value: object) -> Any:
    """Return a value of a step record as a value that JSON can hold.

    Raises:
        TypeError: ``value`` is neither a real number nor a list or mapping of real numbers.
    """
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_figure(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_figure(each) for each in value]
    scalar = value.item() if hasattr(value, "item") else None
    if isinstance(scalar, (bool, int, float)):
        return scalar
    raise TypeError(f"{type(value).__name__} is no real number")


class OutdatedAttemptError(RuntimeError):
    """Raised if a later attempt works on the run, so that this process must not change the run any more."""


class Run:
    """Connection of one rank to the launcher, made by ``attach``. ``Run()`` is a stand-in that writes nothing."""

    def __init__(
        self,
        rank: int = 0,
        local_rank: int = 0,
        world_size: int = 1,
        grace_s: float | None = None,
        heartbeat: HeartbeatFile | None = None,
        under_agent: bool = False,
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size
        self.folder: Path | None = None
        """Folder of the run; None if there is none."""
        self.attempt = 1
        """Number of this start of the run, counted from 1."""
        self.checkpoint_dir: Path | None = None
        """Folder for checkpoints, not created automatically; None if there is no run folder."""
        self.grace_s = grace_s
        """Seconds between a request to stop and the kill; None if not known."""
        self.under_agent = under_agent
        """True if an agent of the launcher started this rank, and watches it."""
        self._heartbeat = heartbeat
        self._limit_s = min(AGREEMENT_S, (grace_s or 4 * AGREEMENT_S) / 4)
        self._writer: RecordWriter | None = None
        self._step = 0
        self._phase = Phase.starting
        self._recorded: tuple[int, float] | None = None
        """Step and ``time.perf_counter()`` of the last step record; None before the first record."""
        self._pause_began: float | None = None
        self._paused_s = 0.0
        """Seconds of evaluations and saves since the last step record."""
        self._signal: signal.Signals | None = None
        self._lock = threading.Lock()
        self._saw_stop_file = self._saw_save_file = False
        self._saves_wanted = self._saves_obeyed = 0
        self._is_outdated = self._is_stopping = self._has_ended = self._has_warned = False

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files that exist once per run."""
        return self.rank == 0

    @property
    def agrees(self) -> bool:
        """True if ``stop_requested`` and ``save_requested`` return the same on all ranks.

        This is so under the launcher, whose agents agree, and for a single process. Under torchrun alone, a script
        combines the answers itself, for example with an all-reduce of the maximum in every step.
        """
        return self._heartbeat is not None or self.world_size == 1

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that requested the stop, on this rank or another; None if no signal did."""
        if self._signal is not None:
            return self._signal.name
        cause = 0 if self._heartbeat is None else self._heartbeat.cause
        return signal.Signals(cause).name if 0 < cause < FROM_FILE else None

    # Reports of a step.

    def record(self, step: int, **figures: object) -> None:
        """Add a step record, which a thread writes within eight seconds. This method never raises.

        It does not wait for the filesystem. It reads the value of a scalar of numpy or torch at once, so it waits for a
        GPU that still computes the scalar.

        ``figures`` are the values of the record by name. A figure is a real number, or a list or mapping of real
        numbers. A figure that is None is left out. A figure of another type is dropped, with one warning. Missing
        values of ``time``, ``attempt`` and ``step_time_s`` are filled in. ``step_time_s`` is the time since the
        previous record, without evaluations and saves, divided by the number of steps since that record.
        """
        now = time.perf_counter()
        try:
            step = int(step)
            self._move(max(step, self._step), Phase.training)
            if self.folder is None:
                return
            record: dict[str, Any] = {"step": step, "attempt": self.attempt}
            for name, value in figures.items():
                try:
                    if value is not None:
                        record[name] = plain_figure(value)
                except Exception as error:  # A foreign ``item`` can raise any exception.
                    self._warn(f"figure {name!r} of step {step} was dropped: {error}")
            if self._recorded is not None and step > self._recorded[0] and "step_time_s" not in figures:
                elapsed_s = now - self._recorded[1] - self._paused_s
                record["step_time_s"] = elapsed_s / (step - self._recorded[0])
            self._recorded, self._paused_s = (step, now), 0.0
            record.setdefault("time", time.time())
            if self._writer is None:
                self._writer = RecordWriter(
                    RunFolder(self.folder).metrics(self.rank), FOLLOWED_S if self.is_first else LONGEST_S
                )
            self._writer.put(record)
        except Exception as error:  # A wrong figure must not end a training.
            self._warn(f"a record of step {step!r} was dropped: {error!r}")

    def phase(self, name: str | Phase, step: int | None = None) -> None:
        """Report the phase of this rank: starting, training, evaluating, saving or leaving.

        ``step`` is the number of steps done; None if it has not changed. The launcher allows more time without progress
        while a rank starts, saves or leaves. ``record`` and ``stop_requested`` also report progress, with the phase
        training. A call takes about a microsecond.

        Raises:
            ValueError: there is no such phase.
        """
        if not isinstance(name, Phase):
            if name not in Phase.__members__:
                raise ValueError(f"found: phase {name!r}\nexpected: {', '.join(Phase.__members__)}")
            name = Phase[name]
        self._move(self._step if step is None else step, name)

    def flush(self) -> None:
        """Write the queued records now, also records and events that a full filesystem did not accept before."""
        if self._writer is not None:
            self._writer.flush()
        write_unwritten()

    # Requests.

    def stop_requested(self) -> bool:
        """Return whether to save and leave now, because of a signal, a time limit, a budget, or the file STOP.

        Every rank calls this method once per step. If ``agrees`` is True, all ranks get True after the same number of
        calls, without a collective. A call takes about a microsecond. While the agents agree on a stop, the call waits,
        mostly well below a second.

        Raises:
            OutdatedAttemptError: on rank 0, if a later attempt of the run has begun.
        """
        if self._is_outdated:
            raise OutdatedAttemptError(f"attempt {self.attempt} was replaced by a later one")
        if self._heartbeat is None:
            answer = self._signal is not None or self._saw_stop_file
        else:
            self._move(self._step, Phase.training)
            answer = self._heartbeat.ask(Request.stop, self._limit_s)
        self._is_stopping = self._is_stopping or answer
        return answer

    def save_requested(self) -> bool:
        """Return whether to save now and continue, because of the file SAVE in the run folder. True once per request.

        Every rank calls this method once per step. If ``agrees`` is True, all ranks get True at the same call. The call
        waits while the agents agree on a save. ``saved`` removes the file.
        """
        if self._heartbeat is None:
            answer = self._saves_wanted > self._saves_obeyed
        else:
            answer = self._heartbeat.ask(Request.save, SAVE_AGREEMENT_S)
        if answer:
            self._saves_obeyed = self._saves_wanted
        return answer

    def is_current(self) -> bool:
        """Return whether no later attempt of the run has begun; True for a stand-in.

        The call reads the filesystem. Use it right before a checkpoint is made valid, for example renamed.
        """
        return self.folder is None or is_newest_attempt(RunFolder(self.folder), self.attempt)

    # Events, which rank 0 records.

    def saved(self, step: int, seconds: float | None = None, **details: Any) -> None:
        """Record that the run can continue from the checkpoint of ``step``. ``seconds`` is the duration of the save.

        ``details`` are further fields of the event. The launcher's limits of restarts count the checkpoint as progress.
        On rank 0, the files SAVE and STOP are removed if they requested this save, so that the next start does not obey
        them again. Every rank first writes its queued records, because no later attempt repeats these steps.

        Raises:
            OutdatedAttemptError: on rank 0, if a later attempt of the run has begun.
        """
        if self.is_first and not self.is_current():
            raise OutdatedAttemptError(f"attempt {self.attempt} was replaced by a later one")
        self.flush()
        if self._phase is Phase.saving:
            self._move(max(step, self._step), Phase.training)
        self._record_event("saved", step, details if seconds is None else {**details, "seconds": seconds})

    def finished(self, step: int, **details: Any) -> None:
        """Record that the training is complete.

        ``step`` is the last step; ``details`` are further fields of the event.
        """
        self._end("finished", step, details)

    def stopped(self, step: int, **details: Any) -> None:
        """Record that this attempt left early because of a request, with the signal or file of the request.

        ``step`` is the last step; ``details`` are further fields of the event. If the script does not call this method,
        the exit of the process records the stop.
        """
        self._end("stopped", step, details)

    def close(self) -> None:
        """Write the queued records, and ignore the stop signals from now on, because the process is about to end.

        Python restores the default handlers at its exit. A second signal could then kill a rank that has already saved,
        and its agent would record a failure. The exit of the process calls this method.
        """
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, signal.SIG_IGN)
        if self._heartbeat is not None:
            self._heartbeat.move(self._step, Phase.leaving)
        self.flush()

    # For programs that choose their run folder themselves.

    def open_folder(self, folder: Path, attempt: int) -> None:
        """Use ``folder`` for records, events and requests, as attempt ``attempt``. ``attach`` calls this method."""
        self.attempt = attempt  # Set before the thread compares this number with the attempts in the folder.
        if self.folder is None:
            self.folder, self.checkpoint_dir = Path(folder), RunFolder(folder).checkpoints
            keep_unwritten()
            if self.is_first:
                threading.Thread(target=self._watch_folder, args=(self.folder,), name="requests", daemon=True).start()

    def install_handlers(self) -> None:
        """Handle the stop signals as requests to stop. Does nothing outside of the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note signal ``number`` as a request to stop, for the next calls of ``stop_requested``.

        A second SIGINT raises KeyboardInterrupt.
        """
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        self._want(Request.stop, number)

    def _watch_folder(self, folder: Path) -> None:
        """Poll the run folder every ``LOOK_S`` seconds for the files STOP and SAVE, and for a later attempt.

        Runs in a thread, until the rank stops or a later attempt has begun.
        """
        while not (self._is_stopping or self._is_outdated):
            with contextlib.suppress(OSError), self._lock:  # The next poll may succeed.
                self._is_outdated = not self.is_current()
                if not self._saw_stop_file and (folder / "STOP").exists():
                    self._saw_stop_file = True
                    self._want(Request.stop, FROM_FILE)
                if not self._saw_save_file and (folder / "SAVE").exists():
                    self._saw_save_file = True
                    self._saves_wanted += 1
                    self._want(Request.save, self._saves_wanted)
            time.sleep(LOOK_S)

    def _want(self, request: Request, value: int) -> None:
        if self._heartbeat is not None:
            self._heartbeat.want(request, value)

    def _move(self, step: int, phase: Phase) -> None:
        if phase is not self._phase:
            now = time.perf_counter()
            if self._pause_began is not None:
                self._paused_s += now - self._pause_began
            self._pause_began = now if phase in PAUSES else None
            self._phase = phase
        self._step = step
        if self._heartbeat is not None:
            self._heartbeat.move(step, phase)

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            say(f"launch.worker: {text} (reported once)")

    def _record_event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Record an event on rank 0, and remove the files SAVE and STOP if their requests are fulfilled."""
        if not self.is_first or self.folder is None:
            return
        RunFolder(self.folder).record_event(event, attempt=self.attempt, step=step, **details)
        with self._lock:  # Otherwise the thread might take a file that is about to be removed for a new request.
            if self._saw_save_file and self._saves_obeyed == self._saves_wanted:
                (self.folder / "SAVE").unlink(missing_ok=True)
                self._saw_save_file = False
            if self._saw_stop_file and self._is_stopping:
                (self.folder / "STOP").unlink(missing_ok=True)

    def _end(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        self._has_ended = True
        request = {"signal": self.signal_name, "file": "STOP" if self._saw_stop_file else None}
        self._record_event(event, step, {**request, **details})

    def _leave(self) -> None:
        """Record a stop that the script has not recorded, at the exit of the process."""
        # No exception has ended the process.
        if self._is_stopping and not self._has_ended and not hasattr(sys, "last_value"):
            try:
                self.stopped(self._step)
            except OSError as error:
                self._warn(f"the stop was not recorded: {error}")
        self.close()

    def _let_go(self) -> None:
        """Detach a process that was forked from a rank, such as a worker of a data loader, because it is not the rank.

        SIGTERM ends such a worker, and must not stop the run. SIGUSR2 is ignored: Slurm sends this warning to every
        process, and the rank needs the data of such a worker until the rank has saved.
        """
        defaults: tuple[Any, ...] = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
        for number, default in zip(STOP_SIGNALS, defaults, strict=True):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, default)
        atexit.unregister(self._leave)
        self._heartbeat = self._writer = self.folder = None
