"""Pipeline parallelism: stages of layers on different ranks, with torch's schedules (torch.distributed.pipelining).

``Pipeline`` has the stages of this rank, the schedule that runs micro-batches through them, and the tied embedding of
the first and the last stage. ``PipelineEngine`` applies the other kinds of parallelism to each stage, as ``NDEngine``
does to a whole model. gpt/topology/schedules.py splits the layers.

Shapes: B sequences of a micro-batch, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from gpt.config import Schedule, Strategy
from gpt.model.gpt import GPT, Stage, Weights
from gpt.model.layers import COMPUTE_DTYPES, autocast, cross_entropy
from gpt.parallel.compile import replace_forward
from gpt.parallel.distributed import layer_mesh
from gpt.parallel.dtensor import local_tensor
from gpt.parallel.engine import RunLayout
from gpt.parallel.nd import NDEngine, reshard
from gpt.parallel.timeline import BUBBLE, receiving, scheduling, waiting, working
from gpt.topology.schedules import local_stages, rank_stages, stage_indices

SCHEDULES = {
    Schedule.gpipe: ScheduleGPipe,
    Schedule["1f1b"]: Schedule1F1B,
    Schedule.interleaved: ScheduleInterleaved1F1B,
    Schedule.zbv: ScheduleZBVZeroBubble,
    Schedule.dualpipev: ScheduleDualPipeV,
}
Criterion = Callable[[Tensor, Tensor], Tensor]
"""Summed loss of logits and targets."""


class Pipeline:
    """This rank's stages of a model, and the schedule that runs them together with those of the other ranks.

    Args:
        model: the whole model, whose layers the stages take over.
        layout: config, ranks and batch of the run.
        group: the ranks of this pipeline, in order.
    """

    def __init__(self, model: GPT, layout: RunLayout, group: dist.ProcessGroup) -> None:
        config = layout.config
        self.group = group
        # NCCL makes the communicator of a group in its first batched transfer, for which it waits for all ranks of the
        # group. With tied embeddings, GPipe's first one is between two ranks alone.
        dist.all_reduce(torch.zeros(1, device=layout.world.device), group=group)
        self._config, self._device, self._batch = config, layout.world.device, layout.batch
        self._time = config.model.block_size // config.parallel.cp
        """Tokens of each sequence on this rank."""
        self.sharded = config.parallel.strategy is Strategy.fsdp
        self._count = config.parallel.pp * local_stages(config.parallel)
        self._owner = {s: rank for rank in range(config.parallel.pp) for s in stage_indices(config.parallel, rank)}
        place = dist.get_rank(group)
        held = zip(stage_indices(config.parallel, place), rank_stages(config, place), strict=True)
        self.stages = {index: Stage(model, part.blocks, part.first, part.last) for index, part in held}
        """This rank's stages, by their index in the pipeline."""
        held_here = list(self.stages.values())
        blocks = [int(number) for stage in held_here for number, _ in stage.blocks.named_children()]
        first, last = any(stage.first for stage in held_here), any(stage.last for stage in held_here)
        self.module = held_here[0] if len(held_here) == 1 else Stage(model, blocks, first, last)
        """The stages as one module with the parameter names of the model, for optimizer and checkpoints only."""
        self.tied = TiedEmbedding(self)
        for stage in self.stages.values():
            replace_forward(stage, partial(self._run_stage, stage.forward, stage.last))
        self._on_micro_batch: Callable[[], None] = lambda: None
        self._objective: Criterion = cross_entropy
        stages = [
            TimedStage(
                stage,
                index,
                self._count,
                self._device,
                input_args=self._example(tokens=stage.first),
                output_args=self._example(logits=stage.last),
                group=group,
            )
            for index, stage in self.stages.items()
        ]
        kind: Any = SCHEDULES[config.parallel.schedule]
        self._schedule = kind(
            stages[0] if issubclass(kind, PipelineScheduleSingle) else stages,
            self._batch.accumulation,
            loss_fn=lambda *pair: self._objective(*pair),
            scale_grads=False,
        )

    def step(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        scale: float | Tensor,
        criterion: Criterion,
        on_micro_batch: Callable[[], None],
    ) -> Tensor:
        """Run forward and backward of a data rank's micro-batches; gradients are of the summed loss times ``scale``.

        Returns:
            The summed loss on the rank of the last stage, 0 on other ranks, () float64.
        """
        self._on_micro_batch = on_micro_batch
        self._objective = working()(lambda logits, targets: criterion(logits, targets) * scale)
        losses: list[Tensor] = []
        tokens = [tokens_BT.to(self._device, non_blocking=True)] if 0 in self.stages else []
        targets_BT = targets_BT.to(self._device, non_blocking=True)
        with scheduling():
            self._schedule.step(*tokens, target=targets_BT, losses=losses, return_outputs=False)
        self._on_micro_batch = lambda: None
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([loss.detach().double() for loss in losses]).sum() / scale

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, criterion: Criterion) -> Tensor:
        """Return the summed loss on the rank of the last stage, else 0, (). Forward only, any number of sequences.

        A rank continues as soon as it has sent its activations, so consecutive calls fill the pipeline.
        """
        x = tokens_BT.to(self._device)
        total = torch.zeros((), device=self._device)
        for index, stage in self.stages.items():
            if index and index - 1 not in self.stages:
                x = self._hidden(len(tokens_BT), self._device)
                dist.recv(x, self.global_rank(index - 1), self.group)
            x = stage(x)
            reshard(stage)
            if stage.last:
                total = criterion(x, targets_BT.to(self._device))
            elif index + 1 not in self.stages:
                dist.send(x.contiguous(), self.global_rank(index + 1), self.group)
        return total

    def global_rank(self, stage: int) -> int:
        """Return the global rank that holds a stage of this pipeline."""
        return dist.get_global_rank(self.group, self._owner[stage])

    def owners(self, name: str) -> int:
        """Return the number of ranks of this pipeline that hold a parameter."""
        return 2 if self.tied.apart and name == "token_embedding.weight" else 1

    @property
    def ends(self) -> tuple[int, int]:
        """Indices of the first and the last stage."""
        return 0, self._count - 1

    def _run_stage(self, forward: Callable[[Tensor], Tensor], last: bool, x: Tensor) -> Tensor:
        self._on_micro_batch()
        with autocast(self._config, self._device):
            y = forward(x)
        return y if last else y.to(self._hidden(0, torch.device("meta")).dtype)

    def _hidden(self, sequences: int, device: torch.device) -> Tensor:
        """Return an empty tensor like those sent between stages: (B, T, D), or this rank's shard along T.

        Residual stream and norms are fp32 under autocast. FSDP computes with weights of 16 bits, and casts inputs.
        """
        slices = self._config.parallel.tp if self._config.parallel.sequence_parallel else 1
        dtype = COMPUTE_DTYPES[self._config.precision] if self.sharded else torch.float32
        return torch.empty(sequences, self._time // slices, self._config.model.n_embd, dtype=dtype, device=device)

    def _example(self, tokens: bool = False, logits: bool = False) -> Tensor:
        """Return an empty meta tensor with shape and dtype of a stage's input or output, for torch's stages."""
        model, meta = self._config.model, torch.device("meta")
        shape = (self._batch.micro, self._time)
        if tokens:
            return torch.empty(shape, dtype=torch.long, device=meta)
        if logits:
            dtype = COMPUTE_DTYPES[self._config.precision]
            return torch.empty(*shape, model.padded_vocab // self._config.parallel.tp, dtype=dtype, device=meta)[
                ..., : model.vocab_size
            ]
        return self._hidden(self._batch.micro, meta).requires_grad_()


class TimedStage(PipelineStage):
    """A stage that reports to the timeline its pieces of work, and whether a piece waits for data from another rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._received: set[tuple[str, int]] = set()
        """(pass, micro-batch) of the passes that begin with data from another rank."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._note("forward", fwd_chunk_id, super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._note("backward", bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working(self._takes("forward", fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working(self._takes("backward", bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, *args, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working():
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **options)

    def _note(self, kind: str, chunk: int, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        if ops:
            self._received.add((kind, chunk))
            receiving()
        return ops

    def _takes(self, kind: str, chunk: int) -> bool:
        is_fed = (kind, chunk) in self._received
        self._received.discard((kind, chunk))
        return is_fed


class TiedEmbedding:
    """A tied embedding whose copies are in the first and the last stage; does nothing for an untied model.

    Both copies get the sum of the two gradients. If they are on different ranks, both copies are stepped, and stay
    equal. If one rank holds both stages, the copies are one parameter. Under FSDP they are two parameters even then,
    because FSDP all-gathers each stage by itself. Only the first is then stepped, and is copied to the second.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        stages, (first, last) = pipeline.stages, pipeline.ends
        self._group = pipeline.group
        tied = pipeline.module.config.tie_embeddings
        here = [stages[end] for end in (first, last) if end in stages and tied]
        self.apart = tied and pipeline.global_rank(first) != pipeline.global_rank(last)
        """True if the copies are on different ranks."""
        self._mine = here[0] if here and self.apart else None
        self._peer = pipeline.global_rank(last if first in stages else first)
        self._pair = here if len(here) == 2 and pipeline.sharded else None
        if self._pair is not None:
            self._pair[1].token_embedding = deepcopy(self._pair[1].token_embedding)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Sum the gradients of both copies, after the reduction over data ranks."""
        if self._mine is not None:
            grad = tied_gradient(self._mine)
            own, theirs = grad.contiguous(), torch.empty_like(grad)
            ways = ((dist.isend, own), (dist.irecv, theirs))
            with waiting("pp"):
                for work in dist.batch_isend_irecv([dist.P2POp(way, t, self._peer, self._group) for way, t in ways]):
                    work.wait()
            grad.add_(theirs)
        if self._pair is not None:
            first, second = self._pair
            tied_gradient(first).add_(tied_gradient(second))
            second.token_embedding.weight.grad = None

    @torch.no_grad()
    def copy_to_second(self) -> None:
        """After a step, copy the first stage's parameter to the last stage, if one rank holds both under FSDP."""
        if self._pair is not None:
            first, second = (stage.token_embedding.weight for stage in self._pair)
            local_tensor(second).copy_(local_tensor(first))


def tied_gradient(stage: Stage) -> Tensor:
    """Return this rank's shard of the gradient of the tied matrix."""
    grad = stage.token_embedding.weight.grad
    assert grad is not None
    return local_tensor(grad)


class PipelineEngine(NDEngine):
    """A model split into pipeline stages; the other kinds of parallelism are applied to each stage."""

    waits_as = BUBBLE
    """``clip`` is the first collective of all stages: ranks that ended early wait there for the others."""

    def __init__(self, model: GPT, weights: Weights, layout: RunLayout) -> None:
        super().__init__(model, weights, layout)
        self.layer_group = layer_mesh(self.mesh, self.world, self.config.parallel.timeout_s).get_group()
        self.optimizer.register_step_post_hook(lambda *_: self._pipeline.tied.copy_to_second())

    def split_model(self, model: GPT, layout: RunLayout) -> tuple[GPT, list[GPT]]:
        self._pipeline = Pipeline(model, layout, self.mesh["pp"].get_group())
        return self._pipeline.module, list(self._pipeline.stages.values())

    def run_micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        # The schedule runs all micro-batches, in an order of its own.
        own = self.local_tokens(tokens_BT), self.local_tokens(targets_BT)
        return self._pipeline.step(*own, self.gradient_factor, self.criterion, on_micro_batch)

    def reduce_gradients(self) -> None:
        super().reduce_gradients()
        self._pipeline.tied.sum_gradients()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return (
            self._pipeline.loss(self.local_tokens(tokens_BT), self.local_tokens(targets_BT), self.criterion)
            * self.loss_weight
        )

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._pipeline.tied.copy_to_second()

    def owners(self, name: str) -> int:
        return self.world.size // self.dims.pp * self._pipeline.owners(name)
