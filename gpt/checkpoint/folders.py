"""Life of checkpoint folders: ``step_00000100`` is begun, committed, set aside, deleted.

Owns the names and the order of renames that keeps every moment safe against a kill. Torch-free. Called on one rank.
Must not know what is in the folders, beyond the manifest.

- ``.saving_step_00000100_<token>``: being written, or left behind by a killed save.
- ``step_00000100``: complete; the rename that gives it this name is the commit.
- ``step_00000100.corrupt``: found damaged; never deleted and never read again.
- ``.deleting_step_00000100_<token>``: no longer kept, or left behind by a killed deletion.
- ``.converting_step_00000100_<token>``: a copy in another form, for the time of reading.
- ``.fetching_step_00000100_<token>``: being fetched from a copy elsewhere.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import shutil
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint import manifest

log = logging.getLogger(__name__)

COMMITTED = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(r"step_\d{8,}\.corrupt(\.\d+)?")
VALIDATION_LOSS = "val_loss"
"""Key in a manifest's ``meta`` of the loss that was measured in the step of the save."""
LEFT_OVER = re.compile(r"\.(saving|deleting|converting|fetching)_step_\d{8,}_[0-9a-f]{8}")


@dataclass(frozen=True)
class Retention:
    """Checkpoints that are kept."""

    last: int
    """Number of the newest."""
    every: int = 0
    """Steps that are multiples of this are kept for good; 0 keeps none."""
    best: int = 0
    """Number of those with the lowest validation loss, as far as it was measured in the step of the save."""


def list_committed(folder: Path) -> list[Path]:
    """List the folders that bear a step's name, oldest first."""
    return sorted((path for path in _entries(folder) if COMMITTED.fullmatch(path.name)), key=step_of)


def steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, ascending; without its manifest a checkpoint does not exist."""
    return [step_of(path) for path in list_committed(folder) if (path / manifest.NAME).is_file()]


def is_empty(folder: Path) -> bool:
    """Tell whether nothing was ever begun in the folder, or nothing of it is left."""
    return not _entries(folder)


def list_set_aside(folder: Path) -> list[Path]:
    """List the checkpoints that were found damaged and set aside, now or in an earlier attempt."""
    return [path for path in _entries(folder) if SET_ASIDE.fullmatch(path.name)]


def step_of(path: Path) -> int:
    """Read the step in a committed folder's name."""
    match = COMMITTED.fullmatch(path.name)
    assert match, path
    return int(match[1])


def temporary_for(folder: Path, step: int, token: str) -> Path:
    """Name the folder that a checkpoint is written into; all its writers know the ``token``, 8 hexadecimal digits."""
    return folder / f".saving_{final_for(folder, step).name}_{token}"


def begin(temporary: Path, step: int) -> None:
    """Make the folder to write a checkpoint into, after removing what killed saves left behind.

    Raises:
        FileExistsError: the step has its checkpoint already.
    """
    folder = temporary.parent
    sweep(folder, keep=temporary)
    final = final_for(folder, step)
    if is_committed(folder, step):
        raise FileExistsError(f"{final} is there already; a step is saved once")
    if final.exists():
        set_aside(final, f"{manifest.NAME} is missing")
    temporary.mkdir(parents=True, exist_ok=True)  # writers of other ranks may have begun


def is_committed(folder: Path, step: int) -> bool:
    """Tell whether a step has its checkpoint."""
    return (final_for(folder, step) / manifest.NAME).is_file()


def begin_conversion(path: Path) -> Path:
    """Make an empty folder beside a checkpoint, for a copy of it in another form."""
    return _temporary(path.parent, "converting", path.name)


def begin_fetch(folder: Path, step: int) -> Path:
    """Make an empty folder for a checkpoint that is fetched from elsewhere; ``commit`` gives it its name."""
    folder.mkdir(parents=True, exist_ok=True)
    return _temporary(folder, "fetching", final_for(folder, step).name)


def commit(temporary: Path, step: int) -> Path:
    """Give a finished folder, manifest included, its final name; returns it."""
    final = final_for(temporary.parent, step)
    temporary.rename(final)
    try:
        manifest.sync_folder(final.parent)
    except OSError as error:  # it is there all the same, and a second try would find that the step has its checkpoint
        log.warning("%s may not outlive a power cut: %s", final, error)
    return final


def set_aside(path: Path, why: str) -> None:
    """Take a damaged checkpoint out of the way and warn about it."""
    name, number = f"{path.name}.corrupt", 1
    while path.with_name(name).exists():
        number += 1
        name = f"{path.name}.corrupt.{number}"
    try:
        path.rename(path.with_name(name))
    except FileNotFoundError:
        return  # another process, left over from an earlier attempt, was faster
    log.warning("checkpoint %s is damaged (%s): set aside as %s", path, why, name)


def kept_steps(saved: list[int], keeps: Retention, read: Callable[[int], manifest.Manifest]) -> set[int]:
    """Choose the steps whose checkpoints are kept.

    Args:
        saved: steps that have one, ascending.
        keeps: how many.
        read: reads the manifest of a step, as far as the validation losses are asked for.
    """
    kept = {*saved[-keeps.last :], *(step for step in saved if keeps.every and step % keeps.every == 0)}
    return kept | set(_best(saved, keeps.best, read) if keeps.best else ())


def retire(folder: Path, keeps: Retention, spared: Set[int] = frozenset()) -> None:
    """Delete all checkpoints but those that are kept, and ``spared`` steps besides."""
    saved = steps(folder)
    kept = spared | kept_steps(saved, keeps, lambda step: manifest.read_manifest(final_for(folder, step)))
    for step in saved:
        if step in kept:
            continue
        final = final_for(folder, step)
        doomed = folder / f".deleting_{final.name}_{secrets.token_hex(4)}"
        try:
            final.rename(doomed)  # first the name goes: a half-deleted folder is never taken for a checkpoint
        except OSError as error:
            log.warning("%s cannot be deleted yet: %s", final, error)
        else:
            remove(doomed)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run goes back, and will save those steps again."""
    for path in list_committed(folder):
        if step_of(path) > step:
            doomed = folder / f".deleting_{path.name}_{secrets.token_hex(4)}"
            path.rename(doomed)
            remove(doomed)


def _best(saved: list[int], number: int, read: Callable[[int], manifest.Manifest]) -> list[int]:
    """Return the steps with the lowest validation loss, of those that were evaluated; of equal ones the newest."""
    losses = []
    for step in saved:
        try:
            loss = read(step).meta.get(VALIDATION_LOSS)
        except (manifest.DamagedError, OSError, RuntimeError):
            continue  # no load takes it either
        if isinstance(loss, float) and math.isfinite(loss):
            losses.append((loss, -step))
    return [-step for _, step in sorted(losses)[:number]]


def sweep(folder: Path, keep: Path | None = None) -> None:
    """Remove the temporary folders that killed saves, deletions and conversions left behind, but for ``keep``."""
    for path in _entries(folder):
        if LEFT_OVER.fullmatch(path.name) and path != keep:
            remove(path)


def remove(path: Path) -> None:
    """Delete a folder; what cannot be deleted now is left to the next sweep."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be removed yet: %s", path, error)


def _temporary(folder: Path, what: str, name: str) -> Path:
    # A token of its own: a process left over from an earlier attempt never writes into the same folder.
    temporary = folder / f".{what}_{name}_{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def final_for(folder: Path, step: int) -> Path:
    """Name the folder of a checkpoint that is complete."""
    return folder / f"step_{step:08d}"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
