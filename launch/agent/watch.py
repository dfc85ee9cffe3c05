"""Watch of this node's running ranks: requests to stop, hung ranks, lost nodes, and records that ranks do not write."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.agent.exchange import Agreement
from launch.agent.node import JOINED, OWNER, STOP_FILE, Attempt, count_oom_kills, describe_wait, is_gone, process_state
from launch.agent.outcome import stop_details
from launch.agent.policy import BUDGET, AlreadyDecidedError
from launch.config import ResilienceConfig
from launch.runs.environment import (
    code_state,
    describe_code,
    describe_environment,
    describe_rank,
    driver_version,
    library_versions,
)
from launch.runs.events import enter_failure, failure_kind
from launch.runs.folder import has_written, read_json
from launch.runs.process import HeartbeatFile, Phase, RankHeartbeat, read_heartbeat
from launch.runs.progress import Progress
from launch.runs.records import recent_records
from launch.runs.tracebacks import PREFIX, exceptions_in, failure_in

if TYPE_CHECKING:
    from launch.agent.ranks import RankAgent


# Hang detector: finds ranks of this node that are stopped, frozen, or without progress.


SLOW = (Phase.starting, Phase.saving, Phase.leaving)
PAUSED_S = 5.0
STACK_SIGNAL = signal.SIGQUIT
"""Signal at which ranks write the stacks of all their threads into their log (faulthandler)."""
STACK_BEGUN = b"(most recent call first)"
"""End of the first line of each thread's stack in a log."""
STACK_WAIT_S = 3.0
"""Longest wait in seconds for the first line of the stacks, and for the end of an incomplete line."""
STACK_QUIET_S = 1.0
"""If a log gets no further line for this time in seconds, its stacks count as complete."""
NEARLY = 0.8
"""Share of each limit of silence that applies to the ranks of this node after ranks of another node have failed.

A rank that was silent for this share of its limit may be the cause of the failure, so it is recorded as hung.
"""


@dataclass(frozen=True)
class StuckRank:
    """A rank that makes no progress. ``why`` is the reason for which it counts as stuck."""

    rank: int
    pid: int
    step: int | None
    """Number of steps done; None if the rank has written no heartbeat.

    A rank without a heartbeat must not get ``STACK_SIGNAL``: the signal would end the process with a core file.
    """
    why: str
    since: float
    """Time of the rank's last progress, Unix seconds."""


STOPPED = "stopped: the process has not run for {}"


