"""Step records of programs that only print their progress: read from logs, and drawn in TensorBoard.

A regular expression of the user, ``script.progress``, finds the values in the logs.

Logs are read while programs write them. Programs without TensorBoard files get such files. Every call is bounded in
time and bytes, because the calling agent also watches the ranks.
"""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.runs.folder import RunFolder, append_lines, parse_json_lines, say
from launch.runs.records import is_record, recent_records

if TYPE_CHECKING:
    from launch.runs.event_files import EventWriter
    from launch.workload import RankContract


RESOLUTION = "step_time_resolution_s"
"""Field of a step record: seconds over which ``step_time_s`` is a mean, if several lines were read together."""
COUNTS = ("step", "steps", "epoch", "epoch_from_1", "steps_per_epoch")
GROUPS = (
    *COUNTS,
    *("loss", "perplexity", "lr", "grad_norm", "step_time_s", "step_time_ms"),
    *("tokens", "samples", "images", "tokens_per_s", "samples_per_s", "images_per_s"),
    "begin",
)
"""Names that groups of the pattern ``script.progress`` may have. Most are fields of a step record.

``epoch`` counts from 0, ``epoch_from_1`` from 1. If a pattern has one of these two and also ``steps_per_epoch``, then
``step`` counts the steps within an epoch. If a line has an epoch but no step, its epoch holds for the lines after it.

If a line has other values but no step, its values belong to the last step. The group ``begin`` matches a text that the
program prints before the values of a step: the values after this text belong to the next step.

``steps`` is the total of a progress bar. The first total is that of the training. A line with another total, such as
that of an evaluation, is skipped, and so is a line with step 0.
"""
POLL_S = 1.0
"""Shortest time between two polls, seconds. The agent calls ``poll`` several times a second."""
LOOK_BYTES = 256 * 1024
"""Largest number of bytes that one poll reads from each log, or from the file of step records."""
CLOSE_S = 10.0
"""Longest time at the end of an attempt for reading output that is still unread, seconds."""
LINE_BYTES = 2_000
"""Number of bytes at the start of a line that are searched; later bytes are ignored."""
MATCH_S = 0.5
"""Longest search in the lines of one poll, seconds. A pattern such as (a+)+$ may need years for one line."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Escape sequences of terminals for colors and movements of the cursor."""


def check_pattern(pattern: str) -> None:
    """Raise ConfigError for a pattern that cannot find step records.

    Raises:
        ConfigError: the pattern is no regular expression, has no group ``step``, or has a group that is not in
            ``GROUPS``.
    """
    try:
        names = set(re.compile(pattern).groupindex)
        unknown = sorted(names - set(GROUPS))
        wrong = f"with a group {', '.join(unknown)}" if unknown else "" if "step" in names else "without a group step"
    except re.error as error:
        wrong = f"which is no regular expression: {error}"
    if wrong:
        raise ConfigError(
            f"script.progress={pattern!r}, {wrong}",
            f"a regular expression of Python's module re with a group step and any of {', '.join(GROUPS[1:])}",
            r"script.progress='step (?P<step>\d+).* loss (?P<loss>[\d.]+)'",
        )


class Progress:
    """Reader of the logs of this node's ranks in one attempt. The agent calls its methods from one thread.

    Args:
        folder: folder of the run.
        attempt: number of the attempt.
        ranks: ranks of this node.
        contract: contract of the ranks. ``progress`` is a pattern with named groups from ``GROUPS``; None if ranks
            record steps themselves. ``unit`` and ``work_per_step`` add throughput to the records of rank 0.
            ``writes_curves`` writes TensorBoard files from these records, on the node of rank 0.
    """

    def __init__(self, folder: RunFolder, attempt: int, ranks: Sequence[int], contract: RankContract) -> None:
        self._folder = folder
        self._attempt = attempt
        self._contract = contract
        self._logs = [_RankLog(folder, attempt, rank, contract) for rank in ranks if contract.progress]
        self._has_first = 0 in ranks
        self._curves = _Curves(folder, attempt) if contract.writes_curves and self._has_first else None
        self._polled = 0.0
        self._is_slow = False

    def poll(self) -> None:
        """Append the step records that new lines of the logs contain to the ranks' files of step records.

        Does nothing within ``POLL_S`` seconds after the last poll.
        """
        if time.monotonic() - self._polled < POLL_S:
            return
        for log in self._logs:
            self._read(log)
        if self._curves is not None:
            self._curves.poll()
        self._polled = time.monotonic()

    def close(self) -> None:
        """Append the step records in unread lines of the logs, for at most ``CLOSE_S`` seconds.

        Records an event if no line of the attempt matched the pattern, and no rank has recorded a step.
        """
        deadline = time.monotonic() + CLOSE_S
        for log in self._logs:
            while self._read(log) and time.monotonic() < deadline:
                pass
        if self._curves is not None:
            while self._curves.poll() and time.monotonic() < deadline:
                pass
            self._curves.close()
        # Only the node of rank 0 reports that nothing matched: many programs print on rank 0 alone.
        if self._is_slow or not self._logs or not self._has_first or any(log.matched for log in self._logs):
            return
        recent = (recent_records(self._folder.metrics(rank))[-1:] for rank in self._folder.metric_ranks())
        if not any(record.get("attempt") == self._attempt for records in recent for record in records):
            cause = "no line in the logs of the ranks matches script.progress, so that no steps are known"
            self._record("progress_not_matched", cause)

    def _read(self, log: _RankLog) -> bool:
        """Append the step records in the next part of a log. Returns whether the log has grown.

        Does nothing, and returns False, after a search took too long (``MATCH_S``).
        """
        if self._is_slow:
            return False
        try:
            return log.poll()
        except TimeoutError:
            self._is_slow = True
            cause = f"script.progress takes more than {MATCH_S} s for a line of rank {log.rank}, and is given up"
            self._record("progress_too_slow", cause)
            return False

    def _record(self, event: str, cause: str) -> None:
        self._folder.record_event(event, attempt=self._attempt, pattern=self._contract.progress, cause=cause)


