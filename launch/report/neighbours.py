"""Points that ran at the same time on the same machine, and so measured each other.

Owns the question which points disturbed which. Must not know of step times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from launch.report.environment import Environment
from launch.report.points import Point


def neighbours(points: Sequence[Point]) -> list[list[str]]:
    """For each point, the names of those it had to share cores or a GPU with while it made steps.

    A point that starts takes as much of a machine as one that makes steps: its ranks import libraries.
    """
    return [[other.title for other in points if other is not point and _disturb(point, other)] for point in points]


def _disturb(one: Point, other: Point) -> bool:
    if one.environment is None or other.environment is None or one.span is None or other.presence is None:
        return False
    at_the_same_time = one.span[0] < other.presence[1] and other.presence[0] < one.span[1]
    return at_the_same_time and _share(one.environment, other.environment)


def _share(one: Environment, other: Environment) -> bool:
    """Whether both had ranks on one GPU, or together more threads on a machine than it has cores."""
    gpus = [{place.device for place in side.ranks if place.device != "cpu"} for side in (one, other)]
    if gpus[0] & gpus[1]:
        return True
    threads = [_threads(one), _threads(other)]
    cores: dict[str, int] = defaultdict(int)
    for place in (*one.ranks, *other.ranks):
        cores[place.machine] = max(cores[place.machine], place.cores)
    return any(
        threads[0][machine] + threads[1][machine] > cores[machine] for machine in threads[0] if machine in threads[1]
    )


def _threads(environment: Environment) -> dict[str, int]:
    """Threads of the ranks that compute on the CPU, by machine."""
    counts: dict[str, int] = defaultdict(int)
    for place in environment.ranks:
        if place.device == "cpu":
            counts[place.machine] += place.threads
    return counts
