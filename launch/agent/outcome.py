"""The end of an attempt: its cause, and a restart, a requeue, a takeover, or the end of the run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from launch.agent.node import (
    JOINED,
    SHARES_JOB,
    STOP_FILE,
    AgentContext,
    Node,
    NodeProblem,
    RendezvousRound,
    RunContext,
    StopRequest,
    TooFewNodesError,
    is_replaced,
    problems_text,
)
from launch.agent.policy import (
    BUDGET,
    LEAVES_THE_NODES,
    NO_HOSTS,
    WANTED,
    Action,
    AlreadyDecidedError,
    Cause,
    Decision,
    RunFailedError,
    attempt_ends,
    cause_of_failure,
    cause_of_signal,
    decide_next,
    has_stopped,
    hosts_to_avoid,
    is_inside_job,
    open_attempts,
    reasons,
    refuse_replaced,
)
from launch.config import CHAIN, Config
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.plan.plan import is_recorded, next_job, record_found, record_next_job
from launch.runs.environment import DUMP_PREFIX, dumped_ranks
from launch.runs.events import (
    events_since_submission,
    failure_text,
    first_failure,
    last_event,
    last_index,
    select_events,
)
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records
from launch.slurm import client as scheduler
from launch.why.rules import find_verdict

# Queries to Slurm's controller: why the job was stopped, and the requeue of the job.


Answer = TypeVar("Answer")

CONTROLLER_WAIT_S = 12 * 3600.0
"""Longest time in seconds that a decision waits for Slurm's controller.

