"""Parameters, FLOPs and memory of a model: equal to what torch counts and allocates.

What a rank stores is compared in tests/parallel."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from gpt.accounting import block_shapes, count, forward_flops, outer_shapes, training_flops, training_flops_per_token
from gpt.config import (
    AttentionBackend,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    ReduceDtype,
    Strategy,
    TrainConfig,
    rules,
)
from gpt.metrics import architecture_rows, performance
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy
from gpt.parallel.modules import prepare_blocks
from gpt.parallel.nd import apply_fsdp
from gpt.planning import memory as rank
from gpt.planning.memory import RankMemory, per_rank
from gpt.planning.rank_shards import activation_bytes, cast_elements, parameter_shards
from gpt.topology import ParallelDims, parallel_dims, split_batch
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan
from launch.plan.preflight import plan_text
from tests.support.small_models import (
    LATENT,
    LLAMA,
    MOE,
    configs,
    elements,
    kept_bytes,
    label,
    loss_of,
    optim,
    random_tokens,
    small,
    variants,
)

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
DENSE = (Ffn.standard, Ffn.swiglu, Ffn.geglu)
DRAWN = settings(max_examples=40)


def read(preset: Path) -> ModelConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(preset)))
    assert isinstance(config, ModelConfig)
    rules.check_model(config)
    return config


def on_meta(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def grouped_flops(a_shape: torch.Size, b_shape: torch.Size, *_: object, **__: object) -> int:
    """2 m k n of a grouped product, which torch's counter does not know; rows or inner dimension are cut."""
    assert len(a_shape) == 2
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


GROUPED = {torch.ops.aten._grouped_mm: grouped_flops}


def counted_flops(config: ModelConfig, sequences: int) -> tuple[int, int]:
    """FLOPs that torch counts for the forward pass, and for forward and backward."""
    # A loop over experts has to see their rows; grouped products go without, but without data in bf16 only.
    looped = config.ffn is Ffn.moe and config.expert_matmul is ExpertMatmul.loop
    if looped:  # nor does it know the CPU's attention kernel
        config = dataclasses.replace(config, attention=AttentionBackend.manual)
    model, device = (GPT(config), "cpu") if looped else (on_meta(config), "meta")
    if config.ffn is Ffn.moe and not looped:
        model = model.to(torch.bfloat16)
    tokens_BT = torch.zeros(sequences, config.block_size, dtype=torch.long, device=device)
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        logits_BTV = model(tokens_BT)
        forward = counter.get_total_flops()
        F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten()).backward()
    return forward, counter.get_total_flops()


def assert_counts_equal(config: ModelConfig) -> None:
    model = on_meta(config)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    claimed = {f"blocks.{i}.{k}": v for i in range(config.n_layer) for k, v in block_shapes(config).items()}
    assert claimed | outer_shapes(config) == built
    parameters = count(config)
    assert parameters.total == elements(model)
    assert parameters.non_embedding == elements(model.blocks) + elements(model.norm)
    parts = {"embedding": model.token_embedding, "position": model.position, "head": model.head}
    for name, module in parts.items():
        assert getattr(parameters, name) == (elements(module) if module else 0), name
    active = parameters.active
    every = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if config.ffn is Ffn.moe:
        assert active * config.n_expert == parameters.total * config.n_expert - every * (
            config.n_expert - config.n_expert_per_token
        )
    else:
        assert active == parameters.total
    for name in ("attention", "ffn"):
        assert getattr(parameters, name) == sum(elements(block.get_submodule(name)) for block in model.blocks)


def assert_flops_equal(config: ModelConfig, sequences: int) -> None:
    assert (forward_flops(config, sequences).palm, training_flops(config, sequences).palm) == counted_flops(
        config, sequences
    )


