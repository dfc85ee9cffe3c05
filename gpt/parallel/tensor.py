"""Tensor parallelism: matrices and vocabulary sharded over ranks that work on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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

from gpt.accounting import BLOCK_NORMS
from gpt.config import ParallelConfig
from gpt.model.ffn import DenseFfn, MixtureOfExperts
from gpt.model.gpt import GPT
from gpt.model.layers import exponentials, write_softmax
from gpt.parallel.distributed import waiting
from gpt.parallel.modules import (
    all_reduce_in_buckets,
    compute_on_shards,
    distribute,
    local_tensor,
    reduce_partial,
    replace_forward,
)

# The vocabulary sharded over ranks: the rows of the embedding, and the loss of logits sharded by columns.
#
# After Megatron-LM (arXiv 1909.08053, section 3).
#
# B batch, T time, D width, V the tokens of one rank, N = B T.


class PlacedStyle(ParallelStyle):
    """Base class of torch's parallel styles for modules that take or return hidden states. ``hidden`` is the placement
    of these hidden states: replicated, or sharded along the sequence."""

    def __init__(self, hidden: Placement) -> None:
        super().__init__()
        self.hidden = hidden


class ShardedEmbedding(PlacedStyle):
    """Style of a token embedding whose rows, one for each token of the vocabulary, are sharded over the ranks.

    torch's RowwiseParallel also shards embeddings, but with torch 2.13 the gradient on each rank is as large as the
    whole matrix.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        if isinstance(module.weight, DTensor):  # a tied embedding, sharded already in another pipeline stage
            return module
        distribute(module, device_mesh, {"weight": Shard(0)})
        replace_forward(module, partial(look_up, module, device_mesh, self.hidden))
        return module


def look_up(embedding: nn.Embedding, mesh: DeviceMesh, hidden: Placement, tokens_BT: Tensor) -> Tensor:
    """Look up tokens in a sharded embedding, (B, T) -> (B, T, D) with placement ``hidden``.

    Each rank looks up the tokens of its own rows, with zeros for other tokens; the sum over the ranks is the result.
    """
    weight_VD = local_tensor(embedding.weight)
    row_BT = tokens_BT - mesh.get_local_rank() * len(weight_VD)
    elsewhere_BT = (row_BT < 0) | (row_BT >= len(weight_VD))
    x_BTD = F.embedding(row_BT.masked_fill(elsewhere_BT, 0), weight_VD)
    return reduce_partial(x_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0), mesh, hidden)