A failover of the controller takes minutes. An upgrade, or the restore of its database, takes hours. After a longer
wait, the job's own time limit has mostly passed.
"""
ASK_AGAIN_S = 5.0
KILLED = 128
"""Exit statuses above this value mean that a signal has ended the process."""


def wait_for_controller(context: RunContext, ask: Callable[[], Answer]) -> Answer:
    """Call ``ask`` until Slurm's controller answers, and return the result of ``ask``.

    The event ``controller_away`` is recorded once if the controller does not answer.

    Raises:
        SlurmError: the controller refuses, or gave no answer for ``CONTROLLER_WAIT_S`` seconds.
    """
    began: float | None = None
    while True:
        try:
            return ask()
        except scheduler.SlurmBusyError as error:
            if began is None:
                began = time.monotonic()
                context.record("controller_away", cause=str(error), waits_s=CONTROLLER_WAIT_S)
            if time.monotonic() - began > CONTROLLER_WAIT_S:
                raise
            time.sleep(ASK_AGAIN_S)


def cause_of_stop(context: RunContext, attempt: int | None) -> Cause:
    """Return the cause of a requested stop: preempted, timed_out, node_failed or cancelled.

    Slurm sends the same signals for all causes, so the cause comes from the events of the run and from the state of the
    job. ``attempt`` is None if no ranks had started.

    Raises:
        RunFailedError: the controller does not know the job, or did not answer for hours.
    """
    by_file = [e for e in context.events("stopped", attempt=attempt) if e.get("file")]
    if context.events("cancelled") or by_file or not context.node.is_slurm:
        return Cause.cancelled
    signalled_at = time.time()  # The answer may come much later than the signal.
    try:
        job = wait_for_controller(context, lambda: scheduler.job_details(context.node.slurm_job))
    except scheduler.SlurmError as error:
        raise failed_to_requeue(context, "requested to stop", str(error)) from error
    return cause_of_signal(job, context.node.restarts, context.config.signal_delay_s, signalled_at)


def requeue_job(context: RunContext, cause: Cause, exclude: Mapping[str, str] = NO_HOSTS, text: str = "") -> None:
    """Requeue this job, or only this element of its array, unless Slurm has already done so.

    With ``resilience.requeue=chain``, the run is left to the next job instead. If several runs share the job, nothing
    is done: the batch script requeues the job later.

    Args:
        context: run and node.
        cause: cause of the end of the attempt.
        exclude: hosts that the job must not get again, each with the reason.
        text: failure of the attempt, for the error message.

    Raises:
        RunFailedError: there is no queue, ``resilience.requeue=false``, or Slurm refused.
    """
    node = context.node
    if not node.is_slurm or not context.config.resilience.requeue:
        why = "there is no queue here" if not node.is_slurm else "resilience.requeue=false"
        raise failed_to_requeue(context, text or cause, f"{cause}, and {why}")
    if SHARES_JOB in os.environ:  # The batch script requeues the job when the agents of all its points have left.
        return
    if context.config.resilience.requeue == CHAIN:
        continue_in_next_job(context, cause, exclude, text)
        return
    is_recorded = False

    def requeue_once() -> None:
        nonlocal is_recorded
        by_slurm = scheduler.job_details(node.slurm_job).restarts > node.restarts
        if not is_recorded:
            # First the event log: Slurm may kill this process as soon as it has received the requeue.
            context.record("requeued", job_id=node.slurm_job, by="slurm" if by_slurm else "agent", cause=cause)
            is_recorded = True
        if not by_slurm:  # An earlier request may have succeeded although its answer was lost.
            scheduler.requeue(node.slurm_job)

    try:
        wait_for_controller(context, requeue_once)
    except scheduler.SlurmError as error:
        why = f"Slurm did not requeue it: {error}; resilience.requeue=chain continues in another job"
        raise failed_to_requeue(context, text or cause, why) from error
    exclude_hosts(context, node.slurm_job, exclude)


def exclude_hosts(context: RunContext, job_id: str, exclude: Mapping[str, str]) -> None:
    """Exclude hosts from the pending job ``job_id``, unless too few other hosts are left.

    ``exclude`` is host -> reason. Records the event ``excluded``, or ``not_excluded`` with the reason. Does nothing
    without hosts.
    """

    def exclude_once() -> str | None:
        left, needed = scheduler.usable_nodes(job_id) - set(exclude), context.config.nodes_asked
        if len(left) < needed:
            return f"only {len(left)} nodes of its partition would be left, and it needs {needed}"
        scheduler.exclude(job_id, list(exclude))
        return None

    if not exclude:
        return
    try:
        why_not = wait_for_controller(context, exclude_once)
    except scheduler.SlurmError as error:
        why_not = str(error)
    if why_not is None:
        context.record("excluded", hosts=list(exclude), job_id=job_id, cause=reasons(exclude))
    else:
        context.record("not_excluded", hosts=list(exclude), cause=f"{why_not} ({reasons(exclude)})")


def submit_next_job(context: RunContext) -> None:
    """With ``resilience.requeue=chain``, submit the next job, which continues the run when this job has ended.

    The next job starts however this job ends. If Slurm does not accept the next job, the event log says why, and this
    job continues. After several next jobs in which the ranks did not start, no further one is submitted. Does nothing
    for a program that cannot resume.
    """
    node, config, events = context.node, context.config, context.events()
    is_chain = node.is_slurm and config.resilience.requeue == CHAIN and can_resume(config)
    if not is_chain or next_job(events, node.slurm_job) is not None:
        return
    without_start = select_events(events[last_index(events, "started") + 1 :], "next_job")
    if len(without_start) >= config.resilience.max_without_progress:
        context.record("no_next_job", after=node.slurm_job, cause="the ranks did not start in the jobs before")
        return
    command = [*CHAIN_COMMAND, str(context.folder.path), node.slurm_job]
    run_or_record(context, command, "no_next_job", after=node.slurm_job)


def can_resume(config: Config) -> bool:
    """Return whether a new start of the program continues from a checkpoint."""
    return workload_of(config).contract(config, config.world_size).resumes


CHAIN_COMMAND = (sys.executable, "-m", "gpt_launch", "launch.slurm.failover")


def run_or_record(context: RunContext, command: Sequence[str], event: str, **details: Any) -> None:
    """Run ``command``. If the command fails, record ``event`` with ``details`` and the last line of its errors."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        context.record(event, **details, cause=lines[-1])


def continue_in_next_job(context: RunContext, cause: Cause, exclude: Mapping[str, str], text: str) -> None:
    """Leave the run to the next job of its chain, which starts when this job has ended.

    Args:
        context: run and node.
        cause: cause of the end of the attempt.
        exclude: hosts that the next job must not get, each with the reason.
        text: failure of the attempt, for the error message.

    Raises:
        RunFailedError: there is no next job.
    """
    job = context.node.slurm_job
    with suppress(scheduler.SlurmError):
        wait_for_controller(context, lambda: scheduler.job_details(job))
    submit_next_job(context)
    job_id = next_job(context.events(), job)
    if job_id is None:
        why = [event["cause"] for event in context.events("no_next_job")] or ["the next job was cancelled"]
        raise failed_to_requeue(context, text or cause, f"there is no next job: {why[-1]}")
    context.record("requeued", job_id=job, by=CHAIN, cause=cause)
    exclude_hosts(context, job_id, exclude)
    record_found(context.folder, job_id, context.node.count, by="agent")


