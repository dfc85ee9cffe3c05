"""Comparison of parameter replicas, bit by bit: a device or a memory may change one without an error.

A difference in a moment of the optimizer shows in its parameter one step later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt.parallel.distributed import World
from gpt.parallel.dtensor import local_tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by the bytes of an element."""

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Drift:
    """Ranks whose parameters differ from those of their replicas."""

    ranks: Ranks
    is_certain: bool
    """True if these ranks differ from a majority of the replicas; False if they only differ from each other."""


class ReplicaCheck:
    """Comparison of the replicas of a module's parameters. Collective: all ranks create it, and call it, together."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self._module, self._world = module, world
        self._ranks_of = ranks_by_shard(world.gather([shard_key(n, p) for n, p in module.named_parameters()]))
        self._groups = sorted({ranks for ranks in self._ranks_of.values() if len(ranks) > 1})
        """Groups of ranks that hold the same shards, in an order that is the same on all ranks."""

    @property
    def compares(self) -> bool:
        """False if every parameter is on one rank only."""
        return bool(self._groups)

    def find_drift(self) -> Drift | None:
        """Compare the present parameters; None if all replicas agree. Waits for the device. Collective."""
        place = {ranks: number for number, ranks in enumerate(self._groups)}
        sums_RG = torch.zeros(self._world.size, len(place), dtype=torch.int64, device=self._world.device)
        for name, parameter in self._module.named_parameters():
            ranks = self._ranks_of[shard_key(name, parameter)]
            if ranks in place:
                sums_RG[self._world.rank, place[ranks]] += checksum(local_tensor(parameter)).to(sums_RG.device)
        # Each rank has filled only its own row, so the sum has the rows of all ranks.
        return find_odd(self._groups, self._world.all_reduce(sums_RG).tolist())


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits of a tensor, () int64, each element taken as an integer.

    The sum is exact in any order of addition, since it wraps around. A single element that differs, by however little,
    changes it.
    """
    flat = tensor.detach().reshape(-1)
    return flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def shard_key(name: str, parameter: Tensor) -> str:
    """Name the shard of a parameter that this rank holds: ranks with the same name are replicas."""
    if not isinstance(parameter, DTensor):
        return name
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert place is not None, "a rank outside of the mesh of its parameter"
    sharded = [
        f"{placement} {place[axis]}/{mesh.size(axis)}"
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    ]
    return "; ".join([name, *sharded])


def ranks_by_shard(keys: Sequence[Sequence[str]]) -> dict[str, Ranks]:
    """Return the ranks that hold each shard, from the shards of each rank."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, own in enumerate(keys):
        for key in own:
            found[key].append(rank)
    return {key: tuple(ranks) for key, ranks in found.items()}


def find_odd(groups: Sequence[Ranks], sums_RG: Sequence[Sequence[int]]) -> Drift | None:
    """Find the ranks that differ from a majority of their replicas, or all ranks of a group without a majority.

    Args:
        groups: ranks that hold the same shards.
        sums_RG: checksum of each rank in each group; a rank outside the group does not count.
    """
    odd: set[int] = set()
    is_certain = True
    for number, ranks in enumerate(groups):
        sums = {rank: sums_RG[rank][number] for rank in ranks}
        (common, votes), *others = Counter(sums.values()).most_common()
        if not others:
            continue
        has_majority = 2 * votes > len(ranks)
        is_certain = is_certain and has_majority
        odd |= {rank for rank, value in sums.items() if value != common or not has_majority}
    return Drift(tuple(sorted(odd)), is_certain) if odd else None
