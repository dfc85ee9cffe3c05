"""Formats of an engine's state on disk: tensors through torch.distributed.checkpoint, or files of the engine's own.

Owns the interface of a format, and the common one: DCP, which reshards whole tensors by their names to any topology.
Must not know what the tensors are, beyond that.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, SavePlanner

from gpt.checkpoint import messages
from gpt.checkpoint.deepspeed_files import open_as_tensors
from gpt.checkpoint.manifest import TENSORS, Manifest

DCP_METADATA = ".metadata"
PLAN_CACHES = (
    "_cached_save_plan",
    "_cached_final_save_plan",
    "_cached_all_plans",
    "_cached_global_plan",
    "_cached_metadata",
)
"""Dictionaries of torch's SavePlanner in which it keeps plans, by key."""


class Format(Protocol):
    """Interface of a format. ``write`` and ``read`` are collective."""

    def describe(self) -> dict[str, Any]:
        """Describe the files for the manifest, as plain JSON; ``kind`` names the format."""
        ...

    def write(self, folder: Path, step: int, state: Any, group: dist.ProcessGroup | None) -> list[Path]:
        """Write ``state`` after ``step``, synced to disk; returns the files of this rank, anywhere in ``folder``."""
        ...

    def read(self, folder: Path, saved: Manifest, state: Any, group: dist.ProcessGroup | None) -> None:
        """Fill ``state`` from the files, of this format or of the one that ``saved.contents`` names."""
        ...


class TensorFiles:
    """Format of whole tensors by name: nested dicts of tensors and DTensors. Reads checkpoints of DeepSpeed, too.

    Who writes what is planned at the first ``write``, and again when the names or shapes of some rank have changed:
    rank 0 plans for all ranks, which takes longer the more there are, while all of them wait.
    """

    def __init__(self) -> None:
        self._plans = _Plans()

    def describe(self) -> dict[str, Any]:
        return dict(TENSORS)

    def write(self, folder: Path, step: int, state: dict[str, Any], group: dist.ProcessGroup | None) -> list[Path]:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        try:
            dcp.save(state, storage_writer=writer, process_group=group, planner=self._plans.planner())
        except BaseException:  # torch's CheckpointException is none of Exception
            # It is raised on every rank; some may have kept a plan that the others have not.
            self._plans = _Plans()
            raise
        rank = dist.get_rank(group)
        return [*folder.glob(f"__{rank}_*.distcp")] + ([folder / DCP_METADATA] if rank == 0 else [])

    def read(self, folder: Path, saved: Manifest, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        with open_as_tensors(folder, saved, group) as tensors:
            # Beside tensors a state holds settings of the optimizer, which a run of DeepSpeed does not write.
            wanted = state if saved.contents == TENSORS else select_tensors(state)
            # The stages of a pipeline want different tensors, so a rank alone cannot tell which are unused.
            names = messages.all_gather(sorted(flatten_state_dict(wanted)[0]), group)
            planner = _ExactPlanner({name for of_rank in names for name in of_rank})
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(tensors), planner=planner, process_group=group)


class _Plans:
    """Plans of the saves of one format, which DCP keeps for the process under one key for each class of planners.

    Under a key of their own, two formats of a process do not take each other's plans for theirs.
    """

    _keys = itertools.count()

    def __init__(self) -> None:
        self._key = f"gpt.checkpoint.formats {next(self._keys)}"
        weakref.finalize(self, _forget, self._key)

    def planner(self) -> DefaultSavePlanner:
        """Make the planner of one save. A new one each time: it would hold on to the state that it has saved."""
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self._key
        return planner


def _forget(key: str) -> None:
    """Free the plans that DCP keeps under a key; on rank 0 these are the plans of all ranks."""
    for name in PLAN_CACHES:
        getattr(SavePlanner, name).pop(key, None)


class _ExactPlanner(DefaultLoadPlanner):
    """Planner that refuses a checkpoint with more tensors than wanted: DCP would load part of a larger model silently.

    Args:
        wanted: names of the tensors that any of the ranks loads.
    """

    def __init__(self, wanted: set[str]) -> None:
        super().__init__()
        self._wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        unused = sorted(self.metadata.state_dict_metadata.keys() - self._wanted)
        if unused:
            raise ValueError(f"the checkpoint also holds {', '.join(unused[:3])}{' ...' if unused[3:] else ''}")
        return super().create_local_plan()


def select_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Copy nested dicts without values that are no tensors; the tensors are the same ones."""
    return dict(_tensors_in(state))


def _tensors_in(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict) and (inner := select_tensors(value)):
            yield key, inner
