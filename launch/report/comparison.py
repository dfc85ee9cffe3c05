"""Comparison of several sweeps and runs in one report, each with a baseline of its own.

Owns which folders may be compared, what each is called beside the others, and how points of the same size compare
across them. Must not know how a table looks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from launch.errors import ConfigError
from launch.report.environment import Environment
from launch.report.points import Point
from launch.report.selection import Selection
from launch.report.series import CONDITIONS, MADE_WITH, MeasuredPoint, identity, label_points
from launch.runs.find import is_run

COMMAND = "python -m launch.report"
COMPARED: Mapping[str, Callable[[Environment], str | None]] = {**CONDITIONS, **MADE_WITH}
"""Conditions that a ratio between points of two folders is a measure of, where they differ."""


def compare(parts: Sequence[Selection]) -> Selection:
    """Join selections into one report; its files are ``comparison.*``, beside the runs of the first.

    Raises:
        ConfigError: a folder is there twice, or a run beside the sweep that it belongs to.
    """
    seen: dict[object, Selection] = {}
    for part in parts:
        key = (part.folder.resolve(), part.sweep and part.sweep.number, part.stem)
        if key in seen:
            raise twice(part.shown, f"with the same runs as {seen[key].shown}", parts, part)
        seen[key] = part
    for part in parts:
        for other in parts:
            of_other = [run.resolve() for run in other.runs]
            if part is not other and is_run(part.folder) and part.folder.resolve() in of_other:
                raise twice(part.shown, f"which belongs to {other.shown}", parts, part)
    runs = tuple(run for part in parts for run in part.runs)
    return Selection(parts[0].folder, runs, parts=tuple(parts))


def twice(shown: Path, why: str, parts: Sequence[Selection], left_out: Selection) -> ConfigError:
    """Return the refusal of what would be in a comparison twice."""
    others = dict.fromkeys(quote(str(part.shown)) for part in parts if part is not left_out)
    return ConfigError(f"{shown}, {why}", "folders with other runs each", f"{COMMAND} {' '.join(others)}")


def source_labels(parts: Sequence[Selection]) -> list[str]:
    """Name the source of each part: as few of its folder's last components as tell the folders apart.

    Runs typed one by one that lie in one folder are of one source, as the points of a sweep are; a source with the
    folder of another one is named by its sweep.
    """
    keys = [_source(part) for part in parts]
    folders = dict.fromkeys(folder for folder, _ in keys)
    tails: dict[Path, str] = {}
    for folder in folders:
        size = 1
        while size < len(folder.parts) and any(
            folder.parts[-size:] == other.parts[-size:] for other in folders if other != folder
        ):
            size += 1
        tails[folder] = "/".join(folder.parts[-size:])
    several = Counter(folder for folder, _ in dict.fromkeys(keys))
    return [tails[folder] + (f" {which}" if several[folder] > 1 else "") for folder, which in keys]


def _source(part: Selection) -> tuple[Path, str]:
    """The folder that the points of a part lie in, and what of it they are."""
    if is_run(part.folder):
        return part.folder.resolve().parent, "runs"
    number = None if part.sweep is None else part.sweep.number
    which = "all runs" if part.sweep is None else "sweep" if number is None else f"sweep {number}"
    return part.folder.resolve(), which


def label_selected(selection: Selection, points: Sequence[Point]) -> list[Point]:
    """The points, each with its label; in a comparison also with its source, which their labels begin with."""
    if not selection.parts:
        return label_points(points)
    sources: dict[str, list[Point]] = defaultdict(list)
    left = list(points)
    for source, part in zip(source_labels(selection.parts), selection.parts, strict=True):
        sources[source] += left[: len(part.runs)]
        left = left[len(part.runs) :]
    return [
        replace(point, source=source, label=f"{source}/{point.title}")
        for source, of_source in sources.items()
        for point in label_points(of_source)
    ]


def ratios_to_first(members: Sequence[MeasuredPoint]) -> dict[str, float]:
    """Title -> throughput over that of the first source's point with as many ranks.

    Where that has several points of a size, the one that was typed alike counts, and none where there is none. Only
    the same units compare.
    """
    sources = list(dict.fromkeys(member.point.source for member in members))
    found: dict[str, float] = {}
    for member in members:
        other = _counterpart(member, [one for one in members if one.point.source == sources[0]])
        if member.point.source == sources[0] or other is None or member.figures is None or other.figures is None:
            continue
        here, there = member.figures.throughput, other.figures.throughput
        if here is not None and there and member.point.unit == other.point.unit:
            found[member.point.title] = here / there
    return found


def _counterpart(member: MeasuredPoint, others: Sequence[MeasuredPoint]) -> MeasuredPoint | None:
    """The point of another source that one compares with; None where there is none, or several might be it."""
    as_large = [one for one in others if one.ranks == member.ranks and one.figures is not None]
    alike = [one for one in as_large if identity(one.point) == identity(member.point)]
    candidates = alike or as_large
    return candidates[0] if len(candidates) == 1 else None


def comparison_notes(members: Sequence[MeasuredPoint]) -> list[str]:
    """Say what a ratio across folders is of: what the points of each differ in from those of the first."""
    sources: dict[str, list[Environment]] = defaultdict(list)
    for member in members:
        sources[member.point.source] += [] if member.point.environment is None else [member.point.environment]
    if len(sources) < 2:
        return []
    (first, of_first), *others = sources.items()
    told = [
        f"Speedup and efficiency are against the smallest point of the same folder. Times {first} is the throughput "
        f"over that of the point of {first} with as many ranks."
    ]
    for source, environments in others:
        different = []
        for name, condition in COMPARED.items():
            here, there = (_values(condition, which) for which in (environments, of_first))
            if here and there and here != there:
                different.append(f"{name} ({' / '.join(here)}, not {' / '.join(there)})")
        if different:
            told.append(f"{source} differs from {first} in {'; '.join(different)}: a ratio is of all of it together.")
    return told


def _values(condition: Callable[[Environment], str | None], environments: Sequence[Environment]) -> list[str]:
    return sorted({value for one in environments if (value := condition(one)) is not None})
