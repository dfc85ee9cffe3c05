"""Verification of a run's checkpoints on disk and of their copies: whether each is byte for byte the saved one.

This changes nothing: a run itself sets damaged checkpoints aside when it loads. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gpt.checkpoint import folders
from gpt.checkpoint.folders import NAME, DamagedError, Manifest, find_damage, read_manifest
from gpt.checkpoint.target import check_target, target_of
from launch.errors import ConfigError
from launch.runs.events import SavedCheckpoint


def saved_checkpoints(folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield the checkpoints in a run's folder of checkpoints, newest first, then those that a load has set aside."""
    for path in reversed(folders.list_committed(folder)):
        yield checkpoint_at(path)
    for path in folders.list_set_aside(folder):
        yield SavedCheckpoint(path, None, 0, lambda told: ("set aside: a load found it damaged",))


def saved_copies(url: str | None, run_folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield the copies of a run's checkpoints, newest first.

    Raises:
        ConfigError: there is no ``url``, or it cannot be reached.
    """
    if url is None:
        raise ConfigError(
            f"--copies of {run_folder}, which makes none",
            "a run with checkpoint.copy_to",
            f"python -m launch.verify {run_folder}",
        )
    check_target(url, run_folder)
    target = target_of(url, run_folder)
    for step in reversed(target.steps()):
        try:
            size = sum(entry.size for entry in target.manifest(step).files.values())
        except DamagedError:
            size = 0
        path = folders.final_for(Path(target.url), step)  # for its name
        yield SavedCheckpoint(path, step, size, partial(target.find_damage, step))


def checkpoint_at(path: Path) -> SavedCheckpoint:
    """Describe the checkpoint in ``path``; only its manifest is read before it is checked."""
    step = folders.step_of(path)
    try:
        manifest = read_manifest(path)
    except (DamagedError, RuntimeError) as error:
        damage = str(error)
        return SavedCheckpoint(path, step, 0, lambda told: damage_now(path, damage))
    size = sum(entry.size for entry in manifest.files.values())
    return SavedCheckpoint(path, step, size, lambda told: check(path, step, manifest, told))


def check(path: Path, step: int, manifest: Manifest, told: Callable[[int], None]) -> tuple[str, ...] | None:
    """Compare every file with the manifest.

    Args:
        path: folder of the checkpoint.
        step: step in the folder's name.
        manifest: content of the folder as it was saved.
        told: called with the bytes that were read since the last call.

    Returns:
        The damage, empty if all files are whole; None if the run has deleted the checkpoint in the meantime.
    """
    wrong = [] if manifest.step == step else [f"{NAME} is that of step {manifest.step}"]
    for name, entry in sorted(manifest.files.items()):
        damage = find_damage(path / name, entry)
        if damage is not None:
            wrong.append(damage)
        told(entry.size)
    return damage_now(path, *wrong) if wrong else ()


def damage_now(path: Path, *damage: str) -> tuple[str, ...] | None:
    """Return ``damage``; None if the checkpoint no longer exists, and so was being deleted."""
    return damage if path.exists() else None
