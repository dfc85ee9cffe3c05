"""The sweeps of a folder: which points each command took, so that a later command takes nothing away from an earlier.

``<output_dir>/<name>/sweep.json`` is the sweep typed last; ``sweeps/0001/sweep.json`` and so on are all of them, each
with the report that was made of it. The same points typed again are the same sweep. Torch-free; must not know how a
report is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runs.damage import damaged, read_mapping
from launch.runs.files import read_json, write_json
from launch.runs.wording import counted

CURRENT = "sweep.json"
ARCHIVE = "sweeps"


@dataclass(frozen=True)
class Sweep:
    """Points of one command. ``number`` is None where somebody wrote ``sweep.json`` by hand."""

    number: int | None
    points: tuple[str, ...]
    """Names of their folders, in the order of the command."""
    typed: tuple[str, ...] = ()
    """Overrides that were typed for it, those of all points together: ``nodes=1,2,4``."""
    time: float = 0.0
    """Time when it was typed last, Unix seconds."""

    def folder(self, group: Path) -> Path | None:
        """Folder of its record and its report; None where it has no record."""
        return None if self.number is None else group / ARCHIVE / f"{self.number:04d}"

    def summary(self, beside: Sequence[Sweep]) -> str:
        """The sweep in a few words: what it sweeps over, and what sets it apart from those ``beside`` it."""
        common = set.intersection(*(set(one.typed) for one in (self, *beside)))
        told = [override for override in self.typed if "," in override or override not in common]
        number = "" if self.number is None else f" {self.number}"
        typed = f": {' '.join(told)}" if told else ""
        when = time.strftime(", typed %Y-%m-%d %H:%M", time.localtime(self.time)) if self.time else ""
        points = counted(len(self.points), "point")
        return f"sweep{number}{typed} ({points}{when})"


def read_sweeps(group: Path) -> list[Sweep]:
    """The recorded sweeps of a folder by their numbers; a record that is damaged is passed over."""
    numbers = sorted(int(path.name) for path in (group / ARCHIVE).glob("[0-9]*") if path.name.isdigit())
    found = [(number, read_json(group / ARCHIVE / f"{number:04d}" / CURRENT)) for number in numbers]
    return [sweep_of(known, number) for number, known in found if known.get("points")]


def current_sweep(group: Path) -> Sweep | None:
    """The sweep of a folder that was typed last; None where there was none.

    Raises:
        ConfigError: its record is damaged.
    """
    record = group / CURRENT
    if not record.exists():
        return None
    known = read_mapping(record)
    if not isinstance(known.get("points"), list) or not known["points"]:
        raise damaged(record, "it names no points")
    return with_points(group, known["points"]) or sweep_of(known, None)


def with_points(group: Path, points: Sequence[str]) -> Sweep | None:
    """The recorded sweep of just these points, in any order."""
    return next((sweep for sweep in read_sweeps(group) if sorted(sweep.points) == sorted(points)), None)


def sweep_of(known: dict[str, Any], number: int | None) -> Sweep:
    """The sweep in a record."""
    return Sweep(
        number, tuple(map(str, known["points"])), tuple(map(str, known.get("typed", ()))), float(known.get("time", 0.0))
    )


def record_sweep(group: Path, points: Sequence[str], typed: Sequence[str]) -> Sweep:
    """Enter a sweep that was typed just now, which becomes the current one of its folder."""
    with suppress(ConfigError):  # a damaged one names no points that could be kept
        before = current_sweep(group)
        if before is not None and before.number is None:  # of an earlier version, or written by hand
            write_record(group, before)
    known = with_points(group, points)
    sweep = write_record(
        group, Sweep(None if known is None else known.number, tuple(points), tuple(typed), time.time())
    )
    write_json(group / CURRENT, record_of(sweep))
    return sweep


def write_record(group: Path, sweep: Sweep) -> Sweep:
    """Write the record of a sweep, under the next number where it has none. Safe against a second writer."""
    number = sweep.number or max((one.number or 0 for one in read_sweeps(group)), default=0)
    while sweep.number is None:
        number += 1
        try:
            (group / ARCHIVE / f"{number:04d}").mkdir(parents=True)
        except FileExistsError:
            continue
        sweep = Sweep(number, sweep.points, sweep.typed, sweep.time)
    write_json(group / ARCHIVE / f"{number:04d}" / CURRENT, record_of(sweep))
    return sweep


def record_of(sweep: Sweep) -> dict[str, Any]:
    """The record as JSON holds it."""
    return {"sweep": sweep.number, "typed": list(sweep.typed), "time": sweep.time, "points": list(sweep.points)}
