"""Budget of a run: its use so far, its worst case, and when it has to stop. Pure functions of event logs.

An allocation is paid for from the start of its job to the end, whatever the ranks do in it. The event log has
``agent_started`` and ``agent_ended`` for each allocation; one that was killed silently lasted until its last
heartbeat. The caps are for all points of one command together, over all attempts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.runs.folder import RunFolder, read_plan

if TYPE_CHECKING:  # which a report, that reckons too, need not load with Hydra
    from launch.config import BudgetConfig, Config

SILENT_S = 300.0
"""An allocation that gave no heartbeat for so long, or for ten polls, is over."""
UNITS = {"gpu_hours": "GPU-hours", "cost": "in cost"}


@dataclass(frozen=True)
class Use:
    """Hours of nodes and of GPUs, and what they cost; None where GPUs or their price are not known."""

    node_hours: float = 0.0
    gpu_hours: float | None = 0.0
    cost: float | None = 0.0

    def __add__(self, other: Use) -> Use:
        gpu_hours, cost = known_sum(self.gpu_hours, other.gpu_hours), known_sum(self.cost, other.cost)
        return Use(self.node_hours + other.node_hours, gpu_hours, cost)


def known_sum(a: float | None, b: float | None) -> float | None:
    """The sum of two amounts, not known where one of them is not."""
    return None if a is None or b is None else a + b


def use_of(hours: float, nodes: int, gpus: int | None, price: float | None) -> Use:
    """Use of ``nodes`` nodes with ``gpus`` GPUs in all in so many hours, at ``price`` for the hour of a GPU."""
    gpu_hours = None if not gpus else hours * gpus
    return Use(hours * nodes, gpu_hours, None if gpu_hours is None or price is None else gpu_hours * price)


@dataclass(frozen=True)
class EventLog:
    """The events of one run, and the last heartbeat of its agent, Unix seconds."""

    events: Sequence[dict[str, Any]]
    alive: float | None = None


@dataclass(frozen=True)
class Rates:
    """Rates of use and price, for allocations whose event log does not tell theirs."""

    gpus_per_node: int | None = None
    price_per_gpu_hour: float | None = None
    poll_s: float = 30.0
    """Seconds between heartbeats of an agent."""


def used(event_logs: Iterable[EventLog], now: float, rates: Rates) -> Use:
    """Sum what the allocations of these runs have used until ``now``, which may be in the future.

    A lost node counts to the end of its allocation, as Slurm bills it until it has taken it out of the job. It does so
    at ``SlurmdTimeout`` at the earliest, and not where only the agent is gone: a cap holds either way.
    """
    total = Use()
    for event_log in event_logs:
        for started, ended in allocations(event_log, now, rates.poll_s):
            gpus, price = started.get("gpus"), started.get("price_per_gpu_hour")
            if gpus is None and rates.gpus_per_node is not None:
                gpus = started["nodes"] * rates.gpus_per_node
            hours = max(0.0, ended - started["allocated_at"]) / 3600
            total += use_of(hours, started["nodes"], gpus, rates.price_per_gpu_hour if price is None else price)
    return total


def allocations(event_log: EventLog, now: float, poll_s: float) -> list[tuple[dict[str, Any], float]]:
    """Every ``agent_started`` of a run with the time until which its allocation counts."""
    found: list[tuple[dict[str, Any], float]] = []
    started: dict[str, Any] | None = None
    for event in event_log.events:
        if event["event"] == "agent_started":
            if started is not None:  # nobody saw its end
                found.append((started, min(event["allocated_at"], latest(started))))
            started = event
        elif event["event"] == "agent_ended" and started is not None and event.get("job") == started["job"]:
            found.append((started, event["ended_at"]))
            started = None
    if started is not None:
        found.append((started, min(now, latest(started), last_seen(started, event_log.alive, now, poll_s))))
    return found


def latest(started: dict[str, Any]) -> float:
    """Time at which an allocation ends at the latest, by its time limit."""
    limit = started.get("limit_s")
    return math.inf if limit is None else float(started["allocated_at"] + limit)


def last_seen(started: dict[str, Any], alive: float | None, now: float, poll_s: float) -> float:
    """Latest sign of an allocation without an end, Unix seconds; infinite while it gives heartbeats."""
    seen = max(alive or 0.0, started["time"])
    return seen if now - seen > max(SILENT_S, 10 * poll_s) else math.inf


def caps(budget: BudgetConfig) -> dict[str, float]:
    """The caps that are set, by the name of their key."""
    both = {"gpu_hours": budget.gpu_hours, "cost": budget.cost}
    return {key: cap for key, cap in both.items() if cap is not None}


def refuse_above(budget: BudgetConfig, so_far: Use, worst: Use, timeout_min: int) -> None:
    """Raise ConfigError if what was used and the worst case of the next submission exceed a cap together."""
    for key, cap in caps(budget).items():
        before, more = getattr(so_far, key), getattr(worst, key)
        assert before is not None and more is not None, "Config.validate asks for GPUs and their price where needed"
        if before + more <= cap:
            continue
        unit = UNITS[key]
        fits = math.floor(timeout_min * (cap - before) / more)
        shorter = f"cluster.timeout_min={fits}, or " if fits >= 1 else ""
        raise ConfigError(
            f"budget.{key}={cap:g}, {amount(before)} used so far, and a worst case of {amount(more)} {unit} more",
            f"a worst case of at most {amount(max(0.0, cap - before))} {unit} more: every node, to its time limit",
            f"{shorter}budget.{key}={amount(before + more, up=True)}",
        )


def spent(budget: BudgetConfig, so_far: Use, expected: Use) -> str | None:
    """Explain which cap ``expected`` reaches, with what to type to go on; None if it reaches none.

    ``expected`` is what will have been used by the time a run that is requested to stop now has saved and left.
    """
    for key, cap in caps(budget).items():
        before, then = getattr(so_far, key), getattr(expected, key)
        assert before is not None and then is not None, "Config.validate asks for GPUs and their price where needed"
        if then >= cap:
            return (
                f"budget.{key}={cap:g} is used up: {amount(before)} {UNITS[key]} so far, and saving comes on top; "
                f"to go on, the same command with a higher budget.{key}"
            )
    return None


def use_text(use: Use) -> str:
    """``12 node-hours, 96 GPU-hours, cost 240``, as far as it is known."""
    parts = [hours_text(use.node_hours, "node")]
    if use.gpu_hours:
        parts.append(hours_text(use.gpu_hours, "GPU"))
    if use.cost:
        parts.append(f"cost {amount(use.cost)}")
    return ", ".join(parts)


def hours_text(value: float, what: str) -> str:
    """``1 node-hour``, ``96 GPU-hours``."""
    number = amount(value)
    return f"{number} {what}-hour{'' if number == '1' else 's'}"


def amount(value: float, *, up: bool = False) -> str:
    """A number of hours or of money with four digits; ``up`` never rounds below it."""
    if value <= 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(value)))
    scaled = value * 10**digits
    rounded = (math.ceil(scaled - 1e-9) if up else round(scaled)) / 10**digits
    return f"{rounded:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{rounded:.0f}"


def heartbeat_file(folder: RunFolder) -> Path:
    """Path of the file whose time tells when the agent of the head node was last seen."""
    return folder.path / ".launch" / "alive"


def last_heartbeat(folder: RunFolder) -> float | None:
    """Time when the agent of the head node was last seen, Unix seconds; None where none ever was."""
    try:
        return heartbeat_file(folder).stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_event_logs(folders: Sequence[RunFolder]) -> list[EventLog]:
    """Read the event logs that a budget is reckoned from."""
    return [EventLog(folder.read_events(), last_heartbeat(folder)) for folder in folders]


def rates_of(config: Config) -> Rates:
    """Rates that this command is charged with where an event log does not tell them."""
    return Rates(config.cluster.gpus_per_node, config.cluster.price_per_gpu_hour, config.budget.poll_s)


def command_folders(folder: RunFolder) -> list[RunFolder]:
    """The run folders of all points of the command that a run belongs to: they share its budget.

    Raises:
        ConfigError: the plan, which names them, is damaged.
    """
    paths = read_plan(folder).get("command_run_dirs")
    return [RunFolder(path) for path in paths] if paths else [folder]
