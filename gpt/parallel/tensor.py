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
from gpt.parallel.dtensor import compute_on_parts, distribute, sum_over, summed
from gpt.parallel.vocab import CutVocabulary

WHOLE, SEQUENCE, HEADS, VOCABULARY = Replicate(), Shard(1), Shard(2), Shard(-1)
"""What a rank has of activations: all, or its slice of (B, T, D) along T, of (B, T, H, C) along H, of (B, T, V)."""

MIXTURE_CUTS: dict[str, Placement] = {
    **{"experts.gate": Shard(1), "experts.up": Shard(1), "experts.down": Shard(2)},
    **{"shared.gate.weight": Shard(0), "shared.up.weight": Shard(0), "shared.down.weight": Shard(1)},
}
"""Where the inner width is in the matrices of a mixture of experts."""


def cut_matrices(model: GPT, line: DeviceMesh, config: ParallelConfig) -> None:
    """Cut ``model``, or a stage of one, which is the same on all ranks of ``line``, and have them meet in its passes.

    It takes tokens as before. Of the logits it gives this rank's columns (``loss_parallel``) or all; what the model
    leaves out as padding of the vocabulary is padding among any rank's columns too.
    """
    stream = SEQUENCE if config.sequence_parallel else WHOLE
    hang(model, line, around_blocks(model, stream, VOCABULARY if config.loss_parallel else WHOLE))
    for block in model.blocks:
        hang(block, line, inside_block(block, stream))


def hang(module: nn.Module, line: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Hang styles on the parts of a module that this variant of the model has."""
    there = dict(module.named_modules())
    # No values are sent: every rank has them.
    parallelize_module(module, line, {name: plan[name] for name in plan if name in there}, src_data_rank=None)


def around_blocks(model: GPT, stream: Placement, logits: Placement) -> dict[str, ParallelStyle]:
    """What is before and after the blocks."""
    head: ParallelStyle = ColwiseParallel(input_layouts=stream, output_layouts=logits)
    if model.config.tie_embeddings:
        head = PrepareModuleInputOutput(
            input_layouts=(stream, None),
            desired_input_layouts=(WHOLE, None),
            output_layouts=VOCABULARY,
            desired_output_layouts=logits,
        )
    return {
        "token_embedding": CutVocabulary(stream),
        "position": HeldWhole(stream, starts_at_slice=True),
        "norm": HeldWhole(stream),
        "head": head,
    }


def inside_block(block: nn.Module, stream: Placement) -> dict[str, ParallelStyle]:
    """Two pairs of matrix products, in each the first cut by outputs and the second by inputs, and what is between."""
    plan: dict[str, ParallelStyle] = {
        "attention_norm": HeldWhole(stream),
        # The stream is gathered once for queries, keys and values, and their gradients are added before they are sent.
        "attention": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(WHOLE, None)),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.query_norm": HeldWhole(HEADS),
        "attention.key_norm": HeldWhole(HEADS),
        "attention.output": RowwiseParallel(output_layouts=stream),
        "ffn_norm": HeldWhole(stream),
    }
    if isinstance(block.ffn, MixtureOfExperts):
        return {**plan, "ffn": CutMixture(stream)}
    return {
        **plan,
        "ffn": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(WHOLE,)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=stream),
    }


class HeldWhole(ParallelStyle):
    """A module that is given ``layout`` of its input, gives that of its output, and has its parameters whole.

    Where the layout is a slice, this rank's gradient is what the slice adds to it. ``starts_at_slice``: the module also
    takes the position of its first token.
    """

    def __init__(self, layout: Placement, starts_at_slice: bool = False) -> None:
        super().__init__()
        self.layout, self.starts_at_slice = layout, starts_at_slice

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {})
        if self.starts_at_slice and self.layout == SEQUENCE:
            replace_forward(module, partial(later, module.forward, device_mesh.get_local_rank()))
        compute_on_parts(module, WHOLE if self.layout == WHOLE else Partial())
        return module


def later(forward: Callable[[Tensor, int], Tensor], slices: int, x_BTD: Tensor, start: int = 0) -> Tensor:
    """Call ``forward`` for tokens that come so many slices later in the sequence."""
    return forward(x_BTD, start + slices * x_BTD.size(1))


class CutMixture(ParallelStyle):
    """A mixture of experts, each of them cut by its inner width. Every rank routes all tokens, so all ranks alike.

    Inside, a rank computes its part of a sum: of the result, of the gradient of the input, of that of the router. So
    nothing is sent before the end; and the losses of routing, which every rank computes whole, have to count as much as
    one over the number of ranks.
    """

    def __init__(self, stream: Placement) -> None:
        super().__init__()
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, MIXTURE_CUTS)
        compute_on_parts(module, Partial())
        replace_forward(module, partial(self._sum, device_mesh, module.forward))
        return module

    def _sum(self, line: DeviceMesh, forward: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        whole_BTD = DTensor.from_local(x_BTD, line, [self.stream]).redistribute(placements=[WHOLE])
        return summed(forward(whole_BTD.to_local(grad_placements=[Partial()])), line, self.stream)


def finish_gradients(module: nn.Module, line: DeviceMesh) -> None:
    """After the last pass, sum the gradients of which each rank of ``line`` has a part. fsdp does so by itself."""
    parts = []
    for parameter in module.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parts.append(grad.to_local())
            parameter.grad = DTensor.from_local(parts[-1], line, parameter.placements)
    sum_over(parts, line.get_group())
