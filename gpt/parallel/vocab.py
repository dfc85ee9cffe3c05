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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from gpt.parallel.compile import replace_forward
from gpt.parallel.dtensor import distribute, local_tensor, reduce_partial


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
        logits_NV = logits_BTV.float().flatten(0, 1)
        if tokens < logits_NV.size(-1):
            padding_V = torch.arange(logits_NV.size(-1), device=logits_NV.device) >= tokens
            logits_NV = logits_NV.masked_fill(padding_V, -torch.inf)
        summed_loss: Tensor = CrossEntropy.apply(logits_NV, targets_BT.flatten(), first, mesh.get_group())
        return summed_loss

    return loss


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, which all-reduces three numbers for each token instead of gathering the logits.

    torch's ``loss_parallel`` reduces four, is a process-wide context, and has to be open around the backward pass too,
    which under a pipeline is called from elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        """Return the loss, (), on every rank. ``first``: the token of this rank's first column."""
        peak_N = logits_NV.amax(-1)
        dist.all_reduce(peak_N, dist.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - peak_N.unsqueeze(-1)
        here_N = (targets_N >= first) & (targets_N < first + logits_NV.size(-1))
        column_N1 = (targets_N - first).masked_fill(~here_N, 0).unsqueeze(-1)
        target_N = shifted_NV.gather(-1, column_N1).squeeze(-1).masked_fill(~here_N, 0)
        weight_NV = shifted_NV.exp_()
        sums_2N = torch.stack((weight_NV.sum(-1), target_N))
        dist.all_reduce(sums_2N, group=group)
        total_N, target_N = sums_2N.unbind()
        ctx.save_for_backward(weight_NV.div_(total_N.unsqueeze(-1)), here_N, column_N1)
        return (total_N.log() - target_N).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_NV, here_N, column_N1 = ctx.saved_tensors
        ones_N1 = here_N.unsqueeze(-1).type_as(softmax_NV)
        return softmax_NV.scatter_add(-1, column_N1, -ones_N1).mul_(gradients[0]), None, None, None