def test_there_are_presets() -> None:
    names = {"gpt2_124m", "gpt2_1p36b", "llama_124m", "llama_1p36b", "llama_1p3b", "team_124m", "hybrid_124m"}
    names |= {"baseline_23m", "tiny_116k", "llama_124m_untied", "qwen3_0p6b", "gemma3_1b", "mistral_7b"}
    names |= {"moe_200m", "shakespeare_baseline", "quick_test", "custom"}
    assert {preset.stem for preset in PRESETS} == names


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset(preset: Path) -> None:
    config = read(preset)
    assert config.name == preset.stem
    assert_counts_equal(config)
    comment = " ".join(line.lstrip("# ") for line in preset.read_text().splitlines() if line.startswith("#"))
    counted = count(config)
    said = {"parameters": counted.total, "without embeddings": counted.non_embedding}
    if config.ffn is Ffn.moe:
        said |= {"active": counted.active, "of them without": counted.active_non_embedding}
    for word, number in said.items():
        assert re.findall(rf"([\d,]+) {word}", comment)[0] == f"{number:,}", word
    # Two layers: torch's counter sees every operation of each, and test_components_of_the_forward_pass sees all layers.
    shallow = dataclasses.replace(config, n_layer=min(config.n_layer, 2))
    for backend in AttentionBackend:
        assert_flops_equal(dataclasses.replace(shallow, attention=backend), sequences=2)


def test_the_custom_preset_has_every_key() -> None:
    text = next(preset for preset in PRESETS if preset.stem == "custom").read_text()
    keys = [line.split(":")[0] for line in text.splitlines() if not line.startswith("#")]
    assert keys == [field.name for field in dataclasses.fields(ModelConfig)]