class Watchdog:
    """Finds silent ranks of this node by their heartbeats and logs.

    Args:
        folder: folder with the heartbeat files of the ranks in this attempt.
        limits: ``resilience`` of the run; ``heartbeat_timeout_s``, ``hang_timeout_s`` and
            ``startup_and_save_timeout_s`` limit the silence.
        logs: rank -> path of its log.
        must_attach: True if every rank must write a heartbeat within ``startup_and_save_timeout_s``. If False, a rank
            may run without ``launch.worker``. Such a rank writes no heartbeat.
        silence_timeout_s: limit in seconds for ranks that have written no heartbeat: the log of such a rank must grow
            within this time. None: no limit.
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
        """Rank -> size of its log in bytes, and time of the log's last growth in monotonic seconds."""
        self._ran: dict[int, float] = {}
        """Rank without a heartbeat -> monotonic seconds of the last poll that found its process not stopped."""

    def poll(self, ranks: Mapping[int, int], share: float = 1.0) -> list[StuckRank]:
        """Return the ranks of ``ranks`` that were silent for more than ``share`` of a limit, longest silence first.

        If this process itself was paused, the time of every limit begins again, because ``scontrol suspend`` pauses the
        ranks and this process together.

        Args:
            ranks: rank -> process id.
            share: part of the limit, from 0 to 1.
        """
        now = time.monotonic()
        if now - self._polled > PAUSED_S:
            self._started = now
        self._polled = now
        found = []
        for rank, pid in ranks.items():
            last = read_heartbeat(self._folder / str(rank))
            late = [(s, text) for s, limit, text in self._silences(rank, pid, last, now) if s > limit * share]
            if late:
                silent_s, text = late[0]
                # The rank itself writes the heartbeat, even if a wrapper runs between the rank and the agent.
                pid, step = (pid, None) if last is None else (last.pid, last.step)
                found.append(StuckRank(rank, pid, step, text.format(f"{silent_s:.0f} s"), time.time() - silent_s))
        return sorted(found, key=lambda stuck: stuck.since)

    def _silences(
        self, rank: int, pid: int, last: RankHeartbeat | None, now: float
    ) -> Iterator[tuple[float, float, str]]:
        """Yield (seconds of silence, longest allowed seconds, description) for each sign of life that a rank must give.

        A rank that has written a heartbeat must write further heartbeats, and must make progress. For another rank, the
        signs of life are: its process is not stopped by SIGSTOP; it writes its first heartbeat, if ``must_attach``; it
        prints within ``silence_timeout_s``.

        Args:
            rank: number of the rank.
            pid: id of the process that the agent has started for the rank.
            last: newest heartbeat of the rank; None if it has written none.
            now: time in monotonic seconds.
        """
        limits, started = self._limits, self._started
        if last is not None:
            is_stopped = process_state(last.pid) in "Tt"
            if is_stopped or last.phase is not Phase.leaving:  # No thread writes heartbeats while Python exits.
                text = STOPPED if is_stopped else STOPPED.replace("stopped", "frozen")
                yield now - max(last.ran_at, started), limits.heartbeat_timeout_s, text
            if last.moved_at:
                limit = limits.startup_and_save_timeout_s if last.phase in SLOW else limits.hang_timeout_s
                text = f"hung: no progress for {{}} while {last.phase.name}"
                yield now - max(last.moved_at, started), limit, text
            return
        if process_state(pid) == "T":
            yield now - max(self._ran.get(rank, 0.0), started), limits.heartbeat_timeout_s, STOPPED
        else:
            self._ran[rank] = now
        if self._must_attach:
            yield now - started, limits.startup_and_save_timeout_s, "not started after {}"
        if self._silence_timeout_s is not None and rank in self._logs:
            size = _size(self._logs[rank])
            if size != self._printed.get(rank, (-1, now))[0]:
                self._printed[rank] = (size, now)
            yield now - max(self._printed[rank][1], started), self._silence_timeout_s, "hung: nothing printed for {}"


def stack_of(pid: int, log: Path) -> str:
    """Return the stacks that process ``pid`` writes into its log on STACK_SIGNAL; empty if the process does not answer.

    A stopped process cannot answer, so this function also sends SIGCONT. The caller must end the process afterwards.
    """
    before, answer = _size(log), b""
    try:
        os.kill(pid, STACK_SIGNAL)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    grew = time.monotonic()
    while True:
        time.sleep(0.05)
        # Checked before the log is read, so that the log of an ended process is complete.
        is_done = is_gone(pid)
        with log.open("rb") as file:
            file.seek(before)
            former, answer = answer, file.read()
        if answer != former:
            grew = time.monotonic()
        # On a busy machine a process may pause in the middle of a line.
        is_whole = STACK_BEGUN in answer and answer.endswith(b"\n")
        if is_done or time.monotonic() - grew > (STACK_QUIET_S if is_whole else STACK_WAIT_S):
            return answer.decode(errors="replace").strip()


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


# Conditions that an agent polls while its ranks run.


STOP_FILE_S = 1.0  # Each poll queries a shared filesystem.


