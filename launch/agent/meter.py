"""The meter of an allocation: when it began and ended, and whether its budget lasts.

Owns ``agent_started``, ``agent_ended`` and ``budget_reached`` of the event log, and the heartbeat that counts where
an agent is killed silently. Runs on the head node alone. The arithmetic is ``launch.plan.budget``'s.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Any

from launch.agent import processes
from launch.agent.node import Node
from launch.config import Config
from launch.plan.budget import (
    caps,
    command_folders,
    heartbeat_file,
    last_heartbeat,
    rates_of,
    read_event_logs,
    spent,
    used,
)
from launch.plan.preflight import measure
from launch.plan.submission import is_recorded, record_found
from launch.runs.folder import RunFolder
from launch.runs.unwritten import write_unwritten
from launch.scheduler import client as scheduler

BUDGET = "budget"
"""Name of a request to stop that comes from the budget, in place of that of a signal."""
LEAVE_S = 5.0
"""From the end of the ranks to the end of the job, about."""


class Meter:
    """Meter of the allocation's use while it is open; on the head node alone."""

    def __init__(self, folder: RunFolder, node: Node, config: Config) -> None:
        self._folder = folder
        self._node = node
        self._config = config
        self._polled = 0.0
        self._together = command_folders(folder) if caps(config.budget) else [folder]

    def __enter__(self) -> Meter:
        if self._node.index == 0:
            self._settle()
            self._enter_submission()
            # By its number and start time the batch script knows the agent's process.
            pid = os.getpid()
            process = {"pid": pid, "pid_started": processes.start_time(pid)}
            self._folder.record_event("agent_started", **self._allocation(), **process)
            self._give_heartbeat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._node.index == 0:
            self._folder.record_event("agent_ended", job=self._node.job, ended_at=time.time())

    def poll(self, *, is_leaving: bool) -> str | None:
        """Every ``budget.poll_s``: give a heartbeat, and say which cap is reached; none to a run that is leaving."""
        if self._node.index or time.monotonic() - self._polled < self._config.budget.poll_s:
            return None
        if is_leaving:
            self._polled = time.monotonic()
            self._give_heartbeat()
            return None
        return self.poll_now()

    def poll_now(self) -> str | None:
        """Poll at once, whenever the last poll was. A cap that is reached is entered into the event log."""
        if self._node.index:
            return None
        self._polled = time.monotonic()
        self._give_heartbeat()
        budget, now = self._config.budget, time.time()
        if not caps(budget):
            return None
        event_logs, rates = read_event_logs(self._together), rates_of(self._config)
        why = spent(budget, used(event_logs, now, rates), used(event_logs, now + self._lead_s(), rates))
        if why is not None:
            attempt = max(self._folder.attempts(), default=None)
            self._folder.record_event("budget_reached", attempt=attempt, job=self._node.job, cause=why)
        return why

    def _lead_s(self) -> float:
        """Seconds until a run that is told to stop at the next poll, and not now, would be gone.

        Its ranks are killed after ``resilience.grace_period_s``: that is how long it takes while no save was measured.
        """
        grace = float(self._config.resilience.grace_period_s)
        measured = measure(self._folder)
        return self._config.budget.poll_s + LEAVE_S + (grace if measured is None else min(grace, measured.stop_s))

    def _settle(self) -> None:
        """Enter the end of an allocation that was killed, from when it was last seen alive."""
        events = self._folder.read_events()
        ended = {e["job"] for e in events if e["event"] == "agent_ended"}
        lost = [e for e in events if e["event"] == "agent_started" and e["job"] not in ended]
        if lost:
            # It may have gone on until just before it would have given the next heartbeat.
            seen = max(last_heartbeat(self._folder) or 0.0, lost[-1]["time"]) + self._config.budget.poll_s
            ended_at = min(seen, time.time())
            self._folder.record_event("agent_ended", job=lost[-1]["job"], ended_at=ended_at, cause="killed")

    def _enter_submission(self) -> None:
        """Enter the job into the event log where its launcher died before it could, or is slower than this agent."""
        if self._node.is_slurm and not is_recorded(self._folder.read_events(), self._node.slurm_names):
            record_found(self._folder, self._node.slurm_job, self._node.count, by="agent")

    def _allocation(self) -> dict[str, Any]:
        """Describe the allocation: nodes, GPUs, price, and since when it is paid for."""
        config, node = self._config, self._node
        begun, limit_s = time.time(), 60.0 * config.cluster.timeout_min
        if node.is_slurm:
            try:
                job = scheduler.job_details(node.slurm_job, retries=1)
                begun, limit_s = job.start_time or begun, job.time_limit_s or limit_s
            except scheduler.SlurmError:  # the agent started a moment after its job
                pass
        placed: dict[str, Any] = next(
            (e for e in reversed(self._folder.read_events()) if e["event"] == "submitted"), {}
        )
        gpus = placed.get("gpus")
        if gpus is None and config.cluster.gpus_per_node is not None:
            gpus = node.count * config.cluster.gpus_per_node
        price = placed.get("price_per_gpu_hour", config.cluster.price_per_gpu_hour)
        where = {"job": node.job, "nodes": node.count, "gpus": gpus, "price_per_gpu_hour": price}
        return {**where, "allocated_at": begun, "limit_s": limit_s}

    def _give_heartbeat(self) -> None:
        write_unwritten()
        file = heartbeat_file(self._folder)
        with contextlib.suppress(OSError):  # a full disk; without heartbeats an allocation is reckoned by its events
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            os.utime(file, (time.time(),) * 2)  # by this node's clock, as the event log is, not by the file server's
