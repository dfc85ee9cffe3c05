"""ND parallelism on a device mesh: FSDP2, experts sharded over ranks, and their combinations with tp and cp."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from gpt.config import ReduceDtype, Strategy, TrainConfig
from gpt.model.ffn import MixtureOfExperts, autocast_rows, find_mixtures, invert_order
from gpt.model.gpt import GPT, Weights
from gpt.model.layers import COMPUTE_DTYPES
from gpt.parallel.context import SequenceShard, shard_sequences
from gpt.parallel.ddp import GradientBucket, GradientReducer
from gpt.parallel.distributed import build_mesh, expert_mesh, mesh_without, shard_mesh, waiting
from gpt.parallel.engine import RunLayout, TorchEngine
from gpt.parallel.modules import all_reduce_in_buckets, local_tensor, materialize, replace_forward, split_into_buckets
from gpt.parallel.tensor import apply_tensor_parallel, reduce_partial_gradients, vocabulary_loss
from gpt.topology import BUCKET_BYTES, ParallelDims, fsdp_units, shard_dimension

# FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over the ranks (arXiv 2304.11277).
#
# With several replicas (HSDP), each one is sharded, and gradients are averaged between replicas.


def apply_fsdp(model: GPT, mesh: DeviceMesh, config: TrainConfig) -> None:
    """Shard all parameters of ``model``, or of a pipeline stage, over ``mesh`` with FSDP, in place.

    One all-gather gathers the parameters of a group. The groups follow torchtitan (torchtitan/distributed/fsdp.py): the
    embedding; each block, or several (``fsdp_units``); the last norm with the output matrix. The last group of blocks,
    and that of the output matrix, stay gathered after the forward pass, since the backward pass begins with them. The
    backward pass of the embedding needs no weights, so they are not gathered again.

    If embedding and output matrix are tied, they are one matrix. This matrix and the last norm are in one more group,
    which has the remaining parameters of the model. The first and the last layer use the matrix, so this group stays
    gathered from the first layer to the last.
    """
    # torch 2.13 warns against writing into the logits, which are a view. The loss does not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    reshard = config.parallel.reshard_after_forward
    blocks = iter(model.blocks)
    units = [list(islice(blocks, count)) for count in fsdp_units(config, len(model.blocks))]
    tied = model.config.tie_embeddings
    if not tied and hasattr(model, "token_embedding"):
        entry = [module for module in (model.token_embedding, model.position) if module is not None]
        fsdp_shard_modules(entry, mesh, config, reshard)
        entry[0].set_unshard_in_backward(False)  # type: ignore[operator]
    for unit in units:
        fsdp_shard_modules(unit, mesh, config, reshard and unit is not units[-1])
    if not tied and hasattr(model, "head"):
        fsdp_shard_modules([model.norm, model.head], mesh, config, reshard=False)
    fsdp_shard_modules([model], mesh, config, reshard=False)


def fsdp_shard_modules(
    modules: Sequence[nn.Module], mesh: DeviceMesh, config: TrainConfig, reshard: bool, dimension: int = 0
) -> None:
    """Shard the parameters of modules with FSDP, in place, as one group that one all-gather gathers. Parameters that
    are sharded already do not change.

    Args:
        modules: modules that are called one after another in a forward pass.
        mesh: the ranks to shard over.
        config: config of the run.
        reshard: True to free gathered parameters after the forward pass, and gather them again for the backward pass.
        dimension: dimension of the parameters along which to shard.
    """
    half, in_bf16 = config.precision.is_half, config.parallel.reduce_dtype is ReduceDtype.bf16
    # Only copies from pinned memory overlap with computing on the GPU.
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    fully_shard(
        list(modules) if len(modules) > 1 else modules[0],
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=COMPUTE_DTYPES[config.precision] if half else None,
            reduce_dtype=torch.bfloat16 if in_bf16 else torch.float32 if half else None,
        ),
        offload_policy=host if config.parallel.cpu_offload else OffloadPolicy(),
        reshard_after_forward=reshard,
        shard_placement_fn=lambda _: Shard(dimension),
    )
    record_fsdp_waits(modules[0])


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP has all-gathered in ``module``. Call this after the forward pass of an evaluation.

    In training the backward pass frees them. Without this call, ``module.parameters()`` would have gathered parameters
    until the next backward pass. Code that reads the shards, such as the comparison of replicas, would find other
    shapes.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


COLLECTIVE = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Names of the methods of torch's ``FSDPParamGroup`` that start a collective, or wait for one."""


