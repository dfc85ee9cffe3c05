"""Warnings of a plan: what would work, and is hardly what somebody wants.

Pure functions over figures; each yields a line for people, or nothing. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpt.accounting.hardware import find
from gpt.config import Precision, TrainConfig
from gpt.topology.batch import Batch

MANY_EPOCHS = 100
"""Passes over a corpus after which hardly anything is left to learn from it."""


def slow_precision(
    device_name: str, precision: Precision, tf32: bool = False, best: Precision | None = None
) -> Iterator[str]:
    """Warn of fp32, true or by TF32, on a device whose matrix units take bf16 or fp16, by the peaks of the two, and of
    bf16 on one that does not compute in it.

    ``best`` is the precision that is fastest on a device whose name is not known; None where nobody can tell.
    """
    known = find(device_name)
    best = best if known is None else known.half
    if best is None or precision is best:
        return
    if precision is Precision.bf16:
        yield f"precision=bf16 on {device_name}, which does not compute in it: precision={best.name}"
    if precision is not Precision.fp32:
        return
    ours, theirs = (None, None) if known is None else (known.peak(precision, tf32), known.peak(best))
    times = "many" if ours is None or theirs is None else f"about {theirs / ours:.0f}"
    name = "precision=fp32 in TF32" if tf32 and (known is None or known.tf32 is not None) else "precision=fp32"
    yield f"{name} on {device_name}, whose peak is {times} times higher in {best.name}: precision={best.name}"


def eager_tensor_parallel(config: TrainConfig) -> Iterator[str]:
    """Warn of tensor parallelism on GPUs whose blocks are not compiled; ``compile`` is settled."""
    if config.parallel.tp > 1 and not config.compiles:
        yield (
            f"parallel.tp={config.parallel.tp} with compile={config.compile.name}: without the compiler each operation "
            "on a sharded matrix goes through Python, which takes longer than the GPU computes: compile=default"
        )


def execution_warnings(config: TrainConfig, device_name: str | None, best: Precision | None = None) -> Iterator[str]:
    """Warn of an execution that leaves GPUs idle; precision, TF32 and compilation of ``config`` are settled.

    ``device_name`` is None where it is not known, ``best`` where the fastest precision there is not.
    """
    if device_name is not None:
        yield from slow_precision(device_name, config.precision, bool(config.tf32), best)
    yield from eager_tensor_parallel(config)


def many_epochs(config: TrainConfig, batch: Batch, corpus_tokens: int) -> Iterator[str]:
    """Warn of a run that goes more than a hundred times through its training tokens."""
    a_step = batch.global_batch * config.model.block_size
    total = a_step * config.optim.max_steps
    if total <= MANY_EPOCHS * corpus_tokens:
        return
    epochs, most = total / corpus_tokens, MANY_EPOCHS * corpus_tokens
    fewer = (
        f"optim.max_steps={max(1, most // a_step)}" if config.optim.max_tokens is None else f"optim.max_tokens={most}"
    )
    yield (
        f"{count_text(total)} tokens from a corpus of {count_text(corpus_tokens)}: {epochs:,.0f} epochs; "
        f"a larger corpus (data=), or {fewer} for {MANY_EPOCHS} epochs"
    )


def many_time_limits(run_s: float, timeout_min: int) -> Iterator[str]:
    """Warn of a run that is estimated to take longer than the time limit of its job."""
    limits = math.ceil(run_s / (60 * timeout_min))
    if limits < 2:
        return
    enough = 10 * math.ceil(1.1 * run_s / 600)
    yield (
        f"about {hours_text(run_s)} by the estimate of the planner, and cluster.timeout_min={timeout_min}: {limits} "
        f"time limits, with a requeue after each; or cluster.timeout_min={enough} where the partition allows it"
    )


def count_text(number: int) -> str:
    """Format a count in three figures: ``9.96 B``, ``7.55 M``."""
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def hours_text(seconds: float) -> str:
    """Format a duration in minutes, hours or days."""
    for unit, name in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 60:.0f} min"
