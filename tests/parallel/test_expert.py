"""Experts sharded over ranks: exchanges of rows, recomputed or not, and the fused optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_distributed
from tests.support.learning import Operations, start, step

MOE = ["model.ffn=moe", "model.n_expert=4", "model.n_expert_per_token=2", "model.ffn_hidden=32"]
WAYS = {
    "experts": ["parallel=fsdp_ep", "parallel.ep=2", *MOE],
    "all-gathered keys": ["parallel=cp", "model.n_kv_head=2"],
    "ring": ["parallel=fsdp_cp", "parallel.cp_method=ring", "model.n_kv_head=2"],
}


def is_exchange(name: str, *_: Any) -> bool:
    return name == "_c10d_functional.all_to_all_single.default"


def recomputed(rank: int, size: int, folder: Path) -> dict[str, list[tuple[tuple[float, ...], int]]]:
    """Losses of two steps, and exchanges of the first, of each way without recomputation, with some, and with all."""
    found: dict[str, list[tuple[tuple[float, ...], int]]] = {}
    for name, words in WAYS.items():
        for recompute in ("none", "selective", "full"):
            kind = [*words, "optim.max_micro_batch=8", f"recompute={recompute}"]
            run = start(rank, size, folder / f"{name} {recompute}", *kind)
            with Operations(is_exchange) as exchanges:
                first = step(run)[0]
            found.setdefault(name, []).append(((first, step(run)[0]), len(exchanges.found)))
    return found


def fused(rank: int, size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Losses with torch's loop over parameters, and with its fused step, which GPUs take."""
    found = []
    for fuse in (False, True):
        run = start(rank, size, folder / str(fuse), *MOE, "parallel=ep", "parallel.ep=2", "optim.max_micro_batch=8")
        optimizer = run.engine.optimizer
        for group in optimizer.param_groups:
            group["fused"] = fuse
        if not fuse:  # the loop knows no flag of steps to be skipped
            optimizer.register_step_pre_hook(lambda stepped, *_: setattr(stepped, "found_inf", None))
        found.append([step(run)[0] for _ in range(3)])
    return found[0], found[1]


def on_two(rank: int, size: int, folder: Path) -> tuple[Any, Any]:
    return recomputed(rank, size, folder / "recomputed"), fused(rank, size, folder / "fused")


def test_recomputation_repeats_exchanges_only_where_nothing_is_kept_and_the_fused_step_is_the_same(
    tmp_path: Path,
) -> None:
    found, (loop, at_once) = run_distributed(on_two, 2, tmp_path / "runs")[0]
    for name, ways in found.items():
        losses, exchanges = zip(*ways, strict=True)
        assert losses[0] == losses[1] == losses[2], f"{name}: bit for bit"
        if name == "experts":
            layers, forward, backward = 2, 3, 2  # how many rows, the rows, and back; only rows have gradients
            assert exchanges[:2] == (layers * (forward + backward),) * 2
            assert exchanges[2] == layers * (2 * forward + backward)
    assert at_once == pytest.approx(loop, rel=1e-6)
