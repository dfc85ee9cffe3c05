"""Restart policy: restart in place, requeue or stop; hosts to avoid; size of the group; budget of the allocation."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType, TracebackType
from typing import Any

from launch.agent import node as processes
from launch.agent.node import Node
from launch.config import Config, RestartLimits
from launch.errors import ConfigError, RepeatedFailureError
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
from launch.plan.plan import is_recorded, record_found
from launch.plan.preflight import measure
from launch.runs.events import ALL_NODES, FEWER_NODES, Events, events_since_submission, fewer_nodes, first_failure
from launch.runs.files import write_unwritten
from launch.runs.folder import RunFolder, read_plan
from launch.slurm import client as scheduler
from launch.slurm.client import JobDetails

# Restart policy: restart in place, requeue or stop, by how an attempt ended. A pure function of the event log.


EARLY_S = 60.0
SLACK_S = 1.0


class Cause(StrEnum):
    """Cause of an attempt's end. Each has a limit of its own, so that preemptions never eat up the limit of crashes."""

    finished = "finished"
    cancelled = "cancelled"
    """By the user: scancel, launch.cancel, a STOP file."""
    budget = "budget"
    """By the agent: a cap of ``budget`` was reached."""
    preempted = "preempted"
    timed_out = "timed_out"
    node_failed = "node_failed"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    """A loss that is no finite number: the same data and weights give it again, unless a device has miscalculated."""
    crashed = "crashed"
    hung = "hung"
    requested = "requested"
    """By the ranks, which left with the exit status that means: saved, put me back into the queue."""
    repeated = "repeated"
    """By the ranks, which have gone back and tried again by themselves as often as they were allowed to."""
    refused = "refused"
    """By the ranks: what was requested cannot work, as a rule before the first step, and would be refused again."""


class Action(StrEnum):
    """Action after an attempt."""

    stop = "stop"
    restart = "restart"
    """Start the ranks again inside the allocation, without the queue."""
    requeue = "requeue"


@dataclass(frozen=True)
class Decision:
    """Action that follows an attempt, with its reason for people."""

    action: Action
    reason: str


WANTED = (Cause.finished, Cause.cancelled, Cause.budget)
"""Causes after which the run is where it was meant to end: it does not start again, and nothing has failed."""
LEAVES_THE_NODES = (Cause.preempted, Cause.timed_out, Cause.requested)
"""Causes that take the allocation away, or give it back; only the queue brings nodes."""
FROM_OUTSIDE = (Cause.preempted, Cause.node_failed)
"""Causes that say nothing about the run where they come before its first step. A time limit that comes so early would
come so again, and ranks that ask for the queue do it by themselves."""
NO_CHECKPOINT = (
    "the program is not said to have checkpoints, so it would run again from its first step "
    "(script.resumes=true where it looks for its own checkpoint when it starts)"
)
BATCH_SCRIPT_ENDED = ("NonZeroExitCode", "JobLaunchFailure", "RaisedSignal")
"""Slurm's reasons of a job that ended because its batch script did. A job that somebody has cancelled has none."""


def decide(
    events: Events, cause: Cause, limits: RestartLimits, without_progress: int, resumes: bool = True, *,
    forgive_after_s: float | None = None,
) -> Decision:  # fmt: skip
    """Decide what follows the attempt that just ended for ``cause``.

    Args:
        events: the event log, the ``attempt_ended`` of this attempt included.
        limits: how often each cause may come.
        without_progress: after so many attempts in a row that saved nothing new the run stops.
        resumes: whether a new start continues from a checkpoint; without one no new start is made.
        forgive_after_s: seconds after which a failure no longer counts, if a newer checkpoint was saved; None: never.
    """
    if cause in WANTED:
        return Decision(Action.stop, str(cause))
    if cause is Cause.refused:
        return Decision(Action.stop, "it would be refused again")
    if cause is Cause.repeated:
        return Decision(Action.stop, "the ranks have tried again by themselves, and it came again")
    if not resumes:
        return Decision(Action.stop, NO_CHECKPOINT)
    stuck = attempts_without_progress(events)
    if stuck >= without_progress:
        return Decision(Action.stop, f"{stuck} attempts in a row saved nothing new (resilience.max_without_progress)")
    ends = [end for end in attempt_ends(events) if end["cause"] == cause]
    seen = sum(not is_forgiven(end, events, forgive_after_s) for end in ends)
    forgiven = f"; {len(ends) - seen} before newer checkpoints are forgiven" if seen < len(ends) else ""
    limit = getattr(limits, cause, None)  # preempted and requested have no limit
    if limit is not None and seen > limit:
        return Decision(Action.stop, f"{cause} {seen} times, and resilience.max_restarts.{cause}={limit}{forgiven}")
    action = Action.requeue if cause in LEAVES_THE_NODES else Action.restart
    return Decision(action, f"{cause}, {seen} of {'any number' if limit is None else limit}{forgiven}")


