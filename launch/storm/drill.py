"""One drill: runs the command, waits until the run has recovered, injects the next fault, and repeats the command.

``faults.jsonl`` records the faults.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.runs.events import is_finished
from launch.runs.files import append_json_lines
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records
from launch.storm.faults import KINDS, FaultError, PlannedFault, Site, inject
from launch.storm.verdict import checkpoints

UNLIMITED = tuple(f"resilience.max_restarts.{cause}" for cause in ("crashed", "hung", "node_failed"))
"""Limits that a drill lifts where nothing else was typed: in an hour of it more happens than they allow."""
LEAVING = ("signalled", "agent_stopped", "attempt_ended", "requeued", "agent_ended")
"""Events of a run that stops: what it has saved by then says nothing of the start that follows."""
FELT_S = 180.0
"""Time after which a fault that ends an attempt has done so: a silent rank or node is given up in less by default."""
POLL_S = 0.1
TRIES = 3
"""A fault whose process has just ended is brought about again."""


@dataclass(frozen=True)
class Interruption:
    """The last fault: Unix times of its first blow and of the end of what lasts, and whether an attempt ends by it."""

    struck: float
    over: float
    ends_attempt: bool = False


class StuckError(RuntimeError):
    """The run does nothing any more."""


class Drill:
    """A stormy run, from its first submission to its end."""

    def __init__(
        self, words: Sequence[str], site: Site, out: Path, patience_s: float, say: Callable[[str], None]
    ) -> None:
        self._site = site
        self._run = site.folder
        self._out = out
        self._patience_s = patience_s
        self._say = say
        typed = {word.lstrip("+~").partition("=")[0] for word in words}
        lifted = [f"{key}=null" for key in UNLIMITED if key not in typed]
        self._words = [*words, *lifted, f"run_dir={self._run.path}"]
        self._process: subprocess.Popen[bytes] | None = None
        self.typed = 0
        """Number of times that the command was typed."""
        self.faults: list[dict[str, Any]] = []
        """The faults that came, each with its time."""
        site.is_over = lambda: self._process is None or self._process.poll() is not None

    def weather(self, schedule: Sequence[PlannedFault]) -> bool:
        """Take the run to its end through the faults of a schedule; whether all of them came.

        Raises:
            StuckError: the run does not go on.
        """
        try:
            last, tries, left = Interruption(0.0, 0.0), 0, list(schedule)
            while left:
                if not self._wait_recovered(left[0], last):
                    break
                try:
                    done = inject(left[0], self._site)
                except FaultError as error:
                    tries += 1
                    if tries > TRIES:
                        raise StuckError(f"{left[0].kind}: {error}") from error
                    last = Interruption(time.time(), time.time())
                    left.insert(1, left.pop(0))  # a srun that was killed comes with the next start of the job only
                    continue
                now, tries = time.time(), 0
                last = Interruption(self._site.struck or now, now, KINDS[left[0].kind].ends_attempt)
                self._enter(left.pop(0), last.struck, done)
            self._wait(self._is_finished, "the end of the run")
            return not left
        finally:
            self._end()

    def _enter(self, fault: PlannedFault, at: float, done: str) -> None:
        told = {"time": at, "done": done, **fault.as_dict()}
        self.faults.append(told)
        append_json_lines(self._out / "faults.jsonl", [told])
        self._say(f"{fault.number}. {fault.kind}: {done}")

    def _wait_recovered(self, fault: PlannedFault, last: Interruption) -> bool:
        """Wait until the run has saved since the fault before and made some more steps; False where it has finished."""

        def has_recovered() -> bool:
            saved = first_save(self._run.read_events(), last, time.time())
            newest = recent_records(self._run.metrics(0))
            if saved is None or not newest or newest[-1]["step"] < saved + fault.after_steps:
                return False
            return not KINDS[fault.kind].damages or len(checkpoints(self._run)) > 1

        self._wait(lambda: has_recovered() or self._is_finished(), f"the recovery before fault {fault.number}")
        return not self._is_finished()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait, and type the command again where it has ended before the run has."""
        deadline, before = time.monotonic() + self._patience_s, -1
        while not condition():
            if self._process is None or (self._process.poll() is not None and not self._is_finished()):
                self._type()
            count = len(self._run.read_events())
            if count != before:
                deadline, before = time.monotonic() + self._patience_s, count
            if time.monotonic() > deadline:
                raise StuckError(f"nothing happened for {self._patience_s:g} s while waiting for {what}")
            time.sleep(POLL_S)

    def _type(self) -> None:
        self.typed += 1
        if self.typed > 2 * len(self.faults) + 3:
            raise StuckError(f"the command was typed {self.typed - 1} times; see {self._out / 'launch.log'}")
        with (self._out / "launch.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpt_launch", *self._words],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _is_finished(self) -> bool:
        return is_finished(self._run.read_events())

    def _end(self) -> None:
        """Wait for the launcher of a run that has finished; end what is left of any other."""
        if self._process is not None and self._is_finished():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience_s)
        if self._process is not None and self._process.poll() is None:
            command = [sys.executable, "-m", "gpt_launch", "cancel", "--now", str(self._run.path)]
            subprocess.run(command, capture_output=True, check=False)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def first_save(events: Sequence[Mapping[str, Any]], last: Interruption, now: float) -> int | None:
    """Step of the first checkpoint of the attempt that continues after a fault; None if there is none yet.

    What an attempt saves on its way out is no sign of recovery: the next fault would meet a run that is leaving, and
    two would be counted where one came. Where all agents were killed nobody enters the end of the attempt, and the
    start of the next one tells of it. A blow that nobody has felt for ``FELT_S`` has met what was over.
    """
    later = [event for event in events if event["time"] > last.struck]
    felt = any(event["event"] in ("attempt_ended", "started") for event in later)
    if last.ends_attempt and not felt and now - last.over < FELT_S:
        return None
    since = max(last.over, *(event["time"] for event in later if event["event"] in LEAVING), 0.0)
    return next((event["step"] for event in later if event["event"] == "saved" and event["time"] > since), None)


def run_quiet(words: Sequence[str], folder: RunFolder, log: Path) -> bool:
    """Make the quiet run, to its end; whether it finished."""
    command = [sys.executable, "-m", "gpt_launch", *words, f"run_dir={folder.path}"]
    with log.open("wb") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    return is_finished(folder.read_events())
