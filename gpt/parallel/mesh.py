"""The ranks as a grid, with a process group for every line of it.

Owns the names of the dimensions and the groups' timeout, which torch does not take over from the first group.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gpt.parallel.world import World
from gpt.topology.dims import Topology


def build_mesh(layout: Topology, world: World, timeout_s: int) -> DeviceMesh:
    """The dimensions of the topology that have more than one rank, and ``dp_shard`` always, from the outermost."""
    used = {name: size for name, size in layout.sizes.items() if size > 1 or name == "dp_shard"}
    options: dict[int | str, Any] = {name: group_options(world, timeout_s) for name in used}
    return init_device_mesh(
        world.device.type, tuple(used.values()), mesh_dim_names=tuple(used), backend_override=options
    )


def group_options(world: World, timeout_s: int) -> tuple[str, Any]:
    """Backend and options of a group in which a collective fails after ``timeout_s``."""
    if world.device.type == "cuda":
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return "nccl", options
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs leave it out
    options._timeout = timedelta(seconds=timeout_s)
    return "gloo", options


def flat(grid: DeviceMesh, names: Sequence[str], world: World, timeout_s: int) -> DeviceMesh:
    """Several neighbouring dimensions of a grid as one, with a group of its own."""
    if len(names) == 1:
        return grid[names[0]]
    return grid[tuple(names)]._flatten("_".join(names), backend_override=group_options(world, timeout_s))


def shard_mesh(grid: DeviceMesh, world: World, timeout_s: int, within: str = "dp_shard") -> DeviceMesh:
    """Where parameters are sharded: the dimension ``within`` a copy of the model and ``cp`` as one, after
    ``dp_replicate`` where there are copies."""
    names = grid.mesh_dim_names or ()
    shard = flat(grid, [name for name in (within, "cp") if name in names], world, timeout_s)
    if "dp_replicate" not in names:
        return shard
    return DeviceMesh._concatenate([grid["dp_replicate"], shard])


def copies_mesh(grid: DeviceMesh, world: World, timeout_s: int) -> DeviceMesh:
    """The ranks that hold the same part of the model and see other samples, or other parts of them."""
    names = grid.mesh_dim_names or ()
    return flat(grid, [name for name in names if name not in ("pp", "ep", "tp")], world, timeout_s)


def expert_grid(grid: DeviceMesh, layout: Topology, world: World, timeout_s: int) -> DeviceMesh:
    """The data ranks and ``cp``, with a dimension ``ep`` of neighbours that deal out the experts among themselves.

    It is cut off from ``dp_shard`` where copies are sharded, so that the experts of one are in its own ranks, else from
    ``dp_replicate``. ``edp`` is what is left of that: ranks to which the same experts are dealt out.
    """
    cut = "dp_shard" if layout.is_sharded else "dp_replicate"
    names = grid.mesh_dim_names or ()
    data = grid[tuple(name for name in ("dp_replicate", "dp_shard", "cp") if name in names)]
    place = (data.mesh_dim_names or ()).index(cut)  # torch 2.11 takes no name here: it refuses those that it has
    sizes = (getattr(layout, cut) // layout.ep, layout.ep)
    options: dict[Any, Any] = {name: group_options(world, timeout_s) for name in ("edp", "ep")}
    return data._unflatten(place, sizes, ("edp", "ep"), backend_override=options)


def layer_mesh(grid: DeviceMesh, world: World, timeout_s: int) -> DeviceMesh:
    """The ranks that hold the same layers: all that are at the same place of their pipelines."""
    return flat(grid, [name for name in grid.mesh_dim_names or () if name != "pp"], world, timeout_s)
