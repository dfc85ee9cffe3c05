"""Labels of runs for people: what was typed for one run and not for all of those beside it.

A folder's name holds all overrides, shared ones too, and is cut after a hundred letters or so: in a sweep with many of
them the names would differ in their hashes alone. Must not know where runs lie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.runs.overrides import NAME_LIMIT, NOT_IN_POINT, NOTHING_TYPED, typed_key, typed_value

MEASURING_KEYS = tuple(
    f"script.{key}"
    for key in (
        *("work_per_step", "unit", "max_steps", "progress", "tensorboard", "silence_timeout_s"),
        *("stop_signal", "requeue_exit", "resumes", "resume_args"),
    )
)
"""Overrides that say how a script is watched, or how large a point is; the program stays the same."""


def tells_apart(override: str) -> bool:
    """Tell whether an override says what a run is, rather than where and how it is submitted or watched."""
    key = typed_key(override)
    return not any(f"{key}.".startswith(f"{other}.") for other in (*NOT_IN_POINT, *MEASURING_KEYS))


def point_labels(runs: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """Label each of some runs by the overrides that not all of them share, in the order in which they were typed.

    Args:
        runs: for each its folder, and what was typed for it.

    Returns:
        Labels that differ. A run alone, one whose folder was typed, and one that nothing typed sets apart is called by
        its folder's name; a run alone for which nothing was typed, or so much that its folder's name was cut, by that
        of the folder above, which is its ``name``. A later generation of a run that is labelled too keeps its number:
        ``nodes=2~3``.
    """
    names = [path.name for path, _ in runs]
    typed = [list(filter(tells_apart, overrides)) for _, overrides in runs]
    common = set.intersection(*map(set, typed)) if typed else set()
    if len(runs) < 2:
        return [alone(path, overrides) for path, overrides in runs]
    labels = []
    for of_run, (path, overrides) in zip(typed, runs, strict=True):
        own = ",".join(override.lstrip("+") for override in of_run if override not in common)
        labels.append(path.name if typed_value(overrides, "run_dir") else own or NOTHING_TYPED)
    counts = Counter(labels)
    labels = [
        label + generation(name) if counts[label] > 1 else label for label, name in zip(labels, names, strict=True)
    ]
    counts = Counter(labels)
    labels = [name if counts[label] > 1 else label for label, name in zip(labels, names, strict=True)]
    return labels if len(set(labels)) == len(labels) else names


def alone(path: Path, overrides: Sequence[str]) -> str:
    """Return the label of a run with no other beside it."""
    number = generation(path.name)
    of_folder = path.name.removesuffix(number)
    # A cut name is longer than a line of a terminal leaves room for, and ends in a hash that says nothing to people.
    says_little = of_folder == NOTHING_TYPED or len(of_folder) > NAME_LIMIT
    is_named = typed_value(overrides, "run_dir") is not None or not path.parent.name
    return path.parent.name + number if says_little and not is_named else path.name


def generation(name: str) -> str:
    """Return the suffix that ``fresh=true`` has given the name of a folder: ``~2``, or nothing."""
    found = re.search(r"~\d+$", name)
    return found.group() if found else ""


def sweep_overrides(points: Sequence[Sequence[str]]) -> list[str]:
    """Collect the overrides of a sweep from what was typed for each point: ``nodes=1,2,4``, ``optim.max_steps=60``."""
    values: dict[str, list[str]] = {}
    for override in (override for point in points for override in point if tells_apart(override)):
        key, _, value = override.partition("=")
        values.setdefault(key, [])
        if value not in values[key]:
            values[key].append(value)
    return [f"{key}={','.join(of_key)}" for key, of_key in values.items()]