def record_fsdp_waits(module: nn.Module) -> None:
    """Make the timeline of a step record the communication of an FSDP module, with the copies into and out of its
    buffers.

    On a CPU the recorded time is that of the collectives, because the host waits in them. On a GPU collectives run
    while kernels run, so the recorded time is that of the waits.
    """
    assert isinstance(module, FSDPModule)
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the name until torch 2.11
    for group in found:
        for name in COLLECTIVE if group is not None else ():
            setattr(group, name, waiting("fsdp")(getattr(group, name)))


def prefetch_forward(groups: Sequence[Sequence[nn.Module]]) -> None:
    """Make each group of FSDP modules, before its own forward pass, start the all-gather of the next group.

    ``groups`` are in the order of the forward pass. Without this call the host starts all-gathers early only if it runs
    ahead of the device. A host that waits for the device inside a block does not run ahead.
    """
    for here, following in pairwise(groups):
        assert isinstance(here[0], FSDPModule)
        here[0].set_modules_to_forward_prefetch([module for module in following if isinstance(module, FSDPModule)])


# Expert parallelism: experts sharded over data-parallel ranks (GShard, arXiv 2006.16668, section 3.2).
#
# Each rank routes its own tokens. An all-to-all dispatches their rows to the ranks with their experts, and a second one
# combines the results. The backward pass sends gradients the same ways. So the gradient of an expert is already summed
# over the expert-parallel ranks. Over the ranks with the same experts it is reduced like every other gradient.
#
# E experts, H experts of this rank, P ranks, R rows of this rank's tokens, S rows sent here, D width, F inner width.


def parallelize_experts(model: GPT, mesh: DeviceMesh, averaged: bool) -> None:
    """Apply expert parallelism over ``mesh`` to every mixture of experts in ``model``, in place.

    Each rank keeps its own experts. In the forward pass, the tokens are sent to the ranks of their experts.

    Args:
        model: the model with all experts, equal on every rank.
        mesh: the expert-parallel ranks.
        averaged: True if FSDP averages the gradients of experts over the ranks that have the same experts. These
            gradients are already sums over ``mesh``, so they are divided by its size. The result is a mean over all
            data ranks, as for the other gradients.
    """
    share = 1 / mesh.size() if averaged else 1.0
    for mixture in find_mixtures(model):
        for name, whole in list(mixture.experts.named_parameters()):
            mine = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            setattr(mixture.experts, name, nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)))
        # Each call has another length and waits for other ranks, so it is not compiled.
        send = torch.compiler.disable(partial(send_to_experts, mixture, mesh.get_group(), share))
        mixture.give_to_experts = send  # type: ignore[method-assign]


def fsdp_shard_experts(model: GPT, mesh: DeviceMesh, config: TrainConfig, dims: ParallelDims) -> None:
    """Shard the experts of this rank with FSDP2, in place, over the ranks of ``mesh``, which have the same experts.

    FSDP2 all-gathers the parameters of a module when the module is called. torch 2.13 refuses the all-gather inside a
    block that is recomputed or compiled. So the forward method of each block is moved into the module of its experts. A
    call of the block then calls this module: FSDP2 all-gathers the experts first, and then the whole block runs.

    Args:
        model: the model or a pipeline stage, with this rank's experts.
        mesh: the ranks to shard over.
        config: config of the run.
        dims: the parallel dimensions.
    """
    last = [*model.blocks][-1:]
    for block in model.blocks:
        for mixture in find_mixtures(block):
            reshard = config.parallel.reshard_after_forward and block not in last
            fsdp_shard_modules([mixture.experts], mesh, config, reshard, shard_dimension(config.model, dims))
            replace_forward(mixture.experts, block.forward)
            # A function, since a module as an attribute would become a submodule.
            replace_forward(block, partial(nn.Module.__call__, mixture.experts))


def send_to_experts(
    mixture: MixtureOfExperts, group: dist.ProcessGroup, share: float, x_RD: Tensor, ends_E: Tensor
) -> Tensor:
    """Apply experts that are sharded over the ranks of ``group`` to rows that are sorted by expert, (R, D) -> (R, D).

    The rows are sent to the ranks of their experts, and the results are sent back. Collective.

    Args:
        mixture: the mixture of experts, with this rank's experts.
        group: the expert-parallel ranks.
        share: number by which the gradients of the experts' parameters are multiplied.
        x_RD: rows of this rank: the hidden states of its tokens, one row for each expert of a token.
        ends_E: the rows of expert e end before ``ends_E[e]``.
    """
    experts, even = mixture.experts, mixture.has_fixed_places
    plan = plan_dispatch(len(x_RD), ends_E, group, even)
    x_SD = AllToAll.apply(autocast_rows(x_RD), plan.sent, plan.received, group).index_select(0, plan.order)
    gate_HFD = None if experts.gate is None else local_experts(experts.gate, share)
    up_HFD, down_HDF = local_experts(experts.up, share), local_experts(experts.down, share)
    y_SD = experts.apply_to(x_SD, plan.ends, even, gate_HFD, up_HFD, down_HDF)
    return AllToAll.apply(y_SD.index_select(0, invert_order(plan.order)), plan.received, plan.sent, group)


