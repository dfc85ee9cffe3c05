"""Parameters and FLOPs against the built model and torch's own counter: equal, not close."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpt.accounting import block_shapes, count, forward_flops, outer_shapes, training_flops, training_flops_per_token
from gpt.config import AttentionBackend, ExpertMatmul, Ffn, ModelConfig, TrainConfig, rules
from gpt.metrics.startup_summary import architecture_rows, performance
from gpt.model.gpt import GPT
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan
from launch.plan.preflight import plan_text
from tests.support.small_models import configs, elements

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
@given(configs())
def test_parameters_of_any_model(config: ModelConfig) -> None:
    assert_counts_equal(config)


@DRAWN
@given(configs(), st.integers(1, 3))
def test_flops_of_any_model(config: ModelConfig, sequences: int) -> None:
    assert_flops_equal(config, sequences)


@DRAWN
@given(configs(DENSE))
def test_per_token_figures_follow_the_papers_formula(config: ModelConfig) -> None:
    config = dataclasses.replace(config, window=None, global_every=None)
    model = on_meta(config)
    n = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    n += model.token_embedding.weight.numel() if config.tie_embeddings else 0
    lhqt = config.n_layer * config.n_head * config.head_dim * config.block_size
    flops = training_flops_per_token(config)
    assert flops.palm == 6 * n + 12 * lhqt
    assert flops.causal == 6 * n + 6 * lhqt
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
