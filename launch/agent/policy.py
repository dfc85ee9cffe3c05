"""Restart policy: restart in place, requeue or stop; hosts to avoid; budget of the allocation."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from launch.agent.node import RunContext, is_replaced, start_time
from launch.config import ClusterKind, ResilienceConfig
from launch.errors import CommandFailedError, ConfigError, RepeatedFailureError
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
from launch.plan.preflight import measure_stop
from launch.runs.events import (
    Events,
    events_since_submission,
    first_failure,
    last_event,
    select_events,
)
from launch.runs.folder import RunFolder, write_unwritten
from launch.slurm import client as scheduler
from launch.slurm.client import JobDetails

# Restart policy: restart in place, requeue or stop, by the cause of an attempt's end. A pure function of the event log.


EARLY_S = 60.0
SLACK_S = 1.0


class Cause(StrEnum):
    """Cause of an attempt's end. Each cause is counted apart, so preemptions do not use up the limit of crashes."""

    finished = "finished"
    cancelled = "cancelled"
    """A user requested the end: scancel, launch.cancel, or a file STOP."""
    budget = "budget"
    """An agent requested the end, because a cap of ``budget`` was reached."""
    preempted = "preempted"
    timed_out = "timed_out"
    node_failed = "node_failed"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    """A loss was not finite. A new start would get the same loss, unless a device has miscalculated."""
    crashed = "crashed"
    hung = "hung"
    node_joined = "node_joined"
    """The agents requested the end, so that the ranks start again with the node of a spare job."""
    requested = "requested"
    """The ranks left with the exit status that requests a requeue of the job, after they had saved."""
    repeated = "repeated"
    """The ranks left because the run had diverged again after as many roll-backs as allowed."""
    refused = "refused"
    """The ranks refused to work, mostly before the first step. A new start would be refused too."""


class Action(StrEnum):
    """Action of the agents after an attempt."""

    stop = "stop"
    restart = "restart"
    """Start the ranks again inside the allocation, without the queue."""
    requeue = "requeue"


@dataclass(frozen=True)
class Decision:
    """Action that follows an attempt, and the reason as text for people."""

    action: Action
    reason: str


def has_stopped(events: Events) -> bool:
    """Return whether the last decision of the agents in these events is that the run stops."""
    return last_event(events, "decided").get("action") == Action.stop


WANTED = (Cause.finished, Cause.cancelled, Cause.budget)
"""Causes of an intended end: all steps are made, or a user or the budget requested the stop.

After such an end, the run does not start again, and has not failed.
"""
FINAL = {
    Cause.refused: "it would be refused again",
    Cause.repeated: "the ranks have tried again by themselves, and it came again",
}
"""Cause after which a new start would end in the same way -> reason for people."""
LEAVES_THE_NODES = (Cause.preempted, Cause.timed_out, Cause.requested)
"""Causes that end the allocation. The run needs the queue to get nodes again."""
FROM_OUTSIDE = (Cause.preempted, Cause.node_failed)
"""Causes from outside the run. An attempt that such a cause ends before its first step shows no fault of the run.

A time limit is no such cause: if an attempt reaches it before its first step, the next attempt would reach it again. A
requeue that ranks request is no such cause either.
"""
NO_CHECKPOINT = (
    "the program is not said to have checkpoints, so it would run again from its first step "
    "(script.resumes=true where it looks for its own checkpoint when it starts)"
)
BATCH_SCRIPT_ENDED = ("NonZeroExitCode", "JobLaunchFailure", "RaisedSignal")
"""Slurm's reasons for the end of a job whose batch script has ended. A cancelled job has another reason."""


