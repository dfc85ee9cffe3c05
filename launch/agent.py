"""The agent: one process on each node, which starts the ranks of a run, watches them, and says how they ended.

    python -m launch.agent RUN_DIR          what srun starts on every node; submitit calls ``run(RUN_DIR)``

Owns signals and the verdict of a node. The ranks themselves are torch elastic's, in ``launch.ranks``. Importing this
module loads no torch: the login node submits ``run`` by name.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from gpt.compose import read_config
from gpt.errors import ConfigError
from gpt.failure import first_failure
from gpt.run_folder import RunFolder
from launch import scheduler
from launch.config import Config
from launch.meeting import give_up
from launch.meter import BUDGET, Meter
from launch.node import Node
from launch.requeue import (
    LEAVES_THE_NODES,
    WANTED,
    Action,
    Cause,
    Decision,
    cause_of_failure,
    cause_of_signal,
    decide,
    since_submission,
)

TOKEN = "LAUNCH_TOKEN"
OWNER = "LAUNCH_OWNER_PID"
"""Process of the launcher that started a local run; without it the run stops too."""


class RunFailedError(RuntimeError):
    """A run whose ranks did not all finish."""


class StopRequest:
    """SIGTERM or SIGUSR2 ask the ranks to save and leave.

    Without Slurm a second one ends them at once (Ctrl-C twice). Slurm sends several by itself: there only the deadline
    ends them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.since = 0.0
        self.interruptible = False
        """Whether to break out of a wait in which there are no ranks to ask."""

    def install(self) -> None:
        """Replace submitit's handlers, which would requeue from inside the handler and on rank 0 only."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if self.interruptible:
            raise InterruptedError(f"{self.name} before the ranks had started")

    def ask(self, name: str) -> None:
        """Note that the run should stop, and why."""
        self.count += 1
        if self.count == 1:
            self.name, self.since = name, time.monotonic()


def run(run_dir: str) -> None:
    """Take this node's part in the run of ``run_dir``, to its end, over as many starts as its limits allow.

    Raises:
        RunFailedError: the run failed and does not start again.
    """
    stop = StopRequest()
    stop.install()
    folder = RunFolder(run_dir)
    config = read_config(folder, Config)
    node = Node.from_env(os.environ.get(TOKEN))
    with Meter(folder, node, config) as meter:
        take_part(folder, node, config, stop, meter)


def take_part(folder: RunFolder, node: Node, config: Config, stop: StopRequest, meter: Meter) -> None:
    """Start the ranks of this node until they are done, or must not start again.

    Raises:
        RunFailedError: the run failed, or has no budget left.
    """
    if node.index == 0:
        refuse_without_budget(folder, node, meter)
        settle_lost_attempts(folder, node, config)
    from launch import ranks  # torch, from here on

    meetings = []  # the first node's stores stay open for nodes that are still leaving the start before
    for start in itertools.count():
        try:
            stop.interruptible = True
            meetings.append(ranks.meet(folder, node, config, start))
            verdict = ranks.run_ranks(folder, node, config, meetings[-1], stop, meter)
        except InterruptedError as error:
            leave_before_the_start(folder, node, config, str(error))
            return
        finally:
            stop.interruptible = False
        ended = ending(folder, meetings[-1].attempt, verdict, stop)
        if node.index == 0:
            if conclude(folder, node, config, meetings[-1].attempt, ended, stop).action is not Action.restart:
                return
        elif ended is not Cause.crashed:
            return


def refuse_without_budget(folder: RunFolder, node: Node, meter: Meter) -> None:
    """Raise RunFailedError where the ranks would have to be stopped as soon as they have started."""
    why = meter.look_now()
    if why is not None:
        give_up(folder, node, why)
        raise RunFailedError(f"not started: {why}")


def leave_before_the_start(folder: RunFolder, node: Node, config: Config, why: str) -> None:
    """Told to stop while there were no ranks yet: nothing is to be saved, but a preempted job must come back."""
    folder.record_event("agent_stopped", node=node.index, cause=why)
    if node.index == 0:
        cause = why_told_to_stop(folder, node, config, attempt=None)
        if cause in LEAVES_THE_NODES:
            requeue(folder, node, config, cause)


def settle_lost_attempts(folder: RunFolder, node: Node, config: Config) -> None:
    """Enter the end of an attempt that was killed with its job, before this start of the job goes on from it.

    Raises:
        RunFailedError: the limits are used up.
    """
    events = since_submission(folder.read_events())
    ended = {e["attempt"] for e in events if e["event"] == "attempt_ended"}
    lost = [e["attempt"] for e in events if e["event"] == "started" and e["attempt"] not in ended]
    if not lost or not node.restarts:
        return
    told = any(e["event"] == "signalled" and e.get("attempt") == lost[-1] for e in events)
    cause = Cause.preempted if told else Cause.node_failed
    saved = [e["step"] for e in events if e["event"] == "saved"]
    reason = f"killed before it could save; goes on from step {max(saved, default=0)}"
    folder.record_event("attempt_ended", attempt=lost[-1], cause=cause, reason=reason)
    limits = config.resilience
    decision = decide(since_submission(folder.read_events()), cause, limits.max_restarts, limits.max_without_progress)
    if decision.action is Action.stop:
        text = f"not started again: {decision.reason}"
        give_up(folder, node, text)
        raise RunFailedError(text)


def ending(folder: RunFolder, attempt: int, verdict: str | None, stop: StopRequest) -> Cause:
    """How an attempt ended, as far as every node can tell: ``finished``, ``cancelled`` (told to stop), or ``crashed``.

    What the ranks wrote into the ledger is compared with how they exited; ``verdict`` is None where all left with 0.
    """
    events = [e for e in folder.read_events() if e.get("attempt") == attempt]
    names = {e["event"] for e in events}
    if verdict is None and "finished" in names:
        return Cause.finished
    if stop.count or (verdict is None and "stopped" in names):
        return Cause.cancelled
    return Cause.crashed


def conclude(folder: RunFolder, node: Node, config: Config, attempt: int, ended: Cause, stop: StopRequest) -> Decision:
    """On the first node: find the cause, decide, tell the other nodes, and put the job back into the queue if need be.

    Raises:
        RunFailedError: the run does not go on although it did not finish, and nobody asked for that.
    """
    failure = None
    cause = ended
    if ended is Cause.cancelled:
        note_unsaved_stop(folder, attempt, stop)
        cause = Cause.budget if stop.name == BUDGET else why_told_to_stop(folder, node, config, attempt)
    elif ended is Cause.crashed:
        failure = first_failure(folder.read_events(), attempt)
        cause = cause_of_failure(failure)
    folder.record_event("attempt_ended", attempt=attempt, cause=cause, signal=stop.name or None)
    events = since_submission(folder.read_events())
    limits = config.resilience
    decision = decide(events, cause, limits.max_restarts, limits.max_without_progress)
    folder.record_event("decided", attempt=attempt, action=decision.action, reason=decision.reason)
    if decision.action is Action.requeue:
        requeue(folder, node, config, cause)
    if decision.action is Action.stop and cause not in WANTED:
        text = failure_text(failure) if failure else f"the run was {cause}"
        told = f"{text}\nnot started again: {decision.reason}"
        give_up(folder, node, told)
        raise RunFailedError(told)
    return decision


def note_unsaved_stop(folder: RunFolder, attempt: int, stop: StopRequest) -> None:
    """Say in the ledger where the ranks were ended before they could save."""
    if not any(e["event"] == "stopped" and e.get("attempt") == attempt for e in folder.read_events()):
        why = "ended before it could save"
        folder.record_event("stopped", attempt=attempt, step=None, signal=stop.name, cause=why)


def why_told_to_stop(folder: RunFolder, node: Node, config: Config, attempt: int | None) -> Cause:
    """Tell a preemption from a time limit and from a cancel: all three arrive as the same signals."""
    events = since_submission(folder.read_events())
    by_hand = any(e["event"] == "cancelled" for e in events)
    by_file = any(e["event"] == "stopped" and e.get("attempt") == attempt and e.get("file") for e in events)
    if by_hand or by_file or not node.is_slurm:
        return Cause.cancelled
    return cause_of_signal(
        scheduler.job_details(node.slurm_job), node.restarts, config.cluster.signal_delay_s, time.time()
    )


def requeue(folder: RunFolder, node: Node, config: Config, cause: Cause) -> None:
    """Put this job, or this one element of its array, back into the queue, unless Slurm has done so already."""
    if not node.is_slurm or not config.resilience.requeue:
        raise RunFailedError(f"{cause}, and not requeued (resilience.requeue={config.resilience.requeue})")
    if scheduler.job_details(node.slurm_job).restarts > node.restarts:
        folder.record_event("requeued", job_id=node.slurm_job, by="slurm", cause=cause)
        return
    # First the ledger: Slurm may kill this process as soon as it has heard of the requeue.
    folder.record_event("requeued", job_id=node.slurm_job, by="agent", cause=cause)
    try:
        scheduler.requeue(node.slurm_job)
    except scheduler.SlurmError as error:
        folder.record_event("requeue_failed", job_id=node.slurm_job, cause=str(error))
        raise RunFailedError(f"{cause}, and Slurm did not requeue it: {error}") from error


def failure_text(failure: dict[str, Any]) -> str:
    """The first failure of a run, for people: who, where, why, and where to read on."""
    step = f" after step {failure['step']}" if failure.get("step") is not None else ""
    head = f"rank {failure['rank']} on {failure['host']} failed first{step}: {failure['cause']}"
    trace = str(failure.get("traceback") or "").rstrip()
    return "\n".join(part for part in (head, trace, f"log: {failure['log']}") if part)


def main() -> int:
    """Run the agent of this node. Exit status 1 where the run failed, 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m launch.agent", description="Run this node's ranks of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, on a filesystem all nodes share")
    try:
        run(str(Path(parser.parse_args().run_dir).absolute()))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
