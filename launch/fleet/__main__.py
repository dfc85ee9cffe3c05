"""``python -m launch.fleet FOLDERS``: use of time by all runs, causes of interruptions, and hosts that fail often.

    python -m launch.fleet outputs
    python -m launch.fleet outputs /scratch/team/outputs --by cluster.partition
    python -m launch.fleet outputs --json
    python -m launch.fleet outputs --openmetrics /var/lib/prometheus/node-exporter/runs.prom

The figures come from the event logs and step records of the run folders. The command writes only the file of
``--openmetrics``. That option also queries Slurm for the states of unfinished jobs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import gpt_launch.own_names  # noqa: F401
from launch.agent.policy import failures_of_hosts
from launch.errors import CommandParser, ConfigError, counted, refusing
from launch.plan.budget import EventLog, Rates, allocations, last_heartbeat, used
from launch.report.goodput import CAUSES, PARTS, measure_goodput
from launch.report.read import read_environment
from launch.runs.compose import read_document
from launch.runs.events import Events
from launch.runs.find import find_runs, plain_console, print_table
from launch.runs.folder import RunFolder, write_atomically
from launch.runs.records import UNITS
from launch.slurm.status import RunStatus, find_run_statuses, poll, update_from_event_log

OF_MACHINES = ("crashed", "hung", "out_of_memory", "node_failed", "node_sick")
"""Causes of interruptions for which a time between failures is meaningful. Other causes are decisions of people."""
CONFIDENCE = 0.9
"""Probability with which the interval of a failure rate contains the true rate."""
SUSPECT = 0.05
"""A host is suspect if the probability of its failures by chance (``Fleet.suspects``) is below this value."""


@dataclass
class Fleet:
    """Totals of a group of runs: time by part, interruptions by cause, and failures by host."""

    runs: int = 0
    node_hours: float = 0.0
    gpu_hours: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    """Key of ``launch.report.goodput.PARTS`` -> node-seconds; seconds for ``waiting``, when a run has no nodes yet."""
    interruptions: defaultdict[str, int] = field(default_factory=partial(defaultdict, int))
    """Key of ``launch.report.goodput.CAUSES`` -> number of interruptions."""
    lost_node_hours: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    """Key of ``CAUSES`` -> node-hours that interruptions of this cause cost."""
    host_hours: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    """Host -> hours in which ranks ran on this host."""
    host_failures: defaultdict[str, int] = field(default_factory=partial(defaultdict, int))
    """Host -> number of attempts that failed because of this host."""
    unknown: int = 0
    """Number of runs whose event logs do not describe all their allocations. Such runs are in no other figure."""

    @property
    def allocated_s(self) -> float:
        """Node-seconds of all allocations."""
        return sum(seconds for part, seconds in self.seconds.items() if part != "waiting")

    @property
    def goodput(self) -> float:
        """Share of the allocated node-hours, 0 to 1, in steps that count."""
        return (self.seconds["steps"] + self.seconds["fewer"]) / (self.allocated_s or 1.0)

    def suspects(self) -> dict[str, float]:
        """Return suspect host -> probability that the host has so many failures by chance.

        The probability assumes that all hosts fail at the same rate. Then the failures of a host are binomial, with
        its share of all host hours. The probability of at least so many failures is multiplied by the number of hosts
        (Bonferroni). Hosts with a probability of ``SUSPECT`` or more are left out.
        """
        total, hours = sum(self.host_failures.values()), sum(self.host_hours.values())
        found = {}
        for host, count in self.host_failures.items():
            share = self.host_hours[host] / hours if hours else 1.0
            tail = sum(math.comb(total, n) * share**n * (1 - share) ** (total - n) for n in range(count, total + 1))
            if (chance := min(1.0, tail * len(self.host_hours))) < SUSPECT:
                found[host] = chance
        return found


def add_run(fleets: Sequence[Fleet], folder: RunFolder, now: float) -> None:
    """Add a run to the sums of each fleet. ``now`` is the Unix time until which a running allocation counts."""
    events = folder.read_events()
    measured = measure_goodput(folder, events)
    if measured is None:
        for fleet in fleets:
            fleet.unknown += 1
        return
    found = allocations(EventLog(events, last_heartbeat(folder)), now, Rates().poll_s)
    hours = [(one, max(0.0, ended - one["allocated_at"]) / 3600) for one, ended in found]
    node_hours = sum(hour * one["nodes"] for one, hour in hours)
    # A run has one number of nodes in nearly all of its time, so its mean is used for all parts.
    nodes = node_hours / sum(hour for _, hour in hours) if node_hours else 0.0
    host_seconds, failures = seconds_of_hosts(folder, events, now), failures_of_hosts(events)
    for fleet in fleets:
        fleet.runs += 1
        fleet.node_hours += node_hours
        fleet.gpu_hours += sum(hour * (one.get("gpus") or 0) for one, hour in hours)
        for part, seconds in measured.seconds.items():
            fleet.seconds[part] += seconds if part == "waiting" else seconds * nodes
        for cause, count in measured.interruptions.items():
            fleet.interruptions[cause] += count
            fleet.lost_node_hours[cause] += measured.lost_s.get(cause, 0.0) / 3600 * nodes
        for host, seconds in host_seconds.items():
            fleet.host_hours[host] += seconds / 3600
        for host, texts in failures.items():
            fleet.host_failures[host] += len(texts)


def seconds_of_hosts(folder: RunFolder, events: Events, now: float) -> dict[str, float]:
    """Return host -> seconds in which ranks of a run were on this host, in all attempts until ``now``, Unix seconds."""
    begun = {e["attempt"]: e["time"] for e in reversed(events) if e["event"] == "started"}
    ends = ("attempt_ended", "finished", "stopped")
    ended = {e["attempt"]: e["time"] for e in events if e["event"] in ends and e.get("attempt") is not None}
    last = min(now, last_heartbeat(folder) or max((e["time"] for e in events), default=now))
    total: dict[str, float] = defaultdict(float)
    for attempt, since in begun.items():
        environment = read_environment(folder, attempt)
        for host in {place.host for place in environment.ranks} if environment else ():
            total[host] += max(0.0, ended.get(attempt, last) - since)
    return total


def rate_interval(count: int, exposure: float) -> tuple[float, float]:
    """Return the ends of the exact interval that contains a Poisson rate with probability ``CONFIDENCE``.

    The rate is ``count`` events in the time ``exposure``. The ends are per unit of this time. The method is from
    Garwood (1936).
    """
    tail = (1 - CONFIDENCE) / 2

    def mean_where(most: int, probability: float) -> float:
        """Return the mean of the Poisson distribution that gives at most ``most`` events this probability."""
        low, high = 0.0, 10.0 * (most + 10)
        for _ in range(100):
            mean = (low + high) / 2
            logs = (n * math.log(mean) - mean - math.lgamma(n + 1) for n in range(most + 1))
            low, high = (mean, high) if sum(map(math.exp, logs)) > probability else (low, mean)
        return low

    least = mean_where(count - 1, 1 - tail) if count else 0.0
    return least / exposure, mean_where(count, tail) / exposure


def fleet_figures(fleet: Fleet) -> dict[str, Any]:
    """Return the sums of a fleet for ``--json``, with the suspect hosts."""
    suspects = fleet.suspects()
    hosts = {
        host: {"hours": fleet.host_hours[host], "failures": count, "chance": suspects.get(host)}
        for host, count in fleet.host_failures.items()
    }
    causes = {
        cause: {"interruptions": count, "lost_node_hours": fleet.lost_node_hours[cause]}
        for cause, count in fleet.interruptions.items()
    }
    return {
        **{key: getattr(fleet, key) for key in ("runs", "unknown", "node_hours", "gpu_hours", "goodput")},
        "seconds": dict(fleet.seconds),
        "causes": causes,
        "hosts": hosts,
    }


def show_fleet(fleet: Fleet) -> None:
    """Print the parts of the time, the causes of interruptions, and the hosts that failed."""
    console = plain_console()
    console.print(
        f"{fleet.runs} runs, {fleet.node_hours:.4g} node-hours, {fleet.gpu_hours:.4g} GPU-hours, goodput "
        f"{fleet.goodput:.1%}" + (f"; {fleet.unknown} more runs have no complete event log" if fleet.unknown else "")
    )
    rows = [
        [name, f"{fleet.seconds[part] / 3600:.3g}", f"{fleet.seconds[part] / fleet.allocated_s:.1%}"]
        for part, name in PARTS.items()
        if fleet.seconds[part] and part != "waiting"
    ]
    print_table(console, ["part", "node-hours", "share"], rows, left=["part"])
    rows = []
    for cause in CAUSES:
        if count := fleet.interruptions[cause]:
            between = ""
            if cause in OF_MACHINES:
                low, high = rate_interval(count, fleet.node_hours)
                between = f"{fleet.node_hours / count:.3g} ({1 / high:.3g} to {1 / low:.3g})"
            rows.append([CAUSES[cause], str(count), f"{fleet.lost_node_hours[cause]:.3g}", between])
    titles = ["interrupted by", "times", "lost node-hours", "node-hours between two (90 % interval)"]
    if rows:
        print_table(console, titles, rows, left=["interrupted by"])
    suspects = fleet.suspects()
    rows = [
        [
            host,
            str(count),
            f"{fleet.host_hours[host]:.3g}",
            f"yes: chance {suspects[host]:.2g}" if host in suspects else "",
        ]
        for host, count in sorted(fleet.host_failures.items(), key=lambda item: -item[1])
    ]
    if rows:
        print_table(console, ["host", "failures", "hours of ranks", "suspect"], rows, left=["host"])
        if suspects:
            console.print(f"leave suspect hosts out: cluster.exclude={','.join(sorted(suspects))}")


def group_of(folder: RunFolder, key: str) -> str:
    """Return the value of a config key of a run as text. Raises ConfigError if the run does not have this key."""
    document = read_document(folder)
    value = OmegaConf.select(document, key, default=...)
    if value is ...:
        raise ConfigError(f"--by {key}, which {folder.path} has not", "a key of the runs", "python -m launch.keys")
    return str(value)


def show_groups(groups: Mapping[str, Fleet], key: str) -> None:
    """Print node-hours, GPU-hours and goodput of each group of runs, the group with the most node-hours first.

    ``groups`` maps a value of the config key ``key`` to the fleet of the runs that have this value.
    """
    rows = [
        [name, str(one.runs), f"{one.node_hours:.4g}", f"{one.gpu_hours:.4g}", f"{one.goodput:.1%}"]
        for name, one in sorted(groups.items(), key=lambda item: -item[1].node_hours)
    ]
    print_table(plain_console(), [key, "runs", "node-hours", "GPU-hours", "goodput"], rows, left=[key])


# Metrics of runs as OpenMetrics text, for the textfile collector of Prometheus's node_exporter. Source: the OpenMetrics
# 1.0 specification. The collector reads the older Prometheus format, in which ``# UNIT`` and ``# EOF`` are comments and
# a counter's family has no type; its samples are the same.


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
"""OpenMetrics family without its prefix -> type, unit and help. The name of a family ends with its unit."""
PREFIX = "launch_run_"

Sample = tuple[str, dict[str, str], float]
"""Family of ``FAMILIES``, labels without the label ``run``, and value of one metric."""


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
    """Return the metrics of all runs as OpenMetrics text. ``now`` is Unix seconds, as in ``samples``."""
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
    """Return a number as OpenMetrics writes it, with its own names for NaN and infinities."""
    return repr(value) if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")


def write_openmetrics(folders: Sequence[Path], file: Path) -> int:
    """Write the metrics of all runs below the folders to ``file``.

    Returns the exit status: 0, or 1 if Slurm did not answer, so that the states of unfinished jobs are not known.
    """
    points = find_run_statuses(find_runs(folders))
    if problem := poll(points, trust_log=True):
        update_from_event_log(points)
        print(f"{problem}\nstates of Slurm jobs are what their event logs say", file=sys.stderr)
    write_atomically(file, openmetrics_text(points, time.time()).encode())
    print(f"{file}: metrics of {counted(len(points), 'run')}")
    return 1 if problem else 0


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of all runs below the folders, or write them for ``--openmetrics``.

    Returns the exit status: 0; 1 if Slurm did not answer for ``--openmetrics``; 2 if there is no run.
    """
    parser = CommandParser(
        prog="python -m launch.fleet",
        description="Where the time of all runs below some folders went, what interrupted them, and which hosts fail "
        "more often than chance explains.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folders with runs")
    parser.add_argument("--by", metavar="KEY", help="also the use by the value of a config key, e.g. cluster.partition")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--openmetrics", type=Path, metavar="FILE", help="write the metrics of each run for Prometheus")
    typed = parser.parse_args(arguments)
    if typed.openmetrics is not None:
        if typed.by or typed.json:
            raise ConfigError("--openmetrics with --by or --json", "one form of output", "two commands")
        return write_openmetrics(typed.folders, typed.openmetrics)
    fleet, groups = Fleet(), defaultdict[str, Fleet](Fleet)
    now = time.time()
    for folder in find_runs(typed.folders):
        group = [groups[group_of(folder, typed.by)]] if typed.by else []
        add_run([fleet, *group], folder, now)
    if typed.json:
        by = {"by": {name: fleet_figures(one) for name, one in groups.items()}} if groups else {}
        print(json.dumps(fleet_figures(fleet) | by, indent=2))
        return 0
    show_fleet(fleet)
    if groups:
        show_groups(groups, typed.by)
    return 0


if __name__ == "__main__":
    sys.exit(main())