def test_the_mixture_by_hand() -> None:
    config = read(next(preset for preset in PRESETS if preset.stem == "moe_200m"))
    attention = 12 * (2 * 768 * 768 + 2 * 768 * 256)
    experts, router, norms = 12 * 8 * 3 * 768 * 2048, 12 * 8 * 768, 25 * 768
    counted = count(config)
    assert counted.non_embedding == attention + experts + router + norms
    assert counted.active == 2 * config.padded_vocab * 768 + attention + experts // 4 + router + norms
    per_token = training_flops_per_token(config)
    assert per_token.palm == 6 * (counted.active - config.padded_vocab * 768 - norms) + 12 * 12 * 768 * 2048
    assert (per_token.router, per_token.ffn) == (6 * router, 6 * experts // 4)


def test_plan_and_panel_tell_the_total_the_active_and_those_without_embeddings() -> None:
    words = ["model=moe_200m", "cluster=slurm"]
    plan = make_plan(typed_config(compose_launch(words)), words, ClusterKind.slurm)
    config = read(next(preset for preset in PRESETS if preset.stem == "moe_200m"))
    for text in (plan_text(plan), architecture_rows(config, count(config).as_dict())["parameters"]):
        for figure in ("549,219,072", "209,480,448 active", "471,952,128 without embeddings"):
            assert figure in text
    words = ["model=gpt2_124m", "cluster=slurm"]
    dense = make_plan(typed_config(compose_launch(words)), words, ClusterKind.slurm)
    assert "active" not in plan_text(dense)


@DRAWN
@given(configs(), st.integers(1, 3))
def test_parameters_and_flops_of_any_model(config: ModelConfig, sequences: int) -> None:
    assert_counts_equal(config)
    assert_flops_equal(config, sequences)


@DRAWN
@given(configs(DENSE))
def test_per_token_figures_follow_the_papers_formula(config: ModelConfig) -> None:
    config = dataclasses.replace(config, window=None, global_every=None)
    model = on_meta(config)
    n = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    n += model.token_embedding.weight.numel() if config.tie_embeddings else 0
    # In latent attention values are narrower than keys.
    lhqt = config.n_layer * config.n_head * (config.head_dim + config.value_width) * config.block_size
    flops = training_flops_per_token(config)
    assert flops.palm == 6 * n + 6 * lhqt
    assert flops.causal == 6 * n + 3 * lhqt
    assert flops.palm * config.block_size == training_flops(config, sequences=1).palm


def test_components_of_the_forward_pass() -> None:
    config = read(next(p for p in PRESETS if p.stem == "llama_124m"))
    config.attention = AttentionBackend.manual
    model, tokens_BT = on_meta(config), torch.zeros(1, config.block_size, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False, depth=8) as counter:
        model(tokens_BT)
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    forward = forward_flops(config, sequences=1)
    last = f".{config.n_layer - 1}."
    inside = [n for n in by_module if last in n and n.rsplit(".", 1)[-1] in ("query", "key", "value", "output")]
    assert len(inside) == 4
    assert config.n_layer * sum(by_module[name] for name in inside) == forward.projections
    attention = next(v for k, v in by_module.items() if k.endswith(f"{last}attention"))
    assert config.n_layer * attention == forward.projections + forward.attention
    assert config.n_layer * next(v for k, v in by_module.items() if k.endswith(f"{last}ffn")) == forward.ffn
    blocks = sum(v for k, v in by_module.items() if re.fullmatch(r".*blocks\.\d+", k))
    assert by_module["Global"] - blocks == forward.logits


def test_the_summary_compares_attention_with_the_feed_forward_and_tells_the_speed_at_half_the_peak() -> None:
    config = ModelConfig(name="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
    # Per token and layer 4 squares of the width and 2 products of 1024 keys, against 8 squares.
    ratio = (4 * 768**2 + 2 * 768 * 1024) / (8 * 768**2)
    flops = training_flops_per_token(config)
    record = {
        "flops_per_token": flops.palm, "peak_flops_per_s": 1e15, "ranks": [{}, {}], "global_batch": 4,
        "block_size": 1024, "memory_planned_gib": 1.0,
    }  # fmt: skip
    told = performance(record, TrainConfig(model=config))
    assert told["where"].endswith(f"attention to feed-forward {ratio:.2f}")
    assert f"at an MFU of 50 % {0.5 * 2e15 / flops.palm:,.0f} tokens/s" in told["upper bound"]


MODEL = ModelConfig(name="m", n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=128)


def test_equal_configs_share_a_result_and_a_changed_one_has_its_own() -> None:
    asked: list[tuple[int, int]] = []

    @lru_cache
    def width(model: ModelConfig, times: int) -> int:
        asked.append((model.n_embd, times))
        return model.n_embd * times

    other = replace(MODEL)
    assert [width(MODEL, 2), width(other, 2), width(MODEL, times=2)] == [128, 128, 128]
    assert asked == [(64, 2)] * 2, "once for each way to call it"
    other.n_embd = 32  # configs can be changed
    assert [width(other, 2), width(MODEL, 3), width(MODEL, 2)] == [64, 192, 128]
    other.options = {"ffn": {"a": [1]}}
    assert width(other, 2) == 64 and len(asked) == 5


# Activations and peaks against tensors that were really allocated; tests/parallel compares what is kept.


MICRO = 3
PRECISIONS = (Precision.fp32, Precision.bf16)


def memory(
    config: ModelConfig,
    strategy: Strategy = Strategy.ddp,
    ranks: int = 1,
    precision: Precision = Precision.fp32,
    accumulation: int = 1,
    recompute: Recompute = Recompute.none,
    **keys: Any,
) -> RankMemory:
    step = optim(global_batch=ranks * MICRO * accumulation, max_micro_batch=MICRO)
    parallel = ParallelConfig(strategy, **keys)
    dims = parallel_dims(parallel, ranks)
    trained = TrainConfig(model=config, optim=step, parallel=parallel, precision=precision, recompute=recompute)
    return per_rank(trained, dims, split_batch(step, dims.data_ranks))


def trained_one_step(model: nn.Module, tokens_BT: Tensor) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, tokens_BT).backward()
    optimizer.step()
    return optimizer


def saved_bytes(config: ModelConfig, sequences: int, precision: Precision) -> int:
    """Bytes that autograd keeps from a forward pass, parameters and buffers not counted."""
    model, tokens_BT = GPT(config), random_tokens(config, sequences)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
        return kept_bytes(model, lambda: model(tokens_BT))


def expected_bytes(config: ModelConfig, sequences: int, precision: Precision) -> int:
    casts = 2 * cast_elements(parameter_shards(config, ParallelDims("ddp", 1, 1))) if precision is Precision.bf16 else 0
    found = activation_bytes(config, sequences, precision)
    return found.embedding + config.n_layer * found.block + found.final + casts


MORE = [
    *(small(**parts, dropout=0.1, attention=AttentionBackend.manual) for parts in ({}, LLAMA)),
    *(
        small(**LLAMA, **LATENT, attention=backend, q_lora_rank=rank)
        for backend in AttentionBackend
        for rank in (None, 9)
    ),
    *(small(**{**MOE, "n_expert_per_token": chosen, "capacity_factor": 1.5}) for chosen in (1, 2, 4)),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [*variants(), *MORE], ids=label)
def test_activations_of_every_variant_with_dropout_and_with_a_capacity(
    config: ModelConfig, precision: Precision
) -> None:
    # Exact with torch 2.13; other versions may keep a little more or less.
    tolerance = 0.02 if config.capacity_factor is None else 0.03
    found = saved_bytes(config, MICRO, precision)
    assert expected_bytes(config, MICRO, precision) == pytest.approx(found, rel=tolerance)


@settings(max_examples=40)
@given(configs(), st.integers(1, 3), st.sampled_from(PRECISIONS))
def test_activations_of_any_model(config: ModelConfig, sequences: int, precision: Precision) -> None:
    config = dataclasses.replace(config, logit_softcap=None)  # logits are counted elsewhere
    # With a width of 2 and a sequence of 1 what is kept once for all tokens shows.
    assert expected_bytes(config, sequences, precision) == pytest.approx(
        saved_bytes(config, sequences, precision), rel=0.15, abs=100 * config.n_layer * sequences
    )


def peak_bytes(
    config: ModelConfig, precision: Precision = Precision.fp32, recompute: Recompute = Recompute.none
) -> int:
    """The most that one step of training held at once, as torch's tracker of every tensor saw it."""
    model, tokens_BT = GPT(config), random_tokens(config, MICRO)
    prepare_blocks(model, TrainConfig(model=config, recompute=recompute))
    optimizer = trained_one_step(model, tokens_BT)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, tokens_BT)
    with tracker:
        optimizer.zero_grad(set_to_none=False)  # as with ddp, whose gradients are views of lasting buckets
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
            logits_BTV = model(tokens_BT)
        loss = cross_entropy(logits_BTV, tokens_BT) / tokens_BT.numel()
        del logits_BTV
        loss.backward()
        optimizer.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(("vocab_size", "precision"), list(zip([64, 2000], PRECISIONS, strict=True)))
