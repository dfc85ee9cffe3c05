"""Floating-point operations of the model's matrix products, from its config alone.

Torch-free. A product of (m, k) and (k, n) matrices counts 2 m k n; everything that is not a matrix product (norms,
softmax, activations, the embedding's look-up) is left out, as is usual: it is under one percent. Must not know how
fast anything runs.

Why training is three times the forward pass, exactly: the backward pass of a product Y = X W is two products of the
same cost, one for the gradient of X and one for that of W. Both operands of every product here need a gradient, also in
the first block, since the embedding under it is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from gpt.components.counts import NOTHING
from gpt.components.facts import part_counts
from gpt.config import AttentionBackend, Ffn, ModelConfig, NormPosition, Recompute
from gpt.config.memo import cached_by_model


@dataclass(frozen=True)
class Flops:
    """FLOPs by component."""

    projections: int
    """Query, key, value and output projections of attention."""
    attention: int
    """Scores Q K^T and the weighted sum of V, over all T x T pairs, as if nothing were masked."""
    ffn: int
    """Feed-forward layers; of a mixture the routed and the shared experts of each token."""
    logits: int
    """Output matrix, with the padding of the vocabulary."""
    router: int = 0
    custom: int = 0
    """Attention, norms and positions of the user's, as measured; nothing is taken off where attention is causal."""

    @property
    def palm(self) -> int:
        """Sum of all: for one token of training, 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

        L layers, H heads, Q head width, T sequence length, causality not taken off. N counts every matrix that a token
        is multiplied with, so the output matrix, but not the input embedding, the position table, gains and biases.
        PaLM counts all its parameters; having one matrix for input and output and no bias, it differs by its gains. Of
        experts, those that a token goes to.
        """
        return sum(getattr(self, component.name) for component in fields(self))

    @property
    def causal(self) -> int:
        """Sum with attention halved, since a causal kernel skips the masked half (as Megatron-LM counts)."""
        return self.palm - self.attention // 2


@cached_by_model
def forward_flops(model: ModelConfig, sequences: int) -> Flops:
    """Count the FLOPs of one forward pass over ``sequences`` sequences of ``block_size`` tokens."""
    tokens = sequences * model.block_size
    queries, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
    of_experts = model.ffn is Ffn.moe
    rows = sequences * expert_rows(model) + tokens * model.n_shared_expert if of_experts else tokens
    dense = 2 * rows * model.n_layer * (3 if model.gated else 2) * model.n_embd * model.ffn_width
    ours = not isinstance(model.attention, str)
    return Flops(
        projections=ours * 2 * tokens * model.n_layer * model.n_embd * (2 * queries + 2 * keys),
        attention=ours * 2 * tokens * model.n_layer * 2 * queries * model.block_size,
        ffn=sequences * model.n_layer * part_counts(model)["ffn"].flops if isinstance(model.ffn, str) else dense,
        logits=2 * tokens * model.n_embd * model.padded_vocab,
        router=2 * tokens * model.n_layer * model.n_embd * model.n_expert if of_experts else 0,
        custom=sequences * custom_flops(model),
    )


def custom_flops(model: ModelConfig) -> int:
    """Count the FLOPs of the user's attention, norms and positions in a forward pass over one sequence."""
    parts = part_counts(model)
    norm, head_norm, position, attention = (
        parts.get(key, NOTHING) for key in ("norm", "head_norm", "position", "attention")
    )
    norms = 2 * model.n_layer + (model.norm_position is NormPosition.pre)
    in_blocks = position.on_heads and not isinstance(model.attention, str)
    positions = model.n_layer if in_blocks else not position.on_heads
    return norms * norm.flops + positions * position.flops + model.n_layer * (head_norm.flops + attention.flops)


def expert_rows(model: ModelConfig) -> int:
    """Count the rows that the experts of one layer compute in training for one sequence of ``block_size`` tokens.

    Each token counts once for each of its experts; with a capacity all slots of all experts count, empty ones too.
    """
    time, chosen = model.block_size, model.n_expert_per_token
    if model.capacity_factor is None:
        return time * chosen
    return model.n_expert * min(time, math.ceil(model.capacity_factor * time * chosen / model.n_expert))


def training_flops(model: ModelConfig, sequences: int) -> Flops:
    """Count the FLOPs of one forward and backward pass over ``sequences`` sequences, nothing recomputed.

    Equal to what ``torch.utils.flop_counter.FlopCounterMode`` counts where attention is written out. A fused kernel
    computes the scores once more in the backward pass: the kernel's doing, not the model's, and not counted.
    """
    once = forward_flops(model, sequences)
    return Flops(**{part.name: 3 * getattr(once, part.name) for part in fields(once)})


@cached_by_model
def training_flops_per_token(model: ModelConfig) -> Flops:
    """Count the FLOPs of training on one token, in sequences of ``block_size``.

    Whole numbers, as every term is linear in T; only the slots of a capacity may not be, and are rounded down.
    """
    sequence = training_flops(model, sequences=1)
    return Flops(**{part.name: getattr(sequence, part.name) // model.block_size for part in fields(sequence)})


def recomputed_flops_per_token(model: ModelConfig, recompute: Recompute) -> int:
    """Count the FLOPs that the backward pass spends on recomputing the blocks, for one token.

    ``full`` repeats all products of a block but the last: torch stops where nothing is missing any more, and the result
    of the last product is needed only where something that keeps its input follows it (dropout, a norm, the weighting
    of experts). ``selective`` repeats attention where a fused kernel draws dropout, and nothing else. Compiled code may
    repeat less.
    """
    once = forward_flops(model, sequences=1)
    if recompute is Recompute.none:
        return 0
    if recompute is Recompute.selective:
        fused = model.attention is not AttentionBackend.manual
        return once.attention // model.block_size if model.dropout and fused else 0
    unknown = isinstance(model.ffn, str)  # which product is its last
    last_is_kept = unknown or model.dropout or model.ffn is Ffn.moe or model.norm_position is not NormPosition.pre
    spared = 0 if last_is_kept else once.ffn // (3 if model.gated else 2)
    return (once.palm - once.logits - spared) // model.block_size
