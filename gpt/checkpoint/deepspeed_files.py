"""DeepSpeed's files in a checkpoint, and their reading without DeepSpeed's engine.

    latest                      the name of the folder below
    global_step100/             one file for each rank's moments and masters, and the model's
    zero_to_fp32.py             DeepSpeed's script that makes one file of weights
    model.pt                    ours: shapes and persistent buffers by name, which DeepSpeed does not always write

The files hold shards that depend on stage and number of ranks. To read them with another stage or number, rank 0 has
DeepSpeed make its universal checkpoint (arXiv 2406.18820), whole tensors by name. Rank 0 stores these through
torch.distributed.checkpoint next to the original for the time of reading. So there is one way between any two
topologies. ``deepspeed``, whose import takes seconds, is imported only when it is used.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gpt.checkpoint import folders
from gpt.checkpoint.folders import DEEPSPEED, TENSORS, Manifest
from gpt.checkpoint.messages import run_on_all_ranks, run_on_first_rank
from gpt.config.rules import is_importable
from launch.errors import ConfigError

MODEL_FILE = "model.pt"
LOOSE_FILES = ("latest", "zero_to_fp32.py", "zero_to_torch.py")
"""Files that DeepSpeed writes next to its folder."""
MOMENTS = ("exp_avg", "exp_avg_sq")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def deepspeed_tag(step: int) -> str:
    """Return the name of the folder that DeepSpeed writes a step into, its tag."""
    return f"global_step{step}"


@contextlib.contextmanager
def open_as_tensors(folder: Path, saved: Manifest, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Open a checkpoint for torch.distributed.checkpoint: yield ``folder``, or a conversion that is deleted after use.

    Collective. Conversions that a killed process leaves are swept with the other temporary folders.
    """
    if saved.contents["kind"] == TENSORS["kind"]:
        yield folder
        return
    assert saved.contents["kind"] == DEEPSPEED, saved.contents
    require_deepspeed(folder)
    scratch = run_on_first_rank(lambda: folders.begin_conversion(folder), group)
    yield run_on_first_rank(lambda: convert(folder, saved, scratch), group)
    run_on_all_ranks(lambda: None, group)  # after a failure the sweep removes the folder
    run_on_first_rank(lambda: folders.remove(scratch), group)


def convert(folder: Path, saved: Manifest, scratch: Path) -> Path:
    """Convert a checkpoint of DeepSpeed to whole tensors in a folder inside ``scratch``, and return it. On one rank."""
    universal = to_universal(folder / deepspeed_tag(saved.step), scratch / "universal")
    about = torch.load(folder / MODEL_FILE, map_location="cpu", weights_only=True)
    model: dict[str, Tensor] = dict(about["buffers"])
    moments: dict[str, dict[str, Tensor]] = {}
    for name, shape in about["shapes"].items():
        model[name] = read_whole(universal, name, "fp32").view(shape)
        moments[name] = {key: read_whole(universal, name, key).view(shape) for key in MOMENTS}
        moments[name]["step"] = torch.tensor(float(saved.step))
    tensors = scratch / "tensors"
    state = {"model": model, "optimizer": {"state": moments}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tensors), no_dist=True)
    return tensors


def require_deepspeed(folder: Path) -> None:
    """Raise ConfigError if this Python has no DeepSpeed, which alone reads the files in ``folder``."""
    if not is_importable("deepspeed"):
        raise ConfigError(
            f"{folder}, a checkpoint in files of DeepSpeed's own, and no package deepspeed in {sys.executable}",
            "DeepSpeed, which is needed to read what it has saved",
            "pip install -c constraints.txt deepspeed, and the same command again",
        )


def to_universal(original: Path, out: Path) -> Path:
    """Have DeepSpeed join its shards to a universal checkpoint in ``out``, and return it.

    It runs in a process of its own: DeepSpeed starts workers, and must not find the ranks of this process.

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


def read_whole(universal: Path, name: str, key: str) -> Tensor:
    """Read one tensor of a universal checkpoint: weights (``fp32``) or a moment; the disk keeps its data until used."""
    path = universal / "zero" / name / f"{key}.pt"
    found = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return found["param"] if isinstance(found, dict) else found


def read_weights(folder: Path, saved: Manifest) -> dict[str, Tensor]:
    """Read the weights of a checkpoint of DeepSpeed by name, fp32 and whole, in one process that only reads there.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    require_deepspeed(folder)
    if saved.contents.get("pp", 1) > 1:
        return read_stages(folder, saved)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    about = torch.load(folder / MODEL_FILE, map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints its progress
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), deepspeed_tag(saved.step))
    return {name: found[name] for name in about["shapes"]} | about["buffers"]


def read_stages(folder: Path, saved: Manifest) -> dict[str, Tensor]:
    """Read the weights of a pipeline's stages by name, fp32 and whole; ``zero_to_fp32`` does not join stages."""
    about = torch.load(folder / MODEL_FILE, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        universal = to_universal(folder / deepspeed_tag(saved.step), Path(scratch) / "universal")
        whole = {name: read_whole(universal, name, "fp32").view(shape) for name, shape in about["shapes"].items()}
        # Cloned, since the files that they are mapped from are deleted with the scratch folder.
        return {name: tensor.clone() for name, tensor in whole.items()} | about["buffers"]
