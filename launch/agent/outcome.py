"""Handling of the end of an attempt: its cause, and a restart, a requeue, a takeover, or the end of the run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from launch.agent.health import (
    LostNode,
    RendezvousRound,
    SickNode,
    describe,
    lost_text,
    record_lost_nodes,
    record_sick_nodes,
)
from launch.agent.node import STOP_FILE, AgentContext, Node, RunContext, StopRequest
from launch.agent.policy import (
    BUDGET,
    LEAVES_THE_NODES,
    NO_HOSTS,
    WANTED,
    Action,
    Cause,
    Decision,
    Meter,
    RunFailedError,
    RunSettledError,
    attempt_ends,
    cause_of_failure,
    cause_of_signal,
    decide,
    hosts_to_avoid,
    points_beside,
    reasons,
)
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.runs.environment import DUMP_FILE, dumped_ranks
from launch.runs.events import failure_text, first_failure
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records
from launch.slurm import client as scheduler

if TYPE_CHECKING:
    from launch.agent.rendezvous import AgentGroup


# Questions of an agent to the controller: why it was told to stop, and putting its job back into the queue.


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


def cause_of_stop(context: RunContext, attempt: int | None) -> Cause:
    """Tell a preemption from a time limit and from a cancel: all three arrive as the same signals.

    Raises:
        RunFailedError: the controller does not know the job, or did not answer for hours.
    """
    events = context.events()
    by_hand = any(e["event"] == "cancelled" for e in events)
    by_file = any(e["event"] == "stopped" and e.get("attempt") == attempt and e.get("file") for e in events)
    if by_hand or by_file or not context.node.is_slurm:
        return Cause.cancelled
    signalled_at = time.time()  # the answer may come much later
    try:
        job = wait_for_controller(context.folder, lambda: scheduler.job_details(context.node.slurm_job))
    except scheduler.SlurmError as error:
        raise failed_to_requeue(context, "told to stop", str(error)) from error
    return cause_of_signal(job, context.node.restarts, context.config.cluster.signal_delay_s, signalled_at)


def requeue(
    context: RunContext,
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
    if not context.node.is_slurm or not context.config.resilience.requeue:
        why = "there is no queue here" if not context.node.is_slurm else "resilience.requeue=false"
        raise failed_to_requeue(context, text or cause, f"{cause}, and {why}")
    told = False

    def put_back() -> None:
        nonlocal told
        by_slurm = scheduler.job_details(context.node.slurm_job).restarts > context.node.restarts
        if not told:
            # First the event log: Slurm may kill this process as soon as it has heard of the requeue.
            by = "slurm" if by_slurm else "agent"
            context.record("requeued", job_id=context.node.slurm_job, by=by, cause=cause)
            told = True
        if not by_slurm:  # nor done by a question whose answer was lost
            scheduler.requeue(context.node.slurm_job)

    try:
        wait_for_controller(context.folder, put_back)
    except scheduler.SlurmError as error:
        raise failed_to_requeue(context, text or cause, f"Slurm did not requeue it: {error}") from error
    if exclude:
        keep_away(context, exclude)


def failed_to_requeue(context: RunContext, text: str, why: str) -> RunFailedError:
    """Enter into the event log why a run that should go on does not, and return the error that says so."""
    context.record("requeue_failed", job_id=context.node.slurm_job or None, cause=why)
    return RunFailedError(f"{text}\nnot started again: {why}")


def keep_away(context: RunContext, hosts: Mapping[str, str]) -> None:
    """Have Slurm exclude hosts from the job that was just requeued, where it then still has nodes to run on."""

    def exclude() -> str | None:
        left = scheduler.usable_nodes(context.node.slurm_job) - set(hosts)
        if len(left) < context.config.nodes_asked:
            return f"only {len(left)} nodes of its partition would be left, and it needs {context.config.nodes_asked}"
        scheduler.exclude(context.node.slurm_job, list(hosts))
        return None

    try:
        why_not = wait_for_controller(context.folder, exclude)
    except scheduler.SlurmError as error:
        why_not = str(error)
    if why_not is None:
        context.record("excluded", hosts=list(hosts), job_id=context.node.slurm_job, cause=reasons(hosts))
    else:
        context.record("not_excluded", hosts=list(hosts), cause=f"{why_not} ({reasons(hosts)})")


# Handling of the end of an attempt: the cause in the event log, and a restart, a requeue, or the end of the run.


def refuse_without_budget(meter: Meter) -> None:
    """Raise RunFailedError where the ranks would have to be stopped as soon as they have started."""
    why = meter.poll_now()
    if why is not None:
        raise RunFailedError(f"not started: {why}")


def handle_early_stop(context: RunContext, why: str) -> None:
    """Told to stop while there were no ranks here: nothing is to be saved, but a preempted job must come back."""
    if context.node.is_head:
        context.record("agent_stopped", node=context.node.index, cause=why)
        cause = cause_of_stop(context, attempt=None)
        if cause in LEAVES_THE_NODES:
            decision = Decision(Action.requeue, f"{cause} before the ranks had started")
            record_decision(context.folder, None, cause, decision)
            requeue(context, cause)


def close_lost_attempts(context: RunContext) -> None:
    """Enter the end of an attempt that was killed with its job, before this start of the job goes on from it.

    Raises:
        RunFailedError: the limits are used up.
    """
    events = context.events()
    ended = {e["attempt"] for e in events if e["event"] == "attempt_ended"}
    lost = [e["attempt"] for e in events if e["event"] == "started" and e["attempt"] not in ended]
    moved = any(e["event"] == "moved" for e in events)  # a preempted run that waited for long: another job goes on
    if not lost or not (context.node.restarts or moved):
        return
    told = any(e["event"] == "signalled" and e.get("attempt") == lost[-1] for e in events)
    cause = Cause.preempted if told else Cause.node_failed
    saved = [e["step"] for e in events if e["event"] == "saved"]
    reason = f"killed before it could save; goes on from step {max(saved, default=0)}"
    before = [e["job"] for e in events if e["event"] == "agent_started" and e["job"] != context.node.job]
    job = before[-1] if before else context.node.job
    record_attempt_end(context.folder, job, lost[-1], cause, reason=reason)
    decision = decide_next(context, cause)
    if decision.action is Action.stop:
        record_decision(context.folder, lost[-1], cause, decision)
        raise RunFailedError(f"not started again: {decision.reason}")


def record_attempt_end(folder: RunFolder, job: str, attempt: int | None, cause: Cause, **details: Any) -> None:
    """Enter the end of an attempt, and the last step it made: None where it came to no step.

    Args:
        job: the start of the job that it belongs to.
        attempt: None where the ranks had not started.
    """
    last = (recent_records(folder.metrics(0)) or [{}])[-1]
    step = last["step"] if attempt is not None and last.get("attempt") == attempt else None
    folder.record_event("attempt_ended", attempt=attempt, cause=cause, step=step, job=job, **details)


def record_decision(folder: RunFolder, attempt: int | None, cause: Cause, decision: Decision) -> None:
    """Enter what follows an attempt, and why."""
    folder.record_event("decided", attempt=attempt, action=decision.action, cause=cause, reason=decision.reason)


def decide_next(context: RunContext, cause: Cause) -> Decision:
    """Decide what follows an attempt whose end, for ``cause``, is the last thing in the event log."""
    limits = context.config.resilience
    resumes = workload_of(context.config).contract(context.config, context.config.world_size).resumes
    events = context.events()
    return decide(
        events, cause, limits.max_restarts, limits.max_without_progress, resumes, forgive_after_s=limits.forgive_after_s
    )


def observed_end(folder: RunFolder, attempt: int, problem: str | None, stop: StopRequest) -> Cause:
    """The end of an attempt as far as every node can tell: ``finished``, ``cancelled`` (told to stop), or ``crashed``.

    What the ranks wrote into the event log is compared with how they exited; ``problem`` is None where all left with 0.
    """
    events = [e for e in folder.read_events() if e.get("attempt") == attempt]
    names = {e["event"] for e in events}
    asked = any(e.get("asks_for_requeue") for e in events)  # of some ranks, while those of other nodes left with 0
    if problem is None and "finished" in names and not asked:
        return Cause.finished
    if problem is None and asked and not stop.count:
        return Cause.requested
    if stop.count or (problem is None and "stopped" in names):
        return Cause.cancelled
    return Cause.crashed


def handle_attempt_end(context: AgentContext, rdzv: RendezvousRound, ended: Cause) -> Decision:
    """On the head node: find the cause, decide, and put the job back into the queue if need be.

    Raises:
        RunFailedError: the run does not go on although it did not finish, and nobody asked for that.
    """
    refuse_replaced(context)
    refuse_settled(context, rdzv.attempt)
    group, stop = context.group, context.stop
    failure = None
    cause = ended
    if ended is Cause.cancelled:
        record_unsaved_stop(context.folder, rdzv.attempt, stop)
        cause = Cause.budget if stop.name == BUDGET else cause_of_stop(context, rdzv.attempt)
    elif ended is Cause.crashed:
        failure = first_failure(context.folder.read_events(), rdzv.attempt)
        record_dumps(context.folder, rdzv.attempt)
        cause = cause_of_crash(context.folder, group, rdzv, failure)
    text = lost_text(group.lost.values()) if cause is Cause.node_failed else failure_text(failure) if failure else ""
    return apply_decision(context, rdzv.attempt, cause, text, signal=stop.name or None)


def refuse_replaced(context: RunContext) -> None:
    """Raise RunFailedError where Slurm has started the job elsewhere while this node was cut off from it.

    Two agents that both think the run theirs would start it again and again under each other's hands.
    """
    starts = [e["job"] for e in context.folder.read_events() if e["event"] == "agent_started"]
    if starts and starts[-1] != context.node.job:
        raise RunFailedError(f"{starts[-1]} works on this run now; {context.node.job} was left over")


def cause_of_crash(
    folder: RunFolder, group: AgentGroup, rdzv: RendezvousRound, failure: dict[str, Any] | None
) -> Cause:
    """Tell a lost node from a rank that failed: where ranks only lost their connections, something else broke them."""
    lost = any(index in group.lost for index in rdzv.members)
    if not lost and (failure is None or failure.get("echo")):
        found = group.find_reason(rdzv)
        record_lost_nodes(folder, rdzv.attempt, found)
        lost = bool(found)
    return Cause.node_failed if lost else cause_of_failure(failure)


def apply_decision(
    context: RunContext, attempt: int | None, cause: Cause, text: str, *, signal: str | None = None,
    in_step: bool = True,
) -> Decision:  # fmt: skip
    """Record the end of an attempt, decide what follows, and do it.

    Args:
        context: an AgentContext where the agents can start the ranks again in place.
        attempt: None where the ranks had not started.
        cause: of the end.
        text: what went wrong, for people.
        signal: name of the signal that stopped the ranks.
        in_step: False after Slurm's step has ended, where nothing can start in place.

    Raises:
        RunFailedError: the run ends without being finished, and no user requested that; or another agent has decided.
    """
    group = context.group if isinstance(context, AgentContext) else None
    refuse_settled(context, attempt)
    record_attempt_end(
        context.folder, context.node.job, attempt, cause, signal=signal, reason=None if in_step else text
    )
    events = context.events()
    decision = decide_next(context, cause)
    if decision.action is Action.requeue and cause is Cause.requested and not context.node.is_slurm:
        decision = Decision(Action.restart, f"{decision.reason}; there is no queue here")
    if decision.action is Action.restart and (group is None or not group.can_go_on):
        why = "too few nodes are left to start again here" if in_step else "its step has ended"
        decision = Decision(Action.requeue, f"{decision.reason}; {why}")
    elif decision.action is Action.restart and group is not None:
        left, wanted = group.next_size or 0, context.config.nodes
        if left < wanted:
            decision = Decision(decision.action, f"{decision.reason}; {left} of {wanted} nodes go on")
    record_decision(context.folder, attempt, cause, decision)
    if decision.action is Action.requeue:
        requeue(context, cause, hosts_to_avoid(events, points_beside(context.folder)), text)
    if decision.action is Action.stop and cause not in WANTED:
        raise RunFailedError(f"{text or f'the run was {cause}'}\nnot started again: {decision.reason}")
    return decision


def refuse_settled(context: RunContext, attempt: int | None) -> None:
    """Raise RunSettledError where another agent, which took this one for lost, has entered the end of the attempt."""
    for end in attempt_ends(context.events()):
        if end.get("job") == context.node.job and end["attempt"] == attempt:
            name = "this start of the job" if attempt is None else f"attempt {attempt}"
            raise RunSettledError(f"another agent has entered the end of {name}, {end['cause']}, and decides")


def handle_missing_nodes(context: AgentContext, why: str) -> None:
    """On the head node: there are too few nodes left for a round.

    Raises:
        RunFailedError: the job cannot be requeued, or its limits are used up.
    """
    known = {e["host"] for e in context.events() if e["event"] == "node_lost"}
    lost = context.group.lost.values()
    record_lost_nodes(context.folder, None, [one for one in lost if one.host not in known])
    apply_decision(context, None, Cause.node_failed, f"{lost_text(lost)}: {why}")


def handle_sick_nodes(context: RunContext, sick: Sequence[SickNode]) -> None:
    """On the head node: too few of the nodes are healthy for a start. The queue may have others.

    Raises:
        RunFailedError: it has none, all nodes are sick alike, or its limits are used up.
    """
    record_sick_nodes(context.folder, None, sick)
    hosts = ",".join(sorted({one.host for one in sick}))
    leave = f"cluster.exclude={hosts}, or spare_nodes=1; " if context.node.is_slurm else ""
    refusal = ConfigError(
        "; ".join(f"node {one.host} is sick: {describe(one.faults)}" for one in sick),
        f"{context.config.resilience.min_nodes or context.config.nodes} healthy nodes, the first of the job among them",
        f"{leave}resilience.health_check.enabled=false starts the ranks all the same",
    )
    context.record("start_refused", cause=str(refusal))
    # What every node finds is the check's own fault, or that of a filesystem they share: so would other nodes.
    is_everywhere = len(sick) == context.node.count > 1 or all(fault.is_shared for one in sick for fault in one.faults)
    cause = Cause.refused if is_everywhere else Cause.node_failed
    apply_decision(context.alone(), None, cause, str(refusal))


def end_lost_agents(context: RunContext, lost: Collection[LostNode]) -> None:
    """On the head node, where the run is over: have Slurm end the step, with agents from which nothing was heard.

    One that is stopped, or hangs in its kernel, never learns that the run is over, and would hold all nodes of the job
    to its time limit: srun waits for every agent.
    """
    node = context.node
    decided = [e for e in context.events() if e["event"] == "decided"]
    if not (node.is_head and node.is_slurm and lost and decided and decided[-1]["action"] == Action.stop):
        return
    hosts = [one.host for one in lost]
    context.record("step_ended", job=node.job, hosts=hosts, cause=lost_text(lost))  # this agent ends with the step
    try:
        scheduler.cancel(node.slurm_step)
    except scheduler.SlurmError as error:
        context.record("step_not_ended", job=node.job, hosts=hosts, cause=str(error))


def record_unsaved_stop(folder: RunFolder, attempt: int, stop: StopRequest) -> None:
    """Say in the event log where the ranks were ended before they could save."""
    if not any(e["event"] == "stopped" and e.get("attempt") == attempt for e in folder.read_events()):
        asked = {"signal": stop.name, "file": STOP_FILE if stop.name == STOP_FILE else None}
        folder.record_event("stopped", attempt=attempt, step=None, cause="ended before it could save", **asked)
    if stop.name == STOP_FILE:  # so that the next start does not obey it again
        (folder.path / STOP_FILE).unlink(missing_ok=True)


def record_dumps(folder: RunFolder, attempt: int) -> None:
    """Name in the event log the ranks whose flight recorder has written its last collectives, and how to read them."""
    ranks = dumped_ranks(folder.attempt(attempt))
    if ranks:
        how = f"torchfrtrace --prefix {DUMP_FILE.value} {shlex.quote(str(folder.attempt(attempt)))}"
        folder.record_event("flight_recorder", attempt=attempt, ranks=ranks, cause=f"a collective timed out: {how}")


# Takeover of a job whose head node is lost: the next node that is there puts it into the queue.


TAKE_OVER_S = 3.0
"""Time that each node leaves to the one before it."""


def take_over_as_leader(context: RunContext, why: str, known: int | None) -> None:
    """On another node: the head node, which decides, is lost. The next node that is there puts the job into the queue.

    Args:
        known: newest attempt that the head node has announced to this one; None where it has announced none.

    Raises:
        RunFailedError: always where this node could do nothing more; the job's end is the head node's.
    """
    time.sleep(TAKE_OVER_S * (context.node.index - 1))  # those before this one come first
    if not context.node.is_slurm:
        raise RunFailedError(f"the head node, {context.node.host_of(0)}, is lost: {why}")
    events = context.events()
    if is_given_up(events, context.node):
        raise RunFailedError(f"{context.node.host} was cut off, and the others go on without it: {why}")
    attempt = orphaned_attempt(events, context.node, known)
    context.record("node_lost", attempt=attempt, node=0, host=context.node.host_of(0), cause=why)
    try:
        text = f"node {context.node.host_of(0)} is lost: {why}"
        apply_decision(context.alone(), attempt, Cause.node_failed, text)
    except RunSettledError:
        raise
    except RunFailedError:
        # Nobody else would end what is left of the job.
        wait_for_controller(context.folder, lambda: scheduler.cancel(context.node.slurm_job))
        raise


def is_given_up(events: Sequence[dict[str, Any]], node: Node) -> bool:
    """Tell whether the head node of this start of the job takes this node for lost: then it works on, and decides."""
    began = max((number for number, e in enumerate(events) if e["event"] == "agent_started"), default=0)
    return any(e["event"] == "node_lost" and e["host"] == node.host for e in events[began:])


def orphaned_attempt(events: Sequence[dict[str, Any]], node: Node, known: int | None) -> int | None:
    """Return the attempt that a lost head node has left to its other nodes; None where it fell between two attempts.

    Args:
        events: the event log since the submission.
        known: newest attempt that the head node has announced to this one; None where it has announced none.

    Raises:
        RunFailedError: the head node has gone on without this one, which was cut off, or has decided what follows.
    """
    begun = [i for i, e in enumerate(events) if e["event"] == "agent_started" and e["job"] == node.job]
    events = events[begun[-1] :] if begun else events
    started = max((e["attempt"] for e in events if e["event"] == "started"), default=None)
    if started is not None and (known is None or started > known):
        raise RunFailedError(f"attempt {started} was started without {node.host}, which had been cut off")
    if not any(e["event"] == "attempt_ended" and e["attempt"] == known for e in events):
        return known
    decided = [e["action"] for e in events if e["event"] == "decided"]
    if decided and decided[-1] == Action.restart:
        return None
    raise RunFailedError(f"the head node, {node.host_of(0)}, is lost, and has decided what follows attempt {known}")
