"""Experts dealt out over ranks learn what one process learns, under copies, fsdp and hsdp."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.compose import compose_train, to_schema
from gpt.composition import lay_out
from gpt.config import TrainConfig
from gpt.errors import ConfigError
from gpt.evaluation import mean_loss
from gpt.gradients import Gradients
from gpt.pulse import Phase
from gpt.resume import save
from gpt.step import queue_step
from gpt.topology import Topology
from tests.distributed import run_distributed
from tests.parallel.learning import ACCUMULATIONS, BATCH, TINY, assert_same, learn, learn_alone, start, step

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
WAYS = {
    2: {"ep": ["parallel=ddp", "parallel.ep=2"], "fsdp ep": ["parallel=fsdp", "parallel.ep=2"]},
    4: {
        "ep=4": ["parallel=ddp", "parallel.ep=4"],
        "ep=2, 2 copies": ["parallel=ddp", "parallel.ep=2"],
        "fsdp, ep=2": ["parallel=fsdp", "parallel.ep=2"],
        "fsdp, ep=4": ["parallel=fsdp", "parallel.ep=4"],
        "hsdp, ep=2": ["parallel=hsdp", "parallel.dp_shard=2", "parallel.ep=2"],
    },
}
COMPOSED = {
    "pp, fsdp, ep=2": ["parallel=fsdp", "parallel.pp=2", "parallel.ep=2"],
}
"""With other dimensions, on four ranks, of which two see different samples: tried in four passes a step."""
Found = dict[tuple[str, str, int], dict[str, Any]]


def learn_all(rank: int, size: int, folder: Path) -> Found:
    every = list(itertools.product(MODELS, ACCUMULATIONS))
    tried = every if size == 2 else [*every[:2], every[3], every[4]]  # on four ranks each model, and both counts
    cases = [(way, *rest, size) for way, rest in itertools.product(WAYS[size].items(), tried)]
    cases += [(way, "dropless", 4, 2) for way in COMPOSED.items() if size == 4]
    found = {}
    for (way, words), model, accumulation, data_ranks in cases:
        micro = f"optim.micro_batch={BATCH // (data_ranks * accumulation)}"
        run = start(rank, size, folder / f"{way}{model}{accumulation}", *MODELS[model], *words, micro)
        found[way, model, accumulation] = learn(run)
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", MODELS)[0]


@pytest.mark.parametrize("size", WAYS)
def test_dealt_out_experts_learn_what_one_process_learns(
    size: int, reference: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found: Found = run_distributed(learn_all, size, tmp_path / "runs", timeout_s=300)[0]
    for (way, model, accumulation), learned in found.items():
        try:
            assert_same(learned, reference[model])
        except AssertionError as error:
            raise AssertionError(f"{way}, {model}, accumulation {accumulation}: {error}") from error


CROSSED = {
    "ddp": ["parallel=ddp"],
    "fsdp": ["parallel=fsdp"],
    **{way: WAYS[4][way] for way in ("ep=2, 2 copies", "fsdp, ep=2", "hsdp, ep=2")},
    "fsdp, ep=2, tp=2": ["parallel=fsdp_ep", "parallel.ep=2", "parallel.tp=2"],
}


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each way, go on under others: the losses of the steps after, and those that were to come."""
    found = {}
    words = [*MODELS["dropless"], "optim.micro_batch=4"]
    for saved, resumed_ones in (
        ("fsdp, ep=2", CROSSED),
        ("ep=2, 2 copies", ["fsdp", "fsdp, ep=2", "ep=2, 2 copies"]),
        ("fsdp", ["ep=2, 2 copies", "hsdp, ep=2"]),
        ("ddp", ["fsdp, ep=2"]),
        ("fsdp, ep=2, tp=2", ["fsdp, ep=2", "fsdp, ep=2, tp=2"]),
    ):
        run = start(rank, size, folder / saved, *CROSSED[saved], *words)
        for _ in range(2):
            step(run)
        save(run, lambda: True)
        to_come = [step(run)[0] for _ in range(3)]
        for resumed in resumed_ones:
            again = start(rank, size, folder / saved, *CROSSED[resumed], *words)
            assert again.step == 2
            found[saved, resumed] = ([step(again)[0] for _ in range(3)], to_come)
    return found