class Watch:
    """Checks that an agent makes several times a second while its ranks run: stop requests, hung ranks, lost nodes."""

    def __init__(self, attempt: Attempt) -> None:
        config, contract, rdzv = attempt.config, attempt.contract, attempt.rdzv
        self._attempt = attempt
        logs = {rank: attempt.log(rank) for rank in attempt.ranks}
        # Ranks that record their end have a heartbeat too, so a rank without a heartbeat is late.
        self._watchdog = Watchdog(
            attempt.heartbeats, config.resilience, logs, contract.records_events, contract.silence_timeout_s
        )
        self._files = [HeartbeatFile(attempt.heartbeats / str(rank)) for rank in attempt.ranks]
        self._agreement = Agreement(rdzv.number, attempt.node.index, rdzv.members, self._files)
        attempt.group.heartbeat.agreement = self._agreement
        self._looked_for_file = 0.0
        self._stop_signal = signal.Signals[contract.stop_signal]
        self._has_signalled = False
        self.asked_for_stacks: set[int] = set()
        """Ranks that got ``STACK_SIGNAL``. A rank that is already at its exit is killed by this signal."""
        self.kill_reason: str | None = None
        """Reason for which this agent ended its ranks; None if the agent did not end them."""

    def poll(self, agent: RankAgent) -> None:
        """Check all conditions once, and stop or kill the ranks of this node if necessary.

        After a request to stop the run, the ranks get the signal to save and leave. Ranks that still run after the
        grace period are killed. Without such a request, the ranks are killed if one of them hangs, or if another node
        is lost. In both cases, the ranks are killed if ranks of another node have failed.
        """
        stop, group, number = self._attempt.stop, self._attempt.group, self._attempt.rdzv.number
        stop.interruptible = False
        owner = os.environ.get(OWNER)
        if owner and not stop.count and is_gone(int(owner)):
            stop.request("the launcher is gone")
        if self._attempt.meter.poll(is_leaving=bool(stop.count)):
            stop.request(BUDGET)
        if not stop.count and self._finds_stop_file():
            stop.request(STOP_FILE)
        # Ranks without ``launch.worker`` cannot save first, so the node joins them only after their next failure.
        can_save = all(file.is_open for file in self._files)
        if not stop.count and can_save and self._attempt.node.is_head and group.can_grow(self._attempt.rdzv):
            stop.request(JOINED)
        if stop.count:
            self._stop_ranks(agent)
        elif self.kill_reason is None:
            self.kill_reason = self._find_stuck(agent) or self.find_lost()
            if self.kill_reason is not None:
                group.report_failed(number)
        if self.kill_reason is None and group.has_failed(number):
            self.kill_reason = "another node failed"
            self._find_stuck(agent, NEARLY)
        if self.kill_reason is not None:
            agent.send(signal.SIGKILL)

    def _finds_stop_file(self) -> bool:
        """Return whether the run folder has a file STOP, and no rank of this node has a heartbeat.

        Ranks with a heartbeat look for the file themselves. This method looks once in ``STOP_FILE_S`` seconds. Calls in
        between return False.
        """
        now = time.monotonic()
        if now - self._looked_for_file < STOP_FILE_S:
            return False
        self._looked_for_file = now
        return not any(file.is_open for file in self._files) and (self._attempt.folder.path / STOP_FILE).exists()

    def _stop_ranks(self, agent: RankAgent) -> None:
        attempt, stop = self._attempt, self._attempt.stop
        if not self._has_signalled:
            self._has_signalled = True
            attempt.record("signalled", attempt=attempt.number, host=attempt.node.host, signal=stop.name)
            # Programs without ``launch.worker``, and ranks that do not poll yet, end now. A rank that polls gets
            # one more request for the stop on which the agents agree.
            agent.send(self._stop_signal)
            self._agreement.request_stop(self._stop_signal)
            attempt.group.heartbeat.publish()  # The second request ends the ranks at once.
        at_once = stop.count > 1 and not attempt.node.is_slurm
        if at_once or time.monotonic() > stop.since + attempt.config.resilience.grace_period_s:
            agent.send(signal.SIGKILL)

    def _find_stuck(self, agent: RankAgent, share: float = 1.0) -> str | None:
        """Find ranks that were silent for too long. Record these ranks as failed, with their stacks.

        Too long is more than ``share`` of a limit of ``Watchdog``. Returns a text on the rank with the longest silence;
        None if no rank was silent for so long.
        """
        stuck = self._watchdog.poll(agent.ranks(), share)
        if stuck:
            self.record_stacks(agent.ranks(), stuck)
        return f"rank {stuck[0].rank} {stuck[0].why}" if stuck else None

    def record_stacks(self, pids: Mapping[int, int], stuck: Sequence[StuckRank] = ()) -> None:
        """Record the stacks of all ranks in ``pids``, and record the ranks in ``stuck`` as failed.

        ``pids`` is rank -> process id. A rank without a heartbeat gets no signal, and has no stacks.
        """
        attempt = self._attempt
        paths = {rank: attempt.heartbeats / str(rank) for rank in pids}
        beats = {rank: beat for rank, path in paths.items() if (beat := read_heartbeat(path))}
        states = {rank: describe_wait(beat.pid) for rank, beat in beats.items()}
        self.asked_for_stacks |= beats.keys()
        with ThreadPoolExecutor() as pool:
            stacks = dict(
                zip(beats, pool.map(lambda rank: stack_of(beats[rank].pid, attempt.log(rank)), beats), strict=True)
            )
        for one in stuck:
            enter_failure(
                attempt.folder, attempt.number, one.rank, cause=one.why, trace=stacks.get(one.rank, ""),
                step=one.step, hung=True, since=one.since, state=states.get(one.rank),
            )  # fmt: skip
        for rank in beats.keys() - {one.rank for one in stuck}:
            known = {"step": beats[rank].step, "state": states[rank], "traceback": stacks[rank]}
            attempt.record("stacks", attempt=attempt.number, rank=rank, host=attempt.node.host, **known)

    def find_lost(self) -> str | None:
        """Return a text that names a lost node; None if no node is lost.

        The head node checks all members of the round and records lost nodes. If another node has replaced the head node
        meanwhile, the text says so. Other nodes check only the head node.
        """
        attempt = self._attempt
        if not attempt.node.is_head:
            return "the head node is lost" if attempt.group.head_is_lost() else None
        try:
            lost = attempt.group.find_silent(attempt.rdzv)
        except AlreadyDecidedError as error:
            return str(error)
        attempt.record_problems("node_lost", attempt.number, lost)
        return f"node {lost[0].host} is lost" if lost else None


