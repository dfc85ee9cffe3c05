"""Client with which a rank reports steps to the launcher and receives requests to save or to stop."""

# Relative imports: a rank may load this package as gpt_launch.launch, if the user has a launch.py.

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import numbers
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ..process import die_with_parent
from ..runs.files import keep_unwritten, say, write_unwritten
from ..runs.folder import RunFolder, is_newest_attempt
from ..runs.heartbeat import BEAT_S, ENVIRONMENT, FROM_FILE, HeartbeatFile, Phase, Request
from ..runs.records import FOLLOWED_S, LONGEST_S, RecordWriter

STORE_PREFIX = "LAUNCH_STORE_PREFIX"
"""Variable of an agent's ranks: a secret prefix, the same for all, for their keys in the store at MASTER_PORT."""
PAUSES = (Phase.evaluating, Phase.saving)
"""Phases whose time is not part of a step."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that mean: save and leave. SIGUSR1 is left alone, NCCL uses it."""
AGREEMENT_S = 10.0
"""Longest wait for the agents while they agree on a stop; less if the grace period is short."""
SAVE_AGREEMENT_S = 60.0
"""Longest wait for the agents while they agree on a save, which has time: a rank that does not wait might miss it."""
LOOK_S = 1.0
"""Between two looks into the run folder, which may be on a shared filesystem."""


# How a process becomes a rank.


_attached: Run | None = None


def attach(handle_signals: bool = True) -> Run:
    """Join the launcher as the rank that the environment names. A second call returns the same Run.

    Without the launcher, and in a process that multiprocessing started, the Run is a stand-in. It writes nothing, and
    ``stop_requested`` answers by the signals of this process alone. Call it in the main thread, early: from here on a
    request to stop no longer ends the process.

    Args:
        handle_signals: take SIGTERM, SIGUSR2 and SIGINT as requests to stop. Without it the Run still receives the
            requests of the launcher, but the script has to handle the signal that the launcher sends with them.
    """
    global _attached
    if _attached is None:
        _attached = make_run(os.environ)
        if handle_signals and not is_child():
            _attached.install_handlers()
        atexit.register(_attached._leave)
        os.register_at_fork(after_in_child=_attached._let_go)
    return _attached


def is_child() -> bool:
    """True if multiprocessing started this process, which then is no rank but the helper of one."""
    module = sys.modules.get("multiprocessing.process")
    return module is not None and module.parent_process() is not None


def make_run(environment: Mapping[str, str]) -> Run:
    """Make the Run of the rank that ``environment`` names, with its heartbeat if an agent watches it."""
    defaults = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))  # torchrun sets these too
    rank, local_rank, size = (int(environment.get(name, default)) for name, default in defaults)
    folder = environment.get("LAUNCH_RUN_DIR")
    if folder is None or is_child():
        return Run(rank, local_rank, size)
    parent = os.getppid()  # before the heartbeat shows this rank: from then on its parent may end
    agent, grace = environment.get("LAUNCH_AGENT_PID"), environment.get("LAUNCH_GRACE_S")
    heartbeats, heartbeat = environment.get(ENVIRONMENT), None
    if heartbeats is not None:
        try:
            heartbeat = HeartbeatFile(Path(heartbeats) / str(rank))
            heartbeat.open_for_rank()
        except OSError as error:  # in a container that does not see the node's folder for temporary files
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
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # standard error is no file
            # The agent of a rank without progress requests the stacks of its threads by this signal.
            faulthandler.register(signal.SIGQUIT)
        # A wrapper between agent and rank, as a shell or `uv run`, would leave the rank behind when it is killed.
        wrapper = None if is_direct else parent
        threading.Thread(target=beat_on, args=(heartbeat, wrapper), name="heartbeat", daemon=True).start()
    return run


def beat_on(heartbeat: HeartbeatFile, parent: int | None) -> None:
    """Beat for as long as this process runs, and end it if its ``parent`` is gone."""
    while True:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        heartbeat.beat()
        time.sleep(BEAT_S)


# The rank.


def plain_figure(value: object) -> Any:
    """Turn a figure into a value that JSON can hold.

    Raises:
        TypeError: the figure is neither a real number nor a list or mapping of such.
    """
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_figure(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_figure(each) for each in value]
    if isinstance(value, numbers.Real):
        return float(value)
    item = getattr(value, "item", None)
    scalar = item() if callable(item) else None
    if isinstance(scalar, (bool, int, float)):
        return scalar
    raise TypeError(f"{type(value).__name__} is no real number")


