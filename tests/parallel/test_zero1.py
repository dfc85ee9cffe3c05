"""zero1 brings the parameters together in a few collectives, however their rows divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gpt.parallel import dtensor
from gpt.parallel.dtensor import all_gather_rows
from tests.support.distributed import run_distributed
from tests.support.watching import Operations

PARAMETERS = 219
SHAPES = [(7, 3), (1, 5), (8,), (2, 2, 2), (3,), (16, 4), (4, 0)]


def gather(rank: int, size: int) -> tuple[int, int]:
    """Tensors of which each rank has its rows only, brought together; the collectives, at once and in small buckets."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.rand(SHAPES[i % len(SHAPES)], generator=generator) for i in range(PARAMETERS)]
    held = [torch.full_like(tensor, -1.0) for tensor in whole]
    for tensor, mine in zip(whole, held, strict=True):
        for theirs, own in list(zip(tensor.chunk(size), mine.chunk(size), strict=True))[rank : rank + 1]:
            own.copy_(theirs)
    made: list[int] = []

    def is_collective(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return "c10d" in name and "wait" not in name

    for bucket in (dtensor.GATHER_BYTES, 512):
        dtensor.GATHER_BYTES = bucket
        tensors = [tensor.clone() for tensor in held]
        with Operations(is_collective) as seen:
            all_gather_rows(tensors, dist.group.WORLD)
        made.append(len(seen.found))
        assert all(map(torch.equal, tensors, whole))
    return made[0], made[1]


def test_every_parameter_comes_together_in_one_collective() -> None:
    for at_once, in_buckets in run_distributed(gather, 3):
        assert at_once == 1
        assert 10 < in_buckets < PARAMETERS
