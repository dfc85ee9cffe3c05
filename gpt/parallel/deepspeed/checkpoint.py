"""Checkpoints of DeepSpeed engines: DeepSpeed's own sharded files, or whole tensors by name.

DeepSpeed loads its own files if the parallelism is the same. After a change of ZeRO stage, number of ranks or strategy,
each rank takes its shards of whole tensors (gpt/checkpoint/deepspeed_files.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._pytree import tree_map_only

from gpt.checkpoint.deepspeed_files import LOOSE_FILES, MODEL_FILE, deepspeed_tag, open_as_tensors
from gpt.checkpoint.folders import DEEPSPEED, Manifest
from gpt.checkpoint.messages import run_on_all_ranks
from gpt.checkpoint.part import Part

if TYPE_CHECKING:
    from gpt.parallel.deepspeed.engine import ZeroEngine


class ZeroFiles:
    """The checkpoint format of a ZeRO run, whose state is the engine itself.

    Args:
        settings: the settings that decide the sharding, apart from the number of ranks; plain JSON.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {"kind": DEEPSPEED, **self.settings}

    def collect(self, step: int, state: ZeroEngine, group: dist.ProcessGroup | None) -> Part:
        # DeepSpeed saves its files in an order with barriers. The collector takes their content instead of writing them
        # to the run folder. Files that DeepSpeed writes by itself go to a folder of this node.
        with tempfile.TemporaryDirectory(prefix="deepspeed_") as scratch:
            collector = Collector(Path(scratch))
            state.ds.checkpoint_engine.save = collector.save
            state.ds.save_checkpoint(scratch, deepspeed_tag(step))
            tensor_info = state.tensor_info()
            if dist.get_rank(group) == 0:
                collector.files[MODEL_FILE] = tensor_info
                for name in LOOSE_FILES:
                    if (path := Path(scratch) / name).exists():
                        collector.files[name] = path.read_bytes()
        return Part(dist.get_rank(group), files=collector.files)

    def read(self, folder: Path, saved: Manifest, state: ZeroEngine, group: dist.ProcessGroup | None) -> None:
        if saved.contents == self.describe() and saved.world_size == dist.get_world_size(group):
            reader = Reader()
            run_on_all_ranks(lambda: reader.read(state.rank_files(folder, deepspeed_tag(saved.step))), group)
            state.ds.checkpoint_engine.load = reader.load
            state.ds.load_checkpoint(str(folder), deepspeed_tag(saved.step))
            del state.ds.checkpoint_engine.load  # and frees the content that was read
            return
        with open_as_tensors(folder, saved, group) as tensors:
            names = state.tensor_names()
            run_on_all_ranks(lambda: state.load_tensors(TensorReader(tensors), names, saved.step), group)
            state.shards.update_from_masters()


class Collector:
    """Collector of the files that DeepSpeed would write under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Any] = {}
        self._folder = folder

    def save(self, state_dict: Any, path: str) -> None:
        """Take the content of one file, in place of DeepSpeed's checkpoint engine, which would write it."""
        # Tensors become objects of their own: DeepSpeed may free the memory of its parameters before they are copied. A
        # torch.Size stays one: the map would make a plain tuple of it, which DeepSpeed's own tools cannot read.
        taken = tree_map_only(Tensor, Tensor.detach, state_dict, is_leaf=lambda value: isinstance(value, torch.Size))
        self.files[Path(path).relative_to(self._folder).as_posix()] = taken


class Reader:
    """Reader of a rank's files, ahead of DeepSpeed.

    DeepSpeed's ranks wait for each other between their files, so a failure has to be known before they begin.
    """

    def __init__(self) -> None:
        self._contents: dict[str, Any] = {}

    def read(self, paths: Sequence[str]) -> None:
        """Read all of ``paths``."""
        for path in paths:
            self.load(path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file, in place of DeepSpeed's checkpoint engine, which reads some files twice."""
        if path not in self._contents:
            self._contents[path] = torch.load(path, map_location="cpu", weights_only=False)
        return self._contents[path]


class TensorReader:
    """Reader of whole tensors from a torch.distributed.checkpoint folder, one at a time, in one process."""

    def __init__(self, folder: Path) -> None:
        self._reader = dcp.FileSystemReader(folder)
        self._known = self._reader.read_metadata().state_dict_metadata

    def weight(self, name: str) -> Tensor:
        """Read a parameter or buffer."""
        return self._read(f"model.{name}")

    def moment(self, name: str, key: str) -> Tensor:
        """Read one of AdamW's moments of a parameter."""
        return self._read(f"optimizer.state.{name}.{key}")

    def _read(self, key: str) -> Tensor:
        entry = self._known.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"the checkpoint holds no {key}")
        found = torch.empty(entry.size)
        dcp.load({key: found}, storage_reader=self._reader, no_dist=True)
        return found

    def refuse_others(self, names: set[str]) -> None:
        """Raise ValueError unless the checkpoint holds exactly the weights of ``names``, that is, the same model."""
        there = {key.removeprefix("model.") for key in self._known if key.startswith("model.")}
        if there != names:
            raise ValueError(f"the checkpoint differs in {', '.join(sorted(there ^ names)[:3])}")
