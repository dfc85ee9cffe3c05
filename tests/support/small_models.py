"""Small models of every kind, for the tests of the model and of its accounting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from gpt.config import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    Norm,
    NormPosition,
    OptimConfig,
    Position,
    rules,
)

LLAMA: dict[str, Any] = {
    "norm": Norm.rmsnorm,
    "position": Position.rope,
    "ffn": Ffn.swiglu,
    "bias": False,
    "tie_embeddings": False,
}

MOE: dict[str, Any] = {"ffn": Ffn.moe, "n_expert": 4, "n_expert_per_token": 2, "ffn_hidden": 24, "bias": False}

LATENT: dict[str, Any] = {"kv_lora_rank": 20, "head_width": 18, "rope_head_width": 6}


MINIMAL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 5, "ffn_hidden": 6}
"""Small enough for finite differences of every parameter."""


def small(**overrides: Any) -> ModelConfig:
    """A model of a few thousand parameters: GPT-2's parts, unless overridden."""
    values = {"name": "small", "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 50}
    config = ModelConfig(**{**values, **overrides})
    rules.check_model(config)
    return config


def optim(**changes: Any) -> OptimConfig:
    """One step of one sequence, unless overridden."""
    sizes = {"max_steps": 1, "global_batch": 1, "max_micro_batch": 1, "lr": 1e-3, "min_lr": 0.0, "warmup_steps": 0}
    return OptimConfig(**{**sizes, **changes})


def variants() -> list[ModelConfig]:
    """Every norm with every position and ffn; the other choices change from one to the next, each at its own pace."""
    made = []
    for i, (norm, position, ffn) in enumerate(itertools.product(Norm, Position, Ffn)):
        parts: dict[str, Any] = {"norm": norm, "position": position, "ffn": ffn, "bias": i % 2 == 0}
        parts["n_kv_head"] = (None, 2, 1)[i % 3]
        parts["attention"] = list(AttentionBackend)[i // 4 % 3]
        parts["tie_embeddings"] = i % 4 < 2
        parts["norm_position"] = list(NormPosition)[i // 3 % 3]
        parts["parallel_residual"] = i % 9 < 3 and i % 5 < 3
        parts["window"], parts["global_every"] = ((None, None), (4, None), (6, 2))[i // 2 % 3]
        parts["head_width"] = (None, 10)[i // 5 % 2]
        if parts["attention"] is AttentionBackend.manual and i % 2:
            parts["attention_softcap"] = 3.0
        parts["qk_norm"] = i % 5 > 2
        parts["attention_sinks"] = i % 7 < 2
        parts["vocab_multiple"] = (1, 16)[i // 2 % 2]
        if ffn is Ffn.standard:
            parts["activation"] = list(Activation)[i // 4 % len(Activation)]
        if ffn is Ffn.moe:
            kinds = (Ffn.swiglu, Ffn.standard, Ffn.geglu)
            parts |= {**MOE, "expert_ffn": kinds[i // 4 % 3], "n_shared_expert": i // 12 % 2}
            parts["expert_matmul"] = list(ExpertMatmul)[i // 8 % 2]
        made.append(small(**parts))
    return made


def label(config: ModelConfig) -> str:
    """Name of a variant by its settings, for the test's name."""
    parts = [config.norm.name, config.position.name, config.ffn.name, config.attention.name, f"kv{config.kv_heads}"]
    parts += [config.norm_position.name, *(["parallel"] if config.parallel_residual else [])]
    return "-".join([*parts, *(["qk"] if config.qk_norm else [])])


def random_tokens(config: ModelConfig, sequences: int, seed: int = 0) -> torch.Tensor:
    """(sequences, block_size) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, config.block_size), generator=generator)


def elements(module: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def loss_of(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
    """Torch's loss of a model, by default of the tokens themselves."""
    targets_BT = tokens_BT if targets_BT is None else targets_BT
    return F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())


@st.composite
def configs(draw: st.DrawFn, ffns: tuple[Ffn, ...] = tuple(Ffn)) -> ModelConfig:
    """Any valid model that is small enough to be built."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    ffn = draw(st.sampled_from(ffns))
    norm_position = draw(st.sampled_from(NormPosition))
    window, attention = draw(st.none() | st.integers(1, 9)), draw(st.sampled_from(AttentionBackend))
    config = ModelConfig(
        name="drawn",
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_kv_head=kv_heads,
        head_width=draw(st.none() | st.sampled_from([2, 6])),
        window=window,
        global_every=None if window is None else draw(st.none() | st.integers(2, 3)),
        attention_softcap=2.0 if attention is AttentionBackend.manual and draw(st.booleans()) else None,
        # torch does not count the FLOPs of the kernel whose sums sinks change.
        attention_sinks=attention is AttentionBackend.manual and draw(st.booleans()),
        logit_softcap=draw(st.none() | st.just(3.0)),
        scale_embedding=draw(st.booleans()),
        n_embd=heads * 2 * draw(st.integers(1, 6)),
        block_size=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(1, 70)),
        vocab_multiple=draw(st.sampled_from([1, 16])),
        norm=draw(st.sampled_from(Norm)),
        norm_position=norm_position,
        qk_norm=draw(st.booleans()),
        position=draw(st.sampled_from(Position)),
        ffn=ffn,
        ffn_hidden=draw(st.none() | st.integers(1, 40)),
        activation=draw(st.sampled_from(Activation)) if ffn is Ffn.standard else None,
        attention=attention,
        parallel_residual=norm_position is NormPosition.pre and draw(st.booleans()),
        bias=ffn is not Ffn.moe and draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )
    if attention is AttentionBackend.manual and draw(
        st.booleans()
    ):  # torch's kernels pad values, and count the padding
        config.kv_lora_rank, config.q_lora_rank = draw(st.integers(1, 9)), draw(st.none() | st.integers(1, 9))
        config.n_kv_head, config.qk_norm, config.rope_head_width = None, False, 2 * draw(st.integers(1, 3))
        config.head_width = config.rope_head_width + draw(st.integers(1, 5))
    if ffn is Ffn.moe:
        config.n_expert = draw(st.integers(1, 5))
        config.n_expert_per_token = draw(st.integers(1, config.n_expert))
        config.n_shared_expert = draw(st.integers(0, 2))
        config.expert_ffn = draw(st.sampled_from([Ffn.standard, Ffn.swiglu, Ffn.geglu]))
        config.expert_balance = draw(st.sampled_from(ExpertBalance))
        config.expert_matmul = ExpertMatmul.loop  # takes any width, and torch counts its products
        config.capacity_factor = draw(st.none() | st.sampled_from([0.5, 1.0, 1.25, 9.0]))
    rules.check_model(config)
    return config


def check_gradients(module: nn.Module, *inputs: Tensor) -> None:
    """Compare the gradients of all parameters and floating-point inputs with finite differences."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]
    values = [(p.detach() + 0.3 * torch.randn_like(p)).requires_grad_() for p in module.parameters()]

    def call(*arguments: Tensor) -> Tensor:
        parameters = dict(zip(names, arguments[len(inputs) :]))
        return functional_call(module, parameters, arguments[: len(inputs)])

    assert gradcheck(call, (*inputs, *values))


def kept_bytes(module: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of the storages that autograd keeps from a call, each once, but not of a module's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    return sum(size for place, size in storages.items() if place not in own)
