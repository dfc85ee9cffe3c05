"""Loading of a trained model from a run folder into one process, whatever number of ranks and strategy saved it.

Owns the choice of the checkpoint, its verification and the reading of its weights, for everything that uses a trained
model instead of training it. Only reads: a damaged checkpoint is passed over, and setting it aside is left to the run
it belongs to, which may be going on meanwhile. Must not know what the model is wanted for.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gpt.checkpoint import deepspeed_files, folders
from gpt.checkpoint.manifest import DEEPSPEED, DamagedError, Manifest, find_damage, read_manifest
from gpt.config import TrainConfig
from gpt.conversion.source import read_run
from gpt.model.gpt import GPT
from launch.errors import ConfigError
from launch.runs.find import runs_inside, runs_labelled
from launch.runs.folder import RunFolder

log = logging.getLogger(__name__)


def load_model(
    run_folder: str | os.PathLike[str], step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[TrainConfig, GPT]:
    """Load the config of a run and its model, fp32 and in eval mode, from the newest checkpoint that is whole.

        config, model = load_model("outputs/quick_test/default")

    Args:
        run_folder: the folder of one run.
        step: take the checkpoint of this step instead of the newest.
        device: the device of the returned model.

    Raises:
        ConfigError: no run there, no checkpoint, or none that is whole.
    """
    folder, config = open_run(run_folder)
    return config, read_weights(config, find_checkpoint(folder, step), device)


def open_run(path: str | os.PathLike[str]) -> tuple[RunFolder, TrainConfig]:
    """Open the run folder at ``path``, or of the run with that label, and read the config it was made with.

    Raises:
        ConfigError: there is none, or one of another program; names the runs below ``path`` where it is the folder of
            a sweep.
    """
    given = Path(path).expanduser()
    if not given.exists():  # it may be the label of a run, as for every command of the launcher
        given = next(iter(runs_labelled(given)), given)
    folder = RunFolder(given.absolute())
    if not folder.config.is_file():
        inside = [run for run in runs_inside(folder.path) if run != folder.path]
        found = (
            f"{folder.path} is the folder of a sweep, with {len(inside)} runs in it"
            if inside
            else f"no run in {folder.path}"
        )
        raise ConfigError(
            found,
            "the folder of one run, which has .hydra/config.yaml",
            str(inside[-1]) if inside else "python -m gpt.train, to make one (it prints its folder first)",
        )
    return folder, read_run(folder)


def find_checkpoint(folder: RunFolder, step: int | None = None) -> Path:
    """Find the newest checkpoint of a run whose files are all as they were saved, or the one of ``step``.

    Raises:
        ConfigError: there is none.
    """
    there = folders.list_committed(folder.checkpoints)
    wanted = [path for path in there if step is None or folders.step_of(path) == step]
    if not there:
        raise ConfigError(
            f"no checkpoint in {folder.checkpoints}",
            "a run that has saved one",
            f"touch {folder.path}/SAVE while it runs",
        )
    if not wanted:
        steps = ", ".join(str(folders.step_of(path)) for path in there)
        raise ConfigError(
            f"no checkpoint of step {step} in {folder.checkpoints}",
            f"one of {steps}",
            f"--step {folders.step_of(there[-1])}",
        )
    damaged = []
    for path in reversed(wanted):
        try:
            verify_checkpoint(path)
        except DamagedError as damage:
            if path.exists():  # the run itself may have deleted it since
                log.warning("checkpoint %s is damaged (%s): passed over", path, damage)
            damaged.append(f"{path.name} ({damage})")
        else:
            return path
    raise ConfigError(
        f"damaged: {'; '.join(damaged)}", "a checkpoint that is as it was saved", "the same command with another step"
    )


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest; raises DamagedError."""
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        damage = find_damage(checkpoint / name, entry)
        if damage:
            raise DamagedError(damage)
    return manifest


def read_weights(config: TrainConfig, checkpoint: Path, device: torch.device | str = "cpu") -> GPT:
    """Build the model of ``config`` with the weights of a checkpoint, in eval mode on ``device``.

    Raises:
        ConfigError: the checkpoint is of another model, or can be read with DeepSpeed only, which is not installed.
    """
    with torch.device("meta"):
        model = GPT(config.model)
    model.to_empty(device="cpu")
    model.reset_buffers()
    state = {"model": model.state_dict()}
    manifest = read_manifest(checkpoint)
    try:
        if manifest.contents["kind"] == DEEPSPEED:
            model.load_state_dict(deepspeed_files.read_weights(checkpoint, manifest))
            return model.to(device).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that one process loads: it does
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise ConfigError(
            f"{checkpoint} cannot be loaded into the model of its run ({str(error).strip().splitlines()[-1]})",
            "the model it was saved from",
            "another run, or the version of this program that made it",
        ) from error
    return model.to(device).eval()
