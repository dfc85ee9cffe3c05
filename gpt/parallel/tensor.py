"""Tensor parallelism: the matrices of a model cut over a line of ranks, which work on the same tokens.

After Megatron-LM (arXiv 1909.08053, section 3). Queries, keys, values and the first matrices of the feed-forward layer
are cut by their outputs, that is by heads and by inner width. The matrices that write into the residual stream are cut
by their inputs, and what the ranks get is summed. Embedding and output matrix are cut by the vocabulary
(gpt/parallel/vocab.py). Between these, each rank has its slice of the sequence (``parallel.sequence_parallel``,
arXiv 2205.05198, section 4.2.2), or all of it.

Owns what is cut where. It is hung on the model from outside, with torch's styles for its Linear layers; whatever is
between the parts of a block is a plain tensor. All parameters become DTensors, also those that every rank holds whole;
where a rank saw a part of the tokens or of the heads only, their gradient is a part of a sum.

B batch, T time, D width, H heads, C head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from gpt.config import ParallelConfig
from gpt.model.gpt import GPT
from gpt.model.moe import MixtureOfExperts
from gpt.parallel.compile import replace_forward
from gpt.parallel.dtensor import all_reduce_in_buckets, compute_on_shards, distribute, reduce_partial
from gpt.parallel.vocab import ShardedEmbedding

REPLICATED, SEQUENCE, HEADS, VOCABULARY = Replicate(), Shard(1), Shard(2), Shard(-1)
"""What a rank has of activations: all, or its slice of (B, T, D) along T, of (B, T, H, C) along H, of (B, T, V)."""

MIXTURE_PLACEMENTS: dict[str, Placement] = {
    **{"experts.gate": Shard(1), "experts.up": Shard(1), "experts.down": Shard(2)},
    **{"shared.gate.weight": Shard(0), "shared.up.weight": Shard(0), "shared.down.weight": Shard(1)},
}
"""Where the inner width is in the matrices of a mixture of experts."""


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Cut ``model``, or a stage of one, which is the same on all ranks of ``mesh``, and have them meet in its passes.

    It takes tokens as before. Of the logits it gives this rank's columns (``loss_parallel``) or all; what the model
    leaves out as padding of the vocabulary is padding among any rank's columns too.
    """
    hidden = SEQUENCE if config.sequence_parallel else REPLICATED
    apply_styles(model, mesh, outer_styles(model, hidden, VOCABULARY if config.loss_parallel else REPLICATED))
    for block in model.blocks:
        apply_styles(block, mesh, block_styles(block, hidden))


def apply_styles(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Hang styles on the parts of a module that this variant of the model has."""
    there = dict(module.named_modules())
    # No values are sent: every rank has them.
    parallelize_module(module, mesh, {name: plan[name] for name in plan if name in there}, src_data_rank=None)


def outer_styles(model: GPT, hidden: Placement, logits: Placement) -> dict[str, ParallelStyle]:
    """What is before and after the blocks."""
    head: ParallelStyle = ColwiseParallel(input_layouts=hidden, output_layouts=logits)
    if model.config.tie_embeddings:
        head = PrepareModuleInputOutput(
            input_layouts=(hidden, None),
            desired_input_layouts=(REPLICATED, None),
            output_layouts=VOCABULARY,
            desired_output_layouts=logits,
        )
    return {
        "token_embedding": ShardedEmbedding(hidden),
        "position": Replicated(hidden, starts_at_slice=True),
        "norm": Replicated(hidden),
        "head": head,
    }


def block_styles(block: nn.Module, hidden: Placement) -> dict[str, ParallelStyle]:
    """Two pairs of matrix products, in each the first cut by outputs and the second by inputs, and what is between."""
    plan: dict[str, ParallelStyle] = {
        "attention_norm": Replicated(hidden),
        # The stream is gathered once for queries, keys and values, and their gradients are added before they are sent.
        "attention": PrepareModuleInput(input_layouts=(hidden, None), desired_input_layouts=(REPLICATED, None)),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.query_norm": Replicated(HEADS),
        "attention.key_norm": Replicated(HEADS),
        "attention.output": RowwiseParallel(output_layouts=hidden),
        "ffn_norm": Replicated(hidden),
    }
    if isinstance(block.ffn, MixtureOfExperts):
        return {**plan, "ffn": ShardedMixture(hidden)}
    return {
        **plan,
        "ffn": PrepareModuleInput(input_layouts=(hidden,), desired_input_layouts=(REPLICATED,)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=hidden),
    }


class Replicated(ParallelStyle):
    """A module that is given ``placement`` of its input, gives that of its output, and has its parameters whole.

    Where the layout is a slice, this rank's gradient is what the slice adds to it. ``starts_at_slice``: the module also
    takes the position of its first token.
    """

    def __init__(self, placement: Placement, starts_at_slice: bool = False) -> None:
        super().__init__()
        self.placement, self.starts_at_slice = placement, starts_at_slice

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {})
        if self.starts_at_slice and self.placement == SEQUENCE:
            replace_forward(module, partial(shift_positions, module.forward, device_mesh.get_local_rank()))
        compute_on_shards(module, REPLICATED if self.placement == REPLICATED else Partial())
        return module


def shift_positions(forward: Callable[[Tensor, int], Tensor], slices: int, x_BTD: Tensor, start: int = 0) -> Tensor:
    """Call ``forward`` for tokens that come so many slices later in the sequence."""
    return forward(x_BTD, start + slices * x_BTD.size(1))


class ShardedMixture(ParallelStyle):
    """A mixture of experts, each of them cut by its inner width. Every rank routes all tokens, so all ranks alike.

    Inside, a rank computes its part of a sum: of the result, of the gradient of the input, of that of the router. So
    nothing is sent before the end; and the losses of routing, which every rank computes whole, have to count as much as
    one over the number of ranks.
    """

    def __init__(self, hidden: Placement) -> None:
        super().__init__()
        self.hidden = hidden

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, MIXTURE_PLACEMENTS)
        compute_on_shards(module, Partial())
        replace_forward(module, partial(self._sum, device_mesh, module.forward))
        return module

    def _sum(self, mesh: DeviceMesh, forward: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        whole_BTD = DTensor.from_local(x_BTD, mesh, [self.hidden]).redistribute(placements=[REPLICATED])
        return reduce_partial(forward(whole_BTD.to_local(grad_placements=[Partial()])), mesh, self.hidden)


def reduce_partial_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """After the last pass, sum the gradients of which each rank of ``mesh`` has a part. fsdp does so by itself."""
    parts = []
    for parameter in module.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parts.append(grad.to_local())
            parameter.grad = DTensor.from_local(parts[-1], mesh, parameter.placements)
    all_reduce_in_buckets(parts, mesh.get_group())