def decide_next(events: Events, cause: Cause, limits: ResilienceConfig, resumes: bool = True) -> Decision:
    """Return the decision on what follows the attempt that just ended for ``cause``.

    Args:
        events: the event log, the ``attempt_ended`` of this attempt included.
        cause: cause of the attempt's end.
        limits: ``resilience`` of the run.
        resumes: True if a new start continues from a checkpoint; otherwise there is no new start.
    """
    if cause in WANTED:
        return Decision(Action.stop, str(cause))
    if cause in FINAL:
        return Decision(Action.stop, FINAL[cause])
    if not resumes:
        return Decision(Action.stop, NO_CHECKPOINT)
    stuck = attempts_without_progress(events)
    if stuck >= limits.max_without_progress:
        return Decision(Action.stop, f"{stuck} attempts in a row saved nothing new (docs/resilience.md)")
    ends = [end for end in attempt_ends(events) if end["cause"] == cause]
    seen = sum(not is_forgiven(end, events, limits.forgive_after_s) for end in ends)
    forgiven = f"; {len(ends) - seen} before newer checkpoints are forgiven" if seen < len(ends) else ""
    limit = getattr(limits.max_restarts, cause, None)  # Preemptions and requested requeues have no limit.
    if limit is not None and seen > limit:
        text = f"{cause} {seen} times, and its limit is {limit} (docs/resilience.md, resilience.max_restarts)"
        return Decision(Action.stop, f"{text}{forgiven}")
    action = Action.requeue if cause in LEAVES_THE_NODES else Action.restart
    return Decision(action, f"{cause}, {seen} of {'any number' if limit is None else limit}{forgiven}")


def is_forgiven(end: dict[str, Any], events: Events, forgive_after_s: float) -> bool:
    """Return whether the end of an attempt no longer counts towards the limit of its cause.

    The end does not count if the run has saved a newer checkpoint since, and ``forgive_after_s`` seconds have passed.
    Both conditions are needed. With the checkpoint alone, a run could fail forever right after each save. With the time
    alone, waiting in the queue would be enough.
    """
    place = events.index(end)
    before = max((save["step"] for save in select_events(events[:place], "saved")), default=-1)
    has_progressed = any(save["step"] > before for save in select_events(events[place:], "saved"))
    return has_progressed and events[-1]["time"] - end["time"] >= forgive_after_s


def attempt_ends(events: Events) -> list[dict[str, Any]]:
    """Return the first event ``attempt_ended`` of each attempt, oldest first.

    An attempt can have a second such event: a head node that had lost its connection records it after another node has
    taken over. If a start of the job ended before its first attempt, the result also has an event of this start,
    without the number of an attempt.
    """
    ends: dict[object, dict[str, Any]] = {}
    for number, event in enumerate(events):
        if event["event"] == "attempt_ended":
            attempt = event.get("attempt")
            start_of_job = event.get("job", f"event {number}")
            ends.setdefault(start_of_job if attempt is None else attempt, event)
    return list(ends.values())


def open_attempts(events: Events) -> list[int]:
    """Return the numbers of attempts that have started and not ended."""
    ended = {end["attempt"] for end in select_events(events, "attempt_ended")}
    return [start["attempt"] for start in select_events(events, "started") if start["attempt"] not in ended]


def attempts_without_progress(events: Events) -> int:
    """Return the number of attempts since the last one that saved a newer checkpoint than the one it started from.

    Checkpoints in memory count as checkpoints. Returns 0 if the run has never reported a checkpoint, since its progress
    is then unknown. Attempts that were interrupted from outside before their first step are not counted.
    """
    starts = select_events(events, "started")
    if not select_events(events, "saved") and not any("from_step" in start for start in starts):
        return 0
    started = {start["attempt"]: start.get("from_step", -1) for start in starts}
    # A checkpoint in memory also counts as progress, if the next start is on the same nodes.
    saved = {e["attempt"]: e["step"] for e in select_events(events, "saved", "saved_in_memory")}
    count = 0
    for end in reversed(attempt_ends(events)):
        attempt = end["attempt"]
        if saved.get(attempt, -1) > started.get(attempt, -1):
            break
        # The attempt ended before its first step.
        from_outside = end["cause"] in FROM_OUTSIDE and end.get("step", -1) is None
        count += not from_outside
    return count


