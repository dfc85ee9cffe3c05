"""The search of run folders, the labels of runs, the record of sweeps, and printed tables, for all commands."""

from __future__ import annotations

import re
import shlex
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from launch.errors import ConfigError, closest, counted
from launch.runs.folder import RunFolder, damaged, make_numbered, numbers_in, write_atomically
from launch.runs.overrides import (
    NAME_LIMIT,
    NOT_IN_POINT,
    NOTHING_TYPED,
    is_within,
    read_overrides,
    typed_key,
    typed_value,
)

if TYPE_CHECKING:
    from rich.console import Console


# Labels of runs: the overrides of a run that the runs with which it is listed do not share.


MEASURING_KEYS = tuple(
    f"script.{key}"
    for key in (
        *("work_per_step", "unit", "max_steps", "progress", "tensorboard", "silence_timeout_s"),
        *("stop_signal", "resumes", "resume_args"),
    )
)
"""Keys that set how a script is watched or measured. They do not change the program, and no label contains them."""


def tells_apart(override: str) -> bool:
    """Return whether an override can distinguish runs.

    False if the override only sets how runs are submitted, watched or measured.
    """
    # The file with the call of a function has another name for each point; call.args has the arguments.
    return not is_within(typed_key(override), (*NOT_IN_POINT, *MEASURING_KEYS, "call.file"))


