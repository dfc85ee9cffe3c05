"""Experts sharded over ranks learn what one process learns, with replicas, fsdp and hsdp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.topology import ParallelDims
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    BATCH,
    TINY,
    Case,
    assert_all_same,
    learn_alone,
    learn_cases,
    start,
    step,
)

MOE = ["model.ffn=moe", "model.n_expert=4", "model.n_expert_per_token=2", "model.ffn_hidden=32"]
MODELS = {
    "dropless": MOE,
    "capacity, bias, plain": [
        *MOE,
        *("model.capacity_factor=1.0", "model.expert_balance=bias", "model.balance_bias_rate=0.1"),
        *("model.expert_ffn=standard", "model.expert_matmul=loop", "model.tie_embeddings=false"),
    ],
    "shared, grouped queries": [*MOE, "model.n_shared_expert=1", "model.n_kv_head=2", "model.z_coefficient=0.01"],
}
EP, FSDP = "parallel=ep parallel.ep=2", "parallel=fsdp_ep parallel.ep=2"
HSDP = "parallel=hsdp parallel.dp_shard=2 parallel.ep=2"
PLACES, SHARED = "capacity, bias, plain", "shared, grouped queries"
CASES = {
    2: [
        *(Case(EP, model, count) for model, count in zip(MODELS, (1, 2, 1), strict=True)),
        *(Case(FSDP, model, count) for model, count in zip(MODELS, (2, 1, 4), strict=True)),
        *(Case(f"{way} model.expert_matmul=grouped", PLACES) for way in (EP, FSDP)),
    ],
    4: [
        Case(EP, SHARED),
        Case("parallel=ep parallel.ep=4", "dropless", 1),
        Case(FSDP, PLACES, 1),
        Case("parallel=fsdp_ep parallel.ep=4", SHARED),
        Case(HSDP, PLACES),
        Case("parallel=pp_fsdp parallel.pp=2 parallel.ep=2", "dropless"),
    ],
}
"""Each way with every model on two ranks; on four, each way to share out ranks beside those of the experts."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", MODELS)[0]


