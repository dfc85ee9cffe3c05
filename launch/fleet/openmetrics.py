"""Metrics of runs as OpenMetrics text, for the textfile collector of Prometheus's node_exporter.

Source: the OpenMetrics 1.0 specification. The collector reads the older Prometheus format, in which ``# UNIT`` and
``# EOF`` are comments and a counter's family has no type; its samples are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from launch.plan.budget import EventLog, Rates, last_heartbeat, used
from launch.report.goodput import measure_goodput
from launch.runs.records import UNITS
from launch.slurm.status import RunStatus

FAMILIES = {
    "state": ("gauge", "", "State of the run, a label, with the number of its job. The value is 1."),
    "step": ("gauge", "", "Newest step since the last submission."),
    **{f"{unit}_per_second": ("gauge", "", f"Throughput of the newest step, {unit} per second.") for unit in UNITS},
    "loss": ("gauge", "", "Loss of the newest step."),
    "goodput_ratio": ("gauge", "ratio", "Share of the allocated time in steps that count."),
    "interruptions": ("counter", "", "Interruptions that cost time, by cause."),
    "node_seconds": ("counter", "seconds", "Node-seconds of all allocations."),
    "heartbeat_timestamp_seconds": ("gauge", "seconds", "Unix time of the last heartbeat of the head node's agent."),
}
"""Family without its prefix -> type, unit and help. A unit is the end of the family's name."""
PREFIX = "launch_run_"

Sample = tuple[str, dict[str, str], float]
"""Family of ``FAMILIES``, labels without the label ``run``, and value."""


def samples(point: RunStatus, now: float) -> Iterator[Sample]:
    """Yield the known metrics of a run. ``now`` is the Unix time until which a running allocation counts."""
    job = {} if point.job is None else {"job_id": point.job.job_id}
    yield "state", {"state": point.state, **job}, 1
    figures = {"step": "step", "loss": "loss", **{f"{unit}_per_second": f"{unit}_per_s" for unit in UNITS}}
    for family, name in figures.items():
        if isinstance(value := point.latest.get(name), int | float):
            yield family, {}, value
    if (seen := last_heartbeat(point.folder)) is not None:
        yield "heartbeat_timestamp_seconds", {}, seen
    events = point.folder.read_events()
    if (measured := measure_goodput(point.folder, events)) is None:
        return
    yield "goodput_ratio", {}, measured.goodput
    for cause, count in measured.interruptions.items():
        yield "interruptions", {"cause": cause}, count
    yield "node_seconds", {}, 3600 * used([EventLog(events, seen)], now, Rates()).node_hours


def openmetrics_text(points: Sequence[RunStatus], now: float) -> str:
    """Return the metrics of all runs as OpenMetrics text. ``now`` as for ``samples``."""
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    lines: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for point in points:
        for family, labels, value in samples(point, now):
            known = {"run": str(point.folder.path.absolute()), **labels}
            text = ",".join(f'{name}="{label.translate(escapes)}"' for name, label in known.items())
            total = "_total" if FAMILIES[family][0] == "counter" else ""
            lines[family].append(f"{PREFIX}{family}{total}{{{text}}} {_number(value)}")
    blocks = []
    for family, (kind, unit, meaning) in FAMILIES.items():
        name = PREFIX + family
        head = [f"# TYPE {name} {kind}", *([f"# UNIT {name} {unit}"] if unit else []), f"# HELP {name} {meaning}"]
        blocks += [*head, *lines[family]] if lines[family] else []
    return "\n".join([*blocks, "# EOF", ""])


def _number(value: float) -> str:
    """Return a number as OpenMetrics writes it; NaN and infinities have names of their own."""
    return repr(value) if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
