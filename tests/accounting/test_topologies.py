"""Laws of the shards of any model, and activations by hand; tests/parallel compares shards with those of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.accounting import FP32, count
from gpt.config import (
    CpMethod,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    Schedule,
    Strategy,
    TrainConfig,
)
from gpt.planning.memory import RankMemory, micro_batches_in_flight, per_rank
from gpt.planning.rank_shards import parameter_shards
from gpt.topology import parallel_dims, split_batch
from gpt.topology.schedules import rank_stages
from tests.support.small_models import LLAMA, MOE, configs, optim, small

OPTIM = optim(global_batch=64, max_micro_batch=2)
HAND: dict[str, Any] = {**LLAMA, "n_layer": 4, "n_kv_head": 2, "ffn_hidden": 64, "block_size": 16, "vocab_size": 64}
"""Of a block: two gains of 32, matrices of 32 x 32, 16 x 32, 16 x 32, 32 x 32, and three of 64 x 32; 9280 in all.
Around them an embedding and an output matrix of 64 x 32, and a gain of 32."""


def run(model: ModelConfig, **parallel: Any) -> TrainConfig:
    return TrainConfig(model=model, optim=OPTIM, parallel=ParallelConfig(**{"strategy": Strategy.ddp, **parallel}))


def memory(config: TrainConfig, ranks: int) -> RankMemory:
    dims = parallel_dims(config.parallel, ranks)
    return per_rank(config, dims, split_batch(config.optim, dims.data_ranks))


@pytest.mark.parametrize("model", [HAND, {}, {**MOE, "n_shared_expert": 1}], ids=["llama", "gpt2", "experts"])
def test_one_rank_along_a_dimension_changes_nothing(model: dict[str, Any]) -> None:
    alone = memory(run(small(**model)), 1)
    for keys in ({"schedule": Schedule.zbv}, {"strategy": Strategy.fsdp, "dp_shard": 1}):
        found = memory(run(small(**model), **keys), 1)
        for part in ("parameters", "gradients", "activations"):
            assert getattr(found, part) == getattr(alone, part)


LAYOUTS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from([Strategy.ddp, Strategy.fsdp]),
        "tp": st.sampled_from([1, 2, 4]),
        "cp": st.sampled_from([1, 2]),
        "pp": st.sampled_from([1, 2, 3]),
        "schedule": st.sampled_from(list(Schedule)),
    }
)


@settings(max_examples=150)
@given(configs(), LAYOUTS, st.sampled_from([1, 2, 3]))
def test_the_ranks_of_a_copy_hold_all_of_it(model: ModelConfig, parallel: dict[str, Any], data_ranks: int) -> None:
    config = run(replace(model, n_layer=6), **parallel)
    dims = parallel_dims(config.parallel, data_ranks * parallel["tp"] * parallel["cp"] * parallel["pp"])
    held = [parameter_shards(config.model, dims, rank_stages(config, rank)) for rank in range(dims.pp)]
    sharing = dims.tp * (dims.dp_shard * dims.cp if dims.is_sharded else 1)
    assert sharing * sum(rank.stored() for rank in held) >= count(config.model).total
    assert sum(rank.layers for rank in held) == 6
    for rank in held:
        assert rank.stored() <= rank.elements <= count(config.model).total


@settings(max_examples=60)
@given(configs(), st.sampled_from((Precision.fp32, Precision.bf16)), st.sampled_from(Recompute))
def test_more_ranks_along_a_dimension_never_need_more(
    model: ModelConfig, precision: Precision, recompute: Recompute
) -> None:
    model = replace(model, n_layer=6, block_size=16)

    def total(ranks: int, **parallel: Any) -> int:
        return memory(replace(run(model, **parallel), precision=precision, recompute=recompute), ranks).total

    for key in ("tp", "cp"):
        for strategy in (Strategy.ddp, Strategy.fsdp):
            sizes = [total(2 * size, strategy=strategy, **{key: size}) for size in (1, 2, 4)]
            assert sizes == sorted(sizes, reverse=True), (key, strategy)
    states = [memory(run(model, strategy=Strategy.fsdp), ranks).parameters for ranks in (1, 2, 4, 8)]
    assert states == sorted(states, reverse=True)


def test_activations_are_cut_by_context_parallelism() -> None:
    alone = memory(run(small(**HAND)), 1)
    shared = memory(run(small(**HAND), cp=2, cp_method=CpMethod.ring), 2)
    angles = 2 * 2 * 8 * (8 // 2) * FP32  # sine and cosine, for queries and keys, 8 tokens, heads 8 wide
    assert shared.activations == pytest.approx(alone.activations / 2 + 4 * angles, rel=0.001)
    assert shared.logits == alone.logits // 2
    gathered = memory(run(small(**HAND), cp=2), 2)
    keys = 2 * (2 * 16) * (2 * 8) * FP32  # both, of two sequences of 16 tokens, 2 heads 8 wide
    result = 2 * 8 * 32 * FP32  # of attention, once more: two sequences, 8 tokens, 32 wide
    assert gathered.activations - shared.activations == 4 * (keys // 2 + result)


def test_activations_are_cut_by_tensor_parallelism() -> None:
    config = run(small(**HAND))
    alone = memory(config, 1)
    cut_up, whole = (memory(run(config.model, tp=2, sequence_parallel=s), 2) for s in (True, False))
    tokens, norms = 2 * 16, 2 * 4 + 1
    assert whole.activations - cut_up.activations == norms * tokens * (2 * 32 + 1) * FP32 // 2
    assert cut_up.logits == alone.logits // 2


@pytest.mark.parametrize(
    ("schedule", "by_rank"),
    [
        ("gpipe", [8, 8, 8, 8]),
        ("1f1b", [4, 3, 2, 1]),
        # (4 + 6 + 1) / 2, (4 + 4 + 1) / 2, ...: micro-batches through one of two stages, rounded up.
        ("interleaved", [6, 5, 4, 3]),
        ("zbv", [4, 4, 4, 4]),
        ("dualpipev", [5, 5, 5, 5]),
    ],
)
def test_micro_batches_in_flight_by_schedule(schedule: str, by_rank: list[int]) -> None:
    parallel = ParallelConfig(Strategy.ddp, pp=4, schedule=Schedule[schedule])
    assert [micro_batches_in_flight(parallel, rank, 8) for rank in range(4)] == by_rank
    assert micro_batches_in_flight(parallel, 0, 1) == 1
    assert micro_batches_in_flight(replace(parallel, pp=1), 0, 8) == 1
