"""Budget of a command: what its runs have used so far and may use at most, and when they must stop.

The use is computed from the event logs of the runs. An allocation counts from the start of its job to the end, even
while no ranks run. The event log has ``agent_started`` and ``agent_ended`` for each allocation; a killed allocation
lasted until its last heartbeat. The caps apply to all points of one command together, over all attempts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, read_plan

if TYPE_CHECKING:  # reports use this module, and do not load Hydra
    from launch.config import BudgetConfig, Config

SILENT_S = 300.0
"""Seconds without a heartbeat after which an allocation counts as ended.

If ten heartbeat intervals of the run are longer, this time is ten intervals.
"""
UNITS = {"gpu_hours": "GPU-hours", "cost": "in cost"}


@dataclass(frozen=True)
class Use:
    """Node-hours, GPU-hours, and cost.

    GPU-hours are None if the number of GPUs is not known. Cost is None if GPU-hours or their price are not known.
    """

    node_hours: float = 0.0
    gpu_hours: float | None = 0.0
    cost: float | None = 0.0

    def __add__(self, other: Use) -> Use:
        gpu_hours, cost = _add(self.gpu_hours, other.gpu_hours), _add(self.cost, other.cost)
        return Use(self.node_hours + other.node_hours, gpu_hours, cost)

    def scaled(self, share: float) -> Use:
        """Return this use multiplied by ``share``."""
        gpu_hours, cost = (None if value is None else share * value for value in (self.gpu_hours, self.cost))
        return Use(share * self.node_hours, gpu_hours, cost)


def _add(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def use_of(hours: float, nodes: int, gpus: int | None, price: float | None) -> Use:
    """Return the use of an allocation of ``nodes`` nodes, with ``gpus`` GPUs in total, for ``hours`` hours.

    ``price`` is the price of a GPU-hour. If ``gpus`` is None, GPU-hours and cost are None. If ``price`` is None, the
    cost is None.
    """
    gpu_hours = hours * gpus if gpus else None
    return Use(hours * nodes, gpu_hours, None if gpu_hours is None or price is None else gpu_hours * price)


@dataclass(frozen=True)
class EventLog:
    """Events of one run, and the time of its agent's last heartbeat in Unix seconds; None if there was no heartbeat."""

    events: Sequence[dict[str, Any]]
    alive: float | None = None


@dataclass(frozen=True)
class Rates:
    """Number of GPUs on a node and price of a GPU-hour, for allocations whose event log does not have them.

    They are None if the config does not set them.
    """

    gpus_per_node: int | None = None
    price_per_gpu_hour: float | None = None
    poll_s: float = 30.0
    """Seconds between heartbeats of an agent."""


def used(event_logs: Iterable[EventLog], now: float, rates: Rates) -> Use:
    """Return the use of all allocations of several runs together, until the time ``now``.

    A lost node counts until its allocation ends, so the result is never below Slurm's bill. If only the agent of a
    node is dead, Slurm bills the node until the allocation ends. Slurm bills a dead node at least until
    ``SlurmdTimeout``.

    Args:
        event_logs: event log of each run.
        now: Unix time in seconds, which may be in the future.
        rates: GPUs and price for event logs that do not have them.
    """
    total = Use()
    for event_log in event_logs:
        found = allocations(event_log, now, rates.poll_s)
        for started, ended in [*found, *spare_allocations(event_log, found)]:
            gpus, price = started.get("gpus"), started.get("price_per_gpu_hour")
            if gpus is None and rates.gpus_per_node is not None:
                gpus = started["nodes"] * rates.gpus_per_node
            hours = max(0.0, ended - started["allocated_at"]) / 3600
            total += use_of(hours, started["nodes"], gpus, rates.price_per_gpu_hour if price is None else price)
    return total


def allocations(event_log: EventLog, now: float, poll_s: float) -> list[tuple[dict[str, Any], float]]:
    """Return (event ``agent_started``, Unix time of the end) for each allocation of a run.

    The end is ``now`` while the allocation runs. If the end was not recorded, it is estimated by the earliest of: the
    start of the next allocation, the time limit, and the last heartbeat. ``poll_s`` is the interval of heartbeats in
    seconds.
    """
    found: list[tuple[dict[str, Any], float]] = []
    started: dict[str, Any] | None = None
    limit = math.inf
    for event in event_log.events:
        if event["event"] == "agent_started":
            if started is not None:  # The end of the allocation was not recorded.
                found.append((started, min(event["allocated_at"], limit)))
            started = event
            limit = event["allocated_at"] + (event.get("limit_s") or math.inf)
        elif event["event"] == "agent_ended" and started is not None and event.get("job") == started["job"]:
            found.append((started, event["ended_at"]))
            started = None
    if started is not None:
        seen = max(event_log.alive or 0.0, started["time"])
        is_silent = now - seen > max(SILENT_S, 10 * poll_s)
        found.append((started, min(now, limit, seen if is_silent else math.inf)))
    return found


