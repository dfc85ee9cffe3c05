"""Models of nanoGPT, transformers and litgpt in the shapes of benchmarks/speed/peers.py, and the training step of each.

Imports the checkouts that the user names; copies no code from them.

Shapes: B sequences, T tokens of one, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of tokens and targets, (B, T) each, that returns the mean loss, ()."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison, the same for every library."""

    kind: str
    """``gpt2``, ``llama`` or ``mixture`` (mixture of experts)."""
    layers: int = 6
    width: int = 384
    heads: int = 6
    block: int = 256
    vocab: int = 8192
    batch: int = 8
    experts: int = 8
    chosen: int = 2

    @property
    def inner(self) -> int:
        """Hidden size of a gated feed-forward layer: 8/3 of the width, rounded to a multiple of 64; half of it for an
        expert.
        """
        whole = (8 * self.width // 3 + 63) // 64 * 64
        return (whole // 2 + 63) // 64 * 64 if self.kind == "mixture" else whole

    def words(self) -> list[str]:
        """Return the overrides that give our model this shape."""
        preset = {"gpt2": "gpt2_124m", "llama": "llama_124m", "mixture": "moe_200m"}[self.kind]
        # nanoGPT has the exact GELU only, so all have it.
        gelu, gated = ["model.activation=gelu"], [f"model.ffn_hidden={self.inner}", "model.tie_embeddings=false"]
        mixture = ["model.n_kv_head=null", f"model.n_expert={self.experts}", f"model.n_expert_per_token={self.chosen}"]
        return [
            f"model={preset}",
            *(f"model.n_layer={self.layers}", f"model.n_head={self.heads}", f"model.n_embd={self.width}"),
            *(f"model.block_size={self.block}", f"model.vocab_size={self.vocab}"),
            *(gelu if self.kind == "gpt2" else gated),
            *(mixture if self.kind == "mixture" else []),
            *(f"optim.global_batch={self.batch}", f"optim.max_micro_batch={self.batch}"),
            *(["data=synthetic", "model.vocab_multiple=1"] if self.vocab < 256 else []),  # bytes do not fit
        ]


def nanogpt(shape: Shape, checkout: Path | None) -> tuple[nn.Module, Loss]:
    """Build nanoGPT's model and its loss."""
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(
        GPTConfig(
            block_size=shape.block,
            vocab_size=shape.vocab,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            dropout=0.0,
            bias=True,
        )
    )
    return model, lambda tokens_BT, targets_BT: model(tokens_BT, targets_BT)[1]


def transformers(shape: Shape, checkout: Path | None) -> tuple[nn.Module, Loss]:
    """Build the model of transformers with SDPA attention, and its loss. The library shifts the labels itself and
    therefore computes one more position of logits.
    """
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": shape.vocab, "use_cache": False, "attn_implementation": "sdpa"}
    llama = common | {
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.block,
        "tie_word_embeddings": False,
    }
    config: Any
    if shape.kind == "gpt2":
        config = hf.GPT2Config(
            n_positions=shape.block,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function="gelu",
            **common,
        )
    elif shape.kind == "llama":
        config = hf.LlamaConfig(**llama)
    else:
        config = hf.MixtralConfig(
            num_local_experts=shape.experts, num_experts_per_tok=shape.chosen, output_router_logits=True, **llama
        )
    model = hf.AutoModelForCausalLM.from_config(config)
    # shift_labels are targets as they are: the loss of all T tokens, as the other libraries compute it.
    return (
        model,
        lambda tokens_BT, targets_BT: model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss,
    )


def litgpt(shape: Shape, checkout: Path | None) -> tuple[nn.Module, Loss]:
    """Build litgpt's model and its loss: torch's cross-entropy of all logits at once, as in its pre-training."""
    sys.path.insert(0, str(checkout))
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]

    mixture = {"n_expert": shape.experts, "n_expert_per_token": shape.chosen, "moe_intermediate_size": shape.inner}
    gpt2 = shape.kind == "gpt2"
    model = GPT(
        Config(
            block_size=shape.block,
            vocab_size=shape.vocab,
            padded_vocab_size=shape.vocab,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=gpt2,
            norm_class_name="LayerNorm" if gpt2 else "RMSNorm",
            mlp_class_name={"gpt2": "GptNeoxMLP", "llama": "LLaMAMLP", "mixture": "LLaMAMoE"}[shape.kind],
            intermediate_size=4 * shape.width if gpt2 else shape.inner,
            **(mixture if shape.kind == "mixture" else {}),
        )
    )
    return model, lambda tokens_BT, targets_BT: F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())


BUILDERS: dict[str, Callable[[Shape, Path | None], tuple[nn.Module, Loss]]] = {
    "nanoGPT": nanogpt,
    "transformers": transformers,
    "litgpt": litgpt,
}
KINDS = {"nanoGPT": ("gpt2",), "transformers": ("gpt2", "llama", "mixture"), "litgpt": ("llama", "mixture")}
"""Library -> shapes that it has. litgpt has neither learned positions nor tied embeddings, so it has no GPT-2."""


class PeerStep:
    """A training step of another library: forward, backward, clipping and AdamW as in its training script.

    Args:
        loss: loss function of the model.
        model: model whose parameters are updated.
        fused: True uses torch's fused AdamW.
        device: device type; on ``cuda`` the step autocasts to bf16.
    """

    def __init__(self, loss: Loss, model: nn.Module, fused: bool, device: torch.device) -> None:
        self.loss, self.model, self.device = loss, model, device
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], 6e-4, (0.9, 0.95), 1e-8, fused=fused)

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Make one step, and return the mean loss, ()."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def build_step(name: str, shape: Shape, checkout: Path | None, compiled: bool, fused: bool, device: str) -> PeerStep:
    """Build the training step of a library.

    Args:
        name: name of the library.
        shape: sizes of the model.
        checkout: checkout of the library; None for an installed library.
        compiled: True to compile model and loss, as one graph where this is possible.
        fused: True to use torch's fused AdamW.
        device: device type; on ``cuda`` the step autocasts to bf16.
    """
    torch.manual_seed(0)
    model, loss = BUILDERS[name](shape, checkout)
    model.to(device).train()
    if compiled:
        loss = torch.compile(loss, dynamic=False)
    return PeerStep(loss, model, fused, torch.device(device))