def cancel_next_job(context: RunContext) -> None:
    """Cancel the next job of a run that is over. Does nothing if the run continues in that job."""
    node, events = context.node, context.events()
    job_id = next_job(events, node.slurm_job)
    if job_id is None or is_recorded(events, [job_id]):
        return
    record_next_job(context.folder, None, node.slurm_job)
    with suppress(scheduler.SlurmError):  # launch.status shows a job that is left, and launch.cancel cancels it.
        wait_for_controller(context, lambda: scheduler.scancel(job_id))


def request_spare_jobs(context: AgentContext, rdzv: RendezvousRound) -> None:
    """On the head node, submit spare jobs in place of the nodes that a round lacks. Each spare job has one node.

    A round lacks a node if it has fewer members than ``nodes`` in the config. A spare job that still waits in the queue
    already replaces one of these nodes. At most ``spare_jobs`` are submitted in all. Threads submit the jobs. If Slurm
    does not accept a job, the event log says why.
    """
    node, lacking = context.node, context.config.nodes - len(rdzv.members)
    if lacking == 0 or node.late == 0:
        return
    awaited, requested = context.group.awaited_jobs(), {e["node"] for e in context.events("spare_job", job=node.job)}
    pending = sum(index in requested for index in awaited)
    for index in [i for i in awaited if i not in requested][: max(0, lacking - pending)]:
        identity = msgspec.json.encode(replace(node, index=index, switches=())).decode()
        context.record("spare_job", job=node.job, node=index, attempt=rdzv.attempt)
        command = [*CHAIN_COMMAND, str(context.folder.path), node.slurm_job, "--spare", identity]
        threading.Thread(target=run_or_record, args=(context, command, "no_spare_job"), name="spare-job").start()


def failed_to_requeue(context: RunContext, text: str, why: str) -> RunFailedError:
    """Record why a run cannot continue, and return the error with that reason, for the caller to raise.

    ``text`` is the failure of the attempt; ``why`` is the reason for which the run cannot continue.
    """
    context.record("requeue_failed", job_id=context.node.slurm_job or None, cause=why)
    return RunFailedError(f"{text}\nnot started again: {why}")


# The end of an attempt: record its cause and the decision in the event log, and carry the decision out.


def handle_attempt_end(context: AgentContext, rdzv: RendezvousRound, ended: Cause) -> Decision:
    """On the head node, find the cause of the end of an attempt, decide what follows, and do it. Returns the decision.

    ``rdzv`` is the round of the attempt; ``ended`` is the cause that every node can see (``observed_end``).

    Raises:
        RunFailedError: the run ends without being finished, and no user requested that.
        AlreadyDecidedError: another agent has recorded the end of the attempt, or is the head node now.
    """
    refuse_replaced(context)
    refuse_decided(context, rdzv.attempt)
    folder, group, stop, attempt = context.folder, context.group, context.stop, rdzv.attempt
    cause, text = ended, ""
    if ended is Cause.cancelled:
        if not context.events("stopped", attempt=attempt):
            why = "ended before it could save"
            context.record("stopped", attempt=attempt, step=None, cause=why, **stop_details(stop))
        if stop.name == STOP_FILE:  # Remove the file, so that the next start does not obey it again.
            (folder.path / STOP_FILE).unlink(missing_ok=True)
        named = {BUDGET: Cause.budget, JOINED: Cause.node_joined}
        cause = named.get(stop.name) or cause_of_stop(context, attempt)
    elif ended is Cause.crashed:
        failure = first_failure(folder.read_events(), attempt)
        dumped = dumped_ranks(folder.attempt(attempt))
        if dumped:
            how = f"torchfrtrace --prefix {DUMP_PREFIX} {shlex.quote(str(folder.attempt(attempt)))}"
            context.record("flight_recorder", attempt=attempt, ranks=dumped, cause=f"a collective timed out: {how}")
        # Where ranks only lost their connections, a different failure is the cause.
        is_lost = any(i in group.lost for i in rdzv.members)
        if not is_lost and (failure is None or failure.get("echo")):
            silent = group.find_reason(rdzv)
            context.record_problems("node_lost", attempt, silent)
            is_lost = bool(silent)
            failure = first_failure(folder.read_events(), attempt)  # other nodes may have recorded events meanwhile
        text = failure_text(failure) if failure else ""
        cause = Cause.node_failed if is_lost else cause_of_failure(failure)
        text = problems_text("lost", group.lost.values()) if is_lost else text
        if verdict := find_verdict(folder):
            context.record("verdict", attempt=attempt, kind=verdict.kind, cause=verdict.sentence, fix=verdict.fix)
            text = f"{text}\n{verdict}"
    return apply_decision(context, attempt, cause, text, left=group.next_size)