@pytest.mark.parametrize(
    "parts", [{}, LLAMA, {"attention": AttentionBackend.manual}, MOE], ids=["gpt2", "llama", "manual", "moe"]
)
def test_total_against_the_measured_peak(parts: dict, vocab_size: int, precision: Precision) -> None:
    config = small(n_layer=4, n_embd=64, block_size=64, vocab_size=vocab_size, **parts)
    assert memory(config, precision=precision).total == pytest.approx(peak_bytes(config, precision), rel=0.03)


CAPACITY = {**MOE, "capacity_factor": 1.25}


@pytest.mark.parametrize(
    ("parts", "recompute"),
    [
        ({}, Recompute.full),
        (LLAMA, Recompute.selective),
        ({"attention": AttentionBackend.manual}, Recompute.selective),
        ({**MOE, "n_shared_expert": 1}, Recompute.full),
        (CAPACITY, Recompute.selective),
        (CAPACITY, Recompute.full),
    ],
)
def test_total_with_recomputation_against_the_measured_peak(parts: dict, recompute: Recompute) -> None:
    config = small(**parts, n_layer=6, n_embd=64, block_size=64, vocab_size=64)
    # With full recomputation the most is needed inside a block that is recomputed, a little above the plan.
    assert memory(config, recompute=recompute).total == pytest.approx(peak_bytes(config, recompute=recompute), rel=0.04)


def sharded_peak(config: ModelConfig, precision: Precision, reshard: bool) -> int:
    bf16 = precision is Precision.bf16
    model, tokens_BT = GPT(config), random_tokens(config, MICRO)
    parallel = ParallelConfig(Strategy.fsdp, reshard_after_forward=reshard)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply_fsdp(model, mesh, TrainConfig(model=config, parallel=parallel, precision=precision))
    optimizer = trained_one_step(model, tokens_BT)
    optimizer.zero_grad()
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((tokens_BT,))
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits_BTV = model(tokens_BT)
        (cross_entropy(logits_BTV, tokens_BT) / tokens_BT.numel()).backward()
        optimizer.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two ranks of which the first is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("precision", "reshard"), [(Precision.fp32, True), (Precision.bf16, False)], ids=str)