# Records for ranks that write none themselves: environment, printed steps, and ends.


LAST_LINE = re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
"""Pattern of the line that names an exception in a log without a traceback of Python's own form."""
WHAT = re.compile(r"^ *what\(\)(:.*)", re.MULTILINE)
"""Pattern of the message that C++ prints for an uncaught exception."""
TOP = re.compile("in <module>|HYDRA_FULL_ERROR")
"""Pattern in the traceback of an uncaught exception: the frame ``<module>``, the top level of the program.

Hydra leaves this frame out, and names the variable HYDRA_FULL_ERROR instead.
"""
UNCAUGHT = re.compile(r"((?:^\[rank\d+\]:(?: .*)?\n?)+)\s*(?:\Z|^terminate called)", re.MULTILINE)
"""Pattern of the traceback that torch prints at the end of a rank's log if an uncaught exception ends the rank.

Only lines of such a traceback begin with ``[rank0]:`` and so on. The message of C++ about an abort may follow, because
threads may still run when the process ends.
"""


class RankRecords:
    """Writer of records about this node's ranks in an attempt. It writes what the ranks do not record themselves."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._contract = attempt.contract
        self._progress = Progress(attempt.folder, attempt.number, attempt.ranks, attempt.contract)
        self._unwritten_part: dict[str, Any] | None = None
        self._parts: list[Sequence[dict[str, Any]]] = []
        """On the first node: rank entries of ``environment.json`` that were read so far, one list for each node."""
        self._environment: dict[str, Any] | None = None
        self._is_environment_written = False
        self._oom_kills = count_oom_kills()

    def begin(self) -> None:
        """Record the start of the ranks, and their environment (``environment.json``), unless the ranks record both."""
        attempt = self._attempt
        if self._contract.records_events:
            return
        entries = [describe_rank(rank, local, attempt.place) for local, rank in enumerate(attempt.ranks)]
        self._unwritten_part = {"ranks": entries}
        self._write_environment()
        if attempt.place == 0:
            size, steps = attempt.config.world_size, self._contract.max_steps
            attempt.record("started", attempt=attempt.number, world_size=size, max_steps=steps)

    def poll(self) -> None:
        """Record the steps that ranks printed since the last poll, and call ``_write_environment`` again."""
        self._progress.poll()
        self._write_environment()

    def close(self) -> None:
        """Record the remaining printed steps, after the ranks have ended."""
        self._progress.close()
        self._write_environment()  # A short program may end before the first poll.

    def _write_environment(self) -> None:
        """Write the entries of this node's ranks for ``environment.json``, if not yet written.

        The first node also writes ``environment.json`` itself, as soon as the entries of all nodes exist.
        """
        attempt, folder = self._attempt, self._attempt.folder
        if self._contract.records_events:
            return
        nodes = folder.attempt(attempt.number) / "nodes"
        if self._unwritten_part is not None and has_written(nodes / f"{attempt.place:05d}.json", self._unwritten_part):
            self._unwritten_part = None
        if attempt.place > 0 or self._is_environment_written:
            return
        while len(self._parts) < len(attempt.rdzv.members):  # Each of thousands of files is read once.
            ranks = read_json(nodes / f"{len(self._parts):05d}.json").get("ranks")
            if ranks is None:
                return
            self._parts.append(ranks)
        if self._environment is None:
            self._environment = self._describe([entry for ranks in self._parts for entry in ranks])
        self._is_environment_written = has_written(folder.environment(attempt.number), self._environment)

    def _describe(self, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the content of ``environment.json`` for the attempt. ``ranks`` has the entry of each rank."""
        attempt, contract, driver = self._attempt, self._contract, driver_version()
        return {
            "attempt": attempt.number,
            "time": time.time(),
            "workload": attempt.workload,
            "command": list(attempt.command.args),
            "world_size": len(ranks),
            "ranks": ranks,
            "environment": describe_environment(),
            "software": library_versions() | ({"nvidia-driver": driver} if driver else {}),
            "git": code_state(attempt.tree.root),
            "code": describe_code(attempt.tree.root, attempt.tree.files),
            "unit": contract.unit,
            "work_per_step": contract.work_per_step,
            "weak_scaling": contract.weak_scaling,
            "max_steps": contract.max_steps,
        }

    def record_end(self, asks_for_requeue: bool) -> None:
        """Record the event ``stopped`` or ``finished`` after the ranks have left without a failure.

        Does nothing if the ranks record their end themselves. If ranks of this node requested a requeue
        (``asks_for_requeue``), this node records ``stopped``. If not, only the first node records an event: ``stopped``
        after a request to stop, else ``finished``.
        """
        attempt, stop = self._attempt, self._attempt.stop
        if self._contract.records_events:
            return
        records = recent_records(attempt.folder.metrics(0))
        details = {"attempt": attempt.number, "step": records[-1]["step"] if records else None}
        if asks_for_requeue:
            attempt.record("stopped", **details, node=attempt.node.index, asks_for_requeue=True)
        elif attempt.place == 0 and not attempt.events("finished", "stopped", attempt=attempt.number):
            # Rank 0 of a script that uses launch.worker records its end itself.
            attempt.record("stopped" if stop.count else "finished", **details, **stop_details(stop))

    def record_silent_failures(self, failed: Mapping[int, int], killed: Set[int]) -> None:
        """Record each rank that failed without a record of its own, with its traceback or the end of its log.

        Also records ``rank_left`` for ranks that left without a failure.

        Args:
            failed: rank -> exit status, negative for a signal, of this node's ranks that have failed.
            killed: ranks that this agent or its engine has killed.
        """
        attempt, contract = self._attempt, self._contract
        known = {e["rank"] for e in attempt.events("rank_failed", attempt=attempt.number)}
        for rank in sorted({*attempt.ranks} - killed - failed.keys()):
            attempt.record("rank_left", attempt=attempt.number, rank=rank, host=attempt.node.host, left=True)
        kinds: dict[str, int] = {}
        for rank, status in sorted(failed.items()):
            # A program without ``launch.worker`` may end in any way after a request to stop.
            stopped = attempt.stop.count and (status < 0 or not contract.records_events)
            is_killed = rank in killed and not uncaught_exception(attempt.log(rank))
            if rank in known or is_killed or stopped or status == contract.requeue_exit:
                continue
            cause, trace = failure_message(status, attempt.log(rank), read_json(attempt.error_file(rank)))
            if status == -signal.SIGKILL and count_oom_kills() > self._oom_kills:
                cause += ", out of memory: the kernel has killed a process of this job for its memory"
            first = kinds.setdefault(failure_kind(cause, trace), rank)
            same = None if first == rank else first
            beat = read_heartbeat(attempt.heartbeats / str(rank))
            step = None if beat is None else beat.step
            enter_failure(attempt.folder, attempt.number, rank, cause=cause, trace=trace, step=step, same_as=same)