def point_labels(runs: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """Return a label for each run: the overrides that not all runs share, in the typed order.

    Args:
        runs: folder and overrides of each run.

    Returns:
        Labels that all differ, in the order of ``runs``. A run with ``run_dir`` among its overrides has the name of its
        folder as label. If two folders of one point are among the runs, the number of the folder is added:
        ``nodes=2~3``. If two labels would still be equal, all runs have the names of their folders as labels. The label
        of a single run is that of ``alone``.
    """
    if len(runs) < 2:
        return [alone(path, overrides) for path, overrides in runs]
    typed = [list(filter(tells_apart, overrides)) for _, overrides in runs]
    common = set.intersection(*map(set, typed))
    labels = []
    for of_run, (path, overrides) in zip(typed, runs, strict=True):
        own = ",".join(override.lstrip("+") for override in of_run if override not in common)
        labels.append(path.name if typed_value(overrides, "run_dir") else own or NOTHING_TYPED)
    counts, names = Counter(labels), [path.name for path, _ in runs]
    labels = [
        label + generation(name) if counts[label] > 1 else label for label, name in zip(labels, names, strict=True)
    ]
    return labels if len(set(labels)) == len(labels) else names


def alone(path: Path, overrides: Sequence[str]) -> str:
    """Return the label of a single run, for people: mostly the name of its folder ``path``.

    Two names of folders say little: that of a run without overrides, and one that is cut because the overrides are
    long. In these two cases, the label is the name of the parent folder, with the number of a fresh run such as ``~2``.
    If ``run_dir`` is among ``overrides``, the user has named the folder, and the label is always its name.
    """
    number = generation(path.name)
    of_folder = path.name.removesuffix(number)
    # A cut name is too long for a line of a terminal, and ends in a hash without a meaning for people.
    says_little = of_folder == NOTHING_TYPED or len(of_folder) > NAME_LIMIT
    is_named = typed_value(overrides, "run_dir") is not None or not path.parent.name
    return path.parent.name + number if says_little and not is_named else path.name


def generation(name: str) -> str:
    """Return the suffix that ``fresh=true`` adds to the name of a folder, such as ``~2``; "" if there is none."""
    found = re.search(r"~\d+$", name)
    return found.group() if found else ""


def sweep_overrides(points: Sequence[Sequence[str]]) -> list[str]:
    """Return one override for each key of the points, with all its values: ``nodes=1,2,4``, ``optim.max_steps=60``."""
    values: dict[str, dict[str, None]] = {}
    for override in (override for point in points for override in point if tells_apart(override)):
        key, _, value = override.partition("=")
        values.setdefault(key, {})[value] = None
    return [f"{key}={','.join(of_key)}" for key, of_key in values.items()]


# Record of the sweeps of a folder: the points of each command, so that later commands keep earlier sweeps.


CURRENT = "sweep.json"
"""Name of a file with the fields of one ``Sweep``.

A folder of runs has such a file for its newest sweep, and one for each sweep in the folder of the sweep's record.
"""
ARCHIVE = "sweeps"
"""Name of the folder with the records of all sweeps of a folder."""


class Sweep(msgspec.Struct, frozen=True):
    """A sweep: the points of one command. The file ``sweep.json`` contains these fields."""

    points: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Names of the points' folders, in the order of the command."""
    number: int | None = msgspec.field(default=None, name="sweep")
    """Number of the sweep in its folder; None if ``sweep.json`` was written by hand."""
    typed: tuple[str, ...] = ()
    """Overrides of all points together, such as ``nodes=1,2,4``."""
    time: float = 0.0
    """Time when a user last typed the sweep, Unix seconds."""

    def folder(self, group: Path) -> Path | None:
        """Return the folder of the sweep's record and report; None if the sweep has no record.

        ``group`` is the folder of its points.
        """
        return None if self.number is None else group / ARCHIVE / f"{self.number:04d}"

    def summary(self, beside: Sequence[Sweep]) -> str:
        """Return a short description of this sweep for people, for a list of this sweep and the sweeps ``beside``.

        The description has the number of the sweep, the number of its points, and the time when it was typed. Of its
        overrides, it has those with several values, and those that not all sweeps of the list have.
        """
        common = set.intersection(*(set(one.typed) for one in (self, *beside)))
        told = [override for override in self.typed if "," in override or override not in common]
        number = "" if self.number is None else f" {self.number}"
        typed = f": {' '.join(told)}" if told else ""
        when = time.strftime(", typed %Y-%m-%d %H:%M", time.localtime(self.time)) if self.time else ""
        points = counted(len(self.points), "point")
        return f"sweep{number}{typed} ({points}{when})"


def read_sweeps(group: Path) -> list[Sweep]:
    """Return the recorded sweeps of a folder, in the order of their numbers. Skips damaged records."""
    found = []
    for number in numbers_in(group / ARCHIVE):
        with suppress(OSError, msgspec.DecodeError):
            record = (group / ARCHIVE / f"{number:04d}" / CURRENT).read_bytes()
            found.append(msgspec.json.decode(record, type=Sweep))
    return found


def current_sweep(group: Path) -> Sweep | None:
    """Return the sweep that a user typed last for the folder ``group``; None if the folder has no sweep.

    Raises:
        ConfigError: the record of the sweep is damaged.
    """
    record = group / CURRENT
    try:
        return msgspec.json.decode(record.read_bytes(), type=Sweep)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise damaged(record, str(error)) from error


def record_sweep(group: Path, points: Sequence[str], typed: Sequence[str]) -> Sweep:
    """Record a sweep that a user has just typed as the current sweep of the folder ``group``, and return the sweep.

    If an earlier sweep has the same points, in any order, its record is replaced and its number is used again.

    Args:
        group: folder of the points.
        points: names of the points' folders.
        typed: overrides of all points together.
    """
    numbers = [sweep.number for sweep in read_sweeps(group) if sorted(sweep.points) == sorted(points)]
    number = numbers[0] if numbers else int(make_numbered(group / ARCHIVE).name)
    sweep = Sweep(tuple(points), number, tuple(typed), time.time())
    for path in (group / ARCHIVE / f"{number:04d}" / CURRENT, group / CURRENT):
        write_atomically(path, msgspec.json.format(msgspec.json.encode(sweep)) + b"\n")
    return sweep


# Search of run folders, for all commands with paths: status, logs, cancel, move, report, compare.


OUTPUTS = Path("outputs")
"""Folder in which runs are searched by default: the default of ``output_dir``."""
DEPTH = 3  # output_dir/name/point, and a folder of several output_dirs


def add_paths(parser: ArgumentParser) -> None:
    """Add the argument ``paths``, one or several runs, to a command that calls ``find_runs``."""
    what = "a run folder, the label of a run, or a folder with runs in it"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=what)


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Return the run folders at or below ``paths``, each once, in the order of ``paths``.

    The run folders below one path are in the natural order of their names: nodes=2 comes before nodes=16.

    A path that does not exist may have the form FOLDER/LABEL: the run in FOLDER with this label.

    Raises:
        ConfigError: a path has no run, or a label means several runs.
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
    """Return what to type in place of a path without runs: a similar path, or a command."""
    if not path.is_absolute() and path.parts[:1] != OUTPUTS.parts and runs_inside(OUTPUTS.absolute() / path):
        return f"{OUTPUTS / path}, which is there"
    above = path.parent.absolute()
    if not path.exists() and above.is_dir():
        for name in closest(path.name, {run.relative_to(above).parts[0] for run in runs_inside(above)})[:1]:
            return f"{shlex.quote(str(path.parent / name))}, which is there"
    if runs_inside(OUTPUTS.absolute()):
        return f"python -m launch.status {OUTPUTS}, which lists the runs that are there"
    return "python -m launch -m nodes=1,2, to make some in outputs/"


