"""Checkpoints of a run: their schedule, the save in flight, the state in a checkpoint, resume, and roll-back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from gpt.checkpoint import VALIDATION_LOSS, FailedSave, LoadedCheckpoint, Saved, Votes
from gpt.config import RESUMABLE
from gpt.data.order import PassedOver
from gpt.metrics.writers import MetricWriters
from gpt.training.guards import MAX_ROLLBACKS, BadSteps, checkpoint_before, is_bad, last_rollback, remedy
from gpt.training.run import Run
from launch.errors import ConfigError, RepeatedFailureError
from launch.runs import compose
from launch.runs.events import best_interval_s
from launch.runs.folder import is_newest_attempt, say
from launch.runs.overrides import is_within
from launch.runs.process import Phase
from launch.runs.records import StepRecord

# The state of a run in a checkpoint, and resuming from it. The files themselves are in ``gpt.checkpoint``.


def start_save(run: Run, val_loss: float | None, in_memory: bool = False) -> None:
    """Start to save a checkpoint of the last step, and return while it is being saved. Collective.

    Args:
        run: the run, which has no save in flight.
        val_loss: validation loss of the step, in nats per token; None if it was not evaluated.
        in_memory: True to save to the memory of the nodes instead of the disk.
    """
    run.worker.phase(Phase.saving, run.step)
    # The fence is sent to the writer's process, so it must not contain the run.
    may_commit = None if in_memory else partial(is_newest_attempt, run.folder, run.attempt)
    meta = checkpoint_meta(run, val_loss)
    state = run.engine.state()
    rank_state = {"cpu": torch.get_rng_state()}
    if run.world.device.type == "cuda":
        rank_state["cuda"] = torch.cuda.get_rng_state(run.world.device)
    run.checkpoints.start(run.step, state, rank_state, meta, may_commit)


def checkpoint_meta(run: Run, val_loss: float | None) -> dict[str, Any]:
    """Return ``Manifest.meta`` for a checkpoint of the last step, as plain JSON: the state of the run outside of model
    and optimizer. ``val_loss`` is the validation loss of the step, None if it was not evaluated."""
    meta = {
        "attempt": run.attempt,
        "samples": run.step * run.batch.global_batch,
        "data_sha256": run.tokens.sha256,
        "topology": run.dims.as_dict(),
        "world_size": run.world.size,
        "config": compose.plain_config(run.config),
        "divergence": run.guard.state(run.step),
        "passed_over": [list(batches) for batches in run.batches.passed_over.ranges],
        "early_stop": run.early_stop.state(),
    }
    if run.samples.stream is not None:
        meta["stream"] = run.samples.stream.state(run.batches.passed_over.batch_of(run.step) * run.batch.global_batch)
    if run.engine.loss_scale is not None:
        meta["loss_scale"] = run.engine.loss_scale.state()
    if val_loss is not None:
        meta[VALIDATION_LOSS] = val_loss
    return meta


def load(run: Run) -> None:
    """Load the newest undamaged checkpoint into the run. If there is none, prepare the first step. Collective.

    Raises:
        ConfigError: the checkpoint was made with another global batch or with other data. Also if the checkpoint was
            fetched from ``checkpoint.copy_to``, and is of another run.
    """
    # Without any checkpoint the optimizer's state is not made yet, because that would cost a step of torch's optimizer.
    began = time.perf_counter()
    state = loaded = None
    if not run.checkpoints.is_new():
        state = run.engine.state()
        if run.config.checkpoint.in_memory and run.checkpoints.memory is None:
            record(run, "memory_passed_over", cause="a node has no memory store")
        loaded = run.checkpoints.load(state)
    if loaded is None:
        run.engine.begin()
        return
    for line in loaded.set_aside:
        record(run, "checkpoint_set_aside", cause=line)
    if loaded.is_from_memory or loaded.memory_damage is not None:
        name = "loaded_from_memory" if loaded.is_from_memory else "memory_passed_over"
        record(run, name, step=loaded.step, cause=loaded.memory_damage)
    if loaded.fetched_for is not None:
        refuse_other_config(run, loaded)
        record(run, "loaded_from_copy", step=loaded.step, cause=loaded.fetched_for)
    if loaded.meta["samples"] != loaded.step * run.batch.global_batch:
        raise ConfigError(
            f"{loaded.meta['samples']} samples in the {loaded.step} steps of the checkpoint, but now "
            f"{run.batch.global_batch} sequences a step",
            "the batch of the first attempt: with optim.weak_scaling=true it follows from the number of ranks",
            f"{loaded.meta['world_size']} ranks, or fresh=true for a new folder",
        )
    if loaded.meta["data_sha256"] != run.tokens.sha256:
        raise ConfigError(
            f"a checkpoint at step {loaded.step} made with other data (sha256 {loaded.meta['data_sha256'][:12]}...)",
            f"the corpus it was made with, now it is {run.tokens.sha256[:12]}...",
            "fresh=true, to start over with this corpus in a new folder",
        )
    run.engine.load(state)
    if run.engine.loss_scale is not None:
        run.engine.loss_scale.load(loaded.meta["loss_scale"])
    if loaded.rank_state is not None:
        torch.set_rng_state(loaded.rank_state["cpu"])
        if run.world.device.type == "cuda" and "cuda" in loaded.rank_state:
            torch.cuda.set_rng_state(loaded.rank_state["cuda"], run.world.device)
    run.step = loaded.step
    run.guard.load(loaded.meta["divergence"])
    event = run.world.on_first(lambda: last_rollback(run.folder.read_events(), loaded.step))
    run.batches.passed_over = PassedOver.of((loaded.meta if event is None else event)["passed_over"])
    if event is not None:
        run.guard.gone_back(event["last"], event["rollbacks"])
    if run.samples.stream is not None:
        run.samples.stream.restore(loaded.meta["stream"])
    run.early_stop.load(loaded.meta["early_stop"])
    run.restore_s = time.perf_counter() - began


def record(run: Run, event: str, **details: Any) -> None:
    """Append an event of this attempt to the event log, on rank 0; do nothing on other ranks."""
    if run.world.is_first:
        run.folder.record_event(event, attempt=run.attempt, **details)


def refuse_other_config(run: Run, loaded: LoadedCheckpoint) -> None:
    """Raise ConfigError if a checkpoint that was fetched from ``checkpoint.copy_to`` is of another run, with other
    settings and a run folder of the same name."""
    there, here = loaded.meta["config"], compose.plain_config(run.config)
    changed = [key for key in here if key in there and here[key] != there[key] and not is_within(key, RESUMABLE)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"copies in {run.config.checkpoint.copy_to} of a run with {key}={there[key]}, and now {key}={here[key]}",
            "the same settings, to go on with that run, or copies of each in a place of its own",
            f"{key}={there[key]}, or another checkpoint.copy_to, and fresh=true for a new folder",
        )


# Going back: from steps whose numbers went wrong to the last good checkpoint, and on without their batches.
#
# gpt/training/guards.py decides when a run has to roll back.


def judge_step(run: Run, done: StepRecord) -> BadSteps | None:
    """Check the record of a step for divergence: a loss or gradients that are not finite, or a loss that is a spike. If
    loss or gradients are not finite, record this in the event log.

    Returns:
        The steps because of which the run has to roll back; None if it need not.
    """
    if is_bad(done):
        what = "loss" if done.loss is None else "gradients"
        where = locate(run, done.step, done.step)
        record(run, "step_skipped", step=done.step, cause=f"{what} not finite", **where)
    return run.guard.judge(done)


def go_back(run: Run, writers: MetricWriters, bad: BadSteps) -> None:
    """Roll the run back: load the newest checkpoint from before the steps ``bad``. Later checkpoints are discarded.
    Training continues from there without the batches of these steps. Collective.

    Raises:
        RepeatedFailureError: the run has rolled back ``MAX_ROLLBACKS`` times without a newer checkpoint.
        FloatingPointError: there is no earlier checkpoint.
    """
    run.worker.phase(Phase.starting, run.step)  # loading takes as long as at the start
    target = run.world.on_first(lambda: checkpoint_before(run.checkpoints.steps(), bad.first))
    where = locate(run, bad.first, bad.last)
    if target is None or run.guard.rollbacks >= MAX_ROLLBACKS:
        why_not = f"gone back {run.guard.rollbacks} times since the last checkpoint; other batches end alike"
        if target is None:
            why_not = f"no checkpoint to go back to (checkpoint.interval={run.config.checkpoint.interval})"
        raise (FloatingPointError if target is None else RepeatedFailureError)(
            f"found: steps {bad.first} to {bad.last}: {bad.cause}; {place_text(where)}; {why_not}\n"
            "expected: finite numbers, or an earlier checkpoint from which other batches give finite numbers\n"
            f"{remedy(run.config)}"
        )
    rollbacks = run.guard.rollbacks + 1
    numbers = [run.batches.passed_over.batch_of(step) for step in range(bad.first, bad.last + 1)]
    passed_over = run.batches.passed_over.including(numbers)
    # Before the load, which reads the batches to leave out from the event log.
    record(
        run, "rolled_back", step=target, first=bad.first, last=bad.last, cause=bad.cause,
        rollbacks=rollbacks, passed_over=passed_over.ranges, **where,
    )  # fmt: skip
    if run.world.is_first:
        print(f"step {bad.last}: {bad.cause}; back to step {target}, and on without {place_text(where)}", flush=True)
    run.checkpoints.discard_after(target)
    load(run)
    writers.go_back(run.step)


def locate(run: Run, first: int, last: int) -> dict[str, list[tuple[int, int]]]:
    """Return the batches and the samples that the steps ``first`` to ``last`` have used.

    The keys of the result are ``batches`` and ``samples``. A value is a list of ranges, each a pair of the first and
    the last number. Batches are counted from 1, samples from 0.
    """
    numbers = [run.batches.passed_over.batch_of(step) for step in range(first, last + 1)]
    batches, each = PassedOver().including(numbers).ranges, run.batch.global_batch
    return {"batches": list(batches), "samples": [((a - 1) * each, b * each - 1) for a, b in batches]}


def place_text(where: dict[str, list[tuple[int, int]]]) -> str:
    """Return the result of ``locate`` as text."""
    batches, samples = (", ".join(f"{a} to {b}" for a, b in ranges) for ranges in where.values())
    return f"batches {batches} (samples {samples})"


# Schedule of the periodic checkpoints: by steps, by minutes, or by the cost of failures and saves.
#
# These are pure functions of the event log and of times.


PRIOR_S = 24 * 3600.0
"""Running time in seconds that is added to the observed running time when the rate of failures of a run is estimated.
One failure is added to the observed failures."""
FIRST_S = 600.0
"""Interval of checkpoints in seconds with ``checkpoint.interval=auto``, before the first save was measured."""
LEAST_S = 60.0
"""Shortest interval of checkpoints in seconds with ``checkpoint.interval=auto``."""
FAILURES = ("crashed", "hung", "node_failed", "out_of_memory")
"""Causes of the end of an attempt that count as failures: the run loses the steps since the last checkpoint."""


def between_failures_s(events: Iterable[Mapping[str, Any]], now: float) -> float:
    """Return the estimated mean time between failures of a run, in seconds, from its event log.

    Args:
        events: the event log.
        now: present Unix time, in seconds.

    Returns:
        (Running time + ``PRIOR_S``) / (number of failures + 1).
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
    """Return the interval of checkpoints in seconds with ``checkpoint.interval=auto``, from the event log.

    It follows from the duration of the last save and the rate of failures. It is at least ``LEAST_S``, and at least the
    time that the last save took, because only one save at a time is in flight. ``now`` is the present Unix time in
    seconds.
    """
    known = list(events)
    saves = [event for event in known if event["event"] == "saved" and "seconds" in event]
    if not saves:
        return FIRST_S
    last = saves[-1]
    found = best_interval_s(last["seconds"], between_failures_s(known, now))
    return max(LEAST_S, last.get("write_s", last["seconds"]), found)


