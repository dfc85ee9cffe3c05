"""Torch elastic behind one door: the agent that starts and watches the ranks of a node, and all that it is handed.

Owns the use of elastic's private parts, ``_monitor_workers``, ``_pcontext`` and the handler of a process: elastic has
no public way to ask something between two polls, to signal the ranks, or to be given processes. A test compares them
with the installed version. Every round is a fresh rendezvous among nodes that the agent group has agreed on: elastic's
own, shared by several starts, was seen to close with a dead node as a member. Must not know what a run is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from subprocess import Popen
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing import api as elastic_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from launch.agent import numa
from launch.agent.fork_server import ForkedProcess
from launch.agent.heartbeat import POLL_S, quick_s
from launch.agent.members import RendezvousRound
from launch.agent.signed_store import SignedStore, derive
from launch.workload import RankContract

HERE = "here"
"""Key in the store of a start: how many nodes are about to start their ranks."""
VERDICT = "verdict"
"""Key in it: what holds for all of them, ``GO``, ``LEAVE`` or ``AGAIN``; the first to write it decides."""
GO, LEAVE, AGAIN = "go", "leave", "again"
LAST_MESSAGES_S = 3.0
"""Time that ranks have after the first failure, to tell theirs."""


class FixedRendezvous(RendezvousHandler):
    """Elastic's rendezvous for agents that have agreed already on who takes part and where."""

    def __init__(
        self, rdzv: RendezvousRound, index: int, timeout_s: float, token: str, is_leaving: Callable[[], bool],
        find_lost: Callable[[], str | None],
    ) -> None:  # fmt: skip
        """Take part in a round.

        Args:
            is_leaving: tells whether this node was told to leave.
            find_lost: says which node is lost, None where none is; asked until all have come.
        """
        self._round = rdzv
        self._token = token
        self._timeout_s = timeout_s
        self._is_leaving = is_leaving
        self._find_lost = find_lost
        self._place = rdzv.place(index)
        self._store = dist.TCPStore(
            rdzv.address, rdzv.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the place of this node among the members, and the store for the ranks.

        Raises:
            InterruptedError: a node was told to leave before all had come here.
            torch.distributed.DistStoreError: a node did not come, or was lost before it could.
        """
        self._meet()
        where = RendezvousStoreInfo(self._round.address, self._round.port)
        store = dist.PrefixStore(derive(self._token, "elastic"), self._store)
        return RendezvousInfo(store, self._place, len(self._round.members), where)

    def departures(self) -> Departures:
        """Return the count of nodes whose ranks have left this round."""
        return Departures(SignedStore(self._store, self._token, "departures"), self._place, len(self._round.members))

    def _meet(self) -> None:
        """Wait for the other nodes where a signal is heard: elastic's own waits, in C++, last as long as the timeout.

        One verdict for all: a node that left while another went on would leave that one waiting.
        """
        store = dist.PrefixStore(derive(self._token, "rendezvous"), self._store)
        deadline = time.monotonic() + self._timeout_s
        count = store.add(HERE, 1)
        while not store.check([VERDICT]):
            if count >= len(self._round.members):
                store.compare_set(VERDICT, "", GO)
            elif self._is_leaving():
                store.compare_set(VERDICT, "", LEAVE)
            elif self._find_lost() is not None:
                store.compare_set(VERDICT, "", AGAIN)
            elif time.monotonic() > deadline:
                raise dist.DistStoreError(f"{count} of {len(self._round.members)} nodes came in {self._timeout_s:g} s")
            else:
                time.sleep(quick_s(len(self._round.members)))
            count = store.add(HERE, 0)
        verdict = store.get(VERDICT).decode()
        if verdict == LEAVE:
            raise InterruptedError("told to leave before the ranks had started")
        if verdict == AGAIN:
            raise dist.DistStoreError("a node was lost before the ranks had started")

    @property
    def use_agent_store(self) -> bool:
        """Have the ranks meet in the store too: no port is opened that could be taken."""
        return True

    def get_backend(self) -> str:
        """Name this rendezvous in elastic's logs."""
        return "fixed"

    def is_closed(self) -> bool:
        """Return False: it serves one round."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there is nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """Name this round."""
        return f"attempt-{self._round.attempt}"

    def shutdown(self) -> bool:
        """Do nothing: the store belongs to the head node's agent group."""
        return True


class Departures:
    """The nodes of a round all of whose ranks have left in order, told in the round's store by signed messages."""

    def __init__(self, store: SignedStore, place: int, count: int) -> None:
        self._store = store
        self._place = place
        self._keys = [f"left/{index}" for index in range(count)]

    def leave(self) -> None:
        """Tell that the ranks of this node have left."""
        self._store.set(self._keys[self._place], "left")

    def is_complete(self) -> bool:
        """Tell whether those of all nodes have. One node looks for all, and tells the others."""
        if self._place == 0 and None not in self._store.read(self._keys):
            self._store.set("left/all", "left")
        return self._store.read(["left/all"]) == ["left"]


class OneLogEach(LogsSpecs):
    """The ranks write their logs themselves (see ``worker_command``); elastic only needs a place for error files."""

    def __init__(self, errors: str) -> None:
        super().__init__()
        self._errors = errors

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Redirect nothing, and tell each rank where its failure is looked for (torch's @record, gpt.train)."""
        nowhere = dict.fromkeys(envs, "")
        files = {rank: f"{self._errors}/{rank}.json" for rank in envs}
        for rank, path in files.items():
            envs[rank]["TORCHELASTIC_ERROR_FILE"] = path
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=files)

    @property
    def root_log_dir(self) -> str:
        """Folder that elastic may write into."""
        return self._errors


class RankAgent(LocalElasticAgent):
    """Elastic's agent, with a callback at every poll of the ranks."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        on_poll: Callable[[RankAgent], None],
        contract: RankContract,
        grace_s: float,
        departures: Departures,
        fork: Callable[[Mapping[str, str]], ForkedProcess | None],
        cpus: Sequence[Collection[int]] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            spec: program of a rank, and how many there are.
            logs: where elastic may write.
            on_poll: called at every poll.
            contract: by which exit status ranks ask for the queue.
            grace_s: how long ranks that do so wait for the others.
            departures: tells whether the ranks of all nodes have left.
            fork: gives the process of a rank with this environment; None where the program is to be executed.
            cpus: to which each rank is bound, by local rank; None binds none.
        """
        super().__init__(spec, logs)
        self._departures = departures
        self._on_poll = on_poll
        self._fork = fork
        self._cpus = cpus
        self._requeue_exit = contract.requeue_exit
        self._grace_s = grace_s
        self._first_exit: float | None = None
        self.killed: set[int] = set()
        """Ranks that were ended from here: their end explains nothing."""
        self.is_given_up = False
        """True where nothing is to be waited for any more: another node has failed, or is lost."""
        self.asks_for_requeue = False
        """True where ranks have left with the exit status that means: saved, put me back into the queue."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the ranks, by forks where there are some: elastic makes their handlers by a function of its module."""
        fork, original, cpus = self._fork, elastic_processes.get_subprocess_handler, self._cpus

        class Handler(SubprocessHandler):
            def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Popen[bytes] | ForkedProcess:  # type: ignore[override]
                if cpus is not None:
                    env[numa.VARIABLE] = ",".join(map(str, sorted(cpus[int(env["LOCAL_RANK"])])))
                forked = fork(env)
                if forked is not None:
                    return forked
                with numa.bound(numa.told_cpus(env)):
                    return super()._popen(args, env)

        elastic_processes.get_subprocess_handler = Handler  # type: ignore[assignment]
        try:
            return super()._start_workers(worker_group)
        finally:
            elastic_processes.get_subprocess_handler = original

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._on_poll(self)
        codes = self._exit_codes()
        if self._wait_for_others(codes):
            return RunResult(state=WorkerState.HEALTHY)
        asking = self._requeue_exit
        if asking is not None and asking in codes and all(code in (0, asking) for code in codes):
            self.asks_for_requeue = True
            left = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=left)
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Wait until the ranks of all other nodes have left, too, and look on meanwhile.

        Elastic's own barrier gives up after five minutes, also where ranks of another node have failed or work on, and
        says nothing: the run then counted as finished.
        """
        with contextlib.suppress(dist.DistError):  # the head node knows how it ended, and has closed its store
            self._departures.leave()
            while not self.is_given_up and not self._departures.is_complete():
                self._on_poll(self)
                time.sleep(POLL_S)

    def _exit_codes(self) -> list[int | None]:
        """Exit status of each rank of this node, None of one that runs; nothing before they are started."""
        if not isinstance(self._pcontext, SubprocessContext):
            return []
        return [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]

    def _wait_for_others(self, codes: Sequence[int | None]) -> bool:
        """Tell whether a rank has failed, or left, and the others still have a moment to do what they have to.

        Elastic would end them right away: the echo of a failure, which comes first, would hide the failure. Those
        that are stuck with the lost rank are then killed, where elastic would wait for them for half a minute.
        """
        if None not in codes or not any(codes):
            return False
        if self._first_exit is None:
            self._first_exit = time.monotonic()
        left = {code for code in codes if code}
        patience_s = self._grace_s if left == {self._requeue_exit} else LAST_MESSAGES_S  # others may save still
        if time.monotonic() - self._first_exit < patience_s:
            return True
        self.send(signal.SIGKILL)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank of this node that is still there."""
        for rank, pid in self.ranks().items():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
            if number is signal.SIGKILL:
                self.killed.add(rank)

    def ranks(self) -> dict[int, int]:
        """Process ids of this node's ranks that have not been reaped, by rank."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        workers = self._worker_group.workers
        handlers = self._pcontext.subprocess_handlers
        return {workers[i].global_rank: h.proc.pid for i, h in handlers.items() if h.proc.poll() is None}
