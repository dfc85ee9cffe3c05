"""Floating-point operations of the model's matrix products, from its config alone.

Torch-free. A product of (m, k) and (k, n) matrices counts 2 m k n; everything that is not a matrix product (norms,
softmax, activations, the embedding's look-up) is left out, as is usual: it is under one percent. Must not know how
fast anything runs.

Why training is three times the forward pass, exactly: the backward pass of a product Y = X W is two products of the
same cost, one for the gradient of X and one for that of W. Both operands of every product here need a gradient, also in
the first block, since the embedding under it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config import Ffn, ModelConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs by component, of whatever they were counted for."""

    projections: int
    """Queries, keys, values and the output matrix of attention."""
    attention: int
    """Scores Q K^T and the weighted sum of V, over all T x T pairs, as if nothing were masked."""
    ffn: int
    logits: int

    @property
    def palm(self) -> int:
        """All of them: for one token of training, 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

        L layers, H heads, Q head width, T sequence length, causality not taken off. N counts every matrix that a token
        is multiplied with, so the output matrix, but not the input embedding, the position table, gains and biases.
        PaLM counts all its parameters; having one matrix for input and output and no bias, it differs by its gains.
        """
        return self.projections + self.attention + self.ffn + self.logits

    @property
    def causal(self) -> int:
        """With attention halved, since a causal kernel skips the masked half (as Megatron-LM counts)."""
        return self.palm - self.attention // 2


def forward_flops(model: ModelConfig, sequences: int) -> Flops:
    """FLOPs of one forward pass over ``sequences`` sequences of ``block_size`` tokens."""
    tokens = sequences * model.block_size
    queries, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
    matrices = 3 if model.ffn is Ffn.swiglu else 2
    return Flops(
        projections=2 * tokens * model.n_layer * model.n_embd * (2 * queries + 2 * keys),
        attention=2 * tokens * model.n_layer * 2 * queries * model.block_size,
        ffn=2 * tokens * model.n_layer * matrices * model.n_embd * model.ffn_width,
        logits=2 * tokens * model.n_embd * model.vocab_size,
    )


def training_flops(model: ModelConfig, sequences: int) -> Flops:
    """FLOPs of one forward and backward pass over ``sequences`` sequences, nothing recomputed.

    Equal to what ``torch.utils.flop_counter.FlopCounterMode`` counts where attention is written out. A fused kernel
    computes the scores once more in the backward pass: the kernel's doing, not the model's, and not counted.
    """
    once = forward_flops(model, sequences)
    return Flops(3 * once.projections, 3 * once.attention, 3 * once.ffn, 3 * once.logits)


def training_flops_per_token(model: ModelConfig) -> Flops:
    """FLOPs of training on one token, in sequences of ``block_size``. Whole numbers, as every term is linear in T."""
    sequence = training_flops(model, sequences=1)
    time = model.block_size
    return Flops(
        sequence.projections // time, sequence.attention // time, sequence.ffn // time, sequence.logits // time
    )