# Checkpoints during training: when they are due, the save in flight, and its events.
#
# Ranks agree through the figures that every step sums over all ranks, so that no step waits for a message.


TRIES = 2
"""Number of failed tries of a save after which training no longer waits for the save, and gives it up."""


class CheckpointSchedule:
    """Schedules the checkpoints of one attempt, and records the outcome of each save in the event log. A save has two
    phases: all ranks write, then rank 0 commits. All methods but ``poll`` and ``is_due`` are collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._manager = run.checkpoints
        self._every = run.config.checkpoint.every()
        self._is_asynchronous = run.config.checkpoint.asynchronous and run.checkpoints.writer.is_background
        self._held_s = 0.0
        self._is_time = False
        self._next_at = time.monotonic() + self._interval_s()

    def poll(self) -> Votes:
        """Return the status of the save in flight on this rank, as numbers. The next step sums them over all ranks.

        If the interval is in minutes or ``auto``, the numbers also have ``is_due``. It is 1 on rank 0 if the next save
        is due, else 0.
        """
        votes = self._manager.poll()
        if self._every.steps is not None:
            return votes
        is_due = self._run.world.is_first and not self._is_time and time.monotonic() >= self._next_at
        return Votes(votes.phase, {**votes.figures, "is_due": is_due})

    def advance(self, phase: int, sums: Mapping[str, float]) -> None:
        """Begin the next phase of the save in flight if all ranks have completed the present phase. If the save is
        complete or has failed, record this in the event log.

        Args:
            phase: ``phase`` in the results of ``poll``, the same on all ranks; 0 if no save is in flight.
            sums: ``figures`` in these results, summed over all ranks.

        Raises:
            ConfigError: the disk was full or broken for longer than ``checkpoint.give_up_after_min`` minutes.
            CheckpointError: checkpoints could not be written for that time, for another reason.
        """
        if phase:
            self._record(self._manager.advance(phase, sums))
        self._is_time = self._is_time or sums.get("is_due", 0) > 0

    def is_due(self, step: int) -> bool:
        """Return True if the periodic checkpoint is due after ``step``; the same on all ranks."""
        if self._every.steps is None:
            return self._is_time
        return self._every.steps > 0 and step % self._every.steps == 0

    def save(self, val_loss: float | None, *, is_last: bool, is_stop: bool) -> float:
        """Start to save a checkpoint of the last step. Return the seconds for which training waited.

        The method first waits until an earlier save is complete, or has failed ``TRIES`` times and is given up. It
        waits until its own save is complete only if ``is_last`` or ``is_stop`` is True, or if
        ``checkpoint.asynchronous`` is false.

        Args:
            val_loss: validation loss of the step, in nats per token; None if it was not evaluated.
            is_last: True if no step follows. The save of this step is then never given up.
            is_stop: True if the run was requested to stop.
        """
        started = time.perf_counter()
        self._run.worker.phase(Phase.saving, self._run.step)
        self.finish()
        start_save(self._run, val_loss)
        self._held_s = time.perf_counter() - started
        if is_last or is_stop or not self._is_asynchronous:
            self.finish(gives_up=not is_last, since=started)
        self._is_time, self._next_at = False, time.monotonic() + self._interval_s()
        return time.perf_counter() - started

    def finish(self, gives_up: bool = True, since: float | None = None) -> None:
        """Wait for the save in flight, if there is one. A save that fails is tried again. If ``gives_up`` is True, it
        is given up after ``TRIES`` failures.

        If ``since`` is a time (time.perf_counter, seconds), the event log gets the seconds since then as the time for
        which training waited. None means that this wait does not count.
        """
        tries = 0
        while self._manager.is_pending:
            found = self._manager.finish(hurries=gives_up)
            if since is not None:
                self._held_s = time.perf_counter() - since
            self._record(found)
            tries += isinstance(found, FailedSave)
            if tries >= TRIES and gives_up:
                self._manager.give_up()

    def _record(self, found: Saved | FailedSave | None) -> None:
        run = self._run
        if isinstance(found, Saved) and found.in_memory:
            record(run, "saved_in_memory", step=found.step, write_s=found.write_s)
        elif isinstance(found, Saved):
            run.worker.saved(found.step, self._held_s, write_s=found.write_s)
        elif isinstance(found, FailedSave):
            cause = found.cause.splitlines()[0]
            if found.in_memory:
                record(run, "save_in_memory_failed", step=found.step, cause=cause)
                return
            record(run, "save_failed", step=found.step, cause=cause, failures=found.failures)
            if run.world.is_first:
                say(f"the checkpoint of step {found.step} could not be written, and is tried again: {found.cause}")

    def _interval_s(self) -> float:
        """Return the seconds from now to the next periodic checkpoint. Return 0 if the interval is a number of steps.
        With ``auto``, return 0 also on all ranks but rank 0, because only rank 0 decides."""
        if self._every.minutes is not None:
            return 60 * self._every.minutes
        if self._every.steps is not None or not self._run.world.is_first:
            return 0.0
        return auto_interval_s(self._run.folder.read_events(), time.time())