def log_end(log: Path) -> str:
    """Return the last 30 lines of a log. If a longer traceback ends the log, return it instead. "" without a log.

    After a crash in compiled code, return the text around the crash. The prefix ``[rank0]: `` of torch's tracebacks is
    left out.
    """
    text = PREFIX.sub("", log.read_text(errors="replace")) if log.exists() else ""
    crash = text.rfind("Fatal Python error")
    # C++ prints its exception before that line. The text is cut because stacks of many threads are long.
    if crash >= 0:
        return text[max(0, crash - 500) :][:20_000]
    end, failure = "\n".join(text.splitlines()[-30:]), failure_in(text)[-20_000:].rstrip()
    return failure if len(failure) > len(end) and exceptions_in(text)[-1].line in end else end


def uncaught_exception(log: Path) -> str:
    """Return the uncaught Python exception with which a rank's log ends; empty if the log ends otherwise."""
    found = UNCAUGHT.search(log.read_text(errors="replace")) if log.exists() else None
    raised = exceptions_in(found[1]) if found else []
    return raised[-1].line if raised else ""


def failure_message(status: int, log: Path, error: Mapping[str, Any]) -> tuple[str, str]:
    """Return cause and traceback of a rank's failure, from its error file or else from its log.

    Args:
        status: exit status, negative for a signal.
        log: path of the rank's log.
        error: content of the error file that torch's decorator ``record`` writes; empty without one.
    """
    end = log_end(log)
    message = error.get("message")
    if isinstance(message, dict) and message.get("message"):
        return str(message["message"]), str((message.get("extraInfo") or {}).get("py_callstack") or end)
    if status < 0:
        name, raised = signal.Signals(-status).name, uncaught_exception(log)
        what = "".join(WHAT.findall(end)[-1:])
        return f"{raised} (then ended by {name})" if raised else f"killed by {name}{what}", end
    chain = exceptions_in(end)
    last = [one.line for one in chain] or LAST_LINE.findall(end)
    if status == 1 and chain and not TOP.search(failure_in(end)) and not end.rstrip().endswith(chain[-1].line):
        last = []  # The program printed an exception that it caught, and left later.
    return (f"{last[-1]} (exit status {status})" if last else f"exit status {status}"), end
