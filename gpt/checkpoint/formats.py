"""Formats of a state on disk: the index of its tensors, and the files of torch.distributed.checkpoint or an engine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from gpt.checkpoint import messages
from gpt.checkpoint.deepspeed_files import open_as_tensors
from gpt.checkpoint.folders import TENSORS, Manifest
from gpt.checkpoint.part import Part, SavePlans

# The index of a state's tensors as JSON: their names, their shapes, and their chunks.
#
# torch.distributed.checkpoint writes its index as a pickle, whose reading can run code. An index that comes over a
# network must not run any.


def encode_index(metadata: Metadata) -> dict[str, Any]:
    """Turn an index into plain JSON; None marks an entry that is no tensor."""
    return {
        name: None
        if isinstance(entry, BytesStorageMetadata)
        else [
            str(entry.properties.dtype).removeprefix("torch."),
            list(entry.size),
            [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks],
        ]
        for name, entry in metadata.state_dict_metadata.items()
    }


def decode_index(plain: dict[str, Any]) -> Metadata:
    """Decode the result of ``encode_index``, without the places of the bytes.

    Raises:
        ValueError: it names an unknown type of tensors.
    """
    return Metadata({name: _decode_entry(entry) for name, entry in plain.items()})


def _decode_entry(entry: list[Any] | None) -> TensorStorageMetadata | BytesStorageMetadata:
    if entry is None:
        return BytesStorageMetadata()
    name, size, chunks = entry
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    found = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), found)


# Formats of an engine's state on disk: tensors through torch.distributed.checkpoint, or files of the engine's own.


class Format(Protocol):
    """Interface of a format. ``collect`` and ``read`` are collective."""

    def describe(self) -> dict[str, Any]:
        """Describe the files for the manifest, as plain JSON; ``kind`` names the format."""
        ...

    def collect(self, step: int, state: Any, group: dist.ProcessGroup | None) -> Part:
        """Collect this rank's files of ``state`` after ``step``; the tensors in it may be the state's own memory.

        A failure is raised on every rank. If no other rank waits, it may be raised on this rank alone.
        """
        ...

    def read(self, folder: Path, saved: Manifest, state: Any, group: dist.ProcessGroup | None) -> None:
        """Fill ``state`` from the files, which have this format or the one in ``saved.contents``."""
        ...


class TensorFiles:
    """Format of whole tensors by name: nested dicts of tensors and DTensors. Reads checkpoints of DeepSpeed, too."""

    def __init__(self) -> None:
        self._plans = SavePlans()

    def describe(self) -> dict[str, Any]:
        return dict(TENSORS)

    def collect(self, step: int, state: dict[str, Any], group: dist.ProcessGroup | None) -> Part:
        plan, data = self._plans.plan(state, group)
        return Part(dist.get_rank(group), plan, data)

    def read(self, folder: Path, saved: Manifest, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        with open_as_tensors(folder, saved, group) as tensors:
            # A state also holds settings of the optimizer, which a run of DeepSpeed does not write.
            wanted = state if saved.contents == TENSORS else select_tensors(state)
            read_tensors(dcp.FileSystemReader(tensors), wanted, group)


def read_tensors(reader: StorageReader, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill ``state`` with tensors by their names, through ``reader``. Collective."""
    # The stages of a pipeline want different tensors, so a single rank cannot know which are unused.
    names = messages.all_gather(sorted(flatten_state_dict(state)[0]), group)
    planner = _ExactPlanner({name for of_rank in names for name in of_rank})
    dcp.load(state, storage_reader=reader, planner=planner, process_group=group)


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

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over a setting of the optimizer: DCP's own reading of it would run any code that it names."""
        setting = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], setting)


def select_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Copy nested dicts without values that are no tensors; the tensors are the same objects."""
    return dict(_tensors_in(state))


def _tensors_in(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict) and (inner := select_tensors(value)):
            yield key, inner
