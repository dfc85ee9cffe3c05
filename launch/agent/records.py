"""Records that an agent keeps of the ranks of its node: environment, printed steps, ends."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.agent.node import STOP_FILE, RunContext, StopRequest
from launch.runs.environment import (
    code_state,
    describe_code,
    describe_cpus,
    describe_environment,
    describe_rank,
    driver_version,
    library_versions,
)
from launch.runs.events import enter_failure, failure_kind, same_text
from launch.runs.files import has_written, read_json
from launch.runs.folder import RunFolder
from launch.runs.progress import Progress
from launch.runs.records import recent_records
from launch.workload import CodeTree, RankCommand, RankContract

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from launch.agent.ranks import Round


# Environment of an attempt, written by the agents for workloads whose ranks do not tell it: ``environment.json``.


class EnvironmentRecord:
    """The part of one agent in the record of an attempt.

    Args:
        folder: of the run.
        attempt: number of the start.
        place: of this node among those that take part; the first puts the record together.
        nodes: how many take part.
    """

    def __init__(self, folder: RunFolder, attempt: int, place: int, nodes: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._place = place
        self._nodes = nodes
        self._part_left: dict[str, Any] | None = None
        self._known: dict[str, Any] = {}
        self._is_written = False

    def describe_node(self, ranks: Sequence[int], cpus: Sequence[Collection[int]] | None = None) -> None:
        """Write down what the ranks of this node run on, in the order of their local ranks.

        Args:
            ranks: of this node.
            cpus: to which each is bound; None where they run on all that this agent has.
        """
        entries = [describe_rank(rank, local, self._place) for local, rank in enumerate(ranks)]
        for local, bound in enumerate(cpus or ()):
            entries[local] |= describe_cpus(bound)
        self._part_left = {"ranks": entries}
        self._write_part()

    def _write_part(self) -> None:
        if self._part_left is not None and has_written(self._part(self._place), self._part_left):
            self._part_left = None

    def poll(self, workload: str, command: RankCommand, contract: RankContract, tree: CodeTree) -> None:
        """On the head node: write ``environment.json`` as soon as all nodes have described themselves."""
        self._write_part()
        if self._is_written or self._place:
            return
        self._known = self._known or self._describe(workload, command, contract, tree)
        self._is_written = bool(self._known) and has_written(self._folder.environment(self._attempt), self._known)

    def _describe(self, workload: str, command: RankCommand, contract: RankContract, tree: CodeTree) -> dict[str, Any]:
        """Put the record of the attempt together; empty while a node has not described itself."""
        parts = [read_json(self._part(place)).get("ranks") for place in range(self._nodes)]
        if any(part is None for part in parts):
            return {}
        ranks = [entry for part in parts for entry in part or ()]
        driver = driver_version()
        return {
            "attempt": self._attempt,
            "time": time.time(),
            "workload": workload,
            "command": list(command.args),
            "world_size": len(ranks),
            "ranks": ranks,
            "environment": describe_environment(),
            "software": library_versions() | ({"nvidia-driver": driver} if driver else {}),
            "git": code_state(tree.root),
            "code": describe_code(tree.root, tree.files),
            "unit": contract.unit,
            "work_per_step": contract.work_per_step,
            "weak_scaling": contract.weak_scaling,
            "max_steps": contract.max_steps,
        }

    def _part(self, place: int) -> Path:
        return self._folder.attempt(self._attempt) / "nodes" / f"{place:05d}.json"


# Records that an agent keeps of the ranks of its node: steps that they print, where they run, and how they ended.


LAST_LINE = re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
"""The line of a Python traceback that names the exception."""


class RankRecords:
    """Records of this node's ranks in one round, from their start to their end."""

    def __init__(self, context: RunContext, start: Round) -> None:
        folder, rdzv, node = context.folder, start.rdzv, context.node.index
        self._folder = folder
        self._node = context.node
        self._config = context.config
        self._round = rdzv
        self._start = start
        self._contract = start.contract
        self._place = rdzv.place(node)
        self._ranks = rdzv.ranks(node, context.config.ranks_on_node)
        self._progress = Progress(folder, rdzv.attempt, self._ranks, start.contract)
        self._environment = EnvironmentRecord(folder, rdzv.attempt, self._place, len(rdzv.members))

    def begin(self, cpus: Sequence[Collection[int]] | None = None) -> None:
        """Write what ranks that record their own events would: that they start, and on what.

        Args:
            cpus: to which each rank is bound, by local rank; None where none is.
        """
        if self._contract.records_events:
            return
        self._environment.describe_node(self._ranks, cpus)
        if self._place == 0:
            self._folder.record_event(
                "started",
                attempt=self._round.attempt,
                world_size=self._config.world_size,
                max_steps=self._contract.max_steps,
            )

    def poll(self) -> None:
        """Take in what the ranks have printed, and what the other nodes have written of theirs."""
        self._progress.poll()
        self._poll_environment()

    def close(self) -> None:
        """Take in the rest once the ranks have ended."""
        self._progress.close()
        self._poll_environment()  # a program of moments may be over before the first poll

    def _poll_environment(self) -> None:
        if not self._contract.records_events:
            start = self._start
            self._environment.poll(start.workload, start.command, start.contract, start.tree)

    def record_end(self, stop: StopRequest, asks_for_requeue: bool) -> None:
        """Write into the event log how ranks ended that do not tell it themselves, and left in order.

        Every node whose ranks ask for the queue says so; whether all is finished, one node says for all.
        """
        if self._contract.records_events:
            return
        attempt = self._round.attempt
        records = recent_records(self._folder.metrics(0))
        step = records[-1]["step"] if records else None
        if asks_for_requeue:
            self._folder.record_event(
                "stopped", attempt=attempt, step=step, node=self._node.index, asks_for_requeue=True
            )
        elif self._place == 0 and not has_told_its_end(self._folder, attempt):
            event = "stopped" if stop.count else "finished"
            asked = {"signal": stop.name or None, "file": STOP_FILE if stop.name == STOP_FILE else None}
            self._folder.record_event(event, attempt=attempt, step=step, **asked)

    def enter_silent_failures(self, result: RunResult, stop: StopRequest, ended_here: Collection[int]) -> None:
        """Enter ranks that died silently into the event log, with their traceback or the end of their log.

        Args:
            result: of all ranks of this node.
            stop: request that they were told of.
            ended_here: ranks that this agent has ended itself.
        """
        attempt, contract = self._round.attempt, self._contract
        events = self._folder.read_events()
        told = {e["rank"] for e in events if e["event"] == "rank_failed" and e.get("attempt") == attempt}
        kinds: dict[str, int] = {}
        for rank, failure in sorted(result.failures.items()):
            # A program that is told to stop, and knows nothing of us, may end in any way.
            stopped = stop.count and (failure.exitcode < 0 or not contract.records_events)
            if rank in told or rank in ended_here or stopped or failure.exitcode == contract.requeue_exit:
                continue
            cause, trace = failure_message(failure, self._folder.log(attempt, rank))
            same = kinds.setdefault(failure_kind(cause, trace), rank)
            if same == rank:
                enter_failure(self._folder, attempt, rank, cause=cause, trace=trace, step=None)
            else:
                told_by = same_text(same)
                enter_failure(self._folder, attempt, rank, cause=cause, trace=told_by, step=None, same_as=same)


