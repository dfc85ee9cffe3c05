"""Formats of checkpoints: files of torch.distributed.checkpoint, their index, and conversion of DeepSpeed's files."""

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
"""Names of the files that DeepSpeed writes next to the folder of a checkpoint."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of the two moments in AdamW's state of a parameter."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def deepspeed_tag(step: int) -> str:
    """Return the name of the folder in which DeepSpeed writes the checkpoint of a step."""
    return f"global_step{step}"


@contextlib.contextmanager
def open_as_tensors(folder: Path, saved: Manifest, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Return a context that yields a folder which torch.distributed.checkpoint can read. Collective.

    This is ``folder`` itself, or a temporary conversion if DeepSpeed has written the checkpoint. The conversion is
    deleted at the end of the context.

    Args:
        folder: folder of the checkpoint.
        saved: manifest of the checkpoint, which names the format of its files.
        group: gloo group of the ranks; None means the default group.

    Raises:
        ConfigError: DeepSpeed has written the checkpoint, and is not installed.
        CheckpointError: the conversion failed; raised on every rank.
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
    """Convert the DeepSpeed checkpoint in ``folder`` to whole tensors. Return the new folder of the tensors, which is
    inside of ``scratch``, a temporary folder. ``saved`` is the manifest of the checkpoint. Not collective."""
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
    """Raise ConfigError if DeepSpeed is not installed: only DeepSpeed can read the checkpoint in ``folder``."""
    if not is_importable("deepspeed"):
        raise ConfigError(
            f"{folder}, a checkpoint in files of DeepSpeed's own, and no package deepspeed in {sys.executable}",
            "DeepSpeed, which is needed to read what it has saved",
            "pip install -c constraints.txt deepspeed, and the same command again",
        )


def to_universal(original: Path, out: Path) -> Path:
    """Join the shards of the DeepSpeed checkpoint ``original`` to a universal checkpoint in ``out``; return ``out``.

    DeepSpeed runs in another process, because it starts workers, and must not find the environment variables of this
    rank, such as RANK.

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
    """Return one whole tensor of a parameter from a universal checkpoint of DeepSpeed. ``name`` and ``shape`` are those
    of the parameter; ``key`` is ``fp32`` for the weights, or one of ``MOMENTS``.

    The tensor is mapped from its file, and read from the disk only when it is used.
    """
    path = universal / "zero" / name / f"{key}.pt"
    found = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    whole: Tensor = found["param"] if isinstance(found, dict) else found
    return whole.view(shape)


def read_deepspeed_weights(folder: Path, saved: Manifest) -> dict[str, Tensor]:
    """Return the whole weights, in fp32, and the buffers of a DeepSpeed checkpoint: name -> tensor. Not collective.

    Raises:
        ConfigError: DeepSpeed is not installed.
        RuntimeError: DeepSpeed cannot convert the checkpoint.
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
    """Return the index of a checkpoint's tensors as plain JSON: name -> [dtype, shape, [[offsets, sizes] of each
    chunk]], or None for a value that is no tensor."""
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
    """Return the index that ``encode_index`` has encoded, without the positions of tensors in files.

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
    """Checkpoint format of torch.distributed.checkpoint: whole tensors by name. It also reads checkpoints of DeepSpeed.

    The state is a nested dict of tensors and DTensors. Other formats override the methods. ``collect`` and ``read`` are
    collective.

    Rank 0 plans which rank writes which tensors, while the other ranks wait. Planning takes longer with more ranks. The
    plan is made at the first save, and again if names or shapes change.
    """

    _keys = itertools.count()

    def __init__(self) -> None:
        self._local: SavePlan | None = None
        self._plan: WritePlan | None = None

    def describe(self) -> dict[str, Any]:
        """Return ``Manifest.contents`` of this format, as plain JSON."""
        return dict(TENSORS)

    def collect(self, step: int, state: Any, group: dist.ProcessGroup | None) -> RankPart:
        """Return what this rank writes for a checkpoint. Collective.

        Args:
            step: step of the checkpoint.
            state: state of the run. The tensors of the result may share memory with it.
            group: gloo group of the ranks; None means the default group.

        Raises:
            CheckpointError: torch cannot plan the save; raised on every rank.
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
        """Plan on rank 0 which rank writes which tensors, as torch.distributed.checkpoint does. Return the plan of this
        rank. Collective.

        Args:
            planner: torch's planner of this rank. Only that of rank 0 makes the plan.
            local: list of the tensors that this rank has.
            group: gloo group of the ranks; None means the default group.

        Raises:
            CheckpointError: torch cannot plan the save; raised on every rank.
        """
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
        """Load a checkpoint into ``state``. Collective.

        Args:
            folder: folder of the checkpoint.
            saved: its manifest, which names the format of its files.
            state: tensors that are filled in place.
            group: gloo group of the ranks.
        """
        with open_as_tensors(folder, saved, group) as tensors:
            # A state also contains settings of the optimizer, which a run of DeepSpeed does not write.
            wanted = state if saved.contents == TENSORS else select_tensors(state)
            read_tensors(dcp.FileSystemReader(tensors), wanted, group)


def read_tensors(reader: StorageReader, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of ``state``, in place, with those of the same names that ``reader`` reads. Collective."""
    # The stages of a pipeline load different tensors, so a single rank cannot know which are unused.
    names = messages.all_gather(sorted(flatten_state_dict(state)[0]), group)
    planner = _ExactPlanner({name for of_rank in names for name in of_rank})
    dcp.load(state, storage_reader=reader, planner=planner, process_group=group)


class _ExactPlanner(DefaultLoadPlanner):
    """Load planner that raises ValueError if the checkpoint has tensors that no rank loads.

    torch's planner would load a part of a larger model without an error.

    Args:
        wanted: names of the tensors that the ranks load.
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
        """Load a value that is no tensor, such as a setting of the optimizer. Unlike torch's method, it does not run
        code that the file may contain."""
        setting = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], setting)


def select_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dicts that has only the tensors, as the same objects. Empty dicts are left out."""
    found = {}
    for key, value in state.items():
        inner = select_tensors(value) if isinstance(value, dict) else value
        if isinstance(inner, Tensor) or (isinstance(inner, dict) and inner):
            found[key] = inner
    return found