@pytest.mark.parametrize("ranks", CASES)
def test_dealt_out_experts_learn_what_one_process_learns(
    ranks: int, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = run_distributed(learn_cases, ranks, tmp_path / "spread" / "runs", CASES[ranks], MODELS, timeout_s=300)[0]
    assert_all_same(CASES[ranks], found, alone)


CROSSED = {
    "ddp": ["parallel=ddp"],
    "fsdp": ["parallel=fsdp"],
    "ep=2, 2 copies": EP.split(),
    "fsdp, ep=2": FSDP.split(),
    "hsdp, ep=2": HSDP.split(),
    "fsdp, ep=2, tp=2": [*FSDP.split(), "parallel.tp=2"],
}


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each way, go on under others: the losses of the steps after, and those that were to come."""
    found = {}
    words = [*MODELS["dropless"], "model.n_layer=1", "optim.max_micro_batch=8"]
    for saved, resumed_ones in (
        ("fsdp, ep=2", ["fsdp, ep=2", "ddp"]),
        ("ep=2, 2 copies", ["ep=2, 2 copies", "fsdp"]),
        ("ddp", ["fsdp, ep=2, tp=2"]),
        ("fsdp, ep=2, tp=2", ["hsdp, ep=2"]),
    ):
        run = start(rank, size, folder / saved, *CROSSED[saved], *words)
        step(run)
        save(run)
        to_come = [step(run)[0] for _ in range(2)]
        for resumed in resumed_ones:
            again = start(rank, size, folder / saved, *CROSSED[resumed], *words)
            assert again.step == 1
            found[saved, resumed] = ([step(again)[0] for _ in range(2)], to_come)
    return found


def test_a_checkpoint_goes_on_however_its_experts_lie(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert len(found) == 6 and {resumed for _, resumed in found} == set(CROSSED)
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"


class Exchanges(TorchDispatchMode):
    """Counts the exchanges of all with all that are really made."""

    made = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += operation is torch.ops._c10d_functional.all_to_all_single.default
        return operation(*args, **(kwargs or {}))


def recomputed(rank: int, size: int, folder: Path) -> dict[str, tuple[tuple[float, ...], int]]:
    """Losses of two steps, and exchanges of the first, for each way to recompute."""
    found = {}
    for recompute in ("none", "selective", "full"):
        words = [*MODELS["dropless"], *FSDP.split(), "optim.max_micro_batch=8", f"recompute={recompute}"]
        run = start(rank, size, folder / recompute, *words)
        with Exchanges() as exchanges:
            first = step(run)[0]
        found[recompute] = ((first, step(run)[0]), exchanges.made)
    return found


def in_bf16(rank: int, size: int, folder: Path) -> list[float]:
    spread = FSDP.split() if size > 1 else ["parallel=ddp"]
    words = [*MODELS[SHARED], *spread, f"optim.max_micro_batch={BATCH // size}", "precision=bf16"]
    run = start(rank, size, folder, *words)
    return [step(run)[0] for _ in range(2)]


def fused(rank: int, size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Losses with torch's loop over parameters, and with its fused step, which GPUs take."""
    found = []
    for fuse in (False, True):
        run = start(rank, size, folder / str(fuse), *MODELS["dropless"], *EP.split(), "optim.max_micro_batch=8")
        optimizer = run.engine.optimizer
        for group in optimizer.param_groups:
            group["fused"] = fuse
        if not fuse:  # the loop knows no flag of steps to be skipped
            optimizer.register_step_pre_hook(lambda stepped, *_: setattr(stepped, "found_inf", None))
        found.append([step(run)[0] for _ in range(3)])
    return found[0], found[1]


def on_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    ways = {"recomputed": recomputed, "bf16": in_bf16, "fused": fused}
    return {name: way(rank, size, folder / name) for name, way in ways.items()}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found out, in one process group."""
    return run_distributed(on_two, 2, tmp_path_factory.mktemp("on_two") / "runs")[0]


def test_recomputation_repeats_exchanges_only_where_nothing_is_kept(of_two: dict[str, Any]) -> None:
    losses, exchanges = zip(*of_two["recomputed"].values(), strict=True)
    assert losses[0] == losses[1] == losses[2]
    layers, forward, backward = 2, 3, 2  # how many rows, the rows, and back; only rows have gradients
    assert exchanges[:2] == (layers * (forward + backward),) * 2
    assert exchanges[2] == layers * (2 * forward + backward)


def test_bf16_rows_travel_as_bf16(of_two: dict[str, Any], tmp_path: Path) -> None:
    alone = run_distributed(in_bf16, 1, tmp_path / "alone")[0]
    assert of_two["bf16"] == pytest.approx(alone, rel=2e-3)


def test_the_fused_optimizer_steps_dealt_out_and_whole_parameters(of_two: dict[str, Any]) -> None:
    loop, at_once = of_two["fused"]
    assert at_once == pytest.approx(loop, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "ranks", "found"),
    [
        (["parallel.ep=2"], 4, "model.ffn=swiglu"),
        ([*MOE, "parallel.ep=3"], 4, "4 ranks that see different samples"),
        ([*MOE, "model.n_expert=6", "parallel.ep=4"], 8, "model.n_expert=6"),
        ([*MOE, "parallel=hsdp", "parallel.dp_shard=2", "parallel.ep=4"], 4, "in one replica of the model"),
        ([*MOE, "parallel=fsdp", "parallel.ep=2", "model.ffn_hidden=40"], 12, "6 ranks"),
        ([*MOE, "parallel=zero1", "parallel.ep=2"], 4, "zero1"),
        ([*MOE, "parallel.ep=2", "compile=default", "recompute=selective"], 4, "recompute=selective"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_with_what_can(words: list[str], ranks: int, found: str) -> None:
    def laid_out(*more: str) -> ParallelDims:
        return check_parallel_dims(config_from([*TINY, *words, *more]), ranks)

    with pytest.raises(ConfigError) as refusal:
        laid_out()
    assert found in refusal.value.found
    laid_out(*refusal.value.fix.split(", or ")[0].split())