class OutdatedAttemptError(RuntimeError):
    """A later attempt works on the run, so this process must not touch the run any more."""


class Run:
    """Connection of one rank to the launcher, made by ``attach``. ``Run()`` alone is a stand-in that writes nothing."""

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
        """The run folder; None if there is none."""
        self.attempt = 1
        """Number of this start of the run, counted from 1."""
        self.checkpoint_dir: Path | None = None
        """Folder for checkpoints; None if there is no run folder. Not created by itself."""
        self.grace_s = grace_s
        """Seconds between a request to stop and the kill; None if not known."""
        self.under_agent = under_agent
        """True if an agent of the launcher started this rank, and watches it."""
        self._heartbeat = heartbeat
        self._limit_s = min(AGREEMENT_S, (grace_s or 4 * AGREEMENT_S) / 4)
        self._runs: RunFolder | None = None
        self._writer: RecordWriter | None = None
        self._step = 0
        self._phase = Phase.starting
        self._recorded: tuple[int, float] | None = None
        """Step and time of the last step record."""
        self._pause_began: float | None = None
        self._paused_s = 0.0
        """Seconds of pauses since the last step record."""
        self._signal: signal.Signals | None = None
        self._lock = threading.Lock()
        self._saw_stop_file = self._saw_save_file = False
        self._saves_wanted = self._saves_obeyed = 0
        self._is_outdated = self._is_stopping = self._has_ended = self._has_warned = False

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes everything that is written once."""
        return self.rank == 0

    @property
    def agrees(self) -> bool:
        """True if ``stop_requested`` and ``save_requested`` are the same on all ranks by themselves.

        True under the launcher, whose agents agree, and for a single process. Under torchrun alone the ranks have to
        agree: a script combines their answers itself, as with an all-reduce of the maximum in every step.
        """
        return self._heartbeat is not None or self.world_size == 1

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that requested the stop, of this rank or of another one; None if it was none."""
        if self._signal is not None:
            return self._signal.name
        cause = 0 if self._heartbeat is None else self._heartbeat.cause
        return signal.Signals(cause).name if 0 < cause < FROM_FILE else None

    # Reports of a step.

    def record(self, step: int, **figures: object) -> None:
        """Add a step record, which a thread writes within eight seconds. Never blocks, never raises.

        ``time``, ``attempt`` and ``step_time_s`` are filled in if they are not given. The last is the time since the
        record before, without evaluations and saves, divided by the steps between the two. A figure is a real number,
        or a list or mapping of such; None is left out, anything else is dropped with one warning. The value of a
        scalar of numpy or torch is read at once, so a scalar on a GPU waits for the GPU.
        """
        now = time.perf_counter()
        try:
            step = int(step)
            self._move(max(step, self._step), Phase.training)
            if self._runs is None:
                return
            record: dict[str, Any] = {"step": step, "attempt": self.attempt}
            for name, value in figures.items():
                try:
                    if value is not None:
                        record[name] = plain_figure(value)
                except Exception as error:  # any exception of a foreign ``item``
                    self._warn(f"figure {name!r} of step {step} was dropped: {error}")
            if self._recorded is not None and step > self._recorded[0] and "step_time_s" not in figures:
                elapsed_s = now - self._recorded[1] - self._paused_s
                record["step_time_s"] = elapsed_s / (step - self._recorded[0])
            self._recorded, self._paused_s = (step, now), 0.0
            record.setdefault("time", time.time())
            if self._writer is None:
                self._writer = RecordWriter(self._runs.metrics(self.rank), FOLLOWED_S if self.is_first else LONGEST_S)
            self._writer.put(record)
        except Exception as error:  # a figure must not end a training
            self._warn(f"a record of step {step!r} was dropped: {error!r}")

    def phase(self, name: str | Phase, step: int | None = None) -> None:
        """Show the phase of this rank: starting, training, evaluating, saving or leaving, with ``step`` steps done.

        Costs about a microsecond. The launcher allows more silence while a rank starts, saves or leaves. ``record`` and
        ``stop_requested`` are signs of life too, and mean training.

        Raises:
            ValueError: there is no such phase.
        """
        if not isinstance(name, Phase):
            if name not in Phase.__members__:
                raise ValueError(f"found: phase {name!r}\nexpected: {', '.join(Phase.__members__)}")
            name = Phase[name]
        self._move(self._step if step is None else step, name)

    def flush(self) -> None:
        """Write the records that are still queued, and records and events that a full filesystem did not take."""
        if self._writer is not None:
            self._writer.flush()
        write_unwritten()

    # Requests.

    def stop_requested(self) -> bool:
        """Return whether to save and leave now: because of a signal, a time limit, a budget, or the file STOP.

        Every rank calls it once a step. All ranks get True after the same number of calls, without a collective, if
        ``agrees`` is True. Costs about a microsecond; while the launcher's agents agree it waits for them, mostly well
        below a second.

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
        """Return whether to save now and continue, as the file SAVE in the run folder requests. True once a request.

        Every rank calls it once a step, with the same promise as ``stop_requested``. ``saved`` removes the file.
        """
        if self._heartbeat is None:
            answer = self._saves_wanted > self._saves_obeyed
        else:
            answer = self._heartbeat.ask(Request.save, SAVE_AGREEMENT_S)
        if answer:
            self._saves_obeyed = self._saves_wanted
        return answer

    def is_current(self) -> bool:
        """Return whether this is still the newest attempt. Asks the filesystem; worth it right before a commit."""
        return self._runs is None or is_newest_attempt(self._runs, self.attempt)

    # Events, which rank 0 records.

    def saved(self, step: int, seconds: float | None = None, **details: Any) -> None:
        """Record a checkpoint of ``step``, which took ``seconds``: the run can continue from this step.

        Restart limits count from it. Removes the files SAVE and STOP if they requested this save, so that the next
        start does not obey them again. On every rank it first writes the records that are queued: no later attempt
        repeats these steps.

        Raises:
            OutdatedAttemptError: on rank 0, if a later attempt of the run has begun, whose checkpoints count.
        """
        if self.is_first and not self.is_current():
            raise OutdatedAttemptError(f"attempt {self.attempt} was replaced by a later one")
        self.flush()
        if self._phase is Phase.saving:
            self._move(max(step, self._step), Phase.training)
        self._record_event("saved", step, details if seconds is None else {**details, "seconds": seconds})

    def finished(self, step: int, **details: Any) -> None:
        """Record that the training is complete."""
        self._end("finished", step, details)

    def stopped(self, step: int, **details: Any) -> None:
        """Record that this attempt left early at a request, and at which. Comes by itself at the exit."""
        self._end("stopped", step, details)

    def close(self) -> None:
        """Write the queued records, and ignore signals from now on: the process is about to end.

        Python restores the default handlers while it ends. A second signal then killed a rank that had saved, which was
        a failure for its agent, and the other agents waited for this rank. Called at the exit by itself.
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
        """Use ``folder`` for records, events and requests, as attempt ``attempt``. ``attach`` calls it by itself."""
        self.attempt = attempt  # before the thread compares it with those in the folder
        if self.folder is None:
            self.folder, self.checkpoint_dir = Path(folder), RunFolder(folder).checkpoints
            self._runs = RunFolder(folder)
            keep_unwritten()
            if self.is_first:
                threading.Thread(target=self._watch_folder, args=(self.folder,), name="requests", daemon=True).start()

    def install_handlers(self) -> None:
        """Replace the handlers of the stop signals; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only set a flag, which the script polls between steps. A second SIGINT interrupts at once."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        self._want(Request.stop, number)

    def _watch_folder(self, folder: Path) -> None:
        """Look into the run folder now and then: files STOP and SAVE, and a later attempt."""
        while not (self._is_stopping or self._is_outdated):
            with contextlib.suppress(OSError), self._lock:  # the next look may succeed
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
        """Record an event on rank 0, and remove the files whose requests were obeyed."""
        if not self.is_first or self._runs is None or self.folder is None:
            return
        self._runs.record_event(event, attempt=self.attempt, step=step, **details)
        with self._lock:  # else the thread might see a file that is about to go, and take it for a new request
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
        """At the exit of the process: record a stop that the script has not recorded."""
        if self._is_stopping and not self._has_ended and not hasattr(sys, "last_value"):  # no exception ended it
            try:
                self.stopped(self._step)
            except OSError as error:
                self._warn(f"the stop was not recorded: {error}")
        self.close()

    def _let_go(self) -> None:
        """In a process that was forked off a rank, as a worker of a data loader: it is not the rank.

        SIGTERM ends such a worker, and must neither be ignored nor stop the run. SIGUSR2 is ignored: Slurm's warning
        ahead of a time limit goes to every process, and the rank needs its data until it has saved.
        """
        defaults: tuple[Any, ...] = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
        for number, default in zip(STOP_SIGNALS, defaults, strict=True):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, default)
        atexit.unregister(self._leave)
        self._heartbeat = self._runs = self._writer = self.folder = None