def local_experts(weight: Tensor, share: float) -> Tensor:
    """Return this rank's experts of a stacked parameter, as a plain tensor. Their gradient is multiplied by ``share``
    in the backward pass."""
    mine = local_tensor(weight)
    # FSDP2 could divide the gradient too, but with an operation that gloo does not support (PREMUL_SUM), or twice if
    # a single rank has the experts.
    if share != 1 and mine.requires_grad:
        mine.register_hook(lambda gradient: gradient * share)
    return mine


@dataclass(frozen=True)
class DispatchPlan:
    """Plan of the all-to-all that sends rows to the ranks of their experts."""

    sent: list[int]
    """Number of rows that this rank sends to each rank."""
    received: list[int]
    """Number of rows that this rank receives from each rank."""
    order: Tensor
    """Permutation of the S received rows that sorts them by expert, (S,)."""
    ends: Tensor
    """Index after the last row of each of this rank's H experts, once the rows are sorted, (H,) int32."""


def plan_dispatch(rows: int, ends_E: Tensor, group: dist.ProcessGroup, fixed_places: bool) -> DispatchPlan:
    """Return the plan of the all-to-all that sends rows, which are sorted by expert, to the ranks of their experts.

    Args:
        rows: number of rows of this rank.
        ends_E: index after the last row of each expert.
        group: the expert-parallel ranks.
        fixed_places: True if all experts have equally many rows, as with a ``capacity_factor``. Otherwise the ranks
            exchange their numbers of rows, for which the host waits.
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
    # The size is known here; without it the host would wait for the device a second time.
    expert_S = expert_PH.repeat_interleave(received_PH.flatten(), output_size=sum(received))
    ends_H = received_PH.sum(0).cumsum(0).to(torch.int32)
    return DispatchPlan(sent, received, expert_S.argsort(stable=True), ends_H)


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send rows of ``x`` to every rank of a group: the first ``sent[0]`` rows to rank 0, and so on. Return the received
    rows, ``received[r]`` from rank r, in the order of ranks. Collective."""
    # An operation of its own with a result, so that selective recomputation can keep it (gpt/parallel/modules.py).
    operations = torch.ops._c10d_functional
    with waiting("ep"):
        return operations.wait_tensor(operations.all_to_all_single(x.contiguous(), received, sent, group.group_name))