def test_a_checkpoint_goes_on_however_its_experts_lie(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert len(found) == 14
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"


def measure(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What a run records beside the loss: gradient figures, imbalance, and an evaluation that does not go round."""
    spread = ["parallel=ddp"] if size == 1 else WAYS[4]["fsdp, ep=2"]
    words = [*MODELS["shared, grouped queries"], *spread, f"optim.micro_batch={BATCH // size}"]
    run = start(rank, size, folder, *words)
    gradients = Gradients(run.config.model, run.world.device)
    record, _ = queue_step(run, gradients, Phase.training).finish(0.0)
    rank_of_data = run.layout.data_rank(rank)
    loss = partial(mean_loss, run.engine.module, run.engine.loss, run.samples, run.world)
    found = {"val_loss": loss(5, 1, rank_of_data, run.layout.data_ranks), "imbalance": record.expert_imbalance}
    return {**found, "mean": record.grad_mean, "std": record.grad_std, **record.layer_grad_norms}


def test_figures_are_those_of_one_process(tmp_path: Path) -> None:
    expected = run_distributed(measure, 1, tmp_path / "alone")[0]
    for found in run_distributed(measure, 4, tmp_path / "spread"):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)


class Exchanges(TorchDispatchMode):
    """Counts the exchanges of all with all that are really made."""

    made = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += operation is torch.ops._c10d_functional.all_to_all_single.default
        return operation(*args, **(kwargs or {}))


def recomputed(rank: int, size: int, folder: Path) -> dict[str, tuple[tuple[float, ...], int]]:
    """Losses of a few steps, and exchanges of the first, for each way to recompute."""
    found = {}
    for recompute in ("none", "selective", "full"):
        words = [*MODELS["dropless"], *WAYS[2]["fsdp ep"], "optim.micro_batch=8", f"recompute={recompute}"]
        run = start(rank, size, folder / recompute, *words)
        with Exchanges() as exchanges:
            first = step(run)[0]
        found[recompute] = ((first, *(step(run)[0] for _ in range(2))), exchanges.made)
    return found


def test_recomputation_repeats_exchanges_only_where_nothing_is_kept(tmp_path: Path) -> None:
    found = run_distributed(recomputed, 2, tmp_path / "runs")[0]
    losses, exchanges = zip(*found.values(), strict=True)
    assert losses[0] == losses[1] == losses[2]
    layers, forward, backward = 2, 3, 2  # how many rows, the rows, and back; only rows have gradients
    assert exchanges[:2] == (layers * (forward + backward),) * 2
    assert exchanges[2] == layers * (2 * forward + backward)


def in_bf16(rank: int, size: int, folder: Path) -> list[float]:
    spread = WAYS[2]["fsdp ep"] if size > 1 else ["parallel=ddp"]
    words = [*MODELS["shared, grouped queries"], *spread, f"optim.micro_batch={BATCH // size}", "precision=bf16"]
    run = start(rank, size, folder, *words)
    return [step(run)[0] for _ in range(3)]


def test_bf16_rows_travel_as_bf16(tmp_path: Path) -> None:
    one, two = (run_distributed(in_bf16, size, tmp_path / str(size))[0] for size in (1, 2))
    assert two == pytest.approx(one, rel=2e-3)


@pytest.mark.parametrize(
    ("words", "ranks", "found"),
    [
        (["parallel.ep=2"], 4, "model.ffn=swiglu"),
        ([*MOE, "parallel.ep=3"], 4, "4 ranks that see different samples"),
        ([*MOE, "model.n_expert=6", "parallel.ep=4"], 8, "model.n_expert=6"),
        ([*MOE, "parallel=hsdp", "parallel.dp_shard=2", "parallel.ep=4"], 4, "in one copy of the model"),
        ([*MOE, "parallel=fsdp", "parallel.ep=2", "model.ffn_hidden=40"], 12, "6 ranks"),
        ([*MOE, "parallel=zero1", "parallel.ep=2"], 4, "zero1"),
        ([*MOE, "parallel.ep=2", "compile=default", "recompute=selective"], 4, "recompute=selective"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_with_what_can(words: list[str], ranks: int, found: str) -> None:
    def laid_out(*more: str) -> Topology:
        return lay_out(to_schema(compose_train([*TINY, *words, *more]), TrainConfig), ranks)

    with pytest.raises(ConfigError) as refusal:
        laid_out()
    assert found in refusal.value.found
    laid_out(*refusal.value.fix.split(", or ")[0].split())


def fused(rank: int, size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Losses with torch's loop over parameters, and with its fused step, which GPUs take."""
    found = []
    for fuse in (False, True):
        run = start(rank, size, folder / str(fuse), *MODELS["dropless"], *WAYS[2]["ep"], "optim.micro_batch=8")
        for group in run.engine.optimizer.param_groups:
            group["fused"] = fuse
        found.append([step(run)[0] for _ in range(3)])
    return found[0], found[1]


def test_the_fused_optimizer_steps_dealt_out_and_whole_parameters(tmp_path: Path) -> None:
    loop, at_once = run_distributed(fused, 2, tmp_path / "runs")[0]
    assert at_once == pytest.approx(loop, rel=1e-6)
