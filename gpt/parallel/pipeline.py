"""Pipeline parallelism: stages of layers on different ranks, with torch's schedules (torch.distributed.pipelining).

``PipelineEngine`` has the stages of this rank, the schedule that runs micro-batches through them, and the tied
embedding of the first and the last stage. It applies the other kinds of parallelism to each stage, as ``NDEngine`` does
to a whole model. gpt/topology/schedules.py splits the layers.

Shapes: B sequences of a micro-batch, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from gpt.config import Pack, Schedule
from gpt.model.attention import find_documents
from gpt.model.gpt import GPT, Stage, Weights
from gpt.model.layers import COMPUTE_DTYPES, autocast
from gpt.parallel.distributed import BUBBLE, mesh_without, receiving, scheduling, waiting, working
from gpt.parallel.engine import RunLayout
from gpt.parallel.modules import local_tensor, replace_forward
from gpt.parallel.nd import NDEngine, reshard
from gpt.topology.schedules import local_stages, rank_stages, stage_indices

SCHEDULES = {
    Schedule.gpipe: ScheduleGPipe,
    Schedule["1f1b"]: Schedule1F1B,
    Schedule.interleaved: ScheduleInterleaved1F1B,
    Schedule.zbv: ScheduleZBVZeroBubble,
    Schedule.dualpipev: ScheduleDualPipeV,
}


class TimedStage(PipelineStage):
    """Pipeline stage of torch that records each forward and backward pass of a micro-batch in the timeline of the step,
    and whether the pass begins with data from another rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._received: set[tuple[str, int]] = set()
        """Passes that begin with data from another rank, as pairs (``forward`` or ``backward``, number of the
        micro-batch). They are the same in each step."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._note("forward", fwd_chunk_id, super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._note("backward", bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working(("forward", fwd_chunk_id) in self._received):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working(("backward", bwd_chunk_id) in self._received):
            return super().backward_one_chunk(bwd_chunk_id, *args, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with working():
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **options)

    def _note(self, kind: str, chunk: int, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        if ops:
            self._received.add((kind, chunk))
            receiving()
        return ops


class TiedEmbedding:
    """Keeps the two copies of a tied embedding equal: that of the first stage of a pipeline, and that of the last
    stage. It does nothing for a model without a tied embedding.

    If the copies are on different ranks, both get the sum of both gradients, and both are updated by the optimizer. If
    one rank has both stages, the copies are one parameter. With FSDP they are two parameters even then, because FSDP
    all-gathers each stage by itself. Only the first copy is then updated, and copied to the second.

    Args:
        stages: this rank's stages.
        group: the ranks of the pipeline.
        ends: global ranks of the first and of the last stage.
        sharded: True under FSDP.
    """

    def __init__(self, stages: Sequence[Stage], group: dist.ProcessGroup, ends: tuple[int, int], sharded: bool) -> None:
        self._group = group
        tied = stages[0].config.tie_embeddings
        here = sorted((s for s in stages if tied and (s.first or s.last)), key=lambda stage: stage.last)
        self.apart = tied and ends[0] != ends[1]
        """True if the copies are on different ranks."""
        self._mine = here[0] if here and self.apart else None
        self._peer = ends[1] if any(stage.first for stage in stages) else ends[0]
        self._pair = here if len(here) == 2 and sharded else None
        if self._pair is not None:
            self._pair[1].token_embedding = deepcopy(self._pair[1].token_embedding)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Replace the gradients of both copies by their sum. Call this after gradients are reduced over data ranks."""
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
        """Copy the embedding of the first stage to the last stage, if one rank has both stages, with FSDP. Call this
        after each step of the optimizer."""
        if self._pair is not None:
            first, second = (stage.token_embedding.weight for stage in self._pair)
            local_tensor(second).copy_(local_tensor(first))


def tied_gradient(stage: Stage) -> Tensor:
    """Return this rank's shard of the gradient of a stage's copy of the tied embedding. Changes in place change the
    gradient itself. The stage must be the first or the last, after a backward pass."""
    grad = stage.token_embedding.weight.grad
    assert grad is not None
    return local_tensor(grad)


