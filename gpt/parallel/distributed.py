"""The ranks of a run: their set-up, device mesh and collectives (``World``), and the timeline of waits in a step."""

from __future__ import annotations

import logging
import os
import time
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gpt.checkpoint import messages
from gpt.config import Device
from gpt.topology import ParallelDims
from launch.errors import ConfigError
from launch.runs.environment import driver_problem, driver_version
from launch.worker import STORE_PREFIX

# Timeline of a step: waits for other ranks, by group, and the work of a pipeline stage; recording waits for nothing.
#
# ``waiting("tp")`` encloses each wait of a collective, ``working`` each piece of a stage's work. Outside of a recorded
# step both do nothing. On a GPU, times are events in the queue of the stream that computes, so a wait that other work
# hides takes no time. On other devices, times are those of the host's clock. All times are read after the step, when
# the device has passed them.


Moment = float | torch.cuda.Event
"""A time: of the host's clock in seconds (time.perf_counter), or an event in the queue of a GPU."""


WORLD, BUBBLE = "world", "bubble"
"""Names of two kinds of spans (``Span``): this rank waits in a collective of all ranks, or for another stage of the
pipeline."""
HOST = "host"
"""Name of spans in which the host does other work while the ranks communicate."""


@dataclass(frozen=True)
class Span:
    """A named part of the time of a step."""

    name: str
    begin: float
    """Seconds since the step began."""
    end: float
    """Seconds since the step began."""

    @property
    def seconds(self) -> float:
        """Length of the span in seconds."""
        return self.end - self.begin


_free: deque[torch.cuda.Event] = deque()
"""GPU events of earlier steps, which later steps use again. Without them, each step of a large model with fsdp would
make thousands of new events."""


class Timeline:
    """Record of one step on one rank: when the rank waits for other ranks, and when its pipeline stages compute."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._waits: list[tuple[str, Moment, Moment]] = []
        self.works: list[tuple[str, Moment, Moment]] = []
        """Forward and backward passes of pipeline stages, as (name, begin, end). The name is ``bubble`` if the pass
        begins with data from another rank, else ``pp``."""
        self.schedules: list[tuple[str, Moment, Moment]] = []
        """Runs of a pipeline's schedule, as (name, begin, end). The name is ``bubble`` if this rank was receiving data
        from another rank at the end of the run, else ``pp``."""
        self.is_waiting = False
        """True during a recorded wait: waits inside another wait are not recorded."""
        self.receives = False
        """True if this rank has begun to receive the data for its next pass from another rank."""
        self._events: list[torch.cuda.Event] = []
        self.start = self.now()
        self.marks = [self.start]
        """Three moments: the beginning of the step, the end of computing gradients, and the end of the optimizer's
        update."""

    def now(self) -> Moment:
        """Return the present moment: the time of the host, or on a GPU a new event in its queue."""
        if not self._is_cuda:
            return time.perf_counter()
        event = _free.popleft() if _free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        return event

    def give_back(self) -> None:
        """Make the events of this timeline available to later timelines. Call this after all moments are read."""
        _free.extend(self._events)
        self._events.clear()

    def mark(self) -> None:
        """Append the present moment to ``marks``, without waiting for the device."""
        self.marks.append(self.now())

    def seconds(self, moment: Moment) -> float:
        """Return the seconds from the begin of the step to a moment. The device must have reached the moment."""
        since = self.start
        if isinstance(since, torch.cuda.Event) and isinstance(moment, torch.cuda.Event):
            return float(since.elapsed_time(moment)) / 1000
        assert isinstance(since, float) and isinstance(moment, float)
        return moment - since

    def add_wait(self, name: str, begin: Moment) -> None:
        """Record that the rank has waited from ``begin`` until now. ``name`` becomes the name of the span, such as
        ``WORLD`` or ``tp``."""
        self._waits.append((name, begin, self.now()))

    def spans(self) -> list[Span]:
        """Return all waits of the step, with those of pipeline schedules. The device must have finished the step."""
        waits, works, schedules = (
            [Span(name, self.seconds(begin), self.seconds(end)) for name, begin, end in moments]
            for moments in (self._waits, self.works, self.schedules)
        )
        for schedule in schedules:
            ends = Span(schedule.name, schedule.end, schedule.end)
            waits += schedule_waits(schedule.begin, [*works, ends], waits)
        return waits


def schedule_waits(begin: float, works: Sequence[Span], waits: Sequence[Span]) -> list[Span]:
    """Return the spans between the passes of this rank in one run of a pipeline's schedule: in these spans, no stage of
    the rank works.

    A span has the name of the pass that follows it. If this pass needs data from another rank, the name is ``bubble``.
    The span then contains the wait for the sender and the transfer, which cannot be distinguished. Otherwise the name
    is ``pp``: in the span, the rank sends its own data.

    Args:
        begin: begin of the schedule, in seconds since the step began.
        works: forward and backward passes of this rank, by time, each named ``bubble`` if it begins with data from
            another rank, else ``pp``. The last one has no length, and marks the end of the schedule.
        waits: recorded waits of this rank in other collectives. The time of such a wait is cut out of the result.
    """
    found, since = [], begin
    waits = sorted(waits, key=lambda span: span.begin)
    begins = [span.begin for span in waits]
    for work in works:
        for wait in waits[bisect_left(begins, since) : bisect_left(begins, work.begin)]:
            found.append(Span(work.name, since, wait.begin))
            since = wait.end
        found.append(Span(work.name, since, work.begin))
        since = work.end
    return found


def total(spans: Sequence[Span], begin: float, end: float, *names: str) -> float:
    """Return the summed seconds of the spans that begin between ``begin`` and ``end``, in seconds since the step began.
    If ``names`` are given, only spans with these names count."""
    return sum(span.seconds for span in spans if begin <= span.begin < end and (not names or span.name in names))


_current: Timeline | None = None


@contextmanager
def recorded(timeline: Timeline) -> Iterator[None]:
    """Return a context in which waits and work are recorded in ``timeline``."""
    global _current
    before, _current = _current, timeline
    try:
        yield
    finally:
        _current = before


def current() -> Timeline | None:
    """Return the timeline in which waits are recorded now; None outside of ``recorded``."""
    return _current


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Return a context that is recorded as a wait for other ranks, under the name ``name``. The body of the context is
    a collective, or the wait for its result. Nothing is recorded if no timeline is active (``recorded``), or if this
    context is inside another wait."""
    timeline = _current
    if timeline is None or timeline.is_waiting:
        yield
        return
    timeline.is_waiting, begin = True, timeline.now()
    try:
        yield
    finally:
        timeline.is_waiting = False
        timeline.add_wait(name, begin)


