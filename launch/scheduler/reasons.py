"""Reasons for which a job is pending, as squeue tells them: those that no waiting removes, and what to type then.

Source: Slurm's job reason codes, https://slurm.schedmd.com/job_reason_codes.html, and the texts that slurmctld 22.05
puts in their place. A code that is not named here goes away by itself: other jobs end, a time comes, what all jobs of a
user, an account or a QOS have together (Grp, PerUser, PerAccount) falls below its limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OWN_WISH = ("JobHeldUser", "Dependency", "BeginTime", "JobArrayTaskLimit")
"""Reasons that are the user's own wish: another place would only get around them."""

LESS = "python -m launch.cancel {run}; python -m launch.doctor, with the same arguments, says what fits"
ASK = "sinfo -R names nodes with their reasons; ask the site, or python -m launch.cancel {run} and ask for other nodes"
RELEASE = "scontrol {cluster}release {job}"


@dataclass(frozen=True)
class LastingReason:
    """A reason that stays until somebody does something."""

    pattern: str
    """Regular expression for the beginning of what squeue prints."""
    meaning: str
    fix: str
    """Words to type; ``{job}``, ``{cluster}`` (the option that names another cluster) and ``{run}`` are filled in."""


LASTING = (
    LastingReason("PartitionNodeLimit", "its partition takes fewer or more nodes, or those it needs are down", LESS),
    LastingReason("PartitionTimeLimit", "its time limit is above that of its partition", LESS),
    LastingReason("PartitionConfig", "it exceeds a limit of its partition, or what the nodes there have", LESS),
    LastingReason("BadConstraints", "no nodes have what it asks for, so Slurm holds it", LESS),
    LastingReason("MaxMemPerLimit", "it asks for more memory of each CPU or node than is allowed", LESS),
    LastingReason(r"(Assoc|QOS)Max\w*(PerJob|PerNode)", "it exceeds what its account or QOS lets a job ask for", LESS),
    LastingReason(r"QOSMin\w+", "it asks for less than a job of its QOS has to", LESS),
    LastingReason("AccountNotAllowed|QOSNotAllowed", "its partition does not take its account or QOS", LESS),
    LastingReason(r"(Job's|User's) .*use this partition", "its partition does not take its account or QOS", LESS),
    LastingReason("InvalidAccount|InvalidQOS", "its account or QOS does not exist, or is not yours", LESS),
    LastingReason("ReservationDeleted", "the reservation it asks for is gone", LESS),
    LastingReason("DeadLine", "it cannot end before the deadline it was given", LESS),
    LastingReason("DependencyNeverSatisfied", "the job it depends on has ended in another way", LESS),
    LastingReason("JobHeldUser", "you, or a coordinator of your account, hold it", RELEASE),
    LastingReason("JobHoldMaxRequeue", "it was requeued as often as the site allows, and is held", RELEASE),
    LastingReason("launch failed requeued held", "it could not be launched on its nodes, and is held", RELEASE),
    LastingReason("job requeued in held state", "it was requeued with a hold", RELEASE),
    LastingReason("JobHeldAdmin", "an administrator holds it, or its priority is 0", "ask the site to release {job}"),
    LastingReason("PartitionDown|PartitionInactive", "its partition is switched off", ASK),
    LastingReason("NodeDown|ReqNodeNotAvail, *UnavailableNodes", "nodes it needs are down, drained or silent", ASK),
    LastingReason(
        "Nodes required for job are DOWN",
        "too few nodes are left: others are down, drained, or kept for a partition that goes first",
        ASK,
    ),
)


def lasting_reason(reason: str) -> LastingReason | None:
    """The entry for a reason that no waiting removes; None for one that goes away by itself."""
    said = reason.replace("_", " ")
    return next((entry for entry in LASTING if re.match(entry.pattern, said)), None)


def advice(reason: str, job: str, run: str, cluster: str | None = None) -> str:
    """Say what a pending job waits for and what to type, where waiting is not enough; otherwise empty.

    Args:
        reason: as squeue prints it.
        job: the id of the job.
        run: what ``launch.cancel`` takes.
        cluster: name of the cluster that it waits on, where that is another one.
    """
    entry = lasting_reason(reason)
    if entry is None:
        return ""
    option = f"--clusters={cluster} " if cluster else ""
    fix = entry.fix.format(job=job, run=run, cluster=option)
    return f"waiting does not change {reason.split(',')[0]}: {entry.meaning}; type {fix}"
