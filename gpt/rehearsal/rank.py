"""Rehearsal of one rank: its model, engine, optimizer and training steps, without other ranks and without a GPU.

Tensors are fake: they have shapes and no values, so a rank of any model needs some 0.4 GB and some seconds. Collectives
use torch's fake process group, which sends nothing. All other code is that of a run.

torch without CUDA cannot differentiate fake tensors of a GPU, so the tensors are on a CPU. Where code depends on the
device, ``as_on_gpu`` makes the choices for a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # makes c10d's collectives take fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as torch_ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from gpt import train
from gpt.config import LOGITS_AT_ONCE, LOSS_CHUNK, ReduceDtype, Strategy, TrainConfig
from gpt.data.loader import StepBatch
from gpt.model import attention, layers
from gpt.model.gpt import GPT
from gpt.parallel import context, ddp, distributed, nd
from gpt.parallel.engine import Engine, RunLayout
from gpt.parallel.modules import local_tensor
from gpt.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    REST,
    Collective,
    RankRehearsal,
    Recorder,
    calling_line,
    recording,
)
from gpt.topology import Batch, ParallelDims
from gpt.training.run import Run
from gpt.training.step import queue_step
from launch import worker
from launch.runs.folder import RunFolder
from launch.runs.process import Phase

FAKE = "fake"
"""Name of the backend of torch for process groups that send nothing."""


# Replacements, for the whole process, of code that needs values or a real process group.


def without_fakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper of ``function`` in which new tensors are real, not fake. It serves functions that make device
    meshes, because a mesh reads the values of its tensors."""

    @wraps(function)
    def on_real_tensors(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **options)

    return on_real_tensors


def as_on_gpu() -> None:
    """Replace, in this process and until its end, functions that work differently on CPUs and GPUs, so that they work
    as on a GPU. The loss is computed in chunks of the size for a GPU, attention makes no masks, and norms compute in
    fp32."""
    kernel = attention.sdpa_attention
    layers.chunk_elements = lambda device: LOSS_CHUNK
    layers.LOGITS_AT_ONCE = dict.fromkeys(LOGITS_AT_ONCE, LOGITS_AT_ONCE["cuda"])
    layers.LinearOnCpu.apply = functional.linear  # type: ignore[method-assign]
    attention.sdpa_attention = lambda q, k, v, _, bias=None: kernel(q, k, v, 0.0, bias)  # type: ignore  # no T x T noise
    attention.causal_bias = context.causal_bias = lambda *_: None  # type: ignore  # and no T x T mask
    functional.layer_norm, functional.rms_norm = in_fp32(functional.layer_norm), in_fp32(functional.rms_norm)


def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a wrapper of torch's function ``norm`` that computes in fp32, as autocast does on a GPU."""

    def on_gpu(*values: Any, **named: Any) -> Tensor:
        values, named = tree_map_only(Tensor, Tensor.float, (values, named))
        return norm(*values, **named)

    return on_gpu


def replace_values() -> None:
    """Replace, in this process and until its end, code of torch and of ``gpt`` that a rehearsal cannot run.

    This is code that reads values of tensors, or that needs data from another rank. The replacements need neither. For
    example, a model gets no initial values, and tokens are distributed evenly over experts.
    """
    distributed.BACKENDS["cpu"] = FAKE
    for name in ("__init__", "__getitem__", "_flatten", "_unflatten"):
        setattr(DeviceMesh, name, without_fakes(getattr(DeviceMesh, name)))
    DeviceMesh._concatenate = staticmethod(without_fakes(DeviceMesh._concatenate))  # type: ignore[method-assign]
    for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
        setattr(torch_ddp, name, lambda *_, **__: None)
    distributed.init_device_mesh = without_fakes(distributed.init_device_mesh)
    train.materialize = nd.materialize = allocate  # type: ignore[assignment]
    ddp.DistributedDataParallel = FakeReplica  # type: ignore[misc]
    nd.plan_dispatch = plan_balanced_dispatch


def allocate(parts: Sequence[GPT], _: Any, device: torch.device, home: torch.device | None = None) -> None:
    """Allocate a model without setting its values; replaces ``gpt.parallel.modules.materialize``, which has the same
    arguments."""
    for part in parts:
        if any(parameter.is_meta for parameter in part.parameters()):
            part.to_empty(device=home or device)
    for part in parts:
        part.reset_buffers()


