"""Going back: from steps whose numbers went wrong to the last good checkpoint, and on without their batches.

Owns what the event log says of skipped steps and of roll-backs, and the end of a run that goes back in vain. When a run
has to go back is gpt/training/divergence.py's.
"""

from __future__ import annotations

from gpt.data.order import PassedOver
from gpt.metrics.writers import MetricWriters
from gpt.training.divergence import BadSteps, checkpoint_before, is_bad, remedy
from gpt.training.run import Run
from gpt.training.state import load
from launch.errors import RepeatedFailureError
from launch.runs.heartbeat import Phase
from launch.runs.records import StepRecord


def judge_step(run: Run, record: StepRecord) -> BadSteps | None:
    """Judge a step that was finished, and enter it in the event log where it was skipped."""
    bad = run.guard.judge(record)
    if run.world.is_first and is_bad(record):
        what = "loss" if record.loss is None else "gradients"
        where = locate(run, record.step, record.step)
        run.folder.record_event(
            "step_skipped", attempt=run.attempt, step=record.step, cause=f"{what} not finite", **where
        )
    return bad


def go_back(run: Run, writers: MetricWriters, bad: BadSteps) -> None:
    """Load the last good checkpoint before the ``bad`` steps, and pass over their batches from there on. Collective.

    Raises:
        RepeatedFailureError: the run has gone back as often as it may, and has saved no newer checkpoint.
        FloatingPointError: there is no checkpoint to go back to.
    """
    run.worker.phase(Phase.starting, run.step)  # loading takes as long as at the start
    target = run.world.on_first(lambda: checkpoint_before(run.store.steps(), bad.first))
    where = locate(run, bad.first, bad.last)
    if target is None or run.guard.rollbacks >= run.config.divergence.max_rollbacks:
        raise failure(run, bad, target, where)
    rollbacks = run.guard.rollbacks + 1
    passed_over = run.batches.passed_over.including(batches_of(run, bad))
    if run.world.is_first:
        # Before the load, which goes by what the event log says.
        run.folder.record_event(
            "rolled_back", attempt=run.attempt, step=target, first=bad.first, last=bad.last, cause=bad.cause,
            rollbacks=rollbacks, passed_over=passed_over.ranges, **where,
        )  # fmt: skip
        print(
            f"step {bad.last}: {bad.cause}; back to step {target}, and on without {place_text(where)}",
            flush=True,
        )
    run.store.discard_after(target)
    run.copies.discard_after(target)
    load(run)
    writers.go_back(run.step)


def batches_of(run: Run, bad: BadSteps) -> list[int]:
    """List the numbers of the batches of steps."""
    return [run.batches.passed_over.batch_of(step) for step in range(bad.first, bad.last + 1)]


def locate(run: Run, first: int, last: int) -> dict[str, list[tuple[int, int]]]:
    """Return the batches of steps ``first`` to ``last``, and their samples, each as ranges with their last number."""
    batches = PassedOver().including(batches_of(run, BadSteps(first, last, ""))).ranges
    each = run.batch.global_batch
    return {"batches": list(batches), "samples": [((a - 1) * each, b * each - 1) for a, b in batches]}


def place_text(where: dict[str, list[tuple[int, int]]]) -> str:
    """Name batches and their samples, for people."""
    parts = (
        f"{what} {', '.join(str(a) if a == b else f'{a} to {b}' for a, b in where[what])}"
        for what in ("batches", "samples")
    )
    return "{} ({})".format(*parts)


def failure(
    run: Run, bad: BadSteps, target: int | None, where: dict[str, list[tuple[int, int]]]
) -> RepeatedFailureError | FloatingPointError:
    """Return the failure of a run that cannot go back for ``bad`` steps, with what to change."""
    steps = f"step {bad.first}" if bad.first == bad.last else f"steps {bad.first} to {bad.last}"
    found = f"found: {steps}: {bad.cause}; {place_text(where)}"
    if target is None:
        return FloatingPointError(
            f"{found}; no checkpoint to go back to\nexpected: finite numbers, or a checkpoint before them "
            f"(checkpoint.interval={run.config.checkpoint.interval})\n{remedy(run.config)}"
        )
    limit = run.config.divergence.max_rollbacks
    return RepeatedFailureError(
        f"{found}; gone back {run.guard.rollbacks} times since the last checkpoint (divergence.max_rollbacks={limit}), "
        f"and other batches end alike\nexpected: steps that a checkpoint and other batches mend; another start would "
        f"compute the same\n{remedy(run.config)}"
    )
