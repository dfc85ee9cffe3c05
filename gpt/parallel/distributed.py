"""The processes of a run: the timeline of a step, the device mesh, collectives (``World``), and joining the ranks."""

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
"""Time of the host in seconds (time.perf_counter), or an event in the queue of a GPU."""

GROUPS = ("dp", "fsdp", "tp", "pp", "cp", "ep")
"""Groups of ranks whose exposed communication is reported separately."""
WORLD, BUBBLE = "world", "bubble"
"""Names of spans that wait for all ranks, or for another stage of the pipeline."""
HOST = "host"
"""Name of spans in which the host does work outside of the step, while the ranks communicate."""


@dataclass(frozen=True)
class Span:
    """A span of the step: its name, and seconds of its begin and end since the step began."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the span, seconds."""
        return self.end - self.begin


_free: deque[torch.cuda.Event] = deque()
"""Unused events, from timelines that have been read. Without reuse, each step of a large model under fsdp would make
thousands."""


class Timeline:
    """Waits and work of one step on one rank, recorded while the step runs."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._waits: list[tuple[str, Moment, Moment]] = []
        self.works: list[tuple[str, Moment, Moment]] = []
        """Pieces of work: ``bubble`` if the piece begins with data of another rank, else ``pp``; its begin; its end."""
        self.schedules: list[tuple[str, Moment, Moment]] = []
        self.is_waiting = False
        """True inside of a wait, because a wait inside another wait is not recorded."""
        self.receives = False
        """True if the rank has begun to receive data from another rank, before its next piece of work."""
        self._events: list[torch.cuda.Event] = []
        self.start = self.now()
        self.marks = [self.start]
        """Begin of the step, and ends of its phases: computing the gradients, then clipping and applying them."""

    def now(self) -> Moment:
        """Return the present moment: host time, or an event in the GPU's queue."""
        if not self._is_cuda:
            return time.perf_counter()
        event = _free.popleft() if _free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        return event

    def give_back(self) -> None:
        """Put the events back into the pool for later timelines. Call it after all moments have been read."""
        _free.extend(self._events)
        self._events.clear()

    def mark(self) -> None:
        """Record the end of a phase: the moment at which the device has done all work queued so far. Does not wait."""
        self.marks.append(self.now())

    def seconds(self, moment: Moment) -> float:
        """Return the seconds from the start of the step to a moment, which the device must have passed."""
        since = self.start
        if isinstance(since, torch.cuda.Event) and isinstance(moment, torch.cuda.Event):
            return float(since.elapsed_time(moment)) / 1000
        assert isinstance(since, float) and isinstance(moment, float)
        return moment - since

    def add_wait(self, name: str, begin: Moment) -> None:
        """Record a wait named ``name`` from ``begin`` until now."""
        self._waits.append((name, begin, self.now()))

    def spans(self) -> list[Span]:
        """Return all waits, with those of a pipeline's schedule; the device must have passed them."""
        waits, works, schedules = (
            [Span(name, self.seconds(begin), self.seconds(end)) for name, begin, end in moments]
            for moments in (self._waits, self.works, self.schedules)
        )
        for schedule in schedules:
            ends = Span(schedule.name, schedule.end, schedule.end)
            waits += schedule_waits(schedule.begin, [*works, ends], waits)
        return waits


def schedule_waits(begin: float, works: Sequence[Span], waits: Sequence[Span]) -> list[Span]:
    """Return spans for the time of a pipeline's schedule in which the stages of this rank did not work.

    Time before work that needs another rank's data is bubble: the transfer and the wait for the sender look the same.
    Time before other work is the rank's own communication, its sends.

    Args:
        begin: start of the schedule, in seconds since the step began.
        works: pieces of work in the order of time, each named ``bubble`` if it begins with data that another rank has
            sent, else ``pp``. The last piece has no length; it is the end of the schedule.
        waits: spans of other groups, which are left out if they are between two pieces of work.

    Returns:
        Spans named ``bubble`` or ``pp``.
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
    """Return the summed seconds of spans that begin in [``begin``, ``end``), only of spans with one of ``names`` if any
    is given."""
    return sum(span.seconds for span in spans if begin <= span.begin < end and (not names or span.name in names))


_current: Timeline | None = None


@contextmanager
def recorded(timeline: Timeline) -> Iterator[None]:
    """Record on a timeline the waits and the work inside the ``with`` block."""
    global _current
    before, _current = _current, timeline
    try:
        yield
    finally:
        _current = before


def current() -> Timeline | None:
    """Return the timeline of the step that is being recorded; None if no step is."""
    return _current


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Record the ``with`` block as a wait for other ranks, named ``name``: a collective, or the wait for its result."""
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
    """Record the ``with`` block as work of a pipeline stage. ``is_fed``: it begins with data that another rank has
    sent."""
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
    """Record the ``with`` block as a pipeline's schedule."""
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
"""Backend of the process groups of a mesh, by type of device. ``set_timeouts`` sets their timeout."""


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """Return the device mesh of a run, outermost axis first: the axes with more than one rank, and ``dp_shard``."""
    used = {name: size for name, size in dims.sizes.items() if size > 1 or name == "dp_shard"}
    options: dict[int | str, Any] = dict.fromkeys(used, BACKENDS[device_type])
    return init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used), backend_override=options)


