"""Questions of an agent to the controller: why it was told to stop, and putting its job back into the queue.

Owns waiting for a controller that does not answer, which never costs a run: its state is saved, and the decision can
wait. Must not know what is decided. Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from launch.agent.avoided_hosts import NO_HOSTS, reasons
from launch.agent.node import Node
from launch.agent.restart_policy import Cause, RunFailedError, cause_of_signal
from launch.config import Config
from launch.runs.events import events_since_submission
from launch.runs.folder import RunFolder
from launch.scheduler import client as scheduler

Answer = TypeVar("Answer")

CONTROLLER_WAIT_S = 12 * 3600.0
"""Time that a decision waits for the controller. A failover takes minutes, an upgrade or a restored database hours; by
then the job's own time limit has mostly passed."""
ASK_AGAIN_S = 5.0


def wait_for_controller(folder: RunFolder, ask: Callable[[], Answer]) -> Answer:
    """Ask until the controller answers, and say in the event log, once, that it does not, and when it does again.

    Raises:
        SlurmError: the controller refuses, or gave no answer for ``CONTROLLER_WAIT_S``.
    """
    began: float | None = None
    while True:
        try:
            answer = ask()
        except scheduler.SlurmBusyError as error:
            if began is None:
                began = time.monotonic()
                folder.record_event("controller_away", cause=str(error), waits_s=CONTROLLER_WAIT_S)
            if time.monotonic() - began > CONTROLLER_WAIT_S:
                raise
            time.sleep(ASK_AGAIN_S)
            continue
        if began is not None:
            folder.record_event("controller_back", away_s=round(time.monotonic() - began, 1))
        return answer


def cause_of_stop(folder: RunFolder, node: Node, config: Config, attempt: int | None) -> Cause:
    """Tell a preemption from a time limit and from a cancel: all three arrive as the same signals.

    Raises:
        RunFailedError: the controller does not know the job, or did not answer for hours.
    """
    events = events_since_submission(folder.read_events())
    by_hand = any(e["event"] == "cancelled" for e in events)
    by_file = any(e["event"] == "stopped" and e.get("attempt") == attempt and e.get("file") for e in events)
    if by_hand or by_file or not node.is_slurm:
        return Cause.cancelled
    signalled_at = time.time()  # the answer may come much later
    try:
        job = wait_for_controller(folder, lambda: scheduler.job_details(node.slurm_job))
    except scheduler.SlurmError as error:
        raise failed_to_requeue(folder, node, "told to stop", str(error)) from error
    return cause_of_signal(job, node.restarts, config.cluster.signal_delay_s, signalled_at)


def requeue(
    folder: RunFolder,
    node: Node,
    config: Config,
    cause: Cause,
    exclude: Mapping[str, str] = NO_HOSTS,
    text: str = "",
) -> None:
    """Put this job, or this one element of its array, back into the queue, unless Slurm has done so already.

    Args:
        exclude: hosts it must not come back to, each with the reason.
        text: what went wrong, for the error.

    Raises:
        RunFailedError: there is no queue, ``resilience.requeue=false``, or Slurm refused.
    """
    if not node.is_slurm or not config.resilience.requeue:
        why = "there is no queue here" if not node.is_slurm else "resilience.requeue=false"
        raise failed_to_requeue(folder, node, text or cause, f"{cause}, and {why}")
    told = False

    def put_back() -> None:
        nonlocal told
        by_slurm = scheduler.job_details(node.slurm_job).restarts > node.restarts
        if not told:
            # First the event log: Slurm may kill this process as soon as it has heard of the requeue.
            by = "slurm" if by_slurm else "agent"
            folder.record_event("requeued", job_id=node.slurm_job, by=by, cause=cause)
            told = True
        if not by_slurm:  # nor done by a question whose answer was lost
            scheduler.requeue(node.slurm_job)

    try:
        wait_for_controller(folder, put_back)
    except scheduler.SlurmError as error:
        raise failed_to_requeue(folder, node, text or cause, f"Slurm did not requeue it: {error}") from error
    if exclude:
        keep_away(folder, node, config, exclude)


def failed_to_requeue(folder: RunFolder, node: Node, text: str, why: str) -> RunFailedError:
    """Enter into the event log why a run that should go on does not, and return the error that says so."""
    folder.record_event("requeue_failed", job_id=node.slurm_job or None, cause=why)
    return RunFailedError(f"{text}\nnot started again: {why}")


def keep_away(folder: RunFolder, node: Node, config: Config, hosts: Mapping[str, str]) -> None:
    """Have Slurm exclude hosts from the job that was just requeued, where it then still has nodes to run on."""

    def exclude() -> str | None:
        left = scheduler.usable_nodes(node.slurm_job) - set(hosts)
        if len(left) < config.nodes_asked:
            return f"only {len(left)} nodes of its partition would be left, and it needs {config.nodes_asked}"
        scheduler.exclude(node.slurm_job, list(hosts))
        return None

    try:
        why_not = wait_for_controller(folder, exclude)
    except scheduler.SlurmError as error:
        why_not = str(error)
    if why_not is None:
        folder.record_event("excluded", hosts=list(hosts), job_id=node.slurm_job, cause=reasons(hosts))
    else:
        folder.record_event("not_excluded", hosts=list(hosts), cause=f"{why_not} ({reasons(hosts)})")
