"""The processes of a run: the device mesh, collectives (``World``), and joining the ranks (``open_world``)."""

from __future__ import annotations

import os
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
from gpt.parallel.timeline import WORLD, waiting
from gpt.topology import ParallelDims
from launch.errors import ConfigError
from launch.runs.environment import driver_problem, driver_version
from launch.worker import STORE_PREFIX

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
    """Return the mesh, of one axis, of the ranks that differ from this rank along no axis of ``axes``.

    With ``axes`` of ``pp`` these are the ranks with the same layers. With ``pp``, ``ep`` and ``tp`` they have the same
    part of the model, and other samples or tokens.
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