def stop_details(stop: StopRequest) -> dict[str, str | None]:
    """Return the fields ``signal`` and ``file`` of the event ``stopped``, which name the request to stop.

    ``signal`` is the signal's name or another reason (``StopRequest.name``); None if nothing requested a stop. ``file``
    is None unless the file STOP requested the stop.
    """
    return {"signal": stop.name or None, "file": STOP_FILE if stop.name == STOP_FILE else None}


def apply_decision(
    context: RunContext, attempt: int | None, cause: Cause, text: str, *,
    left: int | None = None, step_has_ended: bool = False,
) -> Decision:  # fmt: skip
    """Record the end of an attempt, decide what follows, and do it. Returns the decision.

    Args:
        context: run and node.
        attempt: number of the attempt; None if the ranks had not started.
        cause: cause of the end.
        text: failure of the attempt, for people.
        left: number of nodes on which the agents can start the ranks again without a requeue; None if they cannot.
        step_has_ended: True if Slurm's step with the agents has ended.

    Raises:
        RunFailedError: the run ends unfinished, and neither a user nor the budget requested that.
        AlreadyDecidedError: another agent has recorded the end of the attempt.
    """
    refuse_decided(context, attempt)
    signal = (context.stop.name or None) if isinstance(context, AgentContext) else None
    details = {"signal": signal, "reason": text if step_has_ended else None}
    decision = end_attempt(context, context.node.job, attempt, cause, **details)
    action, reason = decision.action, decision.reason
    if action is Action.requeue and cause is Cause.requested and not context.node.is_slurm:
        action, reason = Action.restart, f"{reason}; there is no queue here"
    if action is Action.restart and left is None:
        why = "its step has ended" if step_has_ended else "the nodes that are left cannot start it again here"
        action, reason = Action.requeue, f"{reason}; {why}"
    elif action is Action.restart and left is not None and left < context.config.nodes:
        reason = f"{reason}; the run continues on {left} of {context.config.nodes} nodes"
    decision = Decision(action, reason)
    record_decision(context, attempt, cause, decision)
    if action is not Action.restart:
        # Pending spare jobs go first: a requeue may end this process. Those that run end with the agents.
        for event in context.events("spare_job_submitted", job=context.node.job):
            with suppress(scheduler.SlurmError):  # A job that is left finds no agents, and ends at once.
                scheduler.scancel(event["job_id"], "--state=PENDING")
    if action is Action.requeue:
        requeue_job(context, cause, hosts_to_avoid(context.events()), text)
    if action is Action.stop:
        cancel_next_job(context)
    if action is Action.stop and cause not in WANTED:
        raise RunFailedError(f"{text or f'the run was {cause}'}\nnot started again: {reason}")
    return decision


def end_attempt(context: RunContext, job: str, attempt: int | None, cause: Cause, **details: Any) -> Decision:
    """Record the event ``attempt_ended`` for an attempt of ``job``, and return the decision on what follows.

    The event has the last step of the attempt; None if the attempt made no step.

    Args:
        context: run and node.
        job: name of the start of the job in which the attempt ran.
        attempt: number of the attempt; None if no ranks had started.
        cause: cause of the end.
        details: further fields of the event.
    """
    last = (recent_records(context.folder.metrics(0)) or [{}])[-1]
    step = last["step"] if attempt is not None and last.get("attempt") == attempt else None
    context.record("attempt_ended", attempt=attempt, cause=cause, step=step, job=job, **details)
    return decide_next(context.events(), cause, context.config.resilience, can_resume(context.config))


def record_decision(context: RunContext, attempt: int | None, cause: Cause, decision: Decision) -> None:
    """Record the event ``decided``: the action that follows an attempt which ended for ``cause``, and the reason."""
    context.record("decided", attempt=attempt, action=decision.action, cause=cause, reason=decision.reason)


