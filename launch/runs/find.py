"""Finding run folders, for every command that is given paths: status, logs, cancel, move, report, compare.

Owns the marks of a run folder and the order of several. Must not know what is in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.errors import ConfigError
from launch.runs.folder import RunFolder

DEPTH = 3  # output_dir/name/point, and a folder of several output_dirs


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Find the run folders that are, or lie in, ``paths``; each once, in the order of ``paths`` and of their names.

    Raises:
        ConfigError: there is none in one of them.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        inside = runs_inside(path.absolute())
        if not inside:
            raise ConfigError(
                f"no run in {path}" if path.is_dir() else f"no folder {path}",
                "a run folder, or a folder with runs in it",
                "python -m launch -m nodes=1,2, to make some in outputs/",
            )
        found |= {folder: RunFolder(folder) for folder in inside}
    return list(found.values())


def runs_inside(folder: Path, depth: int = DEPTH) -> list[Path]:
    """List ``folder`` if it is a run's, else the run folders at most ``depth`` levels below, in natural order."""
    return sorted(_search(folder, depth), key=lambda path: natural(str(path)))


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    if is_run(folder):
        yield folder
    elif depth:
        for inner in folder.iterdir():
            if not inner.name.startswith("."):
                yield from _search(inner, depth - 1)


def is_run(folder: Path) -> bool:
    """Tell the folder of one run from others."""
    return any((folder / name).exists() for name in ("metrics", "attempts", "plan.json"))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts nodes=2 before nodes=16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