def flatten_mesh(mesh: DeviceMesh, names: Sequence[str]) -> DeviceMesh:
    """Return a mesh of one axis that joins the neighboring axes ``names``, with a process group of its own."""
    if len(names) == 1:
        return mesh[names[0]]
    return mesh[tuple(names)]._flatten("_".join(names), backend_override=BACKENDS[mesh.device_type])


def shard_mesh(mesh: DeviceMesh, within: str = "dp_shard") -> DeviceMesh:
    """Return the mesh over which FSDP shards parameters: the axes ``within`` and ``cp``, flattened into one.

    If ``mesh`` has the axis ``dp_replicate``, the result has two dimensions, and ``dp_replicate`` is the first.
    """
    names = mesh.mesh_dim_names or ()
    shard = flatten_mesh(mesh, [name for name in (within, "cp") if name in names])
    if "dp_replicate" not in names:
        return shard
    return DeviceMesh._concatenate([mesh["dp_replicate"], shard])


def mesh_without(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """Return the one-axis mesh of the ranks that have the same place as this rank along each of ``axes``.

    Without ``pp`` these are the ranks with the same layers. Without ``pp``, ``ep`` and ``tp`` these are the ranks with
    the same part of the model, which compute other samples or tokens.
    """
    return flatten_mesh(mesh, [name for name in mesh.mesh_dim_names or () if name not in axes])


def expert_mesh(mesh: DeviceMesh, dims: ParallelDims) -> DeviceMesh:
    """Return the mesh of the data ranks and ``cp`` with an axis ``ep``, along which experts are sharded.

    Under FSDP the axis is split off from ``dp_shard``, so that each replica has all experts; else from
    ``dp_replicate``. ``edp`` is the rest of the split axis: the ranks that hold the same experts.
    """
    split_dim = "dp_shard" if dims.is_sharded else "dp_replicate"
    names = mesh.mesh_dim_names or ()
    data = mesh[tuple(name for name in ("dp_replicate", "dp_shard", "cp") if name in names)]
    place = (data.mesh_dim_names or ()).index(split_dim)  # torch 2.11 refuses names that the mesh has
    sizes = (getattr(dims, split_dim) // dims.ep, dims.ep)
    options: dict[Any, Any] = dict.fromkeys(("edp", "ep"), BACKENDS[mesh.device_type])
    return data._unflatten(place, sizes, ("edp", "ep"), backend_override=options)


def set_timeouts(timeout_s: float, without: Collection[dist.ProcessGroup] = ()) -> None:
    """Set the timeout of later collectives, in seconds, in all process groups of this rank except ``without``; also in
    the groups that torch has made."""
    for group in list(c10d._world.pg_map):
        if group not in without:
            c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


T = TypeVar("T")


@dataclass(frozen=True)
class PendingSum:
    """A sum over all ranks that is still being computed."""

    values: torch.Tensor
    work: dist.Work

    def wait(self, waits_as: str = WORLD) -> torch.Tensor:
        """Wait for the sum and return it; on a GPU only the stream waits, not the host.

        The timeline of a step records the wait under the name ``waits_as``.
        """
        with waiting(waits_as):
            self.work.wait()
        return self.values


@dataclass(frozen=True)
class World:
    """This rank, one of ``size`` ranks, its device, and collectives, which all ranks must call."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group for messages between the processes, apart from the collectives of training."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, which does all work that must be done once."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """All-reduce (sum) a tensor over all ranks, or ``group``, in place; queued on a GPU, without waiting."""
        with waiting(WORLD):
            dist.all_reduce(values, group=group)
        return values

    def start_all_reduce(self, values: torch.Tensor) -> PendingSum:
        """Start an all-reduce (sum) of a tensor over all ranks, in place; ``wait`` of the result returns the sum."""
        return PendingSum(values, dist.all_reduce(values, async_op=True))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank. ``gpt.checkpoint.messages`` must be able to send
        them."""
        return messages.all_gather(value, self.control)

    def on_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 only; every rank gets its result, or raises if it failed.

        Args:
            action: its result must be a value that ``gpt.checkpoint.messages`` can send.

        Raises:
            ConfigError: rank 0 raised it; raised on every rank.
            FirstRankError: rank 0 raised another error; raised on the other ranks, so that none of them waits for rank
                0.
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
    """Failure of rank 0 in an action that it does for all ranks; raised on all other ranks."""


def ranks_from_env() -> tuple[int, int, int, int, int]:
    """Return (rank, world size, local rank, local world size, node) as torchrun sets them; without
    torchrun (0, 1, 0, 1, 0).

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
    """Return the device of this rank: a GPU of its own, or the CPU.

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
    """Return the store in which the ranks find each other; None if torch chooses it from its environment variables.

    Under the launcher's agent, the keys have a secret prefix, because the store answers any process that reaches its
    port.
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
    """Yield this rank's ``World``, joined with the other ranks for the length of a ``with`` block.

    Args:
        wish: the device of the config.
        timeout_s: seconds after which a collective that does not complete raises.
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
    """Import and initialize DeepSpeed for the device of this rank, with warnings and errors only."""
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