class _RankLog:
    """The log of a rank, with the last step that the rank printed and the time of that line."""

    def __init__(self, folder: RunFolder, attempt: int, rank: int, contract: RankContract) -> None:
        self.rank = rank
        self.matched = False
        self._reader = NewLines(folder.log(attempt, rank), re.compile(rb"[\r\n]"), LINE_BYTES)
        self._pattern = re.compile(contract.progress or "")
        self._records = folder.metrics(rank)
        self._attempt = attempt
        self._unit = contract.unit
        self._work = contract.work_per_step if rank == 0 else None
        self._epoch: dict[str, str] = {}
        """Epoch of the last line that matched without a step, as group -> text."""
        self._begun: dict[str, Any] | None = None
        """Values of the lines since a line with the group ``begin``; None after the line with their step."""
        self._last: dict[str, Any] | None = None
        """Record of the last step; None before the first match. Its time is that of the step's first line."""
        self._step: int | None = None
        """Last step that was printed."""
        self._steps: int | None = None
        """Total of the progress bar that was printed first."""
        self._polled_at = time.time()

    def poll(self) -> bool:
        """Append the step records in the new lines of the log. Returns False if the log has not grown.

        A carriage return also ends a line.

        Raises:
            TimeoutError: the search in these lines takes more than ``MATCH_S`` seconds.
        """
        before, self._polled_at = self._polled_at, time.time()
        lines = self._reader.read()
        if lines is None:
            return False
        found: list[dict[str, Any]] = []
        with time_limit(MATCH_S):
            for line in lines:
                match = self._pattern.search(ESCAPES.sub("", line.decode(errors="replace")))
                fields = self._fields(match.groupdict()) if match else None
                if fields is not None and found and fields["step"] == found[-1]["step"]:
                    found[-1] |= fields
                elif fields is not None:
                    found.append(fields)
        if found:
            self.matched = True
            # The time of the file's last change is more exact than the time of a poll. The limits guard against file
            # servers with a wrong clock.
            self._append(found, min(max(self._reader.changed_at, before), self._polled_at))
        return True

    def _fields(self, match: Mapping[str, str | Any]) -> dict[str, Any] | None:
        """Return the fields of a step record from ``match``, group -> text; None if their step is not known."""
        texts = {name: text for name, text in match.items() if text}
        if texts.pop("begin", None):
            self._begun = {}
        fields = numbers({**self._epoch, **texts})
        if (steps := fields.pop("steps", None)) is not None:
            self._steps = self._steps or steps
            if steps != self._steps or not fields.get("step"):
                return None
        if "step" not in fields:
            self._epoch = {name: text for name, text in texts.items() if name in COUNTS} or self._epoch
            if self._begun is not None:
                self._begun |= fields
                return None
            if self._step is None or not fields:
                return None
        self._step = fields.setdefault("step", self._step)
        if self._begun is not None:
            fields, self._begun = self._begun | fields, None
        return fields

    def _append(self, found: Sequence[dict[str, Any]], printed_at: float) -> None:
        """Append a step record for each step in ``found``.

        Args:
            found: the fields of each printed step, in the order of the steps. The first step may already have a record,
                and ``found`` has further fields of this step. Then a second record with all fields of the step is
                appended. Readers use the newest record of a step.
            printed_at: Unix time when the last of these steps was printed.
        """
        last, new = self._last, found
        for fields in found:
            self._add_rate(fields)
        if last is not None and found[0]["step"] == last["step"]:
            new, self._last = found[1:], last | found[0]
            if "step_time_s" in found[0]:  # a printed time replaces the mean of several lines
                self._last.pop(RESOLUTION, None)
        records = [self._last] if self._last is not None and self._last != last else []
        newest, step_time_s = found[-1]["step"], None
        if last is not None and newest > last["step"] and printed_at > last["time"]:
            step_time_s = (printed_at - last["time"]) / (newest - last["step"])
        for fields in new:
            step, at = fields.pop("step"), printed_at
            if last is not None and step_time_s is not None and step > last["step"]:
                # This assumes that the steps since the last poll were printed at equal intervals.
                at = min(at, last["time"] + step_time_s * (step - last["step"]))
                if "step_time_s" not in fields:
                    fields["step_time_s"] = step_time_s
                    if len(new) > 1:  # only the mean of these lines is known
                        fields[RESOLUTION] = step_time_s * (newest - last["step"])
            self._add_rate(fields)
            self._last = {"step": step, "attempt": self._attempt, **fields, "time": at}
            records.append(self._last)
        append_lines(self._records, records)

    def _add_rate(self, fields: dict[str, Any]) -> None:
        """Add the throughput, ``work_per_step`` over the step time, to ``fields``, unless the program printed it."""
        if self._unit and self._work and fields.get("step_time_s"):
            fields.setdefault(f"{self._unit}_per_s", self._work / fields["step_time_s"])


