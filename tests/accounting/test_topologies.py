"""Devices by their names, shards of any model and their laws, and what is refused with what can be typed instead.

Tests in tests/parallel compare the shards with those of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.accounting import FP32, Flops, count, expand, peak_flops, utilization
from gpt.config import CpMethod, ModelConfig, ParallelConfig, Precision, Recompute, Schedule, Strategy, TrainConfig
from gpt.planning.memory import RankMemory, micro_batches_in_flight, per_rank
from gpt.planning.rank_shards import parameter_shards
from gpt.topology import parallel_dims, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import rank_stages
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.learning import TINY
from tests.support.planning import refused
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
LATENT = "model.kv_lora_rank=8 model.rope_head_width=4 model.n_kv_head=null"
NARROW = "parallel=tp model.ffn=moe model.n_expert=2 model.ffn_hidden=24"
SLICES = "parallel.sequence_parallel=false"
PP = "model.n_layer=4 optim.max_micro_batch=4 parallel.pp=2"
ALONE = "parallel=ds_pp_zero1 parallel.pp=4 optim.max_micro_batch=4 model.n_layer=4 model.vocab_size=2048"
"""The last stage has the output matrix alone."""
UNITS, EACH = "parallel.fsdp_min_num_params=1000000", "parallel.reduce_each_micro_batch=true"
LORA = "model.lora.rank=4"
FREE = "optim.optimizer=adamw_schedule_free optim.schedule=constant"
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
    (2, f"{LORA} {EXPERTS} parallel.ep=2", "model.lora.rank=4 with parallel.ep=2", "parallel.ep=1"),
    (2, f"{LORA} parallel=zero2", "model.lora.rank=4 with parallel.strategy=deepspeed", "parallel=fsdp"),
    (2, f"{LORA} float8=rowwise", "model.lora.rank=4 with float8=rowwise", "float8=none"),
    (2, f"{LORA} optim=muon", "model.lora.rank=4 with optim.optimizer=muon", "optim.optimizer=adamw"),
    (2, f"{LORA} {EXPERTS} model.lora.targets=[up]", "model.lora.targets=[up]", "model.lora.targets=[query,value]"),
    (2, f"{LORA} {LATENT}", "model.lora.targets=[query,value]", "model.lora.targets=[output,up]"),
    (2, f"parallel=tp {LATENT}", "parallel.tp=2 with model.kv_lora_rank=8", "parallel.tp=1"),
    (2, f"{FREE} parallel=cp", "schedule_free without parallel.cp=1", "parallel.cp=1"),
    (
        2,
        f"{FREE} parallel=fsdp_offload",
        "schedule_free without parallel.cpu_offload=false",
        "parallel.cpu_offload=false",
    ),
    (2, f"{FREE} parallel=zero2", "schedule_free with parallel.strategy=deepspeed", "parallel=fsdp"),
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
        "parallel=ds_pp_zero1 parallel.cpu_offload=true",
        "with parallel.pp=2",
        "parallel.cpu_offload=false",
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
    (4, "parallel=ds_zero0 parallel.cpu_offload=true", "with parallel.zero_stage=0", "parallel.zero_stage=1"),
    *(
        (4, f"parallel={group} parallel.zero_stage=2", f"with parallel.strategy={group}", "parallel.strategy=deepspeed")
        for group in ("fsdp", "auto")
    ),
]
"""Ranks, overrides, and what the refusal names; the beginning of what to type next where it is one of several."""


@pytest.mark.parametrize(("ranks", "words", "found", "fix"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_run_is_refused_with_what_can(ranks: int, words: str, found: str, fix: str) -> None:
    def check(*given: str) -> None:
        config = config_from([*TINY, "optim.max_micro_batch=2", *given])
        config.validate()
        check_parallel_dims(config, ranks)

    told = refused(check, *words.split(), found=found).fix
    assert told.startswith(fix)
    alternatives = [alternative.split() for alternative in told.split(", or ")]
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


COMBINATIONS = {
    "optim.patience=2 eval.interval=0": "optim.patience=2 with eval.interval=0",
    "optim.target_val_loss=0": "optim.target_val_loss",
    "logging.breakdown_interval=5 profile=true": "logging.breakdown_interval=0",
    # Documents packed into sequences.
    "data.document_end=10": "data.document_end=10 with data.pack=none",
    "data.pack=documents parallel=cp": "parallel.cp=2",
    "data.pack=documents parallel=zero2": "DeepSpeed",
    "data.pack=documents model.attention=my.part:Attention": "model.attention=my.part:Attention",
    # Text that is tokenized while it is read.
    "data.stream=true data=synthetic": "data=synthetic",
    "data.stream=true data=tokens data.path=x": "data=tokens",
    "data.stream=true data=text data.path=x data.tokenizer=char": "data.tokenizer=char",
    "data.stream=true data=tinystories": "data.tokenizer=sentencepiece",
    "data.stream=true data=files data.path=x data.max_bytes=9": "data.max_bytes=9",
    "data.stream=true data=openwebtext data.revision=null": "without data.revision",
    "data.stream=true data=text data.path=x data.shuffle_buffer=0": "data.shuffle_buffer=0",
    # A loss without whole logits.
    **{
        f"chunked_loss=true {words}": "chunked_loss=true with"
        for words in ("parallel=tp", "parallel=pp", "parallel=zero2", "model.logit_softcap=30", "precision=fp16")
    },
    # Checkpoints.
    "checkpoint.memory_interval=10 checkpoint.asynchronous=false": "interval=10 with checkpoint.asynchronous=false",
    "checkpoint.memory_interval=10 parallel=zero2": "checkpoint.memory_interval=10 with parallel.strategy=deepspeed",
    "checkpoint.memory_interval=-1": "checkpoint.memory_interval=-1",
    "checkpoint.scrub=true checkpoint.asynchronous=false": "checkpoint.scrub=true with checkpoint.asynchronous=false",
}
"""Overrides, and what their refusal says."""


@pytest.mark.parametrize("words", COMBINATIONS)
def test_keys_that_do_not_go_together_are_refused(words: str) -> None:
    refused(config_from(words.split()).validate, said=COMBINATIONS[words])


# Peaks by the names that drivers report, and what follows from them.


KNOWN_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L40S": 362,
    "AMD Instinct MI300X": 1307,
    "NVIDIA A10": 125,
    "NVIDIA RTX A6000": 154.8,
    "Tesla V100-SXM2-32GB": None,
}
KNOWN_FP32 = {
    "Tesla V100-SXM2-16GB": 15.7,
    "Tesla V100-SXM2-32GB": 15.7,
    "Tesla V100-PCIE-32GB": 14,
    "NVIDIA A100-SXM4-80GB": 19.5,
    "NVIDIA H100 80GB HBM3": 67,
    "NVIDIA B200": None,
}
UNKNOWN = (
    "NVIDIA L40",
    "NVIDIA A10G",
    "NVIDIA H20",
    "NVIDIA H200 NVL",
    "NVIDIA GH200 480GB",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "GRID A100-40C",
    "NVIDIA GeForce RTX 3050",
    "NVIDIA GeForce RTX 4070 SUPER",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "AMD Instinct MI300A",
    "AMD EPYC 9654 96-Core Processor",
    "cpu",
    "",
)


SHORT = {
    "H100": ["NVIDIA H100 80GB HBM3"],
    "nvidia_h100_80gb_hbm3": ["NVIDIA H100 80GB HBM3"],
    "H100-SXM5-80GB": ["NVIDIA H100 80GB HBM3"],
    "h100 pcie": ["NVIDIA H100 PCIe"],
    "H100-94GB": ["NVIDIA H100 NVL"],
    "A100": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"],
    "a100-80": ["NVIDIA A100-SXM4-80GB"],
    "A100 80GB PCIe": ["NVIDIA A100 80GB PCIe"],
    "V100-32GB": ["Tesla V100-SXM2-32GB"],
    "rtx4090": ["NVIDIA GeForce RTX 4090"],
    "RTX 4080": ["NVIDIA GeForce RTX 4080"],
    "RTX 4070 Ti": ["NVIDIA GeForce RTX 4070 Ti"],
    "geforce_rtx_4070_ti_super": ["NVIDIA GeForce RTX 4070 Ti SUPER"],
    "RTX 3060 12GB": ["NVIDIA GeForce RTX 3060"],
    "RTX 3060 8GB": [],
    "mi300x": ["AMD Instinct MI300X"],
    "H20": [],
    "A100-64GB": [],
    "80GB": [],
    "": [],
}


@pytest.mark.parametrize(("name", "meant"), SHORT.items())
def test_short_names_mean_one_device_or_leave_the_memory_open(name: str, meant: list[str]) -> None:
    assert expand(name) == meant


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_device_that_is_not_in_the_table_has_no_short_name_and_borrows_no_peak(name: str) -> None:
    assert expand(name) == []
    assert [peak_flops(name, precision) for precision in Precision] == [None] * len(Precision)


KNOWN_TF32 = {
    "NVIDIA A100-SXM4-80GB": 156,
    "NVIDIA H100 80GB HBM3": 494.5,
    "NVIDIA H100 PCIe": 378,
    "NVIDIA H100 NVL": 417.5,
    "NVIDIA H200": 494.5,
    "NVIDIA L40S": 183,
    "NVIDIA GeForce RTX 3090": 35.6,
}
KNOWN_FP16 = {
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "NVIDIA A100-SXM4-40GB": 312,
}


KNOWN = {
    (Precision.bf16, False): KNOWN_BF16,
    (Precision.fp32, False): KNOWN_FP32,
    (Precision.fp32, True): KNOWN_TF32,
    (Precision.fp16, False): KNOWN_FP16,
}


@pytest.mark.parametrize(
    ("asked", "name", "tflops"), [(asked, *row) for asked, known in KNOWN.items() for row in known.items()]
)
def test_known_peaks(asked: tuple[Precision, bool], name: str, tflops: float | None) -> None:
    assert peak_flops(name, *asked) == (tflops and tflops * 1e12), "none where device or vendor has none"


def test_tf32_changes_only_the_peak_of_fp32_where_the_device_has_it() -> None:
    for name in KNOWN_TF32:
        assert peak_flops(name, Precision.bf16, tf32=True) == peak_flops(name, Precision.bf16)
    for name in (name for name in KNOWN_FP16 if name.startswith("Tesla")):
        assert peak_flops(name, Precision.fp32, tf32=True) == peak_flops(name, Precision.fp32)


CORES_AND_BOOST_MHZ = {
    "3060": (3584, 1777),
    "3060 Ti": (4864, 1665),
    "3070": (5888, 1725),
    "3080": (8704, 1710),
    "3090": (10496, 1695),
    "3090 Ti": (10752, 1860),
    "4060": (3072, 2460),
    "4060 Ti": (4352, 2535),
    "4070": (5888, 2475),
    "4070 Ti": (7680, 2610),
    "4070 Ti SUPER": (8448, 2610),
    "4080": (9728, 2505),
    "4080 SUPER": (10240, 2550),
    "4090": (16384, 2520),
    "4090 D": (14592, 2520),
}
ADVERTISED = {"3060 Ti": 130, "3070": 163, "3080": 238, "3090": 285, "3090 Ti": 320, "4070 Ti": 641}
"""NVIDIA's Tensor TFLOP/s and, of the RTX 40, TOPS: sparse, accumulated in 16 bits, and the latter in 8 bits."""


