"""Shards of any model and their laws, and what cannot be parallelized: refused with what can be typed instead.

Tests in tests/parallel compare the shards with those of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.accounting import FP32, count
from gpt.config import CpMethod, ModelConfig, ParallelConfig, Precision, Recompute, Schedule, Strategy, TrainConfig
from gpt.planning.memory import RankMemory, micro_batches_in_flight, per_rank
from gpt.planning.rank_shards import parameter_shards
from gpt.topology import parallel_dims, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import rank_stages
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.learning import TINY
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


# What cannot be parallelized is refused in words, and what is to be typed instead is accepted.


EXPERTS = "model.ffn=moe model.n_expert=4 model.n_expert_per_token=2 model.ffn_hidden=32"
NARROW = "parallel=tp model.ffn=moe model.n_expert=2 model.ffn_hidden=24"
SLICES = "parallel.sequence_parallel=false"
PP = "model.n_layer=4 optim.max_micro_batch=4 parallel.pp=2"
ALONE = "parallel=ds_pp_zero1 parallel.pp=4 optim.max_micro_batch=4 model.n_layer=4 model.vocab_size=2048"
"""The last stage has the output matrix alone."""
UNITS, EACH = "parallel.fsdp_min_num_params=1000000", "parallel.reduce_each_micro_batch=true"
LORA = "model.lora.rank=4"
REFUSED = [
    # Context parallelism.
    (4, "parallel=cp parallel.cp=4 model.block_size=36", "parallel.cp=4 with model.block_size=36", ""),
    (4, f"parallel=cp {EXPERTS} model.capacity_factor=1.5", "model.capacity_factor=1.5", ""),
    (4, "parallel=cp parallel.cp_method=ring model.dropout=0.1", "parallel.cp_method=ring with model.dropout=0.1", ""),
    (4, "parallel=cp compile=default recompute=selective", "parallel.cp=2 with recompute=selective", ""),
    (4, "parallel=cp parallel.strategy=zero1", "parallel.strategy=zero1 with parallel.cp=2", ""),
    # Tensor parallelism.
    (4, "parallel=tp model.n_head=6 model.n_embd=48 parallel.tp=4", "model.n_head=6", ""),
    (4, "parallel=tp model.n_kv_head=1", "1 key and value heads", ""),
    (4, "parallel=tp model.ffn_hidden=33", "33 wide", ""),
    (4, f"{NARROW} parallel.tp=2", "12 on each rank", ""),
    (4, f"{NARROW} parallel.tp=4 model.n_head=8", "6 on each rank", ""),
    (4, "parallel=tp model.vocab_size=257", "257 rows", ""),
    (4, "parallel=tp model.vocab_size=257 model.vocab_multiple=6 parallel.tp=4", "258 rows", ""),
    (4, "parallel=tp model.block_size=15", "model.block_size=15", ""),
    (4, "parallel=tp model.block_size=15 model.dropout=0.1", "model.block_size=15", ""),
    (4, f"parallel=tp model.dropout=0.1 {SLICES}", "model.dropout=0.1", ""),
    (4, f"parallel=tp model.dropout=0.1 {SLICES} model.block_size=15", "model.dropout=0.1", ""),
    (4, "parallel=tp parallel.strategy=zero1", "parallel.strategy=zero1", ""),
    # Experts.
    (4, "model.ffn=swiglu parallel.ep=2", "model.ffn=swiglu", ""),
    (4, f"{EXPERTS} parallel.ep=3", "4 ranks that see different samples", ""),
    (8, f"{EXPERTS} model.n_expert=6 parallel.ep=4", "model.n_expert=6", ""),
    (4, f"{EXPERTS} parallel=hsdp parallel.dp_shard=2 parallel.ep=4", "in one replica of the model", ""),
    (12, f"{EXPERTS} parallel=fsdp parallel.ep=2 model.ffn_hidden=40", "6 ranks", ""),
    (4, f"{EXPERTS} parallel=zero1 parallel.ep=2", "zero1", ""),
    (4, f"{EXPERTS} parallel.ep=2 compile=default recompute=selective", "recompute=selective", ""),
    # Pipelines.
    (2, f"{PP} parallel.pp=8", "parallel.pp=8 with 2 ranks", "parallel.pp=2"),
    (8, f"{PP} parallel.pp=8 optim.max_micro_batch=1", "parallel.pp=8, and model.n_layer=4", "parallel.pp=4"),
    (
        *(4, f"{PP} parallel.pp=4 parallel.schedule=interleaved", "parallel.pp=4 with 2 stages on each rank"),
        "parallel.pp=2",
    ),
    (2, f"{PP} optim.max_micro_batch=16", "1 micro-batch (", "optim.max_micro_batch=8"),
    (2, f"{PP} optim.max_micro_batch=16 optim.weak_scaling=true", "1 micro-batch (", "optim.max_micro_batch=8"),
    (4, f"{PP} optim.global_batch=2", "1 micro-batch (", "optim.global_batch=4 optim.max_micro_batch=1"),
    (
        *(4, f"{PP} optim.global_batch=1 optim.weak_scaling=true", "1 micro-batch ("),
        "optim.global_batch=2 optim.max_micro_batch=1",
    ),
    (2, f"{PP} parallel.schedule=interleaved optim.global_batch=20", "5 micro-batches", "optim.max_micro_batch=2"),
    (
        *(2, f"{PP} parallel.schedule=interleaved optim.global_batch=7 optim.max_micro_batch=1", "7 micro-batches"),
        "optim.global_batch=8 optim.max_micro_batch=1",
    ),
    (4, f"{PP} parallel.schedule=dualpipev", "2 micro-batches", "optim.max_micro_batch=2"),
    (2, f"{PP} parallel.schedule=zbv recompute=full", "recompute=full", "parallel.schedule=interleaved"),
    (2, f"{PP} parallel.schedule=dualpipev compile=default", "compile=default", "parallel.schedule=interleaved"),
    (
        *(4, f"{PP} parallel.schedule=zbv parallel=fsdp", "parallel.reshard_after_forward=true"),
        "parallel.reshard_after_forward=false",
    ),
    (2, f"{PP} parallel.stages_per_rank=2", "parallel.stages_per_rank=2 with", "parallel.stages_per_rank=1"),
    (
        *(2, f"{PP} parallel.schedule=zbv parallel.stages_per_rank=1", "parallel.stages_per_rank=1 with"),
        "parallel.stages_per_rank=2",
    ),
    (2, f"{PP} parallel=zero1", "parallel.strategy=zero1 with parallel.pp=2", "parallel.strategy=fsdp"),
    # FSDP.
    (2, "parallel=ddp parallel.cpu_offload=true", "parallel.cpu_offload=true with parallel.strategy=ddp", ""),
    (
        *(4, "parallel=pp_fsdp parallel.cpu_offload=true parallel.pp=2 model.tie_embeddings=true"),
        *("parallel.cpu_offload=true with parallel.pp=2", ""),
    ),
    (4, f"parallel=ddp {UNITS}", "fsdp_min_num_params=1000000", "parallel=fsdp"),
    (
        4,
        f"parallel=fsdp {EXPERTS} parallel.ep=2 {UNITS}",
        "fsdp_min_num_params=1000000",
        "parallel.fsdp_min_num_params=null",
    ),
    (4, "parallel=fsdp parallel.fsdp_min_num_params=0", "fsdp_min_num_params=0", "parallel.fsdp_min_num_params=1"),
    (4, f"parallel=ddp {EACH}", EACH, "parallel=fsdp"),
    (4, "parallel=ddp parallel.reduce_dtype=bf16", "parallel.reduce_dtype=bf16 with", "parallel=fsdp"),
    (4, f"parallel=pp_fsdp {EACH}", EACH, "parallel.reduce_each_micro_batch=false"),
    (
        2,
        "parallel=fsdp_offload optim.optimizer=muon",
        "muon with parallel.cpu_offload=true",
        "parallel.cpu_offload=false",
    ),
    # Adapters.
    (2, f"{LORA} parallel=tp", "model.lora.rank=4 with parallel.tp=2", "parallel.tp=1"),
    (2, f"{LORA} {PP}", "model.lora.rank=4 with parallel.pp=2", "parallel.pp=1"),
    (2, f"{LORA} {MOE} parallel.ep=2", "model.lora.rank=4 with parallel.ep=2", "parallel.ep=1"),
    (2, f"{LORA} parallel=zero2", "model.lora.rank=4 with parallel.strategy=deepspeed", "parallel=fsdp"),
    (2, f"{LORA} float8=rowwise", "model.lora.rank=4 with float8=rowwise", "float8=none"),
    (2, f"{LORA} optim=muon", "model.lora.rank=4 with optim.optimizer=muon", "optim.optimizer=adamw"),
    (2, f"{LORA} {MOE} model.lora.targets=[up]", "model.lora.targets=[up]", "model.lora.targets=[query,value]"),
    # DeepSpeed.
    (
        2,
        "parallel=zero2 optim.optimizer=muon",
        "optim.optimizer=muon with parallel.strategy=deepspeed",
        "parallel=fsdp",
    ),
    (4, "parallel=zero2 parallel.pp=2", "zero_stage=2 with parallel.pp=2", "parallel.zero_stage=1"),
    (4, "parallel=zero3_offload parallel.pp=2", "zero_stage=3 with parallel.pp=2", "parallel=ds_pp_zero1"),
    *(
        (
            4,
            f"parallel=zero2 {EXPERTS} parallel.{name}=2",
            f"parallel.strategy=deepspeed with parallel.{name}=2",
            "parallel=fsdp",
        )
        for name in ("tp", "cp", "ep")
    ),
    (4, "parallel=ds_pp_zero1 parallel.pp=4 optim.max_micro_batch=1", "parallel.pp=4", "parallel.pp=2"),
    (4, f"{ALONE} model.norm_position=post", "the last stage has the output matrix alone", "parallel.zero_stage=0"),
    (
        4,
        "parallel=ds_pp_zero1 parallel.offload_optimizer=true",
        "with parallel.pp=2",
        "parallel.offload_optimizer=false",
    ),
    (4, "parallel=ds_pp model.logit_softcap=30", "parallel.pp=2 with model.logit_softcap", "parallel=pp parallel.pp=2"),
    (
        2,
        "parallel=cp parallel.cp_method=ring model.window=8",
        "ring with model.window=8",
        "parallel.cp_method=allgather",
    ),
    (4, "parallel=ds_pp parallel.schedule=gpipe", "parallel.schedule=gpipe", "parallel.schedule=1f1b"),
    (4, "parallel=zero2 precision=fp16", "precision=fp16 with parallel.strategy=deepspeed", "parallel=fsdp"),
    (4, "parallel=zero2 parallel.zero_stage=4", "parallel.zero_stage=4", "parallel.zero_stage=2"),
    (4, "parallel=zero2 parallel.offload_parameters=true", "with parallel.zero_stage=2", "parallel.zero_stage=3"),
    (4, "parallel=ds_zero0 parallel.offload_optimizer=true", "with parallel.zero_stage=0", "parallel.zero_stage=1"),
    *(
        (4, f"parallel={group} parallel.zero_stage=2", f"with parallel.strategy={group}", "parallel.strategy=deepspeed")
        for group in ("fsdp", "auto")
    ),
    (4, "parallel=fsdp parallel.offload_optimizer=true", "parallel.offload_optimizer=", "parallel=zero2"),
]
"""Ranks, overrides, and what the refusal names; the beginning of what to type next where it is one of several."""


@pytest.mark.parametrize(("ranks", "words", "found", "fix"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_run_is_refused_with_what_can(ranks: int, words: str, found: str, fix: str) -> None:
    def check(*given: str) -> None:
        config = config_from([*TINY, "optim.max_micro_batch=2", *given])
        config.validate()
        check_parallel_dims(config, ranks)

    with pytest.raises(ConfigError) as refusal:
        check(*words.split())
    assert found in refusal.value.found and refusal.value.fix.startswith(fix)
    alternatives = [alternative.split() for alternative in refusal.value.fix.split(", or ")]
    typed = [words for words in alternatives if all("=" in word and "model=" not in word for word in words)]
    assert typed
    for alternative in typed:
        keys = {word.split("=")[0] for word in alternative}
        check(*(word for word in words.split() if word.split("=")[0] not in keys), *alternative)


def test_a_lone_output_matrix_is_refused_for_its_norms_only() -> None:
    check_parallel_dims(config_from([*TINY, *ALONE.split()]), 4)


def test_a_file_of_deepspeed_belongs_to_it() -> None:
    with pytest.raises(ConfigError, match="DeepSpeed, whose key it is"):
        config_from(["parallel=fsdp", "parallel.deepspeed_config=ds.json"]).validate()