def vocabulary_loss(mesh: DeviceMesh, columns: int, vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that computes the loss from logits whose columns are sharded over ranks.

    The function takes this rank's columns of the logits, (B, T, ``columns``), and the targets (B, T). It returns the
    summed cross-entropy over the whole vocabulary in nats, () in fp32, the same on every rank.

    Args:
        mesh: the ranks over which the logits are sharded.
        columns: number of logit columns of each rank, including padding.
        vocab_size: number of columns, over all ranks, that are tokens; the rest is padding.
    """
    first = mesh.get_local_rank() * columns
    tokens = max(0, min(columns, vocab_size - first))

    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten()
        return ShardedCrossEntropy.apply(logits_NV, targets_N, first, tokens, mesh.get_group())

    return loss


class ShardedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits whose columns are sharded over ranks. It all-reduces three numbers for each token,
    and does not gather the logits.

    torch's ``loss_parallel`` reduces four numbers for each token. It is also a context of the whole process that must
    be open during the backward pass, and in a pipeline torch's schedule calls the backward pass. As in
    ``gpt.model.layers``, no fp32 logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, first: int, tokens: int, group: dist.ProcessGroup
    ) -> Tensor:
        """Return the loss, () fp32, on every rank.

        The first ``tokens`` columns of ``logits_NV`` belong to the tokens with the ids ``first``, ``first`` + 1, and so
        on. The other columns of this rank are padding.
        """
        here_N = (targets_N >= first) & (targets_N < first + tokens)
        column_N = (targets_N - first).masked_fill(~here_N, 0)
        if tokens:
            own_peak_N, sum_N, distance_N = exponentials(logits_NV[:, :tokens], column_N)
        else:  # only padding
            sum_N, distance_N = torch.zeros(2, len(logits_NV), device=logits_NV.device)
            own_peak_N = torch.full_like(sum_N, -torch.inf)
        peak_N = own_peak_N.clone()
        with waiting("tp"):
            dist.all_reduce(peak_N, dist.ReduceOp.MAX, group=group)
        further_N = own_peak_N - peak_N
        sums_2N = torch.stack((sum_N * further_N.exp(), (distance_N + further_N).masked_fill(~here_N, 0)))
        with waiting("tp"):
            dist.all_reduce(sums_2N, group=group)
        rest_N, target_N = sums_2N[0].log(), sums_2N[1]
        ctx.tokens = tokens
        counts_N = targets_N >= 0
        ctx.save_for_backward(logits_NV, column_N, here_N, peak_N, rest_N, target_N, counts_N)
        return (rest_N - target_N).masked_fill(~counts_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, column_N, here_N, peak_N, rest_N, target_N, counts_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        grad_NV[:, ctx.tokens :] = 0
        if ctx.tokens:
            own = slice(None), slice(ctx.tokens)
            # Minus infinity is the logarithm of the gradient of a token that does not count.
            write_softmax(grad_NV[own], logits_NV[own], peak_N, rest_N - (gradient * counts_N).log())
            column_N1 = column_N.unsqueeze(-1)
            of_target_N1 = (((target_N - rest_N).exp() - 1) * gradient).unsqueeze(-1).type_as(grad_NV)
            kept_N1 = grad_NV.gather(-1, column_N1)
            grad_NV.scatter_(-1, column_N1, torch.where(here_N.unsqueeze(-1), of_target_N1, kept_N1))
        return grad_NV, None, None, None, None


# Tensor parallelism: the matrices of a model sharded over ranks that work on the same tokens.
#
# After Megatron-LM (arXiv 1909.08053, section 3). Queries, keys, values and the first matrices of the feed-forward
# layer are column-parallel: sharded by their outputs, that is by heads and by inner width. The matrices that write into
# the residual stream are row-parallel: sharded by their inputs, their results summed over the ranks. Embedding and
# output matrix are sharded by the vocabulary (above). Between these, hidden states are sharded along the sequence
# (``parallel.sequence_parallel``, arXiv 2205.05198, section 4.2.2), or replicated.
#
# This is applied to the model from outside, with torch's parallel styles for Linear layers; activations between the
# modules of a block are plain tensors. All parameters become DTensors, also the replicated ones. A gradient is partial
# until it is reduced, if a rank saw only a shard of the tokens or heads.
#
# B batch, T time, D width, H heads, C head width, V vocabulary.


REPLICATED, SEQUENCE, HEADS, VOCABULARY = Replicate(), Shard(1), Shard(2), Shard(-1)
"""Placements of activations. ``REPLICATED``: each rank has the whole tensor. ``SEQUENCE``: hidden states (B, T, D),
sharded along T. ``HEADS``: queries and keys (B, T, H, C), sharded along H. ``VOCABULARY``: logits (B, T, V), sharded
along V."""

MIXTURE_PLACEMENTS: dict[str, Placement] = {
    **{"experts.gate": Shard(1), "experts.up": Shard(1), "experts.down": Shard(2)},
    **{"shared.gate.weight": Shard(0), "shared.up.weight": Shard(0), "shared.down.weight": Shard(1)},
}
"""Parameter of a mixture of experts -> its placement: each is sharded along the inner width of the experts."""


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Apply tensor parallelism over the ranks of ``mesh`` to a model or a pipeline stage, in place. Before the call,
    ``model`` is equal on all these ranks.

    The model then takes tokens as before, and returns this rank's columns of the logits, which may include padding of
    the vocabulary.
    """
    record_tensor_waits()
    hidden = SEQUENCE if config.sequence_parallel else REPLICATED
    apply_styles(model, mesh, outer_styles(model, hidden))
    for block in model.blocks:
        apply_styles(block, mesh, block_styles(block, hidden))


def record_tensor_waits() -> None:
    """Record DTensors' waits for tensor-parallel collectives in the timeline of a step.

    DTensors wait in one function of torch's module of functional collectives. The first call of ``record_tensor_waits``
    in a process replaces this function; later calls do nothing. Waits in compiled code are not recorded.
    """
    wait = functional_collectives.wait_tensor
    if getattr(wait, "is_recorded", False):
        return

    def recorded_wait(tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return wait(tensor)  # type: ignore[no-any-return]
        with waiting("tp"):
            return wait(tensor)  # type: ignore[no-any-return]

    recorded_wait.is_recorded = True  # type: ignore[attr-defined]
    functional_collectives.wait_tensor = recorded_wait


def apply_styles(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Apply the styles of ``plan`` (name of a submodule -> style) to those submodules that ``module`` has."""
    there = dict(module.named_modules())
    # No broadcast of values, because every rank has them.
    parallelize_module(module, mesh, {name: plan[name] for name in plan if name in there}, src_data_rank=None)


def outer_styles(model: GPT, hidden: Placement) -> dict[str, ParallelStyle]:
    """Return the styles of the modules outside of the blocks: name of the module -> style. ``hidden`` is the placement
    of hidden states."""
    head: ParallelStyle = ColwiseParallel(input_layouts=hidden, output_layouts=VOCABULARY)
    if model.config.tie_embeddings:
        head = PrepareModuleInputOutput(
            input_layouts=(hidden, None),
            desired_input_layouts=(REPLICATED, None),
            output_layouts=VOCABULARY,
            desired_output_layouts=VOCABULARY,
        )
    return {
        "token_embedding": ShardedEmbedding(hidden),
        "position": ReplicatedPosition(hidden),
        "norm": Replicated(hidden),  # also a user's norm, if its class says that it takes tokens one by one
        "head": head,
    }


def block_styles(block: nn.Module, hidden: Placement) -> dict[str, ParallelStyle]:
    """Return the styles of the modules of a block: name of the module -> style. ``hidden`` is the placement of hidden
    states."""
    plan: dict[str, ParallelStyle] = {
        **dict.fromkeys(BLOCK_NORMS, Replicated(hidden)),
        # One all-gather for queries, keys and values, and one reduce-scatter of the sum of their gradients.
        "attention": PrepareModuleInput(input_layouts=(hidden, None), desired_input_layouts=(REPLICATED, None)),
        **dict.fromkeys(("attention.query", "attention.key", "attention.value"), ColwiseParallel()),
        **dict.fromkeys(("attention.query_norm", "attention.key_norm"), Replicated(HEADS)),
        "attention.sinks": ShardedByHead(),
        "attention.output": RowwiseParallel(output_layouts=hidden),
    }
    if isinstance(block.ffn, MixtureOfExperts):
        return {**plan, "ffn": ShardedMixture(hidden)}
    if not isinstance(block.ffn, DenseFfn):
        return {**plan, "ffn": Replicated(hidden)}  # a user's layer, on this rank's tokens
    whole = PrepareModuleInput(input_layouts=(hidden,), desired_input_layouts=(REPLICATED,))
    columns, rows = dict.fromkeys(("ffn.gate", "ffn.up"), ColwiseParallel()), RowwiseParallel(output_layouts=hidden)
    return {**plan, "ffn": whole, **columns, "ffn.down": rows}


class Replicated(PlacedStyle):
    """Style of a module with replicated parameters. Input and output of the module have the placement ``hidden``.

    If ``hidden`` is not ``REPLICATED``, each rank computes a partial sum of the gradient of the parameters.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {})
        compute_on_shards(module, REPLICATED if self.hidden == REPLICATED else Partial())
        return module


class ShardedByHead(ParallelStyle):
    """Style of a module with one weight for each head: the weights are sharded over the ranks like the heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {"weight": Shard(0)})
        compute_on_shards(module, Partial())
        return module


class ReplicatedPosition(Replicated):
    """Style of a module that also takes the positions of its tokens. If hidden states are sharded along the sequence,
    each rank passes the positions of its own tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.hidden == SEQUENCE:
            replace_forward(module, partial(shift_positions, module.forward, device_mesh.get_local_rank()))
        return super()._apply(module, device_mesh)


def shift_positions(
    forward: Callable[[Tensor, int | Tensor], Tensor], slices: int, x_BTD: Tensor, start: int | Tensor = 0
) -> Tensor:
    """Call ``forward`` on this rank's part of sequences, (B, T, D), with the positions of its tokens. Return the result
    of ``forward``.

    Args:
        forward: forward method of a module for positions.
        slices: number of parts of each sequence that come before this rank's part. All parts have T tokens.
        x_BTD: hidden states of the part.
        start: position of the first token of the sequences, or the positions of all their tokens.
    """
    first, length = slices * x_BTD.size(1), x_BTD.size(1)
    return forward(x_BTD, start[:, first : first + length] if isinstance(start, Tensor) else start + first)


class ShardedMixture(PlacedStyle):
    """Style of a mixture of experts, in which each expert is sharded along its inner width. Every rank routes all
    tokens.

    Inside the mixture a rank computes partial sums: of the result, of the gradient of the input, and of the gradient of
    the router. So the only collective is the sum of the result at the end. The losses of the router are no partial
    sums: every rank computes the whole losses. They are divided by the number of ranks, because their gradients are
    summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, MIXTURE_PLACEMENTS)
        compute_on_shards(module, Partial())
        replace_forward(module, partial(self._sum, device_mesh, module.forward))
        return module

    def _sum(self, mesh: DeviceMesh, forward: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        whole_BTD = DTensor.from_local(x_BTD, mesh, [self.hidden]).redistribute(placements=[REPLICATED])
        return reduce_partial(forward(whole_BTD.to_local(grad_placements=[Partial()])), mesh, self.hidden)


def reduce_partial_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """All-reduce over ``mesh``, in place, those gradients of a module that are partial sums. Call this function after
    the last micro-batch. With FSDP the call is not needed, because FSDP reduces these gradients."""
    parts = []
    for parameter in module.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parts.append(grad.to_local())
            parameter.grad = DTensor.from_local(parts[-1], mesh, parameter.placements)
    all_reduce_in_buckets(parts, mesh.get_group())
