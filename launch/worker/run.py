"""Client with which a rank reports steps to the launcher and receives requests to save or to stop."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ..runs.files import keep_unwritten, say, write_unwritten
from ..runs.folder import RunFolder, is_newest_attempt
from ..runs.heartbeat import BEAT_S, FROM_FILE, HeartbeatFile, Phase, Request
from ..runs.records import FOLLOWED_S, LONGEST_S, RecordWriter

# Figures of a step record: values that JSON can hold, and the time of a step.


PAUSES = (Phase.evaluating, Phase.saving)
"""Phases whose time is not part of a step."""


class StepTimes:
    """Time of a step between two step records, without the pauses in between."""

    def __init__(self) -> None:
        self._recorded: tuple[int, float] | None = None
        self._pause: float | None = None
        self._paused_s = 0.0

    def enter(self, phase: Phase) -> None:
        """Note that another phase begins now."""
        now = time.perf_counter()
        if self._pause is not None:
            self._paused_s += now - self._pause
        self._pause = now if phase in PAUSES else None

    def take(self, step: int, now: float) -> float | None:
        """Seconds of a step since the record before; None at the first one, and where ``step`` is not a later one."""
        seconds = None
        if self._recorded is not None and step > self._recorded[0]:
            seconds = (now - self._recorded[1] - self._paused_s) / (step - self._recorded[0])
        self._recorded, self._paused_s = (step, now), 0.0
        return seconds


def plain_figure(value: object) -> Any:
    """Turn a figure into what JSON can hold.

    Raises:
        TypeError: it is neither a real number nor a list or mapping of such.
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
    if callable(item):
        scalar = item()
        if isinstance(scalar, (bool, int, float)):
            return scalar
    raise TypeError(f"{type(value).__name__} is no real number")


# Requests that lie in the run folder: the files STOP and SAVE, and the attempt that has replaced this one.


LOOK_S = 1.0
"""Between two looks into the run folder, which may be on a shared filesystem."""


class FolderRequests:
    """Last look into the run folder, and which of its requests were obeyed.

    Args:
        want: hands a request on to the agent, with its cause or number.
        is_current: tells whether no later attempt of the run has begun. Asks the filesystem.
        is_stopping: tells whether this rank is leaving, so that nothing more is looked for.
    """

    def __init__(
        self, want: Callable[[Request, int], None], is_current: Callable[[], bool], is_stopping: Callable[[], bool]
    ) -> None:
        self._want = want
        self._is_current = is_current
        self._is_stopping = is_stopping
        self._lock = threading.Lock()
        self._save_file = False
        self._saves_wanted = 0
        self._saves_obeyed = 0
        self.stop_file = False
        """True once the file STOP was seen."""
        self.is_outdated = False
        """True once a later attempt was seen."""

    def watch(self, folder: Path) -> None:
        """Look into the folder now and then, from a thread."""
        threading.Thread(target=self._look_on, args=(folder,), name="requests", daemon=True).start()

    @property
    def has_save(self) -> bool:
        """True where a save is wanted that was not yet obeyed."""
        return self._saves_wanted > self._saves_obeyed

    def obey_save(self) -> None:
        """Note that the save that is wanted now is being made."""
        self._saves_obeyed = self._saves_wanted

    def clear(self, folder: Path) -> None:
        """Take away the files whose requests were obeyed, so that the next start does not obey them again."""
        with self._lock:  # else the thread might see a file that is about to go, and take it for a new request
            if self._save_file and self._saves_obeyed == self._saves_wanted:
                (folder / "SAVE").unlink(missing_ok=True)
                self._save_file = False
            if self.stop_file and self._is_stopping():
                (folder / "STOP").unlink(missing_ok=True)

    def _look_on(self, folder: Path) -> None:
        while not (self._is_stopping() or self.is_outdated):
            with contextlib.suppress(OSError), self._lock:  # the next look may succeed
                self._look(folder)
            time.sleep(LOOK_S)

    def _look(self, folder: Path) -> None:
        self.is_outdated = not self._is_current()
        if not self.stop_file and (folder / "STOP").exists():
            self.stop_file = True
            self._want(Request.stop, FROM_FILE)
        if not self._save_file and (folder / "SAVE").exists():
            self._save_file = True
            self._saves_wanted += 1
            self._want(Request.save, self._saves_wanted)


# Process of a rank as its agent watches it: the heartbeat and its thread, and the stacks that a stuck rank prints.


STACK_SIGNAL = signal.SIGQUIT
"""Signal by which an agent asks a rank that is stuck for the stacks of its threads."""


def is_child() -> bool:
    """True where multiprocessing started this process, which then is no rank but the helper of one."""
    module = sys.modules.get("multiprocessing.process")
    return module is not None and module.parent_process() is not None


def open_heartbeat(folder: str | None, rank: int) -> HeartbeatFile | None:
    """Open the heartbeat file of a rank; None where no agent looks for it, or none can be made."""
    if folder is None:
        return None
    try:
        heartbeat = HeartbeatFile(Path(folder) / str(rank))
    except OSError as error:  # in a container that does not see the node's folder for temporary files
        say(f"launch.worker: no heartbeat, stops are not agreed on: {error}")
        return None
    heartbeat.open_for_rank()
    return heartbeat