def is_forgiven(end: dict[str, Any], events: Events, forgive_after_s: float | None) -> bool:
    """Return whether the end of an attempt counts no longer: the run has saved a newer checkpoint since, some time ago.

    A checkpoint alone would let a run fail for ever right after each; the time alone one that waits in the queue.
    """
    if forgive_after_s is None:
        return False
    place = next(number for number, event in enumerate(events) if event is end)
    steps = [(number, event["step"]) for number, event in enumerate(events) if event["event"] == "saved"]
    before = max((step for number, step in steps if number < place), default=-1)
    has_progressed = any(number > place and step > before for number, step in steps)
    return has_progressed and events[-1]["time"] - end["time"] >= forgive_after_s


def attempt_ends(events: Events) -> list[dict[str, Any]]:
    """The ``attempt_ended`` of each attempt, oldest first; of several for one attempt the first holds.

    A node that was cut off and comes back enters an end of its own beside that of the node which took over. A start of
    the job that came to no attempt has one end too.
    """
    ends: dict[object, dict[str, Any]] = {}
    for number, event in enumerate(events):
        if event["event"] == "attempt_ended":
            attempt = event.get("attempt")
            start_of_job = event.get("job", f"event {number}")  # former logs do not name it
            ends.setdefault(start_of_job if attempt is None else attempt, event)
    return list(ends.values())


def attempts_without_progress(events: Events) -> int:
    """Count the last attempts, one after another, that ended without a checkpoint beyond the one they started from.

    None where the run has never told of a checkpoint: nothing is known then of how far it came. Attempts that were
    interrupted from outside before their first step neither count nor forgive.
    """
    if not any(e["event"] == "saved" or (e["event"] == "started" and "from_step" in e) for e in events):
        return 0
    started = {e["attempt"]: e.get("from_step", -1) for e in events if e["event"] == "started"}
    # What lies in the memory of the nodes is not done again either, where the next start is on the same nodes.
    saved = {e["attempt"]: e["step"] for e in events if e["event"] in ("saved", "saved_in_memory")}
    count = 0
    for end in reversed(attempt_ends(events)):
        attempt = end["attempt"]
        if saved.get(attempt, -1) > started.get(attempt, -1):
            break
        count += not is_blameless(end)
    return count


def is_blameless(end: dict[str, Any]) -> bool:
    """Return whether an attempt was interrupted from outside before its first step, by its ``attempt_ended``."""
    return end["cause"] in FROM_OUTSIDE and end.get("step", -1) is None


def cause_of_signal(job: JobDetails, restarts: int, signal_delay_s: float, now: float) -> Cause:
    """Tell a preemption from a time limit and from a cancel: all three arrive as the same signals.

    While the job runs, a signal is Slurm's announcement. Once it is completing (seen on Slurm 22.05), a requeue has
    raised its count of restarts, the time limit has used its time up, a batch script that died has left its reason, and
    what is left is a cancel, which must never be taken for a preemption and brought back.

    Args:
        job: what the controller says now.
        restarts: how often this job had been requeued when it started.
        signal_delay_s: lead of the signal before the time limit; sbatch may send it up to a minute early.
        now: when the signal came, Unix time.
    """
    if job.state in ("RUNNING", "SUSPENDED"):
        near_the_limit = job.end_time is not None and now > job.end_time - signal_delay_s - EARLY_S
        return Cause.timed_out if near_the_limit and not job.is_preempted else Cause.preempted
    if job.restarts > restarts or job.state == "PENDING":
        return Cause.preempted
    if job.reason.startswith(BATCH_SCRIPT_ENDED):
        return Cause.node_failed
    if job.start_time is None or job.end_time is None or job.time_limit_s is None:
        return Cause.timed_out if job.state == "TIMEOUT" else Cause.cancelled
    used_up = job.end_time - job.start_time >= job.time_limit_s - SLACK_S
    return Cause.timed_out if used_up or job.state == "TIMEOUT" else Cause.cancelled


