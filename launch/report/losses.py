"""Efficiency that a point lost against the smallest one, divided among the phases of its steps.

The time of a step is that of the rank which works longest by itself: its wait for data, its share of a pipeline's
bubble, its optimizer, what it works longer than the ranks do on average (stragglers), and what is left. What the step
takes beyond that rank's own time is communication that no work hides. Owns the phases and the arithmetic, whose parts
add up to the whole by construction. Must not know how a report shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.report.readings import Step

RECORDED = {
    "communication": "comm_s",
    "bubble": "bubble_s",
    "data": "data_wait_s",
    "optimizer": "optimizer_s",
}
"""Phase -> field of the step records that tells it. Communication comes first, as the others lie in a rank's own
time."""
STRAGGLERS, REST = "stragglers", "computation"
LOSSES = {
    "communication": "exposed communication",
    "stragglers": "stragglers",
    "data": "waiting for data",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "computation": "computation and the rest",
}
"""Phase -> its name for people, in the order in which they are shown."""


def phase_shares(steps: Sequence[Step]) -> dict[str, float]:
    """Divide the step time: phase -> its share over these steps; the shares add up to 1. Empty where nothing tells.

    A phase that some steps lack counts as the rest in the others too.
    """
    divided = [step.phases for step in steps if step.phases is not None]
    total = sum(step.time_s for step in steps)
    if len(divided) < len(steps) or not total > 0:
        return {}
    told = [phase for phase in LOSSES if phase != REST and all(phase in phases for phases in divided)]
    shares = {phase: sum(phases[phase] for phases in divided) / total for phase in told}
    return {**shares, REST: 1 - sum(shares.values())}


def lost(point: Mapping[str, float], base: Mapping[str, float], efficiency: float, alone: bool) -> dict[str, float]:
    """Divide ``1 - efficiency`` of a point among phases: phase -> share of its step time; negative where it gained.

    The ideal step takes ``efficiency`` of the time of the real one, divided as at the smallest point. What a phase
    takes beyond its part of the ideal step is lost to it.

    Args:
        point: shares of the phases in its step time, as of ``phase_shares``.
        base: those of the smallest point.
        efficiency: of the point against the smallest one.
        alone: True where the smallest point is one rank, which waits for nobody.
    """
    if not point or not base:
        return {}
    none_alone = {"communication": 0.0, STRAGGLERS: 0.0, "bubble": 0.0} if alone else {}
    ideal = {**none_alone, **base}
    told = [phase for phase in LOSSES if phase != REST and phase in point and phase in ideal]
    if not told:
        return {}
    parts = {phase: point[phase] - efficiency * ideal[phase] for phase in told}
    return {**parts, REST: 1 - efficiency - sum(parts.values())}