def register_stacks() -> None:
    """Write the stacks of all threads into the log when the agent asks for them, as it does of a rank that is stuck."""
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # standard error is no file
        faulthandler.register(STACK_SIGNAL)


def beat_on(heartbeat: HeartbeatFile, parent: int | None) -> None:
    """Beat for as long as this process runs, and end it where its ``parent`` is gone."""
    while True:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        heartbeat.beat()
        time.sleep(BEAT_S)


# Line of one rank to the launcher: what it says of its steps, and when it hears that it is to save or to leave.


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that mean: save and leave. SIGUSR1 is left alone, NCCL uses it."""
AGREEMENT_S = 10.0
"""Longest wait for the agents while they agree on a stop; less where the grace period is short."""
SAVE_AGREEMENT_S = 60.0
"""Longest wait for the agents while they agree on a save, which has time: a rank that does not wait might miss it."""


class OutdatedAttemptError(RuntimeError):
    """A later attempt has taken the run over, so this process must not touch it any more."""


class Run:
    """One rank's line to the launcher. ``attach`` makes it; ``Run()`` alone is a stand-in that nobody listens to."""

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
        """Seconds between a request to stop and the kill; None if it is not known."""
        self.under_agent = under_agent
        """True where an agent of the launcher started this rank, and watches it."""
        self._heartbeat = heartbeat
        self._limit_s = min(AGREEMENT_S, (grace_s or 4 * AGREEMENT_S) / 4)
        self._runs: RunFolder | None = None
        self._writer: RecordWriter | None = None
        self._step = 0
        self._phase = Phase.starting
        self._times = StepTimes()
        self._signal: signal.Signals | None = None
        self._requests = FolderRequests(self._want, self.is_current, lambda: self._is_stopping)
        self._is_stopping = False
        self._has_ended = False
        self._has_warned = False

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def agrees(self) -> bool:
        """True where ``stop_requested`` and ``save_requested`` are the same on all ranks by themselves.

        True under the launcher, whose agents agree, and for a single process. Under torchrun alone nobody but the ranks
        could: there a script combines their answers itself, as with an all-reduce of the maximum in every step.
        """
        return self._heartbeat is not None or self.world_size == 1

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that requested the stop, of this rank or of another one; None if it was none."""
        if self._signal is not None:
            return self._signal.name
        cause = 0 if self._heartbeat is None else self._heartbeat.cause
        return signal.Signals(cause).name if 0 < cause < FROM_FILE else None

    # What a step says.

    def record(self, step: int, **figures: object) -> None:
        """Add a step record, to be written within eight seconds by a thread. Never blocks, never raises.

        ``time``, ``attempt`` and ``step_time_s`` are filled in where they are not given; the last is the time since the
        record before, without evaluations and saves, divided by the steps between the two. A figure is a real number,
        or a list or mapping of such; None is left out, anything else is dropped with one warning. Of a scalar of numpy
        or torch the value is taken at once, so one on a GPU waits for the GPU.
        """
        now = time.perf_counter()
        try:
            step = int(step)
            self._move(max(step, self._step), Phase.training)
            if self._runs is None:
                return
            record: dict[str, Any] = {"step": step, "attempt": self.attempt}
            for name, value in figures.items():
                self._add_figure(record, name, value)
            step_time_s = self._times.take(step, now)
            if "step_time_s" not in figures and step_time_s is not None:
                record["step_time_s"] = step_time_s
            record.setdefault("time", time.time())
            if self._writer is None:
                self._writer = RecordWriter(self._runs.metrics(self.rank), FOLLOWED_S if self.is_first else LONGEST_S)
            self._writer.put(record)
        except Exception as error:  # a figure must not end a training
            self._warn(f"a record of step {step!r} was dropped: {error!r}")

    def phase(self, name: str | Phase, step: int | None = None) -> None:
        """Show what this rank is doing: starting, training, evaluating, saving or leaving, with ``step`` steps done.

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
        """Write the records that are still queued before this returns, and what a full filesystem did not take."""
        if self._writer is not None:
            self._writer.flush()
        write_unwritten()

    # What a step asks.

    def stop_requested(self) -> bool:
        """Return whether to save and leave now: because of a signal, a time limit, a budget, or the file STOP.

        To be called once a step by every rank. All ranks get True after the same number of calls, without a collective,
        where ``agrees`` holds. Costs about a microsecond; while the launcher's agents agree it waits for them, mostly
        well below a second.

        Raises:
            OutdatedAttemptError: on rank 0, where a later attempt of the run has begun.
        """
        if self._requests.is_outdated:
            raise OutdatedAttemptError(f"attempt {self.attempt} was replaced by a later one")
        if self._heartbeat is None:
            answer = self._signal is not None or self._requests.stop_file
        else:
            self._move(self._step, Phase.training)
            answer = self._heartbeat.ask(Request.stop, self._limit_s)
        self._is_stopping = self._is_stopping or answer
        return answer

    def save_requested(self) -> bool:
        """Return whether to save now and go on, as the file SAVE in the run folder asks. True once for each request.

        To be called once a step by every rank, under the same promise as ``stop_requested``. ``saved`` takes the file
        away.
        """
        if self._heartbeat is None:
            answer = self._requests.has_save
        else:
            answer = self._heartbeat.ask(Request.save, SAVE_AGREEMENT_S)
        if answer:
            self._requests.obey_save()
        return answer

    def is_current(self) -> bool:
        """Return whether this is still the newest attempt. Asks the filesystem; worth it right before a commit."""
        return self._runs is None or is_newest_attempt(self._runs, self.attempt)

    # What happened. Rank 0 writes it down.

    def saved(self, step: int, seconds: float | None = None, **details: Any) -> None:
        """Record a checkpoint of ``step``, which took ``seconds``: from here the run can go on.

        Restart limits count from it. Takes the files SAVE and STOP away where this save was what they asked
        for, so that the next start does not obey them again. On every rank it first writes the records that are
        queued: no later attempt will do these steps again.

        Raises:
            OutdatedAttemptError: on rank 0, where a later attempt of the run has begun, whose checkpoints count.
        """
        if self.is_first and not self.is_current():
            raise OutdatedAttemptError(f"attempt {self.attempt} was replaced by a later one")
        self.flush()
        if self._phase is Phase.saving:
            self._move(max(step, self._step), Phase.training)
        if seconds is not None:
            details["seconds"] = seconds
        self._tell("saved", step, details)
        self._clear_requests()

    def finished(self, step: int, **details: Any) -> None:
        """Record that the training is complete."""
        self._end("finished", step, details)

    def stopped(self, step: int, **details: Any) -> None:
        """Record that this attempt left early because it was asked to, and by what. Comes by itself at the exit."""
        self._end("stopped", step, details)

    def close(self) -> None:
        """Write what is queued, and ignore the signals from now on: all is done, and the process is about to end.

        Python gives signals their default back while it ends. One that came then, as a second one to a rank that had
        saved, killed it: a failure to its agent, while the agents of ranks that had ended well waited for this one.
        Called at the exit by itself.
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
        """Keep records, events and requests in ``folder``, as attempt ``attempt``; ``attach`` does so for others."""
        self.attempt = attempt  # before the thread compares it with those in the folder
        if self.folder is None:
            self.folder, self.checkpoint_dir = Path(folder), RunFolder(folder).checkpoints
            self._runs = RunFolder(folder)
            keep_unwritten()
            if self.is_first:
                self._requests.watch(self.folder)

    def install_handlers(self) -> None:
        """Take the stop signals over from whoever handled them; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only set a flag: the script asks for it between steps. A second SIGINT interrupts at once."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        self._want(Request.stop, number)

    def _want(self, request: Request, value: int) -> None:
        if self._heartbeat is not None:
            self._heartbeat.want(request, value)

    def _move(self, step: int, phase: Phase) -> None:
        if phase is not self._phase:
            self._times.enter(phase)
            self._phase = phase
        self._step = step
        if self._heartbeat is not None:
            self._heartbeat.move(step, phase)

    def _add_figure(self, record: dict[str, Any], name: str, value: object) -> None:
        try:
            if value is not None:
                record[name] = plain_figure(value)
        except Exception as error:  # whatever a foreign ``item`` raises
            self._warn(f"figure {name!r} of step {record['step']} was dropped: {error}")

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            say(f"launch.worker: {text} (told once)")

    def _tell(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        if self.is_first and self._runs is not None:
            self._runs.record_event(event, attempt=self.attempt, step=step, **details)

    def _end(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        self._has_ended = True
        asked = {"signal": self.signal_name, "file": "STOP" if self._requests.stop_file else None}
        self._tell(event, step, {**asked, **details})
        self._clear_requests()

    def _clear_requests(self) -> None:
        if self.folder is not None and self.is_first:
            self._requests.clear(self.folder)

    def _leave(self) -> None:
        """At the exit of the process: what a script need not say."""
        if self._is_stopping and not self._has_ended and not hasattr(sys, "last_value"):  # no exception ended it
            try:
                self.stopped(self._step)
            except OSError as error:
                self._warn(f"the stop was not recorded: {error}")
        self.close()

    def _let_go(self) -> None:
        """In a process that was forked off a rank, as a worker of a data loader: it is not the rank.

        Such a worker is ended by SIGTERM, which must neither be ignored nor stop the run. SIGUSR2 nobody sends to end
        it; Slurm's warning ahead of a time limit goes to every process, and the rank needs its data until it has saved.
        """
        defaults: tuple[Any, ...] = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
        for number, default in zip(STOP_SIGNALS, defaults, strict=True):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, default)
        atexit.unregister(self._leave)
        self._heartbeat = self._runs = self._writer = self.folder = None