class PipelineEngine(NDEngine):
    """Engine of a model that is split into pipeline stages; other kinds of parallelism are applied to each stage."""

    waits_as = BUBBLE
    """Name under which the timeline records the wait for the gradient norm. The sum of the norm is the first collective
    of all stages in a step. In it, ranks whose part of the schedule ends early wait for the other ranks. So the wait
    counts as pipeline bubble."""

    def __init__(self, model: GPT, weights: Weights, layout: RunLayout) -> None:
        super().__init__(model, weights, layout)
        self.layer_group = mesh_without(self.mesh, "pp").get_group()
        self.optimizer.register_step_post_hook(lambda *_: self._tied.copy_to_second())

    def split_model(self, model: GPT, layout: RunLayout) -> tuple[GPT, list[GPT]]:
        config = self.config = layout.config
        self.world, self.batch, self.group = layout.world, layout.batch, self.mesh["pp"].get_group()
        # NCCL makes the communicator of a group in its first batched transfer, for which it waits for all ranks of the
        # group. With tied embeddings, GPipe's first transfer is between two ranks alone.
        dist.all_reduce(torch.zeros(1, device=self.world.device), group=self.group)
        count = config.parallel.pp * local_stages(config.parallel)
        self._owner = {s: rank for rank in range(config.parallel.pp) for s in stage_indices(config.parallel, rank)}
        place = dist.get_rank(self.group)
        held = zip(stage_indices(config.parallel, place), rank_stages(config, place), strict=True)
        self.stages = {index: Stage(model, part.blocks, part.first, part.last) for index, part in held}
        """Index of a stage in the pipeline -> the stage, for the stages of this rank."""
        parts = list(self.stages.values())
        blocks = [int(number) for stage in parts for number, _ in stage.blocks.named_children()]
        first, last = any(stage.first for stage in parts), any(stage.last for stage in parts)
        # One module with the parameter names of the model, for optimizer and checkpoints only.
        whole = parts[0] if len(parts) == 1 else Stage(model, blocks, first, last)
        ends = self.global_rank(0), self.global_rank(count - 1)
        self._tied = TiedEmbedding(parts, self.group, ends, self._sharded)
        for stage in parts:
            replace_forward(stage, partial(self._run_stage, stage.forward, stage.last))
        stages = [
            TimedStage(
                stage,
                index,
                count,
                self.world.device,
                input_args=self._example(tokens=stage.first),
                output_args=self._example(logits=stage.last),
                group=self.group,
            )
            for index, stage in self.stages.items()
        ]
        kind: Any = SCHEDULES[config.parallel.schedule]
        self._schedule = kind(
            stages[0] if issubclass(kind, PipelineScheduleSingle) else stages,
            self.batch.accumulation,
            loss_fn=working()(lambda logits, targets: self.criterion(logits, targets) * self.gradient_factor),
            scale_grads=False,
        )
        return whole, [*parts]

    def run_micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # The schedule runs all micro-batches, in an order of its own. The last stage's rank has their losses.
        losses: list[Tensor] = []
        own_BT = self.local_tokens(tokens_BT).to(self.world.device, non_blocking=True)
        targets_BT = self.local_tokens(targets_BT).to(self.world.device, non_blocking=True)
        with scheduling():
            inputs = [own_BT] if 0 in self.stages else []
            # Every stage finds the documents of a micro-batch in its targets.
            packed = {"targets_BT": targets_BT} if self.config.data.pack is Pack.documents else {}
            self._schedule.step(*inputs, target=targets_BT, losses=losses, return_outputs=False, **packed)
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.world.device)
        return torch.stack([loss.detach().double() for loss in losses]).sum() / self.gradient_factor

    def reduce_gradients(self) -> None:
        super().reduce_gradients()
        self._tied.sum_gradients()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # Forward only. A rank continues as soon as it has sent its activations, so consecutive calls fill the pipeline.
        x = self.local_tokens(tokens_BT).to(self.world.device)
        targets_BT = self.local_tokens(targets_BT).to(self.world.device)
        total = torch.zeros((), device=self.world.device)
        for index, stage in self.stages.items():
            if index and index - 1 not in self.stages:
                x = self._hidden(len(tokens_BT), self.world.device)
                dist.recv(x, self.global_rank(index - 1), self.group)
            x = stage(x, targets_BT)
            reshard(stage)
            if stage.last:
                total = self.criterion(x, targets_BT)
            elif index + 1 not in self.stages:
                dist.send(x.contiguous(), self.global_rank(index + 1), self.group)
        return total * self.loss_weight

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._tied.copy_to_second()

    def owners(self, name: str) -> int:
        copies = 2 if self._tied.apart and name == "token_embedding.weight" else 1
        return self.world.size // self.dims.pp * copies

    def global_rank(self, stage: int) -> int:
        """Return the global rank of the rank of this pipeline that has the stage with index ``stage``."""
        return dist.get_global_rank(self.group, self._owner[stage])

    def _run_stage(
        self, forward: Callable[..., Tensor], last: bool, x: Tensor, targets_BT: Tensor | None = None
    ) -> Tensor:
        self.on_micro_batch()
        documents = None if targets_BT is None else find_documents(self.config, targets_BT)
        with autocast(self.config, self.world.device):
            y = forward(x) if documents is None else forward(x, documents)
        return y if last else y.to(self._hidden(0, torch.device("meta")).dtype)

    def _hidden(self, sequences: int, device: torch.device) -> Tensor:
        """Return an uninitialized tensor like those that stages send to each other: (B, T, D) for ``sequences``
        sequences, with this rank's part of T.

        The dtype is that of the residual stream: fp32 under autocast, or with FSDP the dtype of the computation.
        """
        parallel, model = self.config.parallel, self.config.model
        time = model.block_size // parallel.cp // (parallel.tp if parallel.sequence_parallel else 1)
        dtype = COMPUTE_DTYPES[self.config.precision] if self._sharded else torch.float32
        return torch.empty(sequences, time, model.n_embd, dtype=dtype, device=device)

    def _example(self, tokens: bool = False, logits: bool = False) -> Tensor:
        """Return a meta tensor with the shape and dtype of a stage's input or output: of tokens, of logits, or by
        default of hidden states."""
        model, parallel, meta = self.config.model, self.config.parallel, torch.device("meta")
        shape = (self.batch.micro, model.block_size // parallel.cp)
        if tokens:
            return torch.empty(shape, dtype=torch.long, device=meta)
        if logits:
            dtype, columns = COMPUTE_DTYPES[self.config.precision], model.padded_vocab // parallel.tp
            return torch.empty(*shape, columns, dtype=dtype, device=meta)
        return self._hidden(self.batch.micro, meta).requires_grad_()
