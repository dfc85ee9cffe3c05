"""Memory that the ranks of every kind of engine hold is what the plan says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from gpt.accounting import BF16, FP32
from gpt.config import Precision, TrainConfig
from gpt.planning.memory import parallel_factors, states
from gpt.planning.shards import activation_bytes, cast_elements, parameter_shards
from gpt.topology import split_batch
from gpt.topology.pipeline import rank_stages
from gpt.topology.rules import check_parallel_dims
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, DEEPSPEED, MODELS, compose, held_bytes, living_bytes, start_composed, step

WORDS = ["model.n_head=4"]
LAYERS = "model.n_layer=4"
"""For pipelines, some of which have two stages on each of two ranks."""
LAYOUTS = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=hsdp parallel.dp_shard=2",
    "tp": "parallel=tp",
    "fsdp x tp": "parallel=fsdp_tp",
    "pp": "parallel=ddp parallel.pp=2",
    "pp in a V": "parallel=ddp parallel.pp=2 parallel.schedule=zbv",
    "pp of two stages": "parallel=ddp parallel.pp=2 parallel.schedule=interleaved",
    "pp x fsdp": "parallel=fsdp parallel.pp=2",
    "cp": "parallel=cp",
    "cp x fsdp": "parallel=fsdp parallel.cp=2",
    "pp x tp": "parallel=tp parallel.pp=2",
    "ep": "parallel=ep parallel.ep=2",
    "ep x fsdp": "parallel=fsdp_ep parallel.ep=2",
    "ep x tp": "parallel=ep parallel.ep=2 parallel.tp=2",
    "ep x tp x fsdp": "parallel=fsdp_ep parallel.ep=2 parallel.tp=2",
    "ZeRO 0": "parallel=ds_zero0",
    "ZeRO 1": "parallel=ds_zero1",
    "ZeRO 1 in bf16": "parallel=ds_zero1 precision=bf16",
    "ZeRO 2": "parallel=zero2",
    "ZeRO 3": "parallel=zero3",
    "ZeRO 3 in bf16": "parallel=zero3 precision=bf16",
    # With two micro-batches a step the first stage holds all gradients between its two backward passes only, where
    # ``held_bytes``, which looks ahead of forward passes, does not see them.
    "pp x ZeRO 1": "parallel=ds_pp_zero1 optim.max_micro_batch=2",
}
LONG = ["model.n_embd=64", "model.block_size=64"]
"""For recomputation, which leaves so little that what torch keeps once for each micro-batch shows."""
DENSE = "untied, grouped queries"
ON_4 = ("zero1", "fsdp", "hsdp", "ep x tp x fsdp", "pp x ZeRO 1")
"""Where two ranks would leave something whole; and all that shards in two ways."""
ACCUMULATED = ("ddp", "zero1", "fsdp", "tp", "cp", "ep x fsdp")
"""With several micro-batches a step, as all pipelines and all of DeepSpeed."""
CASES = [
    *((name, DENSE) for name in LAYOUTS if "ep" not in name.split()),
    *((name, "tied") for name in ("ddp", "pp", "pp x tp")),
    *((name, "experts") for name in ("ep", "ep x fsdp", "ep x tp", "ep x tp x fsdp")),
]


def ranks_of(name: str) -> int:
    """Four for a layout that shards in two ways or would leave something whole on two, else two."""
    return 4 if " x " in name or name in ON_4 else 2


Cases = dict[tuple[str, ...], TrainConfig]
Held = dict[tuple[str, ...], list[tuple[int, int, int]]]
"""Bytes of parameters, gradients and optimizer on each rank, by layout and model."""


def config_of(name: str, model: str) -> TrainConfig:
    layers = [LAYERS] if "pp" in name.split() else []
    # What is held between micro-batches shows in what each engine adds, not in how its shards are combined.
    micro = 2 if name in ACCUMULATED else 4 if {"pp", "ZeRO"} & set(name.split()) else BATCH
    return compose(*WORDS, f"optim.max_micro_batch={micro}", *layers, *LAYOUTS[name].split(), *MODELS[model])


def hold(rank: int, size: int, folder: Path, cases: Cases) -> dict[tuple[str, ...], tuple[int, int, int]]:
    found = {}
    for number, (case, config) in enumerate(cases.items()):
        run = start_composed(rank, size, folder / str(number), config)
        step(run)
        found[case] = held_bytes(run)
    return found


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    found: Held = {}
    for size in (2, 4):
        cases = {(name, model): config_of(name, model) for name, model in CASES if ranks_of(name) == size}
        ranks = run_distributed(
            hold, size, tmp_path_factory.mktemp("held") / "runs", cases, timeout_s=400, imports=DEEPSPEED
        )
        found |= {case: [rank[case] for rank in ranks] for case in cases}
    return found


@pytest.mark.parametrize(("name", "model"), CASES)
def test_every_rank_holds_what_the_plan_says(name: str, model: str, held: Held) -> None:
    config, by_rank = config_of(name, model), held[name, model]
    dims = check_parallel_dims(config, len(by_rank))
    assert split_batch(config.optim, dims.data_ranks).global_batch == BATCH
    line = len(by_rank) // dims.pp
    for stage in range(dims.pp):
        said = states(config, dims, parameter_shards(config.model, dims, rank_stages(config, stage)))
        expected = (said.parameters, said.gradients, said.optimizer)
        # The first of those that share a tensor has the largest part of it.
        found = tuple(map(max, zip(*by_rank[stage * line : (stage + 1) * line], strict=True)))
        assert found == expected, f"{name} of {model}, stage {stage}"


def test_memory_falls_as_promised(held: Held) -> None:
    most = {name: tuple(map(max, zip(*held[name, DENSE], strict=True))) for name in ("ddp", "zero1", "fsdp")}
    whole, stepped, shards = most["ddp"], most["zero1"], most["fsdp"]
    assert stepped[0] == whole[0]
    assert stepped[1:] == pytest.approx([part / 4 for part in whole[1:]], rel=0.03)
    assert shards == pytest.approx([part / 4 for part in whole], rel=0.03)


WAYS = {
    "tp": "parallel=tp",
    "whole stream": "parallel=tp parallel.sequence_parallel=false",
    "cp": "parallel=cp",
    "ring": "parallel=cp parallel.cp_method=ring",
}
PRECISIONS = {
    "tp": ("bf16", "fp32"),
    "whole stream": ("fp32", "bf16"),
    "cp": ("bf16", "fp32"),
    "ring": ("fp32", "bf16"),
}
"""Of the dense model and of the one with experts: each way and each model in both."""
COPIES = {"ddp": "parallel=ddp", "ep": "parallel=ep parallel.ep=2 model.capacity_factor=1"}
"""With as many rows for every expert: else how many are sent to a rank depends on the tokens."""
ACTIVATIONS = {
    **{
        (way, model, precision): [f"precision={precision}", *WAYS[way].split(), *MODELS[model]]
        for (way, (dense, mixture)), model in itertools.product(PRECISIONS.items(), MODELS)
        for precision in ({"tied": "fp32", DENSE: dense, "experts": mixture}[model],)
    },
    **{
        (way, "experts", "selective"): ["recompute=selective", *words.split(), *MODELS["experts"], *LONG]
        for way, words in {**WAYS, **COPIES}.items()
    },
}


def keep(rank: int, size: int, folder: Path, cases: Cases) -> dict[tuple[str, ...], int]:
    each = enumerate(cases.items())
    return {case: living_bytes(start_composed(rank, size, folder / str(i), config)) for i, (case, config) in each}


def test_activations_of_a_rank_are_what_the_plan_says(tmp_path: Path) -> None:
    cases: Cases = {case: compose(*WORDS, "optim.max_micro_batch=2", *words) for case, words in ACTIVATIONS.items()}
    found = run_distributed(keep, 2, tmp_path / "runs", cases, timeout_s=300)
    for case, config in cases.items():
        dims, width = check_parallel_dims(config, 2), BF16 if config.precision is Precision.bf16 else FP32
        micro = split_batch(config.optim, dims.data_ranks).micro
        said = activation_bytes(config.model, micro, config.precision, config.recompute, parallel_factors(config, dims))
        casts = BF16 * cast_elements(parameter_shards(config.model, dims)) if width == BF16 else 0
        tokens, columns = micro * config.model.block_size // dims.cp, config.model.padded_vocab // dims.tp
        total = said.embedding + config.model.n_layer * said.recomputed + said.final + casts + width * tokens * columns
        assert total == pytest.approx(max(rank[case] for rank in found), rel=0.01), case