class AllToAll(torch.autograd.Function):
    """``all_to_all`` with a backward pass, which sends the gradients of rows back to the ranks of the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradients[0], *ctx.way_back), None, None, None


# The ND engine: tensor, context and expert parallelism, with FSDP or replicas over the data ranks.


class NDEngine(TorchEngine):
    """Engine of tensor, context and expert parallelism, and of FSDP. These kinds can be combined. Over the
    data-parallel ranks, parameters are sharded (fsdp) or replicated (ddp).

    Context-parallel ranks each compute a part of the gradient of a sequence, so gradients are reduced over them as over
    data-parallel ranks. ``model`` is on the meta device. The engine shards it first, and then sets its parameters to
    the values that ``weights`` returns.
    """

    def __init__(self, model: GPT, weights: Weights, layout: RunLayout) -> None:
        config, world, dims = layout.config, layout.world, layout.dims
        self.mesh = build_mesh(dims, world.device.type)
        self._sequence: SequenceShard | None = None
        if dims.cp > 1:
            self._sequence = shard_sequences(model, self.mesh["cp"].get_group(), config, world.device)
        self._sharded = config.parallel.strategy is Strategy.fsdp
        self._late: list[tuple[list[nn.Parameter], dist.ProcessGroup]] = []
        """Pairs (parameters, process group). The parameters are replicated over tp. Their gradients are first summed
        over tp, and then all-reduced over the process group."""
        self._reducer = GradientReducer([])
        module, parts = self.split_model(model, layout)
        data = self.mesh
        if dims.ep > 1:
            data = expert_mesh(self.mesh, dims)
            for part in parts:
                parallelize_experts(part, data["ep"], averaged=self._sharded)
        if dims.tp > 1:
            tensor_mesh = self.mesh["tp"]
            for part in parts:
                apply_tensor_parallel(part, tensor_mesh, config.parallel)
            self.loss_weight = 1.0 if tensor_mesh.get_local_rank() == 0 else 0.0
            self.criterion = vocabulary_loss(tensor_mesh, config.model.padded_vocab // dims.tp, config.model.vocab_size)
        if self._sharded:
            if dims.ep > 1:
                expert_fsdp_mesh = shard_mesh(data, "edp")
                for part in parts:
                    fsdp_shard_experts(part, expert_fsdp_mesh, config, dims)
            fsdp_mesh = shard_mesh(self.mesh)
            for part in parts:
                apply_fsdp(part, fsdp_mesh, config)
                if dims.ep > 1:  # the dispatch of rows waits for the device
                    prefetch_forward([[block, *(m.experts for m in find_mixtures(block))] for block in part.blocks])
        home = torch.device("cpu") if self._sharded and config.parallel.cpu_offload else None
        materialize(parts, weights, world.device, home)
        super().__init__(module, module, layout, averaged=dims.data_ranks * dims.cp if self._sharded else 1)
        if not self._sharded:
            self._reducer = GradientReducer(self._plan_all_reduce(module, data))
        self.timed_groups = find_timed_groups(config, dims)

    def split_model(self, model: GPT, layout: RunLayout) -> tuple[GPT, list[GPT]]:
        """Return this rank's part of the model as one module, and a list of the modules that are called in forward
        passes: the rank's pipeline stages, or the model itself. ``layout`` has the config, ranks and dimensions of the
        run."""
        return model, [model]

    def _plan_all_reduce(self, module: nn.Module, data: DeviceMesh) -> list[GradientBucket]:
        """Return buckets for the all-reduce of the gradients of ``module``, in the order in which the backward pass
        computes them. Parameters that are replicated over tp are added to ``_late`` instead.

        torch's DistributedDataParallel cannot be used, because it requires all parameters on one mesh. Experts are
        replicated over fewer ranks than other parameters: over those ranks of ``data`` that have the same index along
        the axis ep.
        """
        parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
        place = {parameter: index for index, parameter in enumerate(parameters)}
        mixtures = find_mixtures(module) if self.dims.ep > 1 else []
        experts = {parameter for mixture in mixtures for parameter in mixture.experts.parameters()}
        late = {p for p in parameters if isinstance(p, DTensor) and any(q.is_replicate() for q in p.placements)}
        buckets: list[GradientBucket] = []
        for chosen, mesh in (({*parameters} - experts, self.mesh), (experts, data)):
            group = mesh_without(mesh, "pp", "ep", "tp").get_group()
            if group.size() == 1:
                continue
            self._late.append((sorted(chosen & late, key=place.__getitem__), group))
            soon = sorted(chosen - late, key=place.__getitem__, reverse=True)
            for indices in split_into_buckets([local_tensor(p.detach()) for p in soon], BUCKET_BYTES):
                buckets.append(GradientBucket([soon[index] for index in indices], group))
        return sorted(buckets, key=lambda bucket: place[bucket.parameters[-1]], reverse=True)

    def reduce_gradients(self) -> None:
        """All-reduce those gradients that were not all-reduced during the last backward pass. Collective.

        With FSDP there are none. Otherwise these are the gradients of buckets that were not sent yet, with pipelines
        all gradients, and with tp the gradients of parameters that are replicated over tp.
        """
        if self._sharded:
            return
        if self.dims.pp > 1:  # a schedule runs the backward passes of its stages in an order of its own
            self._reducer.begin_last()
        self._reducer.finish()
        if self.dims.tp > 1:
            with waiting("tp"):
                reduce_partial_gradients(self.module, self.mesh["tp"])
            for parameters, group in self._late:
                with waiting("dp"):
                    all_reduce_in_buckets([local_tensor(p.grad) for p in parameters if p.grad is not None], group)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = super().loss(tokens_BT, targets_BT)
        reshard(self.module)
        return loss

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        return x_BT if self._sequence is None else self._sequence.part(x_BT)

    def sync_context(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.module, FSDPModule):
            each = self.config.parallel.reduce_each_micro_batch
            self.module.set_requires_gradient_sync(last or each)
            self.module.set_requires_all_reduce(last)  # once, for any number of reductions in a replica
        elif last:
            self._reducer.begin_last()
        return nullcontext()


def find_timed_groups(config: TrainConfig, dims: ParallelDims) -> tuple[str, ...] | None:
    """Return the kinds of parallelism, such as ``tp``, whose waits the timeline of a step records.

    Data parallelism is named ``fsdp`` or ``dp``. None if no kind has several ranks. Also None if blocks are compiled
    with tp > 1, because waits in compiled code cannot be recorded.
    """
    if dims.tp > 1 and config.compiles:
        return None
    sizes = {"fsdp" if dims.is_sharded else "dp": dims.data_ranks * dims.cp}
    sizes |= {name: getattr(dims, name) for name in ("tp", "pp", "cp", "ep")}
    return tuple(name for name, size in sizes.items() if size > 1) or None
