"""Monitoring of an agent's ranks while they run: requests to stop, hung ranks, lost nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent import node as processes
from launch.agent.exchange import Agreement
from launch.agent.health import record_lost_nodes
from launch.agent.node import OWNER, STOP_FILE, AgentContext
from launch.agent.policy import BUDGET
from launch.config import ResilienceConfig
from launch.runs import heartbeat
from launch.runs.events import enter_failure
from launch.runs.heartbeat import HeartbeatFile, Phase, RankHeartbeat

if TYPE_CHECKING:
    from launch.agent.ranks import RankAgent, Round


# Hang detector: finds ranks of this node that have stopped, frozen as a whole, or without progress.


SLOW = (Phase.starting, Phase.saving, Phase.leaving)
PAUSED_S = 5.0
STACK_SIGNAL = signal.SIGQUIT
"""Ranks answer it by writing the stacks of all their threads into their log (faulthandler)."""
STACK_BEGUN = b"(most recent call first)"
"""What the first line of each thread ends with."""
STACK_WAIT_S = 3.0
"""For the first line."""
STACK_END_S = 20.0
"""For the last one, on a node with more to do than cores to do it."""
NEARLY = 0.8
"""Share of its limit after which a silent rank is named beside the one that reached it."""


@dataclass(frozen=True)
class StuckRank:
    """A rank that does not go on."""

    rank: int
    pid: int
    step: int | None
    """Steps it had done; None where it never got as far as telling."""
    why: str
    since: float
    """Time of its last progress, Unix time."""
    has_stacks: bool = True
    """True where it would answer to being asked for its stacks; SIGQUIT ends any other process, with a core file."""


class Watchdog:
    """Reads the heartbeats of this node's ranks.

    Args:
        folder: the heartbeat files of the ranks, none of them older than this start.
        limits: how long each kind of silence may last.
        logs: what each rank prints.
        must_attach: whether a rank that gives no heartbeat is late after ``startup_and_save_timeout_s``. Without it
            such a rank knows nothing of the launcher, and only its log speaks for it.
        silence_timeout_s: how long the log of such a rank may stand still; None: for ever.
    """

    def __init__(
        self,
        folder: Path,
        limits: ResilienceConfig,
        logs: Mapping[int, Path] | None = None,
        must_attach: bool = True,
        silence_timeout_s: float | None = None,
    ) -> None:
        self._folder = folder
        self._limits = limits
        self._logs = logs or {}
        self._must_attach = must_attach
        self._silence_timeout_s = silence_timeout_s
        self._started = self._polled = time.monotonic()
        self._printed: dict[int, tuple[int, float]] = {}
        """Size of each rank's log, and when it last grew."""

    def poll(self, ranks: Mapping[int, int], share: float = 1.0) -> list[StuckRank]:
        """Those of ``ranks`` (rank: process id) that have been silent for ``share`` of their limit, longest first.

        After a pause of this process itself (``scontrol suspend`` stops all alike) every limit begins anew.
        """
        now = time.monotonic()
        if now - self._polled > PAUSED_S:
            self._started = now
        self._polled = now
        found = [self._check(rank, pid, now, share) for rank, pid in ranks.items()]
        return sorted((stuck for stuck in found if stuck is not None), key=lambda stuck: stuck.since)

    def _check(self, rank: int, pid: int, now: float, share: float) -> StuckRank | None:
        last = heartbeat.read(self._folder / str(rank))
        if last is None:
            return self._check_start(rank, pid, now, share) or self._check_log(rank, pid, now, share)
        # The process that gives heartbeats is the rank itself also where a wrapper stands between it and the agent.
        frozen = now - max(last.ran_at, self._started)
        if frozen > self._limits.heartbeat_timeout_s * share:
            state = "stopped" if processes.is_stopped(last.pid) else "frozen"
            return _stuck(rank, last.pid, last.step, f"{state}: the process has not run for {frozen:.0f} s", frozen)
        silent = now - max(last.moved_at, self._started)
        if last.moved_at and silent > self._limit(last) * share:
            why = f"hung: no progress for {silent:.0f} s while {last.phase.name}"
            return _stuck(rank, last.pid, last.step, why, silent)
        return None

    def _check_start(self, rank: int, pid: int, now: float, share: float) -> StuckRank | None:
        silent = now - self._started
        if not self._must_attach or silent <= self._limits.startup_and_save_timeout_s * share:
            return None
        return StuckRank(rank, pid, None, f"not started after {silent:.0f} s", time.time() - silent, has_stacks=False)

    def _check_log(self, rank: int, pid: int, now: float, share: float) -> StuckRank | None:
        if self._silence_timeout_s is None or rank not in self._logs:
            return None
        size = _size(self._logs[rank])
        known = self._printed.get(rank)
        if known is None or size != known[0]:
            self._printed[rank] = (size, now)
            return None
        silent = now - max(known[1], self._started)
        if silent <= self._silence_timeout_s * share:
            return None
        why = f"hung: nothing printed for {silent:.0f} s"
        return StuckRank(rank, pid, None, why, time.time() - silent, has_stacks=False)

    def _limit(self, last: RankHeartbeat) -> float:
        return self._limits.startup_and_save_timeout_s if last.phase in SLOW else self._limits.hang_timeout_s


def _stuck(rank: int, pid: int, step: int | None, why: str, silent: float) -> StuckRank:
    return StuckRank(rank, pid, step, why, time.time() - silent)