class FakeReplica(DistributedDataParallel):
    """DistributedDataParallel for fake tensors.

    DDP rebuilds its buckets after the first backward pass, in the order in which gradients were computed. DDP's reducer
    does this in C++, and reads values of tensors, which fake tensors do not have. So this class rebuilds the buckets in
    Python. It uses torch's function, with the same largest sizes of buckets.
    """

    def _ddp_init_helper(self, parameters: list[Tensor], *settings: Any) -> None:
        self._settings = settings
        self._came: list[Tensor] = []
        self._rebuilt = False
        self._place = {parameter: number for number, parameter in enumerate(parameters)}
        self._build_reducer(parameters)
        self._hooks = [cast(Any, p).register_post_accumulate_grad_hook(self._came.append) for p in parameters]

    def _pre_forward(self, *inputs: Any, **options: Any) -> Any:
        if not self._rebuilt and len(self._came) == len(self._place):
            self._rebuilt = True
            for hook in self._hooks:
                hook.remove()
            limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, self.bucket_bytes_cap]
            assign = dist._compute_bucket_assignment_by_size

            def in_order(parameters: Any, _: Any, *rest: Any) -> Any:
                return tuple([*reversed(found)] for found in assign(parameters, limits, *rest))  # DDP reverses it

            dist._compute_bucket_assignment_by_size = in_order  # type: ignore[assignment]
            self._build_reducer(self._came)
            dist._compute_bucket_assignment_by_size = assign
        return super()._pre_forward(*inputs, **options)

    def _build_reducer(self, parameters: list[Tensor]) -> None:
        super()._ddp_init_helper(parameters, *self._settings)
        dist._register_comm_hook(self.reducer, None, self._reduce)
        self.reducer = Reducer(self.reducer)

    def _reduce(self, _: None, bucket: Any) -> Future[Tensor]:
        buffer = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(buffer)
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done