def numbers(match: Mapping[str, str | Any]) -> dict[str, Any]:
    """Return the fields of a step record from ``match``, group -> text; without ``step`` if it is not a number.

    Numbers such as 1,024 and 1.5e-3 are read. A step that counts from the start of its epoch becomes a step of the
    whole run.
    """
    fields: dict[str, Any] = {}
    for name, text in match.items():
        with suppress(AttributeError, ValueError, OverflowError):  # the text is None if a group took no part
            value = float(text.replace(",", "").replace("_", ""))
            fields[name] = int(value) if name in COUNTS else value
    epochs = fields.pop("epoch", fields.pop("epoch_from_1", 1) - 1)
    earlier = epochs * fields.pop("steps_per_epoch", 0)
    if "step" in fields:
        fields["step"] += earlier
    if "perplexity" in fields:
        perplexity = fields.pop("perplexity")
        fields["loss"] = round(math.log(perplexity), 6) if perplexity > 0 else math.nan
    if "step_time_ms" in fields:
        fields["step_time_s"] = fields.pop("step_time_ms") / 1000
    return fields


class _Curves:
    """Writer of TensorBoard files from the step records of rank 0 in this attempt."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        # The import takes a second, better before the ranks start than between two polls.
        from launch.runs.event_files import EventWriter, record_scalars

        self._open, self._scalars = EventWriter, record_scalars
        self._folder = folder
        self._attempt = attempt
        self._reader = NewLines(folder.metrics(0), re.compile(rb"\n"), LOOK_BYTES, skip=True)
        self._writer: EventWriter | None = None
        self._drawn: tuple[int, dict[str, float]] = (0, {})
        """Last step that was written to TensorBoard, and its values: tag of a curve -> value."""

    def poll(self) -> bool:
        """Write the next part of the new records to TensorBoard. Returns whether the file of records has grown."""
        lines = self._reader.read()
        for record in parse_json_lines(lines or ()):
            if is_record(record) and record["attempt"] == self._attempt:
                try:
                    self._draw(record)
                except OSError as error:  # a full disk: a later record begins a new file
                    say(f"the curves of step {record['step']} are lost: {error}")
                    self._writer = None
        return lines is not None

    def _draw(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            # This attempt makes this step and later ones again, so the points of earlier attempts are dropped.
            purge_step = record["step"] if self._attempt > 1 else None
            self._writer = self._open(self._folder.tensorboard, purge_step=purge_step)
        step, scalars = record["step"], self._scalars(record)
        for tag, value in scalars.items():
            if self._drawn[0] != step or self._drawn[1].get(tag) != value:
                self._writer.scalar(tag, value, step, record.get("time"))
        self._drawn = (step, scalars)

    def close(self) -> None:
        """Close the event file, after its last records are written."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


class NewLines:
    """Reader of the lines of a growing file. A line is returned as soon as its end is written.

    Args:
        path: path of the file, which may not exist yet.
        end: pattern that ends a line.
        longest: largest number of bytes of a line that are returned; later bytes of the line are left out.
        skip: True to skip the present content of the file.
    """

    def __init__(self, path: Path, end: re.Pattern[bytes], longest: int, skip: bool = False) -> None:
        self._path = path
        self._end = end
        self._longest = longest
        self._offset = path.stat().st_size if skip and path.exists() else 0
        self._begun = b""
        self.changed_at = 0.0
        """Time of the last write to the file, Unix time."""

    def read(self) -> list[bytes] | None:
        """Return the lines that end in the next ``LOOK_BYTES`` bytes; empty if no line ends there.

        None if the file has no further bytes, or does not exist.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < self._offset:  # it was emptied
                    self._offset, self._begun = 0, b""
                file.seek(self._offset)
                data = file.read(LOOK_BYTES)
        except FileNotFoundError:
            return None
        if not data:
            return None
        self._offset += len(data)
        self.changed_at = status.st_mtime
        *whole, begun = self._end.split(self._begun + data)
        self._begun = begun[: self._longest]
        return [line[: self._longest] for line in whole if line]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the ``with`` block after ``seconds``. Has no effect outside the main thread.

    Python's ``re`` checks for signals while it searches, and only a signal can end a search.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
