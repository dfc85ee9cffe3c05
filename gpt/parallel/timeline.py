"""Timeline of a step: waits for other ranks, by group, and the work of a pipeline stage; recording waits for nothing.

``waiting("tp")`` encloses each wait of a collective, ``working`` each piece of a stage's work. Outside of a recorded
step both do nothing. On a GPU, times are events in the queue of the stream that computes, so a wait that other work
hides takes no time. On other devices, times are those of the host's clock. All times are read after the step, when the
device has passed them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Moment = float | torch.cuda.Event
"""Time of the host in seconds (time.perf_counter), or an event in the queue of a GPU."""

GROUPS = ("dp", "fsdp", "tp", "pp", "cp", "ep")
"""Groups of ranks whose exposed communication is reported separately."""
WORLD, BUBBLE = "world", "bubble"
"""Names of spans that wait for all ranks, or for another stage of the pipeline."""
HOST = "host"
"""Name of spans in which the host does work outside of the step, while the ranks communicate."""


@dataclass(frozen=True)
class Span:
    """A span of the step: its name, and seconds of its begin and end since the step began."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the span, seconds."""
        return self.end - self.begin


_free: deque[torch.cuda.Event] = deque()
"""Unused events, from timelines that have been read. Without reuse, each step of a large model under fsdp would make
thousands."""


class Timeline:
    """Waits and work of one step on one rank, recorded while the step runs."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._waits: list[tuple[str, Moment, Moment]] = []
        self.works: list[tuple[str, Moment, Moment]] = []
        """Pieces of work: the name of the time before the piece (as in ``schedule_waits``), begin and end."""
        self.schedules: list[tuple[str, Moment, Moment]] = []
        self.is_waiting = False
        """True inside of a wait, because a wait inside another wait is not recorded."""
        self.receives = False
        """True if the rank has begun to receive data from another rank, before its next piece of work."""
        self._events: list[torch.cuda.Event] = []
        self.start = self.now()
        self.marks = [self.start]
        """Begin of the step, and ends of its phases: computing the gradients, then clipping and applying them."""

    def now(self) -> Moment:
        """Return the present moment: host time, or an event in the GPU's queue."""
        if not self._is_cuda:
            return time.perf_counter()
        event = _free.popleft() if _free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        return event

    def give_back(self) -> None:
        """Put the events back into the pool for later timelines. Call it after all moments have been read."""
        _free.extend(self._events)
        self._events.clear()

    def mark(self) -> None:
        """Record the end of a phase: the moment at which the device has done all work queued so far. Does not wait."""
        self.marks.append(self.now())

    def seconds(self, moment: Moment) -> float:
        """Return the seconds from the start of the step to a moment, which the device must have passed."""
        since = self.start
        if isinstance(since, torch.cuda.Event) and isinstance(moment, torch.cuda.Event):
            return float(since.elapsed_time(moment)) / 1000
        assert isinstance(since, float) and isinstance(moment, float)
        return moment - since

    def add_wait(self, name: str, begin: Moment) -> None:
        """Record a wait named ``name`` from ``begin`` until now."""
        self._waits.append((name, begin, self.now()))

    def spans(self) -> list[Span]:
        """Return all waits, with those of a pipeline's schedule; the device must have passed them."""
        waits, works, schedules = (
            [Span(name, self.seconds(begin), self.seconds(end)) for name, begin, end in moments]
            for moments in (self._waits, self.works, self.schedules)
        )
        for schedule in schedules:
            ends = Span(schedule.name, schedule.end, schedule.end)
            waits += schedule_waits(schedule.begin, [*works, ends], waits)
        return waits


def schedule_waits(begin: float, works: Sequence[Span], waits: Sequence[Span]) -> list[Span]:
    """Return spans for the time of a pipeline's schedule in which the stages of this rank did not work.

    Time before work that needs another rank's data is bubble: the transfer and the wait for the sender look the same.
    Time before other work is the rank's own communication, its sends.

    Args:
        begin: start of the schedule, in seconds since the step began.
        works: pieces of work in the order of time, each named ``bubble`` if it begins with data that another rank has
            sent, else ``pp``. The last piece has no length; it is the end of the schedule.
        waits: spans of other groups, which are left out if they are between two pieces of work.

    Returns:
        Spans named ``bubble`` or ``pp``.
    """
    found, since = [], begin
    waits = sorted(waits, key=lambda span: span.begin)
    begins = [span.begin for span in waits]
    for work in works:
        for wait in waits[bisect_left(begins, since) : bisect_left(begins, work.begin)]:
            found.append(Span(work.name, since, wait.begin))
            since = wait.end
        found.append(Span(work.name, since, work.begin))
        since = work.end
    return found


def total(spans: Sequence[Span], begin: float, end: float, *names: str) -> float:
    """Return the summed seconds of spans that begin in [``begin``, ``end``), only of spans with one of ``names`` if any
    is given."""
    return sum(span.seconds for span in spans if begin <= span.begin < end and (not names or span.name in names))


_current: Timeline | None = None


@contextmanager
def recorded(timeline: Timeline) -> Iterator[None]:
    """Record on a timeline the waits and the work inside the ``with`` block."""
    global _current
    before, _current = _current, timeline
    try:
        yield
    finally:
        _current = before


def current() -> Timeline | None:
    """Return the timeline of the step that is being recorded; None if no step is."""
    return _current


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Record the ``with`` block as a wait for other ranks, named ``name``: a collective, or the wait for its result."""
    timeline = _current
    if timeline is None or timeline.is_waiting:
        yield
        return
    timeline.is_waiting, begin = True, timeline.now()
    try:
        yield
    finally:
        timeline.is_waiting = False
        timeline.add_wait(name, begin)


@contextmanager
def working(is_fed: bool = False) -> Iterator[None]:
    """Record the ``with`` block as work of a pipeline stage. ``is_fed``: it begins with data that another rank has
    sent."""
    timeline = _current
    if timeline is None:
        yield
        return
    begin, is_fed, timeline.receives = timeline.now(), is_fed or timeline.receives, False
    yield
    timeline.works.append((BUBBLE if is_fed else "pp", begin, timeline.now()))


def receiving() -> None:
    """Record that a pipeline stage begins to receive data from another rank."""
    if _current is not None:
        _current.receives = True


@contextmanager
def scheduling() -> Iterator[None]:
    """Record the ``with`` block as a pipeline's schedule."""
    timeline = _current
    if timeline is None:
        yield
        return
    begin = timeline.now()
    yield
    timeline.schedules.append((BUBBLE if timeline.receives else "pp", begin, timeline.now()))
    timeline.receives = False
