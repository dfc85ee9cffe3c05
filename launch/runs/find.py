"""Finding run folders, for every command that is given paths: status, logs, cancel, move, report, compare.

Owns the marks of a run folder, the order of several, and which run a label means. Must not know what is in one.
"""

from __future__ import annotations

import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.labels import point_labels
from launch.runs.overrides import read_overrides
from launch.runs.ranges import closest
from launch.runs.sweeps import read_sweeps

OUTPUTS = Path("outputs")
"""Folder in which runs are looked for by default, that of ``output_dir``."""
DEPTH = 3  # output_dir/name/point, and a folder of several output_dirs


def add_paths(parser: ArgumentParser) -> None:
    """Add the argument ``paths`` of a command that takes one run or several, as ``find_runs`` reads them."""
    what = "a run folder, the label of a run, or a folder with runs in it"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=what)


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Find the run folders that are, or lie in, ``paths``; each once, in the order of ``paths`` and of their names.

    What is no path may be the label of a run, alone or behind the folder that the run lies in.

    Raises:
        ConfigError: there is none in one of them, or a label means several.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        inside = runs_inside(path.absolute()) if path.exists() else runs_labelled(path)
        if not inside:
            raise ConfigError(
                f"no run in {path}" if path.is_dir() else f"{path}, a file" if path.is_file() else f"no folder {path}",
                "a run folder, or a folder with runs in it",
                suggestion(path),
            )
        found |= {folder: RunFolder(folder) for folder in inside}
    return list(found.values())


def suggestion(path: Path) -> str:
    """Propose what to type in place of a path without runs: the same below ``outputs``, one that is spelt like it, a
    list of runs, or a run.
    """
    if not path.is_absolute() and path.parts[:1] != OUTPUTS.parts and runs_inside(OUTPUTS.absolute() / path):
        return f"{OUTPUTS / path}, which is there"
    if (likely := closest_folder(path)) is not None:
        return f"{shlex.quote(str(likely))}, which is there"
    if runs_inside(OUTPUTS.absolute()):
        return f"python -m launch.status {OUTPUTS}, which lists the runs that are there"
    return "python -m launch -m nodes=1,2, to make some in outputs/"


def closest_folder(path: Path) -> Path | None:
    """The folder with runs beside ``path`` whose name is most like the one that is not there."""
    if path.exists() or not path.parent.is_dir():
        return None
    there = {run.relative_to(path.parent.absolute()).parts[0] for run in runs_inside(path.parent.absolute())}
    return next((path.parent / name for name in closest(path.name, there)), None)


def runs_inside(folder: Path, depth: int = DEPTH) -> list[Path]:
    """List ``folder`` if it is a run's, else the run folders at most ``depth`` levels below, in natural order."""
    return sorted(_search(folder, depth), key=lambda path: natural(str(path)))


def typed_for(run: Path) -> Sequence[str]:
    """Return the overrides that were typed for a run; where that is damaged its folder, by which it then goes."""
    try:
        return read_overrides(RunFolder(run))
    except ConfigError:
        return (f"run_dir={run}",)


def labels_of(runs: Sequence[Path]) -> dict[Path, str]:
    """The labels of runs among each other, by their folders."""
    typed = [(run, typed_for(run)) for run in runs]
    return dict(zip(runs, point_labels(typed), strict=True))


def labels_for(points: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """The labels of runs that are about to be made, of folders and what was typed: among each other, and that of a run
    alone among the runs that it will lie beside.
    """
    beside = (
        [] if len(points) > 1 else [run for run in runs_inside(points[0][0].parent, depth=1) if run != points[0][0]]
    )
    runs = [*points, *((run, typed_for(run)) for run in beside)]
    return point_labels(runs)[: len(points)]


def labels_inside(groups: Iterable[Path]) -> dict[Path, str]:
    """The labels of all runs of some folders, each among those it lies beside."""
    return {run: label for group in groups for run, label in labels_of(runs_inside(group, depth=1)).items()}


def runs_labelled(path: Path) -> list[Path]:
    """The run that the end of ``path`` is the label of, among all of its folder or in its sweep; none where there is
    none.

    Raises:
        ConfigError: several runs are called so.
    """
    above = next(folder for folder in path.parents if folder.is_dir())
    label = str(path.relative_to(above))
    alone = not path.is_absolute() and above == Path() and OUTPUTS.is_dir()
    runs = runs_inside(OUTPUTS.absolute()) if alone else runs_inside(above.absolute(), depth=1)
    called: dict[Path, None] = {}
    for group in dict.fromkeys(run.parent for run in runs):
        sweeps = [[group / name for name in sweep.points] for sweep in read_sweeps(group)]
        for beside in (runs_inside(group, depth=1), *sweeps):
            called |= dict.fromkeys(run for run, of_run in labels_of(beside).items() if of_run == label and is_run(run))
    if len(called) > 1:
        raise ConfigError(
            f"{label}, as several runs are called: {', '.join(map(str, called))}",
            "the label of one run; python -m launch.status prints labels that differ",
            command_with(str(path), next(reversed(called))),
        )
    return list(called)


def command_with(word: str, folder: Path) -> str:
    """The command that runs in this process, with a folder in place of a word that was typed; just the folder where it
    was not started by ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    short = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    if spec is None or word not in sys.argv[1:]:
        return shlex.quote(str(short))
    module = spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *(str(short) if arg == word else arg for arg in sys.argv[1:])])


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
    if any((folder / name).exists() for name in ("attempts", "plan.json")):
        return True
    return any((folder / "metrics").glob("rank_*.jsonl"))  # other folders are called metrics too: that of gpt/ is


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts nodes=2 before nodes=16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