@pytest.mark.parametrize(
    "parts", [{"vocab_size": 200}, {**LLAMA, "vocab_size": 1500}], ids=["tied", "large vocabulary"]
)
def test_total_of_a_shard_bounds_the_measured_peak(
    parts: dict, precision: Precision, reshard: bool, two_ranks: None
) -> None:
    # Not reached in bf16: the norms of a CPU keep bf16, those of a GPU fp32.
    config = small(n_layer=4, n_embd=64, block_size=32, **parts)
    measured = sharded_peak(config, precision, reshard)
    claimed = memory(config, Strategy.fsdp, 2, precision, reshard_after_forward=reshard).total
    assert measured < claimed < 1.1 * measured


def test_sharding_divides_the_states_and_adds_what_is_gathered() -> None:
    config = small(n_layer=8, n_embd=64, vocab_size=128)
    replica = memory(config, precision=Precision.bf16)
    for ranks, reshard in itertools.product((2, 4, 8), (True, False)):
        shard = memory(config, Strategy.fsdp, ranks, Precision.bf16, reshard_after_forward=reshard)
        for part in ("parameters", "gradients"):
            assert getattr(shard, part) == pytest.approx(getattr(replica, part) / ranks, rel=0.01)
        assert (shard.activations, shard.logits) == (replica.activations, replica.logits)
        stepped = memory(config, Strategy.zero1, ranks, Precision.bf16)
        assert stepped.parameters == replica.parameters
        assert stepped.optimizer == pytest.approx(replica.optimizer / ranks, rel=0.01)
    resharded, kept = (memory(config, Strategy.fsdp, 4, Precision.bf16, reshard_after_forward=r) for r in (True, False))
    block = elements(GPT(config).blocks[0])
    assert kept.total - resharded.total == 2 * (8 - 2) * block


def test_two_units_are_gathered_at_a_time_and_the_gradients_of_one_are_whole() -> None:
    config = small(n_layer=8, n_embd=64, vocab_size=64)
    block = elements(GPT(config).blocks[0])
    small_units, large_units = (memory(config, Strategy.fsdp, 4, fsdp_min_num_params=n) for n in (None, 2 * block + 1))
    # Of 3 and 5 blocks in place of 1 and 1; in fp32.
    assert large_units.total - small_units.total == 4 * (8 - 2 + 5 - 1) * block
    assert large_units.compute_weights - small_units.compute_weights == large_units.total - small_units.total


def test_accumulation_over_shards_keeps_whole_gradients() -> None:
    config = small(n_layer=8)
    parameters = elements(GPT(config))
    block = elements(GPT(config).blocks[0])
    once, twice = (memory(config, Strategy.fsdp, 4, accumulation=a) for a in (1, 2))
    assert once.not_at_once == -once.gradients, "reduced while activations are freed"
    assert twice.total - once.total == 4 * (parameters - block)
    in_bf16 = memory(config, Strategy.fsdp, 4, accumulation=2, reduce_dtype=ReduceDtype.bf16)
    assert twice.total - in_bf16.total == 2 * parameters
    assert memory(config, Strategy.fsdp, 4, accumulation=2, reduce_each_micro_batch=True) == replace(
        once, not_at_once=0
    )
    assert memory(config, accumulation=2) == memory(config)


def test_zero1_keeps_whole_gradients_between_micro_batches_and_otherwise_a_few_buckets() -> None:
    config = small(n_layer=8)
    sizes = sorted((p.numel() for p in GPT(config).parameters()), reverse=True)
    with mock.patch.object(rank, "BUCKET_BYTES", 4 * sizes[1]):  # the largest is a bucket of its own
        once, twice = (memory(config, Strategy.zero1, 4, accumulation=a) for a in (1, 2))
    assert twice.compute_weights == 4 * sum(sizes)
    assert once.compute_weights == 4 * (sizes[0] + rank.BUCKETS_IN_FLIGHT * sizes[1]) < twice.compute_weights
    assert memory(config, Strategy.zero1, 4).compute_weights == 4 * sum(sizes), "smaller than a bucket"
