"""ND parallelism on a device mesh: tensor, context and expert parallelism with FSDP or replicas over the data ranks.

Owns the order in which they are applied (innermost axis first), the all-reduce of gradients over ranks that saw other
tokens, and a gradient norm in which every element counts once. Each kind of parallelism is a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from gpt.config import Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.model.init import Weights
from gpt.model.moe import find_mixtures
from gpt.parallel.base import TorchEngine
from gpt.parallel.clipping import Clipped, clip_shards
from gpt.parallel.context import SequenceShard, shard_sequences
from gpt.parallel.distributed import World, build_mesh, expert_mesh, replica_mesh, shard_mesh
from gpt.parallel.dtensor import all_reduce_in_buckets, inverse_replicas, local_tensor
from gpt.parallel.expert import expert_parameters, fsdp_shard_experts, parallelize_experts
from gpt.parallel.fsdp import apply_fsdp, prefetch_forward, reshard
from gpt.parallel.materialize import materialize
from gpt.parallel.tensor import apply_tensor_parallel, reduce_partial_gradients
from gpt.parallel.timeline import waiting
from gpt.parallel.vocab import vocabulary_loss
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims


class NDEngine(TorchEngine):
    """A model sharded along the axes of the mesh, with its parameters sharded (fsdp) or replicated (ddp) over data
    ranks.

    Context-parallel ranks each have a part of the gradient of a sequence, so for gradients they count as data ranks.
    The model comes on the meta device, and gets its values after it was sharded.
    """

    def __init__(
        self, model: GPT, weights: Weights, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch
    ) -> None:
        timeout_s = config.parallel.timeout_s
        self.mesh = build_mesh(dims, world, timeout_s)
        self._sequence: SequenceShard | None = None
        if dims.cp > 1:
            self._sequence = shard_sequences(model, self.mesh["cp"].get_group(), config, world.device)
        self._sharded = config.parallel.strategy is Strategy.fsdp
        self._all_reduced: list[tuple[list[nn.Parameter], dist.ProcessGroup]] = []
        """Parameters whose gradients are all-reduced here, with the ranks to reduce over."""
        module, parts = self.split_model(model, config, world, batch)
        data = self.mesh
        if dims.ep > 1:
            data = expert_mesh(self.mesh, dims, world, timeout_s)
            for part in parts:
                parallelize_experts(part, data["ep"], averaged=self._sharded)
        if dims.tp > 1:
            self._apply_tensor_parallel(parts, config, self.mesh["tp"])
        if self._sharded:
            if dims.ep > 1:
                expert_fsdp_mesh = shard_mesh(data, world, timeout_s, "edp")
                for part in parts:
                    fsdp_shard_experts(part, expert_fsdp_mesh, config, dims)
            fsdp_mesh = shard_mesh(self.mesh, world, timeout_s)
            for part in parts:
                apply_fsdp(part, fsdp_mesh, config)
                if dims.ep > 1:  # the dispatch of rows waits for the device
                    prefetch_forward([[block, *(m.experts for m in find_mixtures(block))] for block in part.blocks])
        home = torch.device("cpu") if self._sharded and config.parallel.cpu_offload else None
        materialize(parts, weights, world.device, home)
        if not self._sharded:
            # Replicas all-reduce their gradients after the last micro-batch, without DistributedDataParallel: that
            # wants every parameter on one kind of mesh, and a pipeline schedule would end it for one stage while
            # another still computes.
            experts = expert_parameters(module) if dims.ep > 1 else []
            rest = [p for p in module.parameters() if not any(p is other for other in experts)]
            for chosen, mesh in ((rest, self.mesh), (experts, data)):
                self._all_reduced.append((chosen, replica_mesh(mesh, world, timeout_s).get_group()))
        averaged = dims.data_ranks * dims.cp if self._sharded else 1
        super().__init__(
            module,
            module,
            config,
            world,
            dims,
            batch,
            averaged,
            sync_context=self._sync_last,
            reduce_gradients=self._reduce_after,
        )
        self.timed_groups = find_timed_groups(config, dims)

    def split_model(self, model: GPT, config: TrainConfig, world: World, batch: Batch) -> tuple[GPT, list[GPT]]:
        """Return this rank's part of the model as one module, and the parts of it that are called by themselves."""
        return model, [model]

    def _apply_tensor_parallel(self, parts: Sequence[GPT], config: TrainConfig, mesh: DeviceMesh) -> None:
        for part in parts:
            apply_tensor_parallel(part, mesh, config.parallel)
        self.loss_weight = 1.0 if mesh.get_local_rank() == 0 else 0.0
        if config.parallel.loss_parallel:
            columns = config.model.padded_vocab // mesh.size()
            self.criterion = vocabulary_loss(mesh, columns, config.model.vocab_size)

    def _reduce_after(self) -> None:
        """All-reduce the gradients that FSDP did not reduce in the last backward pass."""
        if self.dims.tp > 1 and not self._sharded:
            with waiting("tp"):
                reduce_partial_gradients(self.module, self.mesh["tp"])
        for parameters, group in self._all_reduced:
            with waiting("dp"):
                all_reduce_in_buckets([local_tensor(p.grad) for p in parameters if p.grad is not None], group)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = super().loss(tokens_BT, targets_BT)
        reshard(self.module)
        return loss

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        return x_BT if self._sequence is None else self._sequence.part(x_BT)

    def _sync_last(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.module, FSDPModule):
            each = self.config.parallel.reduce_each_micro_batch
            self.module.set_requires_gradient_sync(last or each)
            self.module.set_requires_all_reduce(last)  # between replicas once, whatever a replica does inside
        return nullcontext()

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        limit = self.config.optim.grad_clip
        return clip_shards(self.gradients(), limit, self.world, figures_N, meanwhile)

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, local_tensor(parameter.grad), inverse_replicas(parameter.grad, self.owners(name))

    def owners(self, name: str) -> int:
        """Count the ranks that hold a parameter, or a shard of it."""
        return self.world.size


def find_timed_groups(config: TrainConfig, dims: ParallelDims) -> tuple[str, ...] | None:
    """Return the groups whose waits are recorded; None where some are out of sight: in compiled blocks under tp."""
    if dims.tp > 1 and config.compiles:
        return None
    sizes = {"fsdp" if dims.is_sharded else "dp": dims.data_ranks * dims.cp}
    sizes |= {name: getattr(dims, name) for name in ("tp", "pp", "cp", "ep")}
    return tuple(name for name, size in sizes.items() if size > 1) or None