def cause_of_signal(job: JobDetails, restarts: int, signal_delay_s: float, now: float) -> Cause:
    """Return the cause of a stop signal: preempted, timed_out, cancelled, or node_failed for a failed batch script.

    Slurm sends the same signals for all causes, so the cause follows from the state of the job.

    If the job still runs, the signal is a warning: the time limit is near, or the job is preempted. If the job is
    ending, its state shows the cause (seen with Slurm 22.05). After a preemption, the number of restarts is higher, or
    the job is in the queue again. At the time limit, the job has used all of its time. After a failed batch script, the
    state has a reason. Every other end counts as a cancel, so that a cancelled job does not start again.

    Args:
        job: state of the job, as Slurm's controller reports it.
        restarts: number of requeues of the job before this start of the job.
        signal_delay_s: seconds from the signal to the time limit; sbatch may send the signal a minute earlier.
        now: time when the signal came, Unix seconds.
    """
    if job.is_running:
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


CAUSES_BY_ERROR = {
    ConfigError.__name__: Cause.refused,
    RepeatedFailureError.__name__: Cause.repeated,
    FloatingPointError.__name__: Cause.diverged,
}


def cause_of_failure(failure: dict[str, Any] | None) -> Cause:
    """Return the cause of an attempt's end from its first recorded failure; ``crashed`` if there is none."""
    text = str(failure.get("cause", "")) if failure else ""
    named = CAUSES_BY_ERROR.get(text.partition(": ")[0])
    if named is not None:
        return named
    if "OutOfMemoryError" in text or "MemoryError" in text or "out of memory" in text.lower():
        return Cause.out_of_memory
    return Cause.hung if failure is not None and failure.get("hung") else Cause.crashed


class RunFailedError(CommandFailedError):
    """Raised if the run ends without being finished, and without a request to end."""


class AlreadyDecidedError(RunFailedError):
    """Raised if another agent decides: it has recorded the end of the attempt, or is the head node now."""


def refuse_replaced(context: RunContext) -> None:
    """Raise AlreadyDecidedError if another node, or another start of the job, has replaced this head node.

    Otherwise two agents would work on the run and restart it again and again.
    """
    node = context.node
    job = last_event(context.folder.read_events(), "agent_started").get("job", node.job)
    if job != node.job:
        raise AlreadyDecidedError(f"{job} works on this run now; {node.job} was left over")
    if is_replaced(context.folder, node):
        raise AlreadyDecidedError(f"{node.host} was cut off, and another node is the head node now")


def is_inside_job(folder: RunFolder) -> bool:
    """Return whether the run is a step of a Slurm job that the user started before, for example with salloc."""
    return last_event(folder.read_events(), "submitted").get("cluster") == ClusterKind.allocation.name


# Hosts that a run avoids, and why: a pure function of its event log.


NO_HOSTS: Mapping[str, str] = MappingProxyType({})
UNRELIABLE = 2
"""Number of failures after which a host is avoided. A single failure may be chance, or the fault of the run."""
DRIFT = "replicas_differ"
"""Name of the event that is recorded when the parameters differ between data-parallel replicas."""
OF_A_HOST = (Cause.crashed, Cause.hung, Cause.node_failed)
"""Causes of an attempt's end for which a host may be responsible.

A diverged loss, too little memory and a refusal come from the program, and would occur on every host.
"""


def unreliable_hosts(events: Events) -> dict[str, str]:
    """Return the hosts that failed in several attempts since the command was typed: host -> its failures as text.

    A host whose parameters differ from those of most replicas is included after one failure, which cannot be chance.
    """
    events = events_since_submission(events)
    certain = {host for event in select_events(events, DRIFT, certain=True) for host in event["hosts"]}
    failures = sorted(failures_of_hosts(events).items())
    return {host: "; ".join(each) for host, each in failures if len(each) >= UNRELIABLE or host in certain}