def cause_of_failure(failure: dict[str, Any] | None) -> Cause:
    """The cause behind the first failure of an attempt, from what the rank or its agent wrote into the event log."""
    text = str(failure.get("cause", "")) if failure else ""
    if text.startswith(f"{ConfigError.__name__}: "):
        return Cause.refused
    if text.startswith(f"{RepeatedFailureError.__name__}: "):
        return Cause.repeated
    if text.startswith(f"{FloatingPointError.__name__}: "):
        return Cause.diverged
    if "OutOfMemoryError" in text or "MemoryError" in text or "out of memory" in text.lower():
        return Cause.out_of_memory
    if failure is not None and failure.get("hung"):
        return Cause.hung
    return Cause.crashed


class RunFailedError(RuntimeError):
    """A run whose ranks did not all finish."""


class RunSettledError(RunFailedError):
    """The end of an attempt that another agent has entered already, which then decides."""


# Hosts that a run avoids, and why: a pure function of its event log, and of those of the points beside it. Torch-
# free.


NO_HOSTS: Mapping[str, str] = MappingProxyType({})
NO_EVENTS: Mapping[str, Events] = MappingProxyType({})
UNRELIABLE = 2
"""After so many failures a host is avoided: one may be chance, or the run's own."""
DRIFT = "replicas_differ"
"""Event of a run whose replicas of the parameters were not the same."""
OF_A_HOST = (Cause.crashed, Cause.hung, Cause.node_failed)
"""Causes that a host may have brought about. A loss that is no number, memory that is too small and a refusal come from
what is run, wherever it is run."""


def points_beside(folder: RunFolder) -> dict[str, Events]:
    """Read what the other points of the command have told since this one was submitted: name of the point -> events.

    A plan that cannot be read names none: what it is for is told where it is needed.
    """
    try:
        others = [other for other in command_folders(folder) if other.path != folder.path]
    except ConfigError:
        return {}
    since = next((event["time"] for event in events_since_submission(folder.read_events())), 0.0)
    logs = {other.path.name: events_since_submission(other.read_events()) for other in others}
    return {name: [event for event in log if event["time"] >= since] for name, log in logs.items()}


def unreliable_hosts(events: Events, beside: Mapping[str, Events] = NO_EVENTS) -> dict[str, str]:
    """Hosts that have failed in more than one attempt since the command was typed, each with its failures in words.

    One that has changed parameters, as a majority of the replicas tells, is unreliable at once: that is no chance.

    Args:
        events: event log of the run.
        beside: those of the other points of its command, by their names.
    """
    certain = {
        host
        for log in (events, *beside.values())
        for e in events_since_submission(log)
        if e["event"] == DRIFT and e["certain"]
        for host in e["hosts"]
    }
    failures = failures_everywhere(events, beside).items()
    return {host: "; ".join(told) for host, told in sorted(failures) if len(told) >= UNRELIABLE or host in certain}


def hosts_to_avoid(events: Events, beside: Mapping[str, Events] = NO_EVENTS) -> dict[str, str]:
    """Hosts that a requeued job must not come back to: the unreliable ones, and any that was lost or found sick.

    The arguments are those of ``unreliable_hosts``.
    """
    logs = {"": events_since_submission(events), **{f"{name}: ": log for name, log in beside.items()}}
    lost = {str(e["host"]) for log in logs.values() for e in log if e["event"] == "node_lost"}
    told = failures_everywhere(events, beside)
    avoid = {host: "; ".join(told[host]) for host in sorted(lost | {*unreliable_hosts(events, beside)})}
    for name, log in logs.items():
        sick = {str(e["host"]): f"{name}sick: {e['cause']}" for e in log if e["event"] == "node_sick"}
        avoid |= {host: "; ".join(filter(None, (avoid.get(host), why))) for host, why in sick.items()}
    return avoid


