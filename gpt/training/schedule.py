"""Schedule of the periodic checkpoints: by steps, by minutes, or by what failures and saves cost.

Pure functions of the event log and of times. Must not know how a checkpoint is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from launch.runs.events import best_interval_s

PRIOR_S = 24 * 3600.0
"""Running time without a failure, and one failure at its end, that every run is taken to have behind it."""
FIRST_S = 600.0
"""Time to the first checkpoint, before any save was measured."""
LEAST_S = 60.0
FAILURES = ("crashed", "hung", "node_failed", "out_of_memory")
"""Causes of an attempt's end that lose the steps since the last checkpoint."""


def between_failures_s(events: Iterable[Mapping[str, Any]], now: float) -> float:
    """Estimate the mean time between failures of a run, seconds, by its event log.

    Args:
        events: the event log.
        now: time of the clock that events bear.

    Returns:
        Running time, ``PRIOR_S`` more, by the failures and one more: a day until the first failure was seen.
    """
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    failed = set()
    for event in events:
        attempt = event.get("attempt")
        if attempt is None:
            continue
        ended[attempt] = event["time"]
        if event["event"] == "started":
            began.setdefault(attempt, event["time"])
        elif event["event"] == "rank_failed" or (event["event"] == "attempt_ended" and event.get("cause") in FAILURES):
            failed.add(attempt)
    newest = max(began, default=None)
    ran = sum((now if attempt == newest else ended[attempt]) - since for attempt, since in began.items())
    return (max(0.0, ran) + PRIOR_S) / (len(failed) + 1)


def auto_interval_s(events: Iterable[Mapping[str, Any]], now: float) -> float:
    """Return the interval of ``checkpoint.interval=auto``, seconds, by the last save and the failures seen so far.

    Never shorter than the last save took to be on the disk, since one at a time is in flight, nor than ``LEAST_S``.
    """
    known = list(events)
    saves = [event for event in known if event["event"] == "saved" and "seconds" in event]
    if not saves:
        return FIRST_S
    last = saves[-1]
    found = best_interval_s(last["seconds"], between_failures_s(known, now))
    return max(LEAST_S, last.get("write_s", last["seconds"]), found)