@pytest.mark.parametrize("card", CORES_AND_BOOST_MHZ)
def test_the_peaks_of_cards_follow_from_their_cores_and_clocks(card: str) -> None:
    cores, boost_mhz = CORES_AND_BOOST_MHZ[card]
    name = f"NVIDIA GeForce RTX {card}"
    fp32, bf16 = peak_flops(name, Precision.fp32), peak_flops(name, Precision.bf16)
    assert fp32 == pytest.approx(2 * cores * boost_mhz * 1e6, rel=5e-3)
    assert bf16 == pytest.approx(4 * cores * boost_mhz * 1e6, rel=5e-3)
    if card in ADVERTISED:
        assert bf16 == pytest.approx(ADVERTISED[card] * 1e12 / (4 if card.startswith("3") else 8), rel=1e-2)


def test_utilization_of_a_published_run() -> None:
    # PaLM, appendix B: 540B on 6144 chips of 275 TFLOP/s, 238,300 tokens/s, 46.2 % with attention and 45.7 % without.
    # 118 layers, 48 heads 256 wide, 2048 tokens; the parameters beside attention are those of table 1.
    parameters, attention = 540.35e9, 12 * 118 * 48 * 256 * 2048
    flops = Flops(projections=0, attention=attention, ffn=int(6 * parameters), logits=0)
    used = utilization(flops, tokens_per_s=238_300 / 6144, peak_flops_per_s=275e12)
    assert used.mfu_palm == pytest.approx(0.462, abs=0.001)
    assert used.hfu == used.mfu_palm
    assert used.mfu_causal == pytest.approx((0.462 + 0.457) / 2, abs=0.001)
    assert used.tflops_per_s == pytest.approx(0.462 * 275, rel=0.002)


def test_no_utilization_without_a_peak() -> None:
    used = utilization(Flops(1, 2, 3, 4), tokens_per_s=1e12, peak_flops_per_s=None)
    assert (used.tflops_per_s, used.mfu_palm, used.mfu_causal, used.hfu) == (10.0, None, None, None)
