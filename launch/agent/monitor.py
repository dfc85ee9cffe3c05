"""Monitoring of an agent's ranks while they run: requests to stop, ranks that are stuck, nodes that are lost.

Owns the order in which these are asked and the event of each. Must not know how ranks are started, nor what
follows their end.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent import processes
from launch.agent.agreement import Agreement
from launch.agent.hang_detector import NEARLY, Watchdog, stack_of
from launch.agent.members import RendezvousRound, record_lost_nodes
from launch.agent.meter import BUDGET, Meter
from launch.agent.node import Node
from launch.agent.stop import OWNER, STOP_FILE, StopRequest
from launch.config import Config
from launch.runs import heartbeat
from launch.runs.failures import enter_failure
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import HeartbeatFile
from launch.workload import RankContract

if TYPE_CHECKING:
    from launch.agent.elastic import RankAgent
    from launch.agent.rendezvous import AgentGroup


STOP_FILE_S = 1.0  # a look asks a shared filesystem


class Watch:
    """Conditions that an agent polls several times a second, besides the exit of its ranks."""

    def __init__(
        self, folder: RunFolder, node: Node, config: Config, group: AgentGroup, rdzv: RendezvousRound,
        stop: StopRequest, meter: Meter, heartbeats: Path, contract: RankContract,
    ) -> None:  # fmt: skip
        """Watch the ranks of one round.

        Args:
            heartbeats: folder of the ranks' heartbeat files, fresh for this round.
            contract: what is known of the ranks' behavior. Those that tell the event log how they end give a heartbeat
                too, so one without it is late.
        """
        self._folder = folder
        self._node = node
        self._group = group
        self._round = rdzv
        self._stop = stop
        self._meter = meter
        ranks = rdzv.ranks(node.index, config.ranks_on_node)
        logs = {rank: folder.log(rdzv.attempt, rank) for rank in ranks}
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
