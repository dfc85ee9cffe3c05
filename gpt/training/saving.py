"""Checkpoints during training: their schedule, the save in flight, and its events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt.checkpoint.folders import Retention
from gpt.checkpoint.memory import FailedInMemory, SavedInMemory
from gpt.checkpoint.saving import FailedWrite, Saved
from gpt.training.run import Run
from gpt.training.state import begin_save, begin_save_in_memory
from gpt.training.step import Ballot
from launch.runs.events import best_interval_s
from launch.runs.files import say
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import Phase

# Schedule of the periodic checkpoints: by steps, by minutes, or by the cost of failures and saves.
#
# These are pure functions of the event log and of times.


PRIOR_S = 24 * 3600.0
"""Prior of the estimate, seconds: every run starts with this running time, and one failure at its end."""
FIRST_S = 600.0
"""Seconds to the first checkpoint, before any save was measured."""
LEAST_S = 60.0
FAILURES = ("crashed", "hung", "node_failed", "out_of_memory")
"""Causes of an attempt's end that lose the steps since the last checkpoint."""


def between_failures_s(events: Iterable[Mapping[str, Any]], now: float) -> float:
    """Estimate the mean time between failures of a run, in seconds, from its event log.

    Args:
        events: the event log.
        now: present time, by the clock of the events.

    Returns:
        Running time plus ``PRIOR_S``, divided by failures plus one: one day until the first failure.
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
    """Return the interval of ``checkpoint.interval=auto``, in seconds, from the last save and the failures so far.

    The interval is never shorter than the last save took to reach the disk, since one save at a time is in flight. Nor
    is it shorter than ``LEAST_S``.
    """
    known = list(events)
    saves = [event for event in known if event["event"] == "saved" and "seconds" in event]
    if not saves:
        return FIRST_S
    last = saves[-1]
    found = best_interval_s(last["seconds"], between_failures_s(known, now))
    return max(LEAST_S, last.get("write_s", last["seconds"]), found)


# Checkpoints during training: when they are due, the ballots about the save in flight, and its events.
#
# Ranks agree through the figures that every step sums over them, so that no step waits for a message. The state is in
# ``gpt.training.state``, the writing in ``gpt.checkpoint``.


TRIES = 2
"""Failed writes after which training no longer waits for a save: it continues, or leaves with the checkpoint before."""


class Saving:
    """The checkpoints of one attempt. All methods but ``ballot`` and ``is_due`` are collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._saves = run.store.saves
        self._every = run.config.checkpoint.every()
        self._is_asynchronous = run.config.checkpoint.asynchronous and self._saves.writer.is_background
        self._memory = run.store.memory
        self._held_s = 0.0
        self._is_time = False
        self._next_at = time.monotonic() + self._interval_s()

    def ballot(self) -> Ballot:
        """Return this rank's ballot for this step."""
        by_time = () if self._every.steps is not None else (float(self._run.world.is_first and self._clock_says()),)
        if self._saves.is_pending:
            vote = self._saves.vote()
        elif self._memory is not None and self._memory.is_pending:
            vote = self._memory.vote()
        else:
            return Ballot(0, by_time)
        return Ballot(vote.phase, (float(vote.done), float(vote.failed), *by_time))

    def hear(self, ballot: Ballot, sums: Sequence[float]) -> None:
        """Take in the ballots of all ranks of one step, summed.

        Raises:
            ConfigError: the disk was full, or failed, for longer than ``checkpoint.give_up_after_min``.
            CheckpointError: checkpoints could not be written for as long, for another reason.
        """
        if ballot.phase > 0:
            self._tell(self._saves.count(ballot.phase, sums[0], sums[1]))
            if self._memory is not None and not self._memory.is_pending and self._saves.has_copy:
                # The copy that was taken for the disk is sent only now, so that the disk's checkpoint waits for
                # nothing.
                self._memory.start_again(self._saves.take_committed())
        elif ballot.phase and self._memory is not None:
            self._tell_of_memory(self._memory.count(ballot.phase, sums[0], sums[1]))
        if self._every.steps is None and sums:
            self._is_time = self._is_time or sums[-1] > 0

    def is_due(self, step: int) -> bool:
        """Tell whether the periodic checkpoint is due after ``step``; the same on all ranks."""
        if self._every.steps is None:
            return self._is_time
        return self._every.steps > 0 and step % self._every.steps == 0

    def is_due_in_memory(self, step: int) -> bool:
        """Tell whether a checkpoint in memory is due after ``step``; never while another save is in flight."""
        if self._memory is None or self._saves.is_pending or self._memory.is_pending:
            return False
        return step % self._run.config.checkpoint.in_memory_interval == 0

    def save_in_memory(self) -> float:
        """Begin to send the step just done into the memory of the nodes; return the seconds that training waited."""
        started = time.perf_counter()
        if self._memory is not None and not (self._saves.is_pending or self._memory.is_pending):
            begin_save_in_memory(self._run, self._memory)
        return time.perf_counter() - started

    def save(self, val_loss: float | None, *, is_last: bool, is_stop: bool) -> float:
        """Save the step just done; return the seconds that training waited.

        Waits for the save before. Waits for this save too if it is the last, or if saves are synchronous.

        Args:
            val_loss: validation loss of the step, nats per token; None if it was not evaluated.
            is_last: no step follows, so that no other save would hold these steps.
            is_stop: the run must leave, and has little time.
        """
        started = time.perf_counter()
        run = self._run
        run.worker.phase(Phase.saving, run.step)
        if not self._saves.is_failing:  # if it is failing, this newer state takes its place
            self._finish()
        begin_save(run, val_loss)
        self._held_s = time.perf_counter() - started
        if is_last or is_stop or not self._is_asynchronous:
            self._finish(gives_up=not is_last, since=started)
        self._is_time, self._next_at = False, time.monotonic() + self._interval_s()
        return time.perf_counter() - started

    def settle(self) -> None:
        """Wait for the save in flight, before the run goes back or leaves; give the save up if it fails again."""
        self._finish()

    def _finish(self, gives_up: bool = True, since: float | None = None) -> None:
        """Wait for the save in flight; give it up if it fails again and training can continue, or has to leave."""
        if self._memory is not None:
            self._tell_of_memory(self._memory.finish())
        tries = 0
        while self._saves.is_pending:
            found = self._saves.finish(hurries=gives_up)
            if since is not None:
                self._held_s = time.perf_counter() - since
            self._tell(found)
            tries += isinstance(found, FailedWrite)
            if tries >= TRIES and gives_up:
                self._saves.give_up()

    def _tell(self, found: Saved | FailedWrite | None) -> None:
        run = self._run
        if isinstance(found, Saved):
            run.worker.saved(found.step, self._held_s, write_s=found.write_s)
            run.copies.copy(found.step)
        elif found is not None and run.world.is_first:
            cause = found.cause.splitlines()[0]
            run.folder.record_event(
                "save_failed", attempt=run.attempt, step=found.step, cause=cause, failures=found.failures
            )
            say(f"the checkpoint of step {found.step} could not be written, and is tried again: {found.cause}")

    def _tell_of_memory(self, found: SavedInMemory | FailedInMemory | None) -> None:
        run = self._run
        if found is None or not run.world.is_first:
            return
        told = {"attempt": run.attempt, "step": found.step}
        if isinstance(found, SavedInMemory):
            run.folder.record_event("saved_in_memory", **told, write_s=found.write_s)
        else:
            run.folder.record_event("save_in_memory_failed", **told, cause=found.cause)
            say(f"the checkpoint of step {found.step} in memory was given up: {found.cause}")

    def _clock_says(self) -> bool:
        return not self._is_time and time.monotonic() >= self._next_at

    def _interval_s(self) -> float:
        """Return the seconds to the next periodic checkpoint, if time decides, by rank 0's clock."""
        if self._every.minutes is not None:
            return 60 * self._every.minutes
        if self._every.steps is not None or not self._run.world.is_first:
            return 0.0
        return auto_interval_s(self._run.folder.read_events(), time.time())