def refuse_decided(context: RunContext, attempt: int | None) -> None:
    """Raise AlreadyDecidedError if another agent, which lost contact with this one, has recorded the attempt's end."""
    for end in attempt_ends(context.events()):
        if end.get("job") == context.node.job and end["attempt"] == attempt:
            name = "this start of the job" if attempt is None else f"attempt {attempt}"
            raise AlreadyDecidedError(f"another agent has recorded the end of {name}, {end['cause']}, and decides")


# Ends of a start of the job that made no attempt: stopped early, killed with its job, too few nodes.


def handle_early_stop(context: RunContext, why: str) -> None:
    """Record a stop before any ranks ran, and requeue the job after a preemption or at its time limit.

    ``why`` is the reason for the event log. Does nothing except on the head node.

    Raises:
        RunFailedError: the job cannot be requeued, or Slurm's controller did not tell the cause of the stop.
    """
    if context.node.is_head:
        context.record("agent_stopped", node=context.node.index, cause=why)
        cause = cause_of_stop(context, attempt=None)
        if cause in LEAVES_THE_NODES:
            record_decision(context, None, cause, Decision(Action.requeue, f"{cause} before the ranks had started"))
            requeue_job(context, cause)


def close_lost_attempts(context: RunContext) -> None:
    """Record the end of the last attempt if that attempt was killed together with an earlier start of the job.

    Raises:
        RunFailedError: ``resilience`` does not allow another attempt.
    """
    lost = open_attempts(context.events())
    # "moved": a preempted run that waited for long, or the next job of a chain, continues as another job.
    if not lost or not (context.node.restarts or context.events("submitted", moved=True)):
        return
    attempt = lost[-1]
    cause = Cause.preempted if was_signalled(context.events(), attempt) else Cause.node_failed
    step = max((e["step"] for e in context.events("saved")), default=0)
    jobs = [e["job"] for e in context.events("agent_started") if e["job"] != context.node.job] or [context.node.job]
    reason = f"killed before it could save; continues from step {step}"
    decision = end_attempt(context, jobs[-1], attempt, cause, reason=reason)
    if decision.action is Action.stop:
        record_decision(context, attempt, cause, decision)
        raise RunFailedError(f"not started again: {decision.reason}")


def handle_too_few_nodes(context: AgentContext, error: TooFewNodesError) -> None:
    """Record, on the head node, that too few nodes are healthy, and requeue the job to get other nodes.

    Raises:
        RunFailedError: there is no queue, all nodes have the same fault, or ``resilience`` allows no further start.
    """
    if not error.sick:
        lost = context.group.lost.values()
        known = {e["host"] for e in context.events("node_lost")}
        context.record_problems("node_lost", None, [one for one in lost if one.host not in known])
        apply_decision(context, None, Cause.node_failed, f"{problems_text('lost', lost)}: {error}")
        return
    context.record_problems("node_sick", None, error.sick)
    found = problems_text("sick", error.sick)
    is_shared = all(one.is_shared for one in error.sick)
    hosts = ",".join(sorted({one.host for one in error.sick}))
    leave = f"cluster.exclude={hosts}, or spare_nodes=1; " if context.node.is_slurm else ""
    fix = f"{leave}resilience.health_check=false starts the ranks without the check"
    if is_shared:
        fix = f"df -h {shlex.quote(str(context.folder.path))}; or output_dir=FOLDER"
    needed = context.config.resilience.min_nodes or context.config.nodes
    refusal = ConfigError(found, f"{needed} healthy nodes, the first of the job among them", fix)
    context.record("start_refused", cause=str(refusal))
    # A fault of every node comes from the check itself or a shared filesystem: other nodes would have it too.
    is_everywhere = is_shared or len(error.sick) == context.node.count > 1
    apply_decision(context, None, Cause.refused if is_everywhere else Cause.node_failed, str(refusal))