def stack_of(pid: int, log: Path) -> str:
    """The stacks of a rank's threads, by having it write them into its log; empty where it does not answer.

    A stopped process answers when it goes on: it is continued, and the caller must end it right after.
    """
    before, blocking = _size(log), processes.threads_blocking(pid, STACK_SIGNAL)
    try:
        os.kill(pid, STACK_SIGNAL)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    asked = time.monotonic()
    while True:
        time.sleep(0.05)
        # Looked at before the log is read: what was written until then is all there.
        gone = processes.is_gone(pid)
        handles = processes.is_pending(pid, STACK_SIGNAL) or processes.threads_blocking(pid, STACK_SIGNAL) - blocking
        with log.open("rb") as file:
            file.seek(before)
            answer = file.read()
        begun = STACK_BEGUN in answer
        if gone or (begun and not handles) or time.monotonic() - asked > (STACK_END_S if begun else STACK_WAIT_S):
            return answer.decode(errors="replace").strip()


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


# Monitoring of an agent's ranks while they run: requests to stop, ranks that are stuck, nodes that are lost.


STOP_FILE_S = 1.0  # a look asks a shared filesystem


class Watch:
    """Conditions that an agent polls several times a second, besides the exit of its ranks."""

    def __init__(self, context: AgentContext, start: Round) -> None:
        folder, config, group, node = context.folder, context.config, context.group, context.node
        rdzv, contract, heartbeats = start.rdzv, start.contract, start.heartbeats
        self._folder = folder
        self._node = node
        self._group = group
        self._round = rdzv
        self._stop = context.stop
        self._meter = context.meter
        ranks = rdzv.ranks(node.index, config.ranks_on_node)
        logs = {rank: folder.log(rdzv.attempt, rank) for rank in ranks}
        # Ranks that write their end into the event log have a heartbeat too, so a rank without one is late.
        self._watchdog = Watchdog(
            heartbeats, config.resilience, logs, contract.records_events, contract.silence_timeout_s
        )
        files = [HeartbeatFile(heartbeats / str(rank)) for rank in ranks]
        self._agreement = Agreement(rdzv.number, node.index, rdzv.members, files)
        group.heartbeat.conversation = self._agreement
        self._heartbeats = [heartbeats / str(rank) for rank in ranks]
        self._looked_for_file = 0.0
        self._grace_s = config.resilience.grace_period_s
        self._stop_signal = signal.Signals[contract.stop_signal]
        self._asked = False
        self.kill_reason: str | None = None
        """Reason for which this agent ended its ranks; None where it did not."""

    def poll(self, agent: RankAgent) -> None:
        """Hand a request to stop on, and end the ranks where they outstay it, are stuck, or have lost their peers."""
        self._stop.interruptible = False
        owner = os.environ.get(OWNER)
        if owner and not self._stop.count and processes.is_gone(int(owner)):
            self._stop.ask("the launcher is gone")
        if self._meter.poll(is_leaving=bool(self._stop.count)):
            self._stop.ask(BUDGET)
        if self._finds_stop_file():
            self._stop.ask(STOP_FILE)
        if self._stop.count:
            self._stop_ranks(agent)
        elif self.kill_reason is None:
            self.kill_reason = self._find_stuck(agent) or self.find_lost()
            if self.kill_reason is not None:
                self._group.tell_failed(self._round.number)
        if self.kill_reason is None and self._group.has_failed(self._round.number):
            self.kill_reason = "another node failed"
            self._find_stuck(agent, NEARLY)
        if self.kill_reason is not None:
            agent.send(signal.SIGKILL)

    def _finds_stop_file(self) -> bool:
        """Tell whether somebody has put a file STOP into the run folder of ranks that do not look for it themselves.

        Every agent looks, as a program that knows nothing of the launcher has only its own agent to tell it.
        """
        now = time.monotonic()
        if self._stop.count or now - self._looked_for_file < STOP_FILE_S:
            return False
        self._looked_for_file = now
        heard = any(heartbeat.read(path) is not None for path in self._heartbeats)
        return not heard and (self._folder.path / STOP_FILE).exists()

    def _stop_ranks(self, agent: RankAgent) -> None:
        if not self._asked:
            self._asked = True
            self._folder.record_event(
                "signalled", attempt=self._round.attempt, host=self._node.host, signal=self._stop.name
            )
            # For programs that know nothing of the launcher, and ranks that have not come as far as asking: they end
            # now. To a rank that asks it is one more wish for the stop that the agents agree on.
            agent.send(self._stop_signal)
            self._agreement.want_stop(self._stop_signal)
            self._group.heartbeat.wake()
        at_once = self._stop.count > 1 and not self._node.is_slurm
        if at_once or time.monotonic() > self._stop.since + self._grace_s:
            agent.send(signal.SIGKILL)

    def _find_stuck(self, agent: RankAgent, share: float = 1.0) -> str | None:
        """Enter ranks that do not go on into the event log, with their stacks. The one silent longest is to blame."""
        stuck = self._watchdog.poll(agent.ranks(), share)
        for one in stuck:
            log = self._folder.log(self._round.attempt, one.rank)
            enter_failure(
                self._folder, self._round.attempt, one.rank, cause=one.why,
                trace=stack_of(one.pid, log) if one.has_stacks else "", step=one.step, hung=True, since=one.since,
            )  # fmt: skip
        return f"rank {stuck[0].rank} {stuck[0].why}" if stuck else None

    def find_lost(self) -> str | None:
        """On the head node: a member that has fallen silent; elsewhere: the head node itself. None where none has."""
        if not self._node.is_head:
            return "the head node is lost" if self._group.head_is_lost() else None
        lost = self._group.find_silent(self._round)
        record_lost_nodes(self._folder, self._round.attempt, lost)
        return f"node {lost[0].host} is lost" if lost else None