class Reducer:
    """Wrapper of DDP's reducer that keeps the reducer from rebuilding its buckets. ``FakeReplica`` rebuilds them
    instead."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


EXPECTED_WAITS: Counter[str] = Counter()
"""Line of code where the host must wait for the device, because it needs a value -> number of waits in this process."""
plan_dispatch = nd.plan_dispatch


def plan_balanced_dispatch(rows: int, ends_E: Tensor, group: dist.ProcessGroup, fixed_places: bool) -> nd.DispatchPlan:
    """Return the plan of an all-to-all that sends rows to the ranks of their experts. This function replaces
    ``gpt.parallel.nd.plan_dispatch``, and has the same arguments. It cannot read how many rows each expert has, because
    fake tensors have no values. So it assumes that every rank receives equally many rows."""
    if fixed_places:
        return plan_dispatch(rows, ends_E, group, fixed_places)
    ranks = group.size()
    held = len(ends_E) // ranks
    sent_PH = ends_E.long().diff(prepend=ends_E.new_zeros(1).long()).view(ranks, held)
    nd.all_to_all(sent_PH, [1] * ranks, [1] * ranks, group)
    EXPECTED_WAITS[f"{calling_line()} (sizes of experts without a capacity)"] += 1
    sent = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    received = [sent[group.rank()]] * ranks
    order_S = torch.arange(sum(received))
    return nd.DispatchPlan(sent, received, order_S, torch.arange(held, dtype=torch.int32))


# One rank.

IN_LAYERS = ("tp", "cp", "ep", "pp")
"""Labels (``RankGroup.label``) of groups of ranks that reduce activations. They do so in the precision of the run,
which is intended."""


class FakeBatches:
    """Batches of fake tokens; replaces ``BatchPrefetcher``."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        self._shape = batch.per_rank, block_size

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step: tokens and targets, (per_rank, T)."""
        tokens_BT, targets_BT = (torch.empty(self._shape, dtype=torch.long) for _ in range(2))
        return StepBatch(tokens_BT, targets_BT, 0, 0, 0.0)


def rehearse_rank(config: TrainConfig, dims: ParallelDims, batch: Batch, rank: int, kind: str) -> RankRehearsal:
    """Build the model, engine and optimizer of one rank with fake tensors, and make two training steps. Return the
    findings about the second step.

    The first step makes buffers and connections that later steps use again. Call this in a process of its own, because
    it replaces parts of torch.

    Args:
        config: config of the run; precision and parallelism are not ``auto``.
        dims: the parallel dimensions.
        batch: split of the global batch.
        rank: number of the rank.
        kind: text on the place of the rank in the mesh.
    """
    size = dims.data_ranks * dims.model_ranks
    found = RankRehearsal(rank, kind)
    dist.init_process_group(FAKE, store=FakeStore(), rank=rank, world_size=size)
    replace_values()
    as_on_gpu()
    control = dist.new_group(backend=FAKE)
    world = distributed.World(rank, size, 0, 1, 0, torch.device("cpu"), control)
    recorder = Recorder()
    with torch.device("meta"):
        model = GPT(config.model)
    with FakeTensorMode(allow_non_fake_inputs=True), recording(recorder, copies=True):
        engine = train.parallelize(model, lambda _, shape: torch.empty(shape), RunLayout(config, world, dims, batch))
        engine.module.train()
        run = make_run(config, world, dims, batch, engine)
        queue_step(run, None, Phase.training)
        for counts in (recorder.waits, recorder.products, recorder.linear, EXPECTED_WAITS):
            counts.clear()
        found.in_step, since = len(recorder.collectives), recorder.memory.now
        states = [value for state in cast(Any, engine).optimizer.state.values() for value in state.values()]
        held: dict[str, list[Tensor]] = {
            PARAMETERS: [*engine.module.parameters()],
            OPTIMIZER: [value for value in states if isinstance(value, Tensor)],
        }
        for kind_of, tensors in held.items():
            recorder.memory.name(tensors, kind_of)
        for parameter in engine.module.parameters():
            if parameter.requires_grad:  # the gradients of earlier micro-batches may be other tensors
                parameter.register_post_accumulate_grad_hook(lambda p: recorder.memory.name([p.grad], GRADIENTS))
        with torch.autograd.graph.saved_tensors_hooks(partial(note_saved, recorder), lambda saved: saved):
            queue_step(run, None, Phase.training)
        held[GRADIENTS] = [p.grad for p in engine.trained.parameters() if p.grad is not None]
        recorder.memory.name(held[GRADIENTS], GRADIENTS)
        peak = recorder.memory.peak(since)
        for kind_of, tensors in held.items():
            sizes: Counter[str] = Counter()
            for tensor in map(local_tensor, tensors):
                sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
            found.dtypes[kind_of] = dict(sizes)
    for (kind_of, place), size in peak.items():
        found.memory[kind_of] = found.memory.get(kind_of, 0) + size
        if kind_of in (ACTIVATIONS, REST):
            found.largest[place] = found.largest.get(place, 0) + size
    found.collectives, found.groups = recorder.collectives, recorder.groups
    found.doubts = [*doubts(config, recorder, engine, recorder.collectives[found.in_step :])]
    found.waits, found.expected_waits = dict(recorder.waits), dict(EXPECTED_WAITS)
    return found


def doubts(config: TrainConfig, recorder: Recorder, engine: Engine, step: Iterable[Collective]) -> Iterator[str]:
    """Yield lines of text on findings that stop no step, but are seldom intended: precisions, repeated layers, and
    parameters that fsdp does not shard. ``step`` has the collectives of the step."""
    for (dtype, place), elements in recorder.products.items():
        # The router of experts computes in fp32 by design; its results are few.
        if config.precision.is_half and dtype == torch.float32 and elements > 0.01 * recorder.products.total():
            yield f"a matrix product in float32 in a run in {config.precision.name} at {place}"
    for weight, times in recorder.linear.items():
        if times > engine.batch.accumulation:
            passes = f"{times} times in {engine.batch.accumulation} micro-batches"
            yield f"a linear layer computed {passes} at {recorder.linear_at[weight]}"
    asked = config.parallel.reduce_dtype is ReduceDtype.bf16
    for one in [] if asked else step:
        if "reduce" in one.operation and "float16" in one.dtype and recorder.groups[one.group].label not in IN_LAYERS:
            yield f"gradients reduced in {one.dtype} instead of float32, first in {one}"
            break
    if config.parallel.strategy is Strategy.fsdp:
        for name, parameter in engine.trained.named_parameters():
            if not isinstance(parameter, DTensor):
                yield f"parameter {name}, which fsdp neither shards nor reduces"


def note_saved(recorder: Recorder, tensor: Tensor) -> Tensor:
    """Record that autograd saves ``tensor`` for the backward pass. Return the tensor."""
    recorder.memory.name([tensor], ACTIVATIONS)
    return tensor


def make_run(config: TrainConfig, world: distributed.World, dims: ParallelDims, batch: Batch, engine: Engine) -> Run:
    """Return a run for a rehearsal. It has the objects that a step uses; fields that a step does not use are None."""
    none: Any = None
    return Run(
        config=config,
        folder=RunFolder(Path("rehearsal")),
        world=world,
        attempt=1,
        batch=batch,
        dims=dims,
        engine=engine,
        tokens=none,
        samples=none,
        batches=cast(Any, FakeBatches(batch, config.model.block_size)),
        checkpoints=none,
        guard=none,
        worker=worker.attach(handle_signals=False),
        early_stop=none,
    )