def runs_inside(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Return the run folders up to ``depth`` levels below ``folder``, in natural order.

    If ``folder`` is itself a run folder, return only ``folder``.
    """
    if is_run(folder):
        return [folder]
    inner = [each for each in folder.iterdir() if not each.name.startswith(".")] if depth and folder.is_dir() else []
    found = [run for each in inner for run in runs_inside(each, depth - 1)]
    return sorted(found, key=lambda path: natural(str(path)))


def typed_for(run: Path) -> Sequence[str]:
    """Return the overrides that were typed for the run in folder ``run``.

    If the file of overrides is damaged, return only the override ``run_dir=<run>``.
    """
    try:
        return read_overrides(RunFolder(run))
    except ConfigError:
        return (f"run_dir={run}",)


def labels_of(runs: Sequence[Path]) -> dict[Path, str]:
    """Return folder -> label for runs that are listed together."""
    typed = [(run, typed_for(run)) for run in runs]
    return dict(zip(runs, point_labels(typed), strict=True))


def labels_for(points: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """Return a label for each planned run. ``points`` has the folder and the overrides of each run.

    The labels of several runs differ from each other. The label of a single run differs from the labels of existing
    runs in its folder.
    """
    beside = runs_inside(points[0][0].parent, depth=1) if len(points) == 1 else []
    runs = [*points, *((run, typed_for(run)) for run in beside if run != points[0][0])]
    return point_labels(runs)[: len(points)]


def labels_inside(groups: Iterable[Path]) -> dict[Path, str]:
    """Return folder -> label for all runs in the folders ``groups``. The labels in one folder differ."""
    return {run: label for group in groups for run, label in labels_of(runs_inside(group, depth=1)).items()}


def runs_labelled(path: Path) -> list[Path]:
    """Return a list with the one run that ``path`` names as FOLDER/LABEL; empty if there is none.

    A run has one label among all runs of its parent folder, and one label in each sweep that contains the run. Each of
    these labels is accepted.

    Raises:
        ConfigError: several runs have this label.
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
            f"{shlex.quote(str(next(reversed(called))))} in place of {label}",
        )
    return list(called)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder: it has attempts, a plan or step records."""
    if any((folder / name).exists() for name in ("attempts", "plan.json")):
        return True
    return any((folder / "metrics").glob("rank_*.jsonl"))  # gpt/ has a folder of this name too


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names by value: nodes=2 comes before nodes=16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


# Console of the commands, which prints text as it is, and tables. The agents on the nodes do not load it.


def plain_console(**options: Any) -> Console:
    """Return a console that prints texts unchanged: no markup in brackets, no colored numbers, no wrapped lines.

    ``options`` are further arguments of ``Console``.
    """
    from rich.console import Console

    return Console(**{"soft_wrap": True, "highlight": False, "markup": False, **options})


def print_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    optional: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> list[str]:
    """Print a table without its empty columns. On a terminal, lines fit its width; in a file, lines may have any
    length.

    Args:
        console: console that prints.
        titles: titles of the columns, of one or two lines.
        rows: cells of each row.
        left: titles of columns that are aligned left, and whose cells a terminal may wrap. A wrapped number is
            unreadable, so the other columns are aligned right and are not wrapped.
        optional: ends of titles. If the terminal is too narrow, the columns whose titles have the first of these ends
            are hidden, then those with the next, until the table fits.
        styles: style of each row.

    Returns:
        The titles of the hidden columns.
    """
    from rich import box
    from rich.measure import Measurement
    from rich.segment import Segments
    from rich.table import Table
    from rich.text import Text

    shown = [index for index in range(len(titles)) if any(row[index] for row in rows)]
    hidden: list[str] = []
    for ending in (*optional, None):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for title in (titles[index] for index in shown):
            is_left = title in left
            table.add_column(title, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*(Text(row[index]) for index in shown), style=styles[number] if styles else None)
        width = Measurement.get(console, console.options.update(width=10_000), table)
        if ending is None or not console.is_terminal or width.maximum <= console.width:
            break
        hidden += [titles[index] for index in shown if titles[index].endswith(ending)]
        shown = [index for index in shown if not titles[index].endswith(ending)]
    # A terminal wraps a line that is too long; a cell that is cut off cannot be read.
    fits = console.is_terminal and width.minimum <= console.width
    options = console.options.update(width=console.width if fits else width.maximum)
    console.print(Segments(console.render(table, options)), soft_wrap=True, end="")
    return hidden