def has_told_its_end(folder: RunFolder, attempt: int) -> bool:
    """Tell whether rank 0 has written how an attempt ended, as a script does that uses ``launch.worker``."""
    ends = ("finished", "stopped")
    return any(e["event"] in ends and e.get("attempt") == attempt for e in folder.read_events())


TERMINATED = "terminate called without an active exception"
"""The last words of a process whose C++ threads are ended for them, as Python's end does to threads that want it."""
THREADS_LEFT = (
    "; where its work was done, threads of its process group were alive when Python ended: import torch.distributed.nn "
    "at the top of the script; del model, and torch.distributed.destroy_process_group(), at its end"
)


def failure_message(failure: ProcessFailure, log: Path) -> tuple[str, str]:
    """Cause and traceback of a rank's failure: from the error file that torch's @record writes, or from its log."""
    message = failure.error_file_data.get("message") if failure.error_file_data else None
    if isinstance(message, dict) and message.get("message"):
        return str(message["message"]), str((message.get("extraInfo") or {}).get("py_callstack") or tail(log))
    number = -failure.exitcode
    end = tail(log)
    if number > 0:
        hint = THREADS_LEFT if number == signal.SIGABRT and end.rstrip().endswith(TERMINATED) else ""
        return f"killed by {signal.Signals(number).name}{hint}", end
    last = LAST_LINE.findall(end)
    return (f"{last[-1]} (exit status {failure.exitcode})" if last else f"exit status {failure.exitcode}"), end


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