def failures_everywhere(events: Events, beside: Mapping[str, Events]) -> dict[str, list[str]]:
    """Failures of each host in this run, then in the points ``beside`` it, with their names."""
    found = failures_of_hosts(events)
    for name, log in beside.items():
        for host, told in failures_of_hosts(log).items():
            found.setdefault(host, []).extend(f"{name}: {failure}" for failure in told)
    return found


def failures_of_hosts(events: Events) -> dict[str, list[str]]:
    """Failures of each host since the command was typed, at most one for an attempt, in the order of the attempts.

    A host has failed where it was lost, or where the rank that failed first in an attempt ran there. An error about a
    lost peer says nothing about the host that noticed it. Where replicas of the parameters differed, all ranks fail,
    and the hosts are those of the replicas.
    """
    now = events_since_submission(events)
    failures: dict[str, dict[object, str]] = defaultdict(dict)
    for number, event in enumerate(now):
        if event["event"] == "node_lost":
            attempt = event.get("attempt")
            when = "before the ranks started" if attempt is None else f"in attempt {attempt}"
            failures[event["host"]].setdefault(number if attempt is None else attempt, f"lost {when}")
    drifts = [event for event in now if event["event"] == DRIFT]
    for event in drifts:
        for host in event["hosts"]:
            failures[host].setdefault(event["attempt"], f"in attempt {event['attempt']}: {event['cause']}")
    told_otherwise = {event["attempt"] for event in drifts}
    for end in attempt_ends(now):
        is_of_host = end["cause"] in OF_A_HOST and end["attempt"] not in told_otherwise
        first = first_failure(now, end["attempt"]) if is_of_host else None
        if first is not None and not first.get("echo"):
            told = f"rank {first['rank']} failed first in attempt {end['attempt']}: {first['cause']}"
            failures[first["host"]].setdefault(end["attempt"], told)
    return {host: list(by_attempt.values()) for host, by_attempt in failures.items()}


def reasons(hosts: Mapping[str, str]) -> str:
    """Reasons for which hosts are avoided, for the event log."""
    return " | ".join(f"{host}: {why}" for host, why in sorted(hosts.items()))


# Size of an agent group: with how many nodes a start is made, all that the run asks for or fewer where some are
# lost.


@dataclass(frozen=True)
class GroupSizes:
    """Numbers of nodes with which a run can be started."""

    full: int
    """As many as the run asks for."""
    fewer: tuple[int, ...] = ()
    """Smaller ones that its workload allows, from the largest."""

    @classmethod
    def of_run(cls, folder: RunFolder, config: Config) -> GroupSizes:
        """Return the sizes of a run, as its plan holds them.

        Raises:
            ConfigError: the plan is damaged.
        """
        promised = (read_plan(folder).get("promised") or {}) if config.may_shrink else {}
        return cls(config.nodes, tuple(promised.get("fewer_nodes") or ()))

    @property
    def least(self) -> int:
        """The smallest size."""
        return min(self.full, *self.fewer) if self.fewer else self.full

    def largest(self, available: int) -> int | None:
        """Return the largest size that ``available`` nodes can make; None where they are too few for any."""
        return next((size for size in (self.full, *self.fewer) if size <= available), None)


def record_size(
    folder: RunFolder, attempt: int, sizes: GroupSizes, hosts: Sequence[str], missing: Mapping[str, str]
) -> None:
    """Enter into the event log that an attempt runs on fewer nodes than the run asks for, or on all of them again.

    Args:
        hosts: those that take part.
        missing: the others of the job, each with the reason.
    """
    if len(hosts) < sizes.full:
        cause = "; ".join(f"{host}: {why}" for host, why in missing.items())
        told = {"nodes": len(hosts), "asked": sizes.full, "hosts": list(hosts), "cause": cause}
        folder.record_event(FEWER_NODES, attempt=attempt, **told)
        return
    before = max((number for number in folder.attempts() if number < attempt), default=0)
    if before in fewer_nodes(folder.read_events()):
        folder.record_event(ALL_NODES, attempt=attempt, nodes=sizes.full, hosts=list(hosts))


# The meter of an allocation: when it began and ended, and whether its budget lasts.


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
        """Seconds until a run that is requested to stop at the next poll, and not now, would be gone.

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