def spare_allocations(
    event_log: EventLog, found: Sequence[tuple[dict[str, Any], float]]
) -> list[tuple[dict[str, Any], float]]:
    """Return (event, Unix time of the end) for each node of a spare job that has joined a job of the run.

    The event is the ``agent_started`` of the joined job, with one node, and with the time when the node joined. If the
    end of the node was not recorded, the node ends with the joined job. ``found`` is the result of ``allocations``
    for the run's own jobs.
    """
    jobs = {started["job"]: (started, ended) for started, ended in found}
    nodes = []
    for number, event in enumerate(event_log.events):
        if event["event"] == "spare_started" and event["job"] in jobs:
            job, ended = jobs[event["job"]]
            ends = select_events(event_log.events[number:], "spare_ended", job=event["job"], node=event["node"])
            left = [end["ended_at"] for end in ends]
            gpus = job["gpus"] // job["nodes"] if job.get("gpus") else None
            nodes.append(({**job, "nodes": 1, "gpus": gpus, "allocated_at": event["time"]}, min([ended, *left])))
    return nodes


def caps(budget: BudgetConfig) -> dict[str, float]:
    """Return the caps that are set: name of the key under ``budget`` -> cap."""
    return {key: cap for key, cap in vars(budget).items() if cap is not None}


def refuse_above(budget: BudgetConfig, so_far: Use, worst: Use, timeout_min: int) -> None:
    """Raise ConfigError if the use so far plus the worst case of the next submission exceeds a cap.

    Args:
        budget: caps.
        so_far: use of all points of the command until now.
        worst: use of the next submission, if all its jobs run until their time limit.
        timeout_min: this time limit in minutes; the error proposes a shorter one.
    """
    for key, cap in caps(budget).items():
        before, more = getattr(so_far, key), getattr(worst, key)
        assert before is not None and more is not None, "Config.validate requires GPUs and their price where needed"
        if before + more <= cap:
            continue
        unit = UNITS[key]
        fits = math.floor(timeout_min * (cap - before) / more)
        shorter = f"cluster.timeout_min={fits}, or " if fits >= 1 else ""
        raise ConfigError(
            f"budget.{key}={cap:g}, {amount(before)} used so far, and a worst case of {amount(more)} {unit} more",
            f"at most {amount(max(0.0, cap - before))} {unit} more in the worst case: all nodes until the time limit",
            f"{shorter}budget.{key}={math.ceil(before + more)}",
        )


def spent(budget: BudgetConfig, so_far: Use, expected: Use) -> str | None:
    """Return a text on the cap that is reached, and what to type to continue; None if no cap is reached.

    A cap is reached if the run must stop now, so that its save still fits below the cap.

    Args:
        budget: caps, which apply to all points of the command together.
        so_far: use of these points until now.
        expected: use of these points until the run has saved and left, if the run stops now.
    """
    for key, cap in caps(budget).items():
        before, then = getattr(so_far, key), getattr(expected, key)
        assert before is not None and then is not None, "Config.validate requires GPUs and their price where needed"
        if then >= cap:
            return (
                f"budget.{key}={cap:g} is used up: {amount(before)} {UNITS[key]} so far, and saving comes on top; "
                f"to continue, the same command with a higher budget.{key}"
            )
    return None


def use_text(use: Use) -> str:
    """Return the known parts of a use as text, without zeros: ``12 node-hours, 96 GPU-hours, cost 240``."""
    known = {"node": use.node_hours, "GPU": use.gpu_hours}
    hours = {what: amount(value) for what, value in known.items() if value}
    parts = [f"{value} {what}-hour{'' if value == '1' else 's'}" for what, value in hours.items()]
    return ", ".join(parts + ([f"cost {amount(use.cost)}"] if use.cost else []))


def amount(value: float) -> str:
    """Return hours or cost as text: four significant digits, a whole number from 10,000, or ``less than 0.001``."""
    if 0 < value < 0.001:
        return "less than 0.001"
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def heartbeat_file(folder: RunFolder) -> Path:
    """Return the path of the file whose modification time is the last heartbeat of the head node's agent."""
    return folder.path / ".launch" / "alive"


def last_heartbeat(folder: RunFolder) -> float | None:
    """Return the time of the last heartbeat of the head node's agent in Unix seconds; None if there was none."""
    try:
        return heartbeat_file(folder).stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_event_logs(folders: Sequence[RunFolder]) -> list[EventLog]:
    """Return the event logs of runs, with their last heartbeats."""
    return [EventLog(folder.read_events(), last_heartbeat(folder)) for folder in folders]


def rates_of(config: Config) -> Rates:
    """Return the GPUs per node and the price of a GPU-hour in ``config``, for event logs that do not have them."""
    return Rates(config.cluster.gpus_per_node, config.cluster.price_per_gpu_hour, config.budget_poll_s)


def command_folders(folder: RunFolder) -> list[RunFolder]:
    """Return the run folders of all points of the command that submitted the run in ``folder``.

    These points share one budget. If the plan of the run names no folders, return only ``folder``.

    Raises:
        ConfigError: the plan, which names the folders, is damaged.
    """
    paths = read_plan(folder).get("command_run_dirs")
    return [RunFolder(path) for path in paths] if paths else [folder]