def hosts_to_avoid(events: Events) -> dict[str, str]:
    """Return the unreliable, lost and sick hosts, which a requeued job must not get again: host -> reason."""
    avoid, events = unreliable_hosts(events), events_since_submission(events)
    failures = failures_of_hosts(events)
    avoid |= {event["host"]: "; ".join(failures[event["host"]]) for event in select_events(events, "node_lost")}
    return avoid | {event["host"]: f"sick: {event['cause']}" for event in select_events(events, "node_sick")}


def failures_of_hosts(events: Events) -> dict[str, list[str]]:
    """Return the failures of each host in the order of the attempts, from the events since the command was typed.

    Each host has at most one failure per attempt. A host has failed if it was lost, or if the first failed rank of an
    attempt ran there. A host whose rank only reports a lost peer did not fail. If replicas of the parameters differ,
    all ranks fail, and only the hosts of the wrong replicas count.
    """
    failures: dict[str, dict[object, str]] = defaultdict(dict)
    for event in select_events(events, "node_lost"):
        attempt = event.get("attempt")
        when = "before the ranks started" if attempt is None else f"in attempt {attempt}"
        failures[event["host"]].setdefault(id(event) if attempt is None else attempt, f"lost {when}")
    drifted = set()
    for event in select_events(events, DRIFT):
        drifted.add(event["attempt"])
        for host in event["hosts"]:
            failures[host].setdefault(event["attempt"], f"in attempt {event['attempt']}: {event['cause']}")
    for end in attempt_ends(events):
        is_of_host = end["cause"] in OF_A_HOST and end["attempt"] not in drifted
        first = first_failure(events, end["attempt"]) if is_of_host else None
        if first is not None and not first.get("echo"):
            text = f"rank {first['rank']} failed first in attempt {end['attempt']}: {first['cause']}"
            failures[first["host"]].setdefault(end["attempt"], text)
    return {host: [*by_attempt.values()] for host, by_attempt in failures.items()}


def reasons(hosts: Mapping[str, str]) -> str:
    """Return the hosts with their reasons as one text for the event log."""
    return " | ".join(f"{host}: {why}" for host, why in sorted(hosts.items()))


# The meter of an allocation: when it began and ended, and whether its budget lasts.


BUDGET = "budget"
"""Name of a request to stop that comes from the budget, in place of a signal's name."""
LEAVE_S = 5.0
"""Approximate seconds from the end of the ranks to the end of the job."""