def end_lost_agents(context: RunContext, lost: Collection[NodeProblem]) -> None:
    """Have Slurm end the step with the agents of lost nodes. The head node calls this after the end of the run.

    An agent that is stopped, or hangs in its kernel, never ends by itself. srun waits for every agent, so all nodes
    would stay allocated until the time limit. If the first node is lost, with the batch script and srun, no process
    would end the job. So the whole job is cancelled.
    """
    node, folder = context.node, context.folder
    if not (node.is_head and node.is_slurm and lost and has_stopped(context.events())):
        return
    has_no_script = any(one.index == 0 for one in lost) and not is_inside_job(folder)
    # launch.agent.hosts does not wait for lost agents.
    if is_replaced(folder, node) or not (has_no_script or context.config.cluster.by_srun):
        return
    step = "" if has_no_script else f".{node.job.rpartition('-')[2]}"
    details = {"job": node.job, "hosts": [one.host for one in lost]}
    context.record("step_ended", **details, cause=problems_text("lost", lost))  # This agent ends with the step.
    try:
        wait_for_controller(context, lambda: scheduler.scancel(f"{node.slurm_job}{step}"))
    except scheduler.SlurmError as error:
        context.record("step_not_ended", **details, cause=str(error))


# The end of a start of the job that an agent has not decided: the head node is lost, or the agents were killed.


def events_of(folder: RunFolder, node: Node) -> list[dict[str, Any]]:
    """Return the events since the agents of this start of the job began; empty if no agent has begun.

    Each requeue is another start of the job.
    """
    events = events_since_submission(folder.read_events())
    this_start = node.job.rpartition("-")[0] + "-"  # The agents of a batch script without a step have no such event.
    began = [e for e in select_events(events, "agent_started") if e["job"].startswith(this_start)]
    return events[events.index(began[-1]) :] if began else []


def pending_action(events: Sequence[dict[str, Any]], status: int) -> Action | None:
    """Return the action that is still to be done after the agents have ended; None if there is none.

    Returns ``requeue`` if an agent decided to requeue the job, but did not do so. Returns ``restart`` if the agents
    were killed before they decided.

    Args:
        events: events since the agents of this start of the job began.
        status: exit status of srun, or of ``launch.agent.hosts``.
    """
    if not events:  # The job was killed before the agents began. A refusal by the agents would come again.
        return Action.restart if status > KILLED else None
    if select_events(events, "requeue_failed") or select_events(events, "requeued", by=CHAIN):
        return None
    action = last_event(events, "decided", "started").get("action", Action.restart)  # "started" has no action
    if action != Action.restart:
        return Action.requeue if action == Action.requeue else None
    return None if select_events(events, "agent_ended") else Action.restart


def cut_short(context: RunContext, events: Sequence[dict[str, Any]]) -> tuple[int | None, Cause]:
    """Return the number of the attempt whose end no agent has recorded, and the cause of this end.

    The number is None if no ranks had started. ``events`` are the events since the agents of this start of the job
    began.

    Raises:
        RunFailedError: Slurm's controller did not tell the cause of a stop.
    """
    attempt = ([None, *open_attempts(events)])[-1]
    if attempt is not None and select_events(events, "finished", attempt=attempt):
        return attempt, Cause.finished
    if select_events(events, "budget_reached"):
        return attempt, Cause.budget
    if context.events("cancelled") or select_events(events, "agent_stopped") or was_signalled(events, attempt):
        return attempt, cause_of_stop(context, attempt)
    return attempt, Cause.node_failed


def was_signalled(events: Sequence[dict[str, Any]], attempt: int | None) -> bool:
    """Return whether an agent had received a request to stop during an attempt.

    The request ``JOINED``, after which the ranks start again with one more node, does not count.
    """
    return any(e["signal"] != JOINED for e in select_events(events, "signalled", attempt=attempt))


def take_over(context: AgentContext) -> bool:
    """Record the loss of the previous head node, and make the decision that the previous head node has not made.

    Runs on the next head node. Returns True if the ranks start again in this allocation.

    Raises:
        RunFailedError: the run ends unfinished.
    """
    node, events = context.node, events_of(context.folder, context.node)
    lost, action = [*context.group.lost.values()][-1:], pending_action(events, KILLED + 1)
    attempt, cause = cut_short(context, events)
    text = problems_text("lost", lost)
    context.record_problems("node_lost", attempt, lost)
    context.record("head_replaced", node=node.index, host=node.host, job=node.job, attempt=attempt, cause=text)
    if action is Action.requeue:
        requeue_job(context, Cause(last_event(events, "decided")["cause"]), hosts_to_avoid(events), text)
    if action is not Action.restart or (attempt is None and select_events(events, "decided")):
        return action is Action.restart
    # Agents that srun has not started end with their connection to the lost node. Then no process would end the job.
    left = context.group.next_size if context.config.cluster.by_srun else None
    return apply_decision(context, attempt, cause, text, left=left).action is Action.restart
