"""How the state of an engine becomes files: tensors through torch.distributed.checkpoint, or files of its own.

Owns what the store asks of a format, and the common one: DCP, which reshards whole tensors by their names to any
topology. Must not know what the tensors are, beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from gpt.checkpoint.deepspeed_files import as_tensors
from gpt.checkpoint.manifest import TENSORS, Manifest

DCP_METADATA = ".metadata"


class Format(Protocol):
    """Files in a folder of a checkpoint. ``write`` and ``read`` are called on all ranks together."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the files, plain JSON; ``kind`` names the format."""
        ...

    def write(self, folder: Path, step: int, state: Any, group: dist.ProcessGroup | None) -> list[Path]:
        """Write ``state`` after ``step``, synced to disk; the files that this rank wrote, anywhere in ``folder``."""
        ...

    def read(self, folder: Path, saved: Manifest, state: Any, group: dist.ProcessGroup | None) -> None:
        """Fill ``state`` from the files, of this format or of another one: ``saved.contents`` tells."""
        ...


class TensorFiles:
    """Whole tensors by name: nested dicts of tensors and DTensors. Reads what DeepSpeed has written, too."""

    def describe(self) -> dict[str, Any]:
        return dict(TENSORS)

    def write(self, folder: Path, step: int, state: dict[str, Any], group: dist.ProcessGroup | None) -> list[Path]:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=group)
        rank = dist.get_rank(group)
        return [*folder.glob(f"__{rank}_*.distcp")] + ([folder / DCP_METADATA] if rank == 0 else [])

    def read(self, folder: Path, saved: Manifest, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        with as_tensors(folder, saved, group) as tensors:
            # Beside tensors a state holds settings of the optimizer, which a run of DeepSpeed does not write.
            wanted = state if saved.contents == TENSORS else only_tensors(state)
            names: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(names, sorted(flatten_state_dict(wanted)[0]), group=group)
            planner = _ExactPlanner({name for of_rank in names for name in of_rank})
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(tensors), planner=planner, process_group=group)


class _ExactPlanner(DefaultLoadPlanner):
    """Refuses a checkpoint that holds more than is asked for: DCP would load part of a larger model without a word.

    Args:
        wanted: what any of the ranks asks for.
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


def only_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The same nested dicts without what is no tensor; the tensors are the same ones."""
    return dict(_tensors_in(state))


def _tensors_in(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict) and (inner := only_tensors(value)):
            yield key, inner