class Meter:
    """Measures, during a ``with`` block, how much of the budget is used. Only the head node measures.

    Also records when the allocation of this run begins and ends.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._folder = context.folder
        self._polled = -math.inf
        self._together = command_folders(context.folder) if caps(context.config.budget) else [context.folder]

    def __enter__(self) -> Meter:
        node = self._context.node
        if node.is_head and node.index == 0:  # A later head node continues the meter.
            self._close_killed_allocation()
            if node.is_slurm:
                # An element of a job array has two ids in Slurm.
                ids = (node.slurm_job, node.job.split("-")[1])
                # The launcher ended before it recorded its submission, or is slower than this agent.
                if not is_inside_job(self._folder) and not is_recorded(self._folder.read_events(), ids):
                    record_found(self._folder, node.slurm_job, node.count, by="agent")
            # The batch script identifies the agent's process by its number and start time.
            pid = os.getpid()
            process = {"pid": pid, "pid_started": start_time(pid)}
            self._context.record("agent_started", **self._allocation(), **process)
            self._write_heartbeat()
        if node.index >= node.count:
            self._context.record("spare_started", job=node.job, node=node.index, host=node.host)
        return self

    def __exit__(self, *error: object) -> None:
        node = self._context.node
        if node.is_head and not is_replaced(self._folder, node):
            self._context.record("agent_ended", job=node.job, ended_at=time.time())
        if node.index >= node.count:
            self._context.record("spare_ended", job=node.job, node=node.index, ended_at=time.time())

    def poll(self, *, is_leaving: bool = False) -> str | None:
        """Touch the heartbeat file of the run's head node, and compare the use of the budget with its caps.

        The use of all points of the command counts together. If the run would reach a cap by the time at which a stop
        that begins now has ended, the method records the event ``budget_reached``, and returns a text that names the
        cap.

        Returns None if no cap is so near, or if ``is_leaving`` (the ranks are already leaving). Does nothing and
        returns None except on the head node, and if the last poll was less than ``budget_poll_s`` seconds ago.
        """
        config, now = self._context.config, time.time()
        if not self._context.node.is_head or time.monotonic() - self._polled < config.budget_poll_s:
            return None
        self._polled = time.monotonic()
        self._write_heartbeat()
        if is_leaving or not caps(config.budget):
            return None
        # A run that is requested to stop at the next poll would be gone after this many seconds. Ranks are killed after
        # the grace period: without a measured save, a stop takes that long.
        grace, measured = float(config.resilience.grace_period_s), measure_stop(self._folder)
        lead_s = config.budget_poll_s + LEAVE_S + (grace if measured is None else min(grace, sum(measured)))
        event_logs, rates = read_event_logs(self._together), rates_of(config)
        why = spent(config.budget, used(event_logs, now, rates), used(event_logs, now + lead_s, rates))
        if why is not None:
            attempt = max(self._folder.attempts(), default=None)
            self._context.record("budget_reached", attempt=attempt, job=self._context.node.job, cause=why)
        return why

    def _close_killed_allocation(self) -> None:
        """Record the end of an earlier allocation of this run, if the allocation was killed before it recorded its end.

        The recorded time is ``budget_poll_s`` seconds after the last heartbeat of the allocation, at most the present
        time.
        """
        events = self._folder.read_events()
        ended = {end["job"] for end in select_events(events, "agent_ended")}
        lost = [start for start in select_events(events, "agent_started") if start["job"] not in ended]
        if lost:
            # The allocation may have continued until just before its next heartbeat.
            seen = max(last_heartbeat(self._folder) or 0.0, lost[-1]["time"]) + self._context.config.budget_poll_s
            ended_at = min(seen, time.time())
            self._context.record("agent_ended", job=lost[-1]["job"], ended_at=ended_at, cause="killed")

    def _allocation(self) -> dict[str, Any]:
        """Return the allocation's nodes, GPUs, price per GPU-hour, start (Unix seconds) and time limit (seconds).

        The number of GPUs and the price are None if they are not known.
        """
        config, node = self._context.config, self._context.node
        begun, limit_s = time.time(), 60.0 * config.cluster.timeout_min
        if node.is_slurm and not is_inside_job(self._folder):
            with suppress(scheduler.SlurmError):  # The agent started a moment after its job.
                job = scheduler.job_details(node.slurm_job, retries=1)
                begun, limit_s = job.start_time or begun, job.time_limit_s or limit_s
        placed = last_event(self._folder.read_events(), "submitted")
        gpus = placed.get("gpus")
        if gpus is None and config.cluster.gpus_per_node is not None:
            gpus = node.count * config.cluster.gpus_per_node
        price = placed.get("price_per_gpu_hour", config.cluster.price_per_gpu_hour)
        where = {"job": node.job, "nodes": node.count, "gpus": gpus, "price_per_gpu_hour": price}
        return {**where, "allocated_at": begun, "limit_s": limit_s}

    def _write_heartbeat(self) -> None:
        write_unwritten()
        file = heartbeat_file(self._folder)
        # The disk is full. Without heartbeats, the events decide how much an allocation has used.
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            # Uses this node's clock, as the event log does, instead of the file server's.
            os.utime(file, (time.time(),) * 2)