def start_copies(run: Run) -> None:
    """Begin to copy checkpoints elsewhere, if the config says so: first the loaded one, if it has no copy.

    Copies of later steps are discarded, since the run makes those steps again.
    """
    kept = run.config.checkpoint
    if kept.copy_to is None or not run.world.is_first:
        return
    keeps = run.store.saves.keeps if kept.copy_keep is None else Retention(kept.copy_keep)
    run.copies.start(run.folder.path, run.attempt, kept.copy_to, keeps)
    run.copies.discard_after(run.step)
    if run.step:
        run.copies.copy(run.step)


def tell_damage(folder: RunFolder, attempt: int, step: int, damage: str, was_whole: bool) -> None:
    """Enter in the event log that the checkpoint of a step was read again, found damaged, and set aside.

    A checkpoint that ``was_whole`` at an earlier reading is replaced: older ones were deleted for it, and the next save
    may be far. A checkpoint that was written damaged is not replaced, since a disk that spoils every file would be
    written to without end.
    """
    folder.record_event("checkpoint_set_aside", attempt=attempt, step=step, cause=damage)
    say(f"the checkpoint of step {step} is damaged: {damage}")
    if was_whole:
        (folder.path / "SAVE").touch()  # like a user's request for a save: all ranks see it after the same step
