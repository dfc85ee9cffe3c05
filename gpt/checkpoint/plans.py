"""Plans of who writes which tensors of a state, made by torch.distributed.checkpoint and kept from save to save.

Owns the cache. ``dcp.async_save`` with a process of its own would keep plans too, but not for this protocol: it stages
the whole state on every rank, replicas included; it plans and ends each save by collectives of its own, over a second
process group in which one slow writer holds up all others; and it knows neither a manifest nor a second try. So the
planner and the file format are torch's, and the cache and the order of a save are ours. Must not know where bytes go.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

from gpt.checkpoint import messages
from gpt.checkpoint.collective import CheckpointError, explain


@dataclass(frozen=True)
class WritePlan:
    """Share of one rank in the files of a state."""

    key: int
    """Number that names this plan in this process."""
    items: SavePlan
    metadata: Metadata | None
    """Index of the tensors of all ranks, without their places in the files; rank 0's only."""


class SavePlans:
    """The plan of one format's saves: made at the first, and again when names or shapes of some rank have changed.

    Rank 0 plans for all ranks, which takes longer the more there are, while all of them wait.
    """

    _keys = itertools.count()

    def __init__(self) -> None:
        self._local: SavePlan | None = None
        self._plan: WritePlan | None = None

    def plan(self, state: dict[str, Any], group: dist.ProcessGroup | None) -> tuple[WritePlan, list[Any]]:
        """Plan a save of ``state``; returns this rank's share, and the data of its items, in their order. Collective.

        A tensor among the data is the state's own memory, no copy.

        Raises:
            CheckpointError: the state cannot be planned; on every rank.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, None, dist.get_rank(group) == 0)
        local = planner.create_local_plan()
        has_changed = self._plan is None or local != self._local
        if any(messages.all_gather(has_changed, group)):
            self._plan = None  # until the new one stands on every rank
            self._plan = self._agree(planner, local, group)
            self._local = local
        assert self._plan is not None
        planner.finish_plan(self._plan.items)
        return self._plan, [planner.resolve_data(item) for item in self._plan.items.items]

    def _agree(self, planner: DefaultSavePlanner, local: SavePlan, group: dist.ProcessGroup | None) -> WritePlan:
        """Have rank 0 make the plans of all ranks, as torch.distributed.checkpoint does for a save."""
        found: list[Metadata] = []

        def plan_for_all(plans: list[SavePlan]) -> list[SavePlan]:
            made, metadata = planner.create_global_plan(plans)
            found.append(metadata)
            return FileSystemWriter(".").prepare_global_plan(made)  # which only names the files of each rank

        try:
            own = _DistWrapper(group, True, 0).reduce_scatter("plan", lambda: local, plan_for_all)
        except CheckpointException as error:  # a BaseException, raised on every rank
            raise CheckpointError(explain(error)) from error
        return WritePlan(next(self._keys), own, found[0] if found else None)
