"""The vocabulary sharded over ranks: the rows of the embedding, and the loss of logits sharded by columns.

For tensor parallelism (gpt/parallel/tensor.py), after arXiv 1909.08053, section 3. Must not know the rest of the model.

B batch, T time, D width, V the tokens of one rank, N = B T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from gpt.model.loss import exponentials, write_softmax
from gpt.parallel.compile import replace_forward
from gpt.parallel.dtensor import distribute, local_tensor, reduce_partial
from gpt.parallel.timeline import waiting


class ShardedEmbedding(ParallelStyle):
    """Style of an embedding sharded by rows (tokens), whose output has the placement ``hidden``.

    torch's RowwiseParallel takes embeddings too, but the gradient that it leaves on each rank is as large as the whole
    matrix (torch 2.13).
    """

    def __init__(self, hidden: Placement) -> None:
        super().__init__()
        self.hidden = hidden

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        if isinstance(module.weight, DTensor):  # tied, and seen in another pipeline stage already
            return module
        distribute(module, device_mesh, {"weight": Shard(0)})
        replace_forward(module, partial(look_up, module, device_mesh, self.hidden))
        return module


def look_up(embedding: nn.Embedding, mesh: DeviceMesh, hidden: Placement, tokens_BT: Tensor) -> Tensor:
    """Look up tokens in a row-sharded embedding: each rank gives its rows, and zeros for the others, to be summed."""
    weight_VD = local_tensor(embedding.weight)
    row_BT = tokens_BT - mesh.get_local_rank() * len(weight_VD)
    elsewhere_BT = (row_BT < 0) | (row_BT >= len(weight_VD))
    x_BTD = F.embedding(row_BT.masked_fill(elsewhere_BT, 0), weight_VD)
    return reduce_partial(x_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0), mesh, hidden)


def vocabulary_loss(mesh: DeviceMesh, columns: int, vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the summed cross-entropy, in nats and fp32, of column-sharded logits (B, T, V) and targets (B, T).

    Args:
        mesh: the ranks over which the logits are sharded.
        columns: columns of each rank; logits may lack the last ones, if they are padding.
        vocab_size: number of columns that are tokens. The others are padding.
    """
    first = mesh.get_local_rank() * columns
    tokens = max(0, min(columns, vocab_size - first))

    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten()
        summed_loss: Tensor = ShardedCrossEntropy.apply(logits_NV, targets_N, first, tokens, mesh.get_group())
        return summed_loss

    return loss


class ShardedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, which all-reduces three numbers for each token instead of gathering the logits.

    torch's ``loss_parallel`` reduces four, is a process-wide context, and has to be open around the backward pass too,
    which under a pipeline is called from elsewhere. As in ``gpt.model.loss``, no fp32 logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, first: int, tokens: int, group: dist.ProcessGroup
    ) -> Tensor:
        """Return the loss, (), on every rank, whose columns are ``tokens`` tokens from ``first`` on, then padding."""
        here_N = (targets_N >= first) & (targets_N < first + tokens)
        column_N = (targets_N - first).masked_fill(~here_N, 0)
        if tokens:
            own_peak_N, sum_N, distance_N = exponentials(logits_NV[:, :tokens], column_N)
        else:  # padding alone
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
        ctx.save_for_backward(logits_NV, column_N, here_N, peak_N, rest_N, target_N)
        return (rest_N - target_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, column_N, here_N, peak_N, rest_N, target_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        grad_NV[:, ctx.tokens :] = 0
        if ctx.tokens:
            own = slice(None), slice(ctx.tokens)
            write_softmax(grad_NV[own], logits_NV[own], peak_N, rest_N - gradient.log())
            column_N1 = column_N.unsqueeze(-1)
            of_target_N1 = (((target_N - rest_N).exp() - 1) * gradient).unsqueeze(-1).type_as(grad_NV)
            kept_N1 = grad_NV.gather(-1, column_N1)
            grad_NV.scatter_(-1, column_N1, torch.where(here_N.unsqueeze(-1), of_target_N1, kept_N1))
        return grad_NV, None, None, None, None
