"""Expert parallelism: experts sharded over data-parallel ranks (GShard, arXiv 2006.16668, section 3.2).

Each rank routes its own tokens. An all-to-all dispatches their rows to the ranks that hold their experts, a second one
combines the results; the backward pass sends gradients the same ways. So the gradient of an expert is already summed
over the expert-parallel ranks; over the ranks that hold the same experts it is reduced like every other gradient. Must
not know how rows are routed.

E experts, H experts held here, P ranks, R rows of this rank's tokens, S rows sent here, D width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gpt.config import TrainConfig
from gpt.model.experts import autocast_rows
from gpt.model.gpt import GPT
from gpt.model.moe import MixtureOfExperts, find_mixtures, invert_order
from gpt.parallel.compile import replace_forward
from gpt.parallel.dtensor import local_tensor
from gpt.parallel.fsdp import fsdp_shard_modules
from gpt.parallel.timeline import waiting
from gpt.topology.dims import ParallelDims
from gpt.topology.experts import shard_dimension


def parallelize_experts(model: GPT, mesh: DeviceMesh, averaged: bool) -> None:
    """Apply expert parallelism over ``mesh`` to every mixture of ``model``: keep this rank's experts, dispatch rows.

    Args:
        model: with all experts, equal on every rank.
        mesh: the expert-parallel ranks.
        averaged: True where FSDP averages gradients over the ranks that hold the same experts. Other gradients are
            averaged over all data ranks; those of experts are summed over ``mesh`` already, and so divided here.
    """
    share = 1 / mesh.size() if averaged else 1.0
    for mixture in find_mixtures(model):
        for name, whole in list(mixture.experts.named_parameters()):
            mine = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            setattr(mixture.experts, name, nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)))
        # Each call has another length and waits for other ranks, so it is not compiled.
        send = torch.compiler.disable(build_dispatch(mixture, mesh.get_group(), share))
        mixture.give_to_experts = send  # type: ignore[method-assign]


def fsdp_shard_experts(model: GPT, mesh: DeviceMesh, config: TrainConfig, dims: ParallelDims) -> None:
    """Shard a rank's experts over the ranks that hold the same ones (FSDP2).

    FSDP2 all-gathers parameters when their module is called. Inside a block that would be in the middle of what is
    recomputed or compiled, where torch 2.13 refuses it; so the experts' module is called around the whole block.
    """
    last = [*model.blocks][-1:]
    for block in model.blocks:
        for mixture in find_mixtures(block):
            reshard = config.parallel.reshard_after_forward and block not in last
            fsdp_shard_modules([mixture.experts], mesh, config, reshard, shard_dimension(config.model, dims))
            replace_forward(mixture.experts, block.forward)
            replace_forward(block, partial(call_module, mixture.experts))


def call_module(module: nn.Module, *inputs: Any) -> Any:
    """Call a module with its hooks; a function, since a module as an attribute would become a submodule."""
    return module(*inputs)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model that are sharded over expert-parallel ranks."""
    return [parameter for mixture in find_mixtures(model) for parameter in mixture.experts.parameters()]


def build_dispatch(
    mixture: MixtureOfExperts, group: dist.ProcessGroup, share: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Build ``MixtureOfExperts.give_to_experts`` for sharded experts: dispatch, compute, combine."""

    def forward(x_RD: Tensor, ends_E: Tensor) -> Tensor:
        experts = mixture.experts
        plan = plan_dispatch(len(x_RD), ends_E, group, mixture.has_fixed_places)
        x_SD = AllToAll.apply(autocast_rows(x_RD), plan.sent, plan.received, group)
        gate_HFD = None if experts.gate is None else local_experts(experts.gate, share)
        up_HFD, down_HDF = local_experts(experts.up, share), local_experts(experts.down, share)
        x_SD, even = x_SD.index_select(0, plan.order), mixture.has_fixed_places
        y_SD = experts.apply_to(x_SD, plan.ends, even, gate_HFD, up_HFD, down_HDF)
        return AllToAll.apply(y_SD.index_select(0, invert_order(plan.order)), plan.received, plan.sent, group)

    return forward


def local_experts(weight: Tensor, share: float) -> Tensor:
    """Return this rank's experts of a parameter, with the gradient multiplied by ``share``."""
    mine = local_tensor(weight)
    # FSDP2 could divide too, but by a factor that gloo cannot (PREMUL_SUM), or twice where one rank has the experts.
    if share != 1 and mine.requires_grad:
        mine.register_hook(lambda gradient: gradient * share)
    return mine


@dataclass(frozen=True)
class DispatchPlan:
    """Sizes of the all-to-all of rows, and the order that sorts received rows by expert."""

    sent: list[int]
    """Rows from here to each rank."""
    received: list[int]
    """Rows from each rank to here."""
    order: Tensor
    """(S,): sorts received rows by expert; rows of one expert stay in the order of ranks."""
    ends: Tensor
    """(H,): ends of each expert's rows after sorting, int32."""


def plan_dispatch(rows: int, ends_E: Tensor, group: dist.ProcessGroup, fixed_places: bool) -> DispatchPlan:
    """Plan the dispatch of rows that end at ``ends_E`` for each expert.

    With fixed places (a capacity) all ranks know the sizes, and the device is not waited for. Else they are exchanged.
    """
    ranks, device = group.size(), ends_E.device
    held = len(ends_E) // ranks
    if fixed_places:
        places = rows // len(ends_E)
        order_S = torch.arange(rows, device=device).view(ranks, held, places).transpose(0, 1).flatten()
        ends_H = torch.arange(1, held + 1, dtype=torch.int32, device=device) * (ranks * places)
        return DispatchPlan([rows // ranks] * ranks, [rows // ranks] * ranks, order_S, ends_H)
    sent_PH = ends_E.long().diff(prepend=ends_E.new_zeros(1).long()).view(ranks, held)
    received_PH = all_to_all(sent_PH, [1] * ranks, [1] * ranks, group)
    sent, received = torch.stack([sent_PH.sum(1), received_PH.sum(1)]).tolist()
    expert_PH = torch.arange(held, device=device).repeat(ranks)
    # The size is known here; without it the device would be waited for a second time.
    expert_S = expert_PH.repeat_interleave(received_PH.flatten(), output_size=sum(received))
    ends_H = received_PH.sum(0).cumsum(0).to(torch.int32)
    return DispatchPlan(sent, received, expert_S.argsort(stable=True), ends_H)


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange rows with every rank of a group, in the order of ranks (all_to_all_single with unequal sizes)."""
    # As an operation of its own, with a result, so that selective recomputation can keep it (gpt/parallel/compile.py).
    operations = torch.ops._c10d_functional
    with waiting("ep"):
        return operations.wait_tensor(operations.all_to_all_single(x.contiguous(), received, sent, group.group_name))


class AllToAll(torch.autograd.Function):
    """``all_to_all`` whose backward pass sends gradients the reverse way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradients[0], *ctx.way_back), None, None, None
