"""Formats of a state on disk: the index of its tensors, and the files of torch.distributed.checkpoint or an engine."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _DistWrapper

from gpt import checkpoint as folders
from gpt.checkpoint import DEEPSPEED, TENSORS, Manifest, messages
from gpt.checkpoint.messages import CheckpointError, explain, run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import RankPart, WritePlan
from gpt.config.rules import is_importable
from launch.errors import ConfigError

MODEL_FILE = "model.pt"
LOOSE_FILES = ("latest", "zero_to_fp32.py", "zero_to_torch.py")
"""Files that DeepSpeed writes next to its folder."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state that have the size of the parameter."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def deepspeed_tag(step: int) -> str:
    """Return DeepSpeed's tag of a step: the name of the folder into which it writes the checkpoint of the step."""
    return f"global_step{step}"


@contextlib.contextmanager
def open_as_tensors(folder: Path, saved: Manifest, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Yield a folder that torch.distributed.checkpoint can read. This is ``folder`` itself, or a temporary conversion
    if the checkpoint was written by DeepSpeed.

    Collective. The conversion is deleted after use; ``folders.sweep`` deletes one that a killed process has left.
    """
    if saved.contents["kind"] == TENSORS["kind"]:
        yield folder
        return
    assert saved.contents["kind"] == DEEPSPEED, saved.contents
    require_reader(folder)
    scratch = run_on_first_rank(lambda: folders.begin_temporary(folder.parent, "converting", saved.step), group)
    yield run_on_first_rank(lambda: convert(folder, saved, scratch), group)
    run_on_all_ranks(lambda: None, group)  # after a failure, ``folders.sweep`` removes the folder
    run_on_first_rank(lambda: folders.remove_folder(scratch), group)


def convert(folder: Path, saved: Manifest, scratch: Path) -> Path:
    """Convert a checkpoint of DeepSpeed to whole tensors; return the folder of the tensors, in ``scratch``. Not
    collective."""
    universal = to_universal(folder / deepspeed_tag(saved.step), scratch / "universal")
    about = torch.load(folder / MODEL_FILE, map_location="cpu", weights_only=True)
    model: dict[str, Tensor] = dict(about["buffers"])
    moments: dict[str, dict[str, Tensor]] = {}
    for name, shape in about["shapes"].items():
        model[name] = read_whole(universal, name, "fp32", shape)
        moments[name] = {key: read_whole(universal, name, key, shape) for key in MOMENTS}
        moments[name]["step"] = torch.tensor(float(saved.step))
    tensors = scratch / "tensors"
    state = {"model": model, "optimizer": {"state": moments}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tensors), no_dist=True)
    return tensors


def require_reader(folder: Path) -> None:
    """Raise ConfigError if this Python has no DeepSpeed, because only DeepSpeed reads the files in ``folder``."""
    if not is_importable("deepspeed"):
        raise ConfigError(
            f"{folder}, a checkpoint in files of DeepSpeed's own, and no package deepspeed in {sys.executable}",
            "DeepSpeed, which is needed to read what it has saved",
            "pip install -c constraints.txt deepspeed, and the same command again",
        )


def to_universal(original: Path, out: Path) -> Path:
    """Join the shards of the DeepSpeed checkpoint ``original`` into a universal checkpoint, in ``out``; return ``out``.

    DeepSpeed runs in a process of its own: it starts workers, and must not find the ranks of this process.

    Raises:
        RuntimeError: DeepSpeed failed; the message has the end of its output.
    """
    args = ["--input_folder", str(original), "--output_folder", str(out), "--inject_missing_state"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(RANK_VARIABLES)}
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *args],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"DeepSpeed cannot convert {original}:\n{done.stdout[-2000:]}")
    return out


def read_whole(universal: Path, name: str, key: str, shape: Sequence[int]) -> Tensor:
    """Read one whole tensor of a universal checkpoint: weights (``fp32``) or a moment.

    The tensor is memory-mapped from its file: the data is read from the disk only when it is used.
    """
    path = universal / "zero" / name / f"{key}.pt"
    found = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    whole: Tensor = found["param"] if isinstance(found, dict) else found
    return whole.view(shape)


def read_deepspeed_weights(folder: Path, saved: Manifest) -> dict[str, Tensor]:
    """Read the weights (fp32, whole) and buffers of a checkpoint of DeepSpeed, by name, in a single process.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    require_reader(folder)
    about = torch.load(folder / MODEL_FILE, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        universal = to_universal(folder / deepspeed_tag(saved.step), Path(scratch) / "universal")
        # Cloned, since the files from which the tensors are mapped are deleted with the scratch folder.
        found = {name: read_whole(universal, name, "fp32", shape).clone() for name, shape in about["shapes"].items()}
    return found | about["buffers"]


# The index of a state's tensors as JSON: their names, their shapes, and their chunks.
#
# torch.distributed.checkpoint writes its index as a pickle, whose reading can run code. An index that comes over a
# network must not run any.


def encode_index(metadata: Metadata) -> dict[str, Any]:
    """Turn an index into plain JSON: name -> [dtype, shape, [[offsets, sizes] of each chunk]]; None for a
    value that is no tensor."""
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
    """Decode the result of ``encode_index``; the positions of the tensors in files are not part of it.

    Raises:
        ValueError: the dtype of a tensor is unknown.
    """
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in plain.items():
        if entry is None:
            found[name] = BytesStorageMetadata()
            continue
        kind, size, chunks = entry
        held = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        found[name] = TensorStorageMetadata(TensorProperties(messages.dtype_of(kind)), torch.Size(size), held)
    return Metadata(found)


# Formats of an engine's state on disk: tensors through torch.distributed.checkpoint, or files of the engine's own.


class TensorFiles:
    """Format of whole tensors by name: nested dicts of tensors and DTensors. Reads checkpoints of DeepSpeed, too.

    Base of other formats, which override the methods. ``collect`` and ``read`` are collective.

    The plan of which rank writes which tensors is made at the first save, and again if names or shapes change on a
    rank. Rank 0 plans for all ranks, and they wait for it. The time grows with the number of ranks.
    """

    _keys = itertools.count()

    def __init__(self) -> None:
        self._local: SavePlan | None = None
        self._plan: WritePlan | None = None

    def describe(self) -> dict[str, Any]:
        """Return the description of the files for the manifest, as plain JSON; its key ``kind`` names the format."""
        return dict(TENSORS)

    def collect(self, step: int, state: Any, group: dist.ProcessGroup | None) -> RankPart:
        """Collect this rank's files of ``state`` after ``step``; their tensors may share memory with ``state``.

        A failure is raised on every rank; only on this rank if no other rank waits for it.
        """
        # ``dcp.async_save`` with a process of its own would keep plans, too, but does not fit. It stages the whole
        # state on every rank, replicas included. It plans and ends each save by collectives over a second process
        # group, in which one slow writer delays all ranks. It has neither a manifest nor a second try. So the planner
        # and the file format are torch's; the cache and the order of a save are ours.
        planner, rank = DefaultSavePlanner(), dist.get_rank(group)
        planner.set_up_planner(state, None, rank == 0)
        local = planner.create_local_plan()
        if any(messages.all_gather(self._plan is None or local != self._local, group)):
            self._plan = None  # until every rank has the new plan
            self._plan = self._agree(planner, local, group)
            self._local = local
        assert self._plan is not None
        planner.finish_plan(self._plan.items)
        return RankPart(rank, self._plan, [planner.resolve_data(item) for item in self._plan.items.items])

    def _agree(self, planner: DefaultSavePlanner, local: SavePlan, group: dist.ProcessGroup | None) -> WritePlan:
        """Have rank 0 plan for all ranks, as torch.distributed.checkpoint does; return this rank's plan."""
        found: list[Metadata] = []

        def plan_for_all(plans: list[SavePlan]) -> list[SavePlan]:
            made, metadata = planner.create_global_plan(plans)
            found.append(metadata)
            return dcp.FileSystemWriter(".").prepare_global_plan(made)  # which only names the files of each rank

        try:
            own = _DistWrapper(group, True, 0).reduce_scatter("plan", lambda: local, plan_for_all)
        except CheckpointException as error:  # a BaseException, raised on every rank
            raise CheckpointError(explain(error)) from error
        return WritePlan(next(self._keys), own, found[0] if found else None)

    def read(self, folder: Path, saved: Manifest, state: Any, group: dist.ProcessGroup | None) -> None:
        """Fill ``state`` from the files in ``folder``, which have this format or the format named in
        ``saved.contents``."""
        with open_as_tensors(folder, saved, group) as tensors:
            # A state also contains settings of the optimizer, which a run of DeepSpeed does not write.
            wanted = state if saved.contents == TENSORS else select_tensors(state)
            read_tensors(dcp.FileSystemReader(tensors), wanted, group)


def read_tensors(reader: StorageReader, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill ``state`` with the tensors of the same names that ``reader`` reads. Collective."""
    # The stages of a pipeline load different tensors, so a single rank cannot know which are unused.
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
        """Load a setting of the optimizer without running code; DCP's own loading would run any code in the file."""
        setting = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], setting)


def select_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dicts with only their tensors, which are the same objects; no empty dicts remain."""
    found = {}
    for key, value in state.items():
        inner = select_tensors(value) if isinstance(value, dict) else value
        if isinstance(inner, Tensor) or (isinstance(inner, dict) and inner):
            found[key] = inner
    return found