@contextmanager
def working(is_fed: bool = False) -> Iterator[None]:
    """Return a context that is recorded as work of a pipeline stage. ``is_fed`` is True if the work begins with data
    from another rank. A call of ``receiving`` before the context has the same effect."""
    timeline = _current
    if timeline is None:
        yield
        return
    begin, is_fed, timeline.receives = timeline.now(), is_fed or timeline.receives, False
    yield
    timeline.works.append((BUBBLE if is_fed else "pp", begin, timeline.now()))


def receiving() -> None:
    """Record that a pipeline stage begins to receive data from another rank."""
    if _current is not None:
        _current.receives = True


@contextmanager
def scheduling() -> Iterator[None]:
    """Return a context for one run of a pipeline's schedule. The step's timeline records begin and end of the context.

    Nothing is recorded if no timeline is active.
    """
    timeline = _current
    if timeline is None:
        yield
        return
    begin = timeline.now()
    yield
    timeline.schedules.append((BUBBLE if timeline.receives else "pp", begin, timeline.now()))
    timeline.receives = False


# The device mesh.


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Type of device -> backend of the process groups of a mesh. ``set_timeouts`` sets the timeout of these
groups later."""


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """Return the device mesh of a run, with the axes that have more than one rank, and always ``dp_shard``. The
    outermost axis comes first."""
    used = {name: size for name, size in dims.sizes.items() if size > 1 or name == "dp_shard"}
    options: dict[int | str, Any] = dict.fromkeys(used, BACKENDS[device_type])
    return init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used), backend_override=options)


def flatten_mesh(mesh: DeviceMesh, names: Sequence[str]) -> DeviceMesh:
    """Return a mesh with one axis, which joins the neighboring axes ``names`` of ``mesh`` in one process group."""
    if len(names) == 1:
        return mesh[names[0]]
    return mesh[tuple(names)]._flatten("_".join(names), backend_override=BACKENDS[mesh.device_type])


def shard_mesh(mesh: DeviceMesh, within: str = "dp_shard") -> DeviceMesh:
    """Return the mesh over which FSDP shards parameters: the axes ``within`` and ``cp``, joined into one axis.

    ``within`` is ``dp_shard``, or ``edp`` for the parameters of experts (see ``expert_mesh``). If ``mesh`` has the axis
    ``dp_replicate``, the result has two axes, and ``dp_replicate`` is the first.
    """
    names = mesh.mesh_dim_names or ()
    shard = flatten_mesh(mesh, [name for name in (within, "cp") if name in names])
    if "dp_replicate" not in names:
        return shard
    return DeviceMesh._concatenate([mesh["dp_replicate"], shard])


def mesh_without(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """Return a mesh with one axis, which joins all axes of ``mesh`` except ``axes``.

    The result has the ranks whose index along each of ``axes`` is that of this rank. If ``axes`` is ``pp``, these are
    the ranks with the same layers as this rank. If ``axes`` are ``pp``, ``ep`` and ``tp``, these are the ranks with the
    same part of the model as this rank, and each of them computes other samples or tokens.
    """
    return flatten_mesh(mesh, [name for name in mesh.mesh_dim_names or () if name not in axes])


def expert_mesh(mesh: DeviceMesh, dims: ParallelDims) -> DeviceMesh:
    """Return the mesh of the data-parallel and context-parallel ranks, in which one axis is split into ``edp`` and
    ``ep``.

    Experts are sharded along ``ep``; ranks along ``edp`` have the same experts. The axis that is split is ``dp_shard``
    with FSDP, so that each replica of the model has all experts; otherwise ``dp_replicate``.
    """
    split_dim = "dp_shard" if dims.is_sharded else "dp_replicate"
    names = mesh.mesh_dim_names or ()
    data = mesh[tuple(name for name in ("dp_replicate", "dp_shard", "cp") if name in names)]
    place = (data.mesh_dim_names or ()).index(split_dim)  # torch 2.11 refuses names that the mesh has
    sizes = (getattr(dims, split_dim) // dims.ep, dims.ep)
    options: dict[Any, Any] = dict.fromkeys(("edp", "ep"), BACKENDS[mesh.device_type])
    return data._unflatten(place, sizes, ("edp", "ep"), backend_override=options)


def set_timeouts(timeout_s: float, without: Collection[dist.ProcessGroup] = ()) -> None:
    """Set the timeout, in seconds, of collectives that start after this call, in all process groups of this process
    except those in ``without``."""
    for group in list(c10d._world.pg_map):
        if group not in without:
            c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


T = TypeVar("T")


@dataclass(frozen=True)
class PendingSum:
    """An all-reduce (sum) that was started and may not be complete."""

    values: torch.Tensor
    """Tensor that is summed in place."""
    work: dist.Work

    def wait(self, waits_as: str = WORLD) -> torch.Tensor:
        """Wait for the sum, and return it. On a GPU only the stream waits, not the host.

        The wait is recorded in the timeline under the name ``waits_as``.
        """
        with waiting(waits_as):
            self.work.wait()
        return self.values


@dataclass(frozen=True)
class World:
    """This rank, its device, and collectives over all ranks."""

    rank: int
    """Number of this rank, from 0 to ``size`` - 1."""
    size: int
    """Number of ranks."""
    local_rank: int
    """Number of this rank on its node, from 0."""
    local_size: int
    """Number of ranks on this node."""
    node: int
    """Number of this node, from 0."""
    device: torch.device
    control: dist.ProcessGroup
    """Process group of all ranks on gloo, for messages, apart from the collectives of training."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, which does the work that only one rank must do."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """All-reduce (sum) a tensor in place over the ranks of ``group``, and return the tensor. A ``group`` of None
        means all ranks. On a GPU the sum is queued, and the host does not wait."""
        with waiting(WORLD):
            dist.all_reduce(values, group=group)
        return values

    def start_all_reduce(self, values: torch.Tensor) -> PendingSum:
        """Start an all-reduce (sum) of a tensor over all ranks, in place. The method ``wait`` of the result returns the
        sum."""
        return PendingSum(values, dist.all_reduce(values, async_op=True))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks, on every rank. Collective. The values must have a type
        that ``gpt.checkpoint.messages`` can send."""
        return messages.all_gather(value, self.control)

    def on_first(self, action: Callable[[], T]) -> T:
        """Call ``action`` on rank 0 only, and return its result on every rank. Collective.

        Args:
            action: a function whose result ``gpt.checkpoint.messages`` can send.

        Raises:
            ConfigError: ``action`` raised it; it is raised on every rank.
            FirstRankError: ``action`` raised another error. Rank 0 raises that error, and the other ranks this one.
        """
        message = b""
        failure: BaseException | None = None
        if self.is_first:
            try:
                message = messages.encode_value((action(), None, None))
            except BaseException as error:  # torch's CheckpointException and SystemExit are no Exception
                failure = error
                refusal = error if isinstance(error, ConfigError) else None
                # ``rank 0 failed`` marks the text as an echo of that failure.
                text = f"rank 0 failed: {type(error).__name__}: {error}"
                message = messages.encode_value((None, refusal, text))
        result, refusal, explanation = messages.decode_value(messages.broadcast(message, self.control))
        if failure is not None:
            raise failure
        if explanation is not None:
            raise refusal or FirstRankError(explanation)
        return cast(T, result)


class FirstRankError(RuntimeError):
    """Raised on all ranks but rank 0 if rank 0 fails in ``World.on_first``; the message has its error."""


def ranks_from_env() -> tuple[int, int, int, int, int]:
    """Return (rank, number of ranks, rank on this node, number of ranks on this node, node) from the environment
    variables that torchrun sets; (0, 1, 0, 1, 0) if none is set.

    Raises:
        ConfigError: only some of the variables are set, or they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if not present:
        return 0, 1, 0, 1, 0
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in os.environ)
        raise ConfigError(
            f"{', '.join(present)} in the environment, but not {missing}",
            "all of them (set by torchrun) or none",
            f"torchrun --nproc-per-node N -m gpt.train ..., or unset {' '.join(present)}",
        )
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names[:4])
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size}",
            "0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE",
            "torchrun --nproc-per-node N -m gpt.train ...",
        )
    return rank, size, local_rank, local_size, int(os.environ.get("GROUP_RANK", rank // local_size))


def choose_device(wish: Device, local_rank: int, local_size: int) -> torch.device:
    """Return the device of a rank: the GPU with the index ``local_rank``, or the CPU.

    Args:
        wish: the config's device; ``auto`` takes the CPU if the node has no GPU.
        local_rank: number of the rank on its node.
        local_size: number of ranks on the node.

    Raises:
        ConfigError: the config demands cuda and there are fewer GPUs than ranks on this node.
    """
    gpus = torch.cuda.device_count()
    if wish is Device.cpu or (wish is Device.auto and gpus == 0):
        return torch.device("cpu")
    if gpus < local_size:
        without = "" if torch.backends.cuda.is_built() else f", and torch {torch.__version__} without CUDA"
        raise ConfigError(
            f"{local_size} ranks on a node with {gpus} visible GPUs{without}",
            "a GPU for each rank" + (", and a torch with CUDA (docs/setup.md)" if without else ""),
            f"ranks_per_node={gpus}" if gpus else "device=cpu",
        )
    if not torch.cuda.is_available():
        why = driver_problem(driver_version(), torch.version.cuda) or f"torch {torch.__version__} cannot use them"
        raise ConfigError(
            f"{gpus} GPUs, and {why}",
            "GPUs, a driver and a torch that fit together (docs/setup.md)",
            "nvidia-smi on this node; a newer driver, or a torch for an older CUDA",
        )
    return torch.device("cuda", local_rank)


def choose_store(size: int, timeout: timedelta) -> dist.Store | None:
    """Return the key-value store with which torch.distributed connects the ranks; None if torch shall make a store from
    its environment variables.

    If the launcher's agent has started the ranks, all keys in the store get a secret prefix, because the store answers
    any process that reaches its port.

    Args:
        size: number of ranks.
        timeout: longest wait for a connection to the store, or for a key in it.
    """
    if size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    prefix = os.environ.get(STORE_PREFIX)
    if prefix is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(prefix, store)


@contextmanager
def open_world(wish: Device, timeout_s: int) -> Iterator[World]:
    """Return a context that connects this process with the other ranks, and yields its ``World``. Collective.

    Args:
        wish: the device of the config.
        timeout_s: seconds after which a collective raises if it is not complete.

    Raises:
        ConfigError: the variables of torchrun contradict each other, or there are fewer GPUs than ranks.
    """
    rank, size, local_rank, local_size, node = ranks_from_env()
    device = choose_device(wish, local_rank, local_size)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=choose_store(size, timeout), rank=rank, world_size=size, timeout=timeout)
    # The ranks connect now: a broken network fails before the model is built, and NCCL gets its memory before torch's
    # allocator takes it.
    dist.all_reduce(torch.zeros(1, device=device))
    # Groups do not inherit the timeout of the first group.
    control = dist.new_group(backend="gloo", timeout=timeout)
    yield World(rank, size, local_rank, local_size, node, device, control)
    # Not after an exception: closing waits for ranks that may be gone. The exit of the process closes the group.
    dist.destroy_process_group()


def load_deepspeed(world: World) -> None:
    """Import DeepSpeed, and initialize it for the device of this rank. It then logs only warnings and errors."""
    os.environ["DS_ACCELERATOR"] = world.device.type  # else it takes any GPU it sees, whatever ``device`` says
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames collectives that DeepSpeed calls in every step, and 2.11 knows no other names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed's shared-memory collectives take a minute to compile at the first start; gloo does without them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups.mpu = None  # an earlier pipeline in this process may have set it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
