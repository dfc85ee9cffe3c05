"""Checks of what preemption does to a run: whether it comes back, and how long it has to save.

Pure functions over Slurm's limits and a request.
"""

from __future__ import annotations

from collections.abc import Iterator

from launch.checks.facts import Request
from launch.checks.findings import Finding, fine, warn
from launch.scheduler.limits import Limits, Partition, how_preempted


def check(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Everything about preemption in one partition."""
    mode = how_preempted(limits, partition)
    if mode == "OFF":
        yield fine("preemption", f"nothing preempts jobs in {partition.name}")
        return
    if mode == "REQUEUE":
        yield from check_requeue(limits, partition, request)
    else:
        done = (
            "suspended, and its collectives time out" if "SUSPEND" in mode else "ended and not put back into the queue"
        )
        why = f"a preempted run is {done}; typing the same command again goes on from its last checkpoint"
        yield warn(
            "preemption", f"PreemptMode of {partition.name} is {mode}", why, elsewhere(limits, partition, request)
        )
    if "SUSPEND" not in mode:
        yield from check_grace(limits, partition, request)


def check_requeue(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Tell whether the batch job may be requeued: JobRequeue of the cluster, or --requeue."""
    options = {str(key).replace("-", "_"): value for key, value in request.config.cluster.additional_parameters.items()}
    if options.get("no_requeue"):
        found, fix = "cluster.additional_parameters.no_requeue is set", "~cluster.additional_parameters.no_requeue"
    elif limits.number("JobRequeue") == 0 and not options.get("requeue"):
        found, fix = "JobRequeue=0 on this cluster, and no --requeue", "+cluster.additional_parameters.requeue=true"
    else:
        yield fine("preemption", f"jobs in {partition.name} may be preempted, and are requeued")
        return
    why = f"jobs in {partition.name} may be preempted, and this one would be ended instead of requeued"
    yield warn("preemption", found, why, fix)


def check_grace(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Tell whether a preempted run has the time to save that it has before its time limit.

    Slurm 22.05 ends a preempted job GraceTime and then KillWait after it was told.
    """
    wait = limits.number("KillWait") or 0
    lead, left = request.config.cluster.signal_delay_s, partition.grace_s + wait
    if lead <= left:
        return
    found = (
        f"GraceTime of {partition.name} is {partition.grace_s} s (KillWait {wait} s), and cluster.signal_delay_s={lead}"
    )
    why = f"a preempted run has about {left} s for a save, not {lead} s: a slower one is lost"
    yield warn("preemption", found, why, elsewhere(limits, partition, request))


def elsewhere(limits: Limits, partition: Partition, request: Request) -> str:
    """Propose what to type to lose less: checkpoints twice as often, or a large partition that is not preempted."""
    often = request.plan.promised.saves_more_often or "more frequent checkpoints"
    safe = [
        p.name
        for p in limits.partitions
        if p.name != partition.name
        and p.state == "UP"
        and how_preempted(limits, p) == "OFF"
        and len(limits.nodes_of(p)) >= request.config.nodes
    ]
    return f"{often}, or cluster.partition={safe[0]}" if safe else often
