"""The agent: one process on each node, which starts the ranks of a run, watches them, and reports how they ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.agent.health import HeadNodeLostError, LostNode, NodesMissingError, SickNodesError
from launch.agent.node import AgentContext, Node, RunContext, StopRequest
from launch.agent.outcome import (
    close_lost_attempts,
    end_lost_agents,
    handle_attempt_end,
    handle_early_stop,
    handle_missing_nodes,
    handle_sick_nodes,
    observed_end,
    refuse_replaced,
    refuse_without_budget,
    take_over_as_leader,
)
from launch.agent.policy import WANTED, Action, Cause, Meter, RunFailedError, points_beside, unreliable_hosts
from launch.config import Config
from launch.config.compose import read_point
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.placement import refuse_other_code
from launch.process import lasting_imports, set_default_threads
from launch.runs.environment import raise_open_files, set_defaults
from launch.runs.events import FEWER_NODES, is_finished
from launch.runs.files import deny_others_writing, keep_unwritten, make_folder
from launch.runs.folder import RunFolder, is_event
from launch.runs.progress import NewLines
from launch.worker import STORE_PREFIX
from launch.worker.memory_store import MemoryStore

# The user's command at events of a run (``launch.on_event``): run in the background, one after another.


COPY_FAILED = "copy_failed"
POLL_S = 0.5
LONGEST_LINE = 1 << 20
TOLD_AS_THEY_ARE = (
    *("started", "requeued", "requeue_failed", "node_lost", "node_sick", "budget_reached"),
    *("save_failed", "rolled_back", FEWER_NODES),
)
"""Events that the command is told of by their own names; the others are made of what was decided after an attempt."""


def name_of(event: Mapping[str, Any]) -> str | None:
    """Name by which the command is told of an event; None if it is not told."""
    kind = event["event"]
    if kind == COPY_FAILED:  # and tried again every few minutes, for as long as the store is away
        return kind if event["failures"] == 1 else None
    if kind in TOLD_AS_THEY_ARE:
        return str(kind)
    if kind != "decided" or event["action"] == Action.requeue:  # what comes of that is an event of its own
        return None
    if event["action"] == Action.restart:
        return "restarted"
    if event["cause"] in WANTED:
        return "finished" if event["cause"] == Cause.finished else "stopped"
    return "failed"


def variables(folder: RunFolder, name: str, event: Mapping[str, Any]) -> dict[str, str]:
    """Variables that tell the command of an event; what is not known is empty."""
    told = {
        "LAUNCH_EVENT": name,
        "LAUNCH_EVENT_TIME": event["time"],
        "LAUNCH_EVENT_CAUSE": event.get("cause"),
        "LAUNCH_EVENT_REASON": event.get("reason"),
        "LAUNCH_EVENT_STEP": event.get("step"),
        "LAUNCH_EVENT_HOST": event.get("host"),
        "LAUNCH_EVENT_JSON": json.dumps(event),
        "LAUNCH_ATTEMPT": event.get("attempt"),
        "LAUNCH_RUN_DIR": folder.path,
    }
    return {key: "" if value is None else str(value) for key, value in told.items()}


COMMAND_TIMEOUT_S = 60.0
"""Seconds after which the command of ``launch.on_event`` is killed."""


@contextlib.contextmanager
def on_event(folder: RunFolder, config: Config, is_active: bool = True) -> Iterator[None]:
    """Run the user's command for each event that is entered in a ``with`` block, if there is one.

    At the end it waits for the commands of the last events, for ``COMMAND_TIMEOUT_S`` in all.

    Args:
        folder: of the run.
        config: of the run.
        is_active: False on nodes that leave it to the head node.
    """
    command = config.launch.on_event_command
    if not (is_active and command):
        yield
        return
    teller = EventTeller(folder, command, COMMAND_TIMEOUT_S)
    try:
        yield
    finally:
        teller.close()


class EventTeller:
    """Follows the event log of a run, and runs a command for each event that is to be told.

    Args:
        folder: of the run.
        command: program and arguments.
        timeout_s: seconds after which a command is killed.
    """

    def __init__(self, folder: RunFolder, command: Sequence[str], timeout_s: float) -> None:
        self._folder = folder
        self._command = list(command)
        self._timeout_s = timeout_s
        self._lines = NewLines(folder.events, re.compile(rb"\n"), LONGEST_LINE, skip=True)
        self._events: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._threads = [
            threading.Thread(target=work, name="on-event", daemon=True) for work in (self._follow, self._run_all)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Run the command for what was entered until now, as far as the time limit goes."""
        self._deadline = time.monotonic() + self._timeout_s
        self._closing.set()
        for thread in self._threads:
            thread.join(self._timeout_s + 2 * POLL_S)

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(POLL_S)  # looked at before the log: what was entered until then is read
            with contextlib.suppress(OSError):  # a filesystem that is away; the next look finds the same lines
                while (lines := self._lines.read()) is not None:
                    for line in lines:
                        self._take(line)
        self._events.put(None)

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:  # torn by a crash
            return
        if isinstance(event, dict) and is_event(event) and name_of(event) is not None:
            self._events.put(event)

    def _run_all(self) -> None:
        while (event := self._events.get()) is not None:
            name = name_of(event)
            assert name is not None
            problem = self._run(name, event)
            if problem:  # without the command, which may hold what is nobody's business, and without its output
                with contextlib.suppress(OSError):
                    self._folder.record_event("on_event_failed", of=name, cause=f"launch.on_event {problem}")

    def _run(self, name: str, event: Mapping[str, Any]) -> str | None:
        """Run the command for one event; returns what went wrong."""
        left = min(self._timeout_s, self._deadline - time.monotonic())
        if left <= 0:
            return "was not run: the agent leaves, and those before it took too long"
        env = {key: value for key, value in os.environ.items() if key != STORE_PREFIX}
        env |= variables(self._folder, name, event)
        try:
            with open_log(self._folder) as log:
                process = subprocess.Popen(
                    self._command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except (OSError, ValueError) as error:
            return f"cannot be run: {type(error).__name__}"
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"was killed, after at most {self._timeout_s:g} s"
        return f"left with {status}, and its output in .launch/on_event.log" if status else None


@contextlib.contextmanager
def open_log(folder: RunFolder) -> Iterator[int]:
    """Open the file of the command's output, which only its owner may read."""
    path = Path(folder.path) / ".launch" / "on_event.log"
    make_folder(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# The agent: one process on each node, which starts the ranks of a run, watches them, and says how they ended.


TOKEN = "LAUNCH_TOKEN"


def run(run_dir: str) -> None:
    """Take this node's part in the run of ``run_dir``, to its end, over as many starts as its limits allow.

    Raises:
        RunFailedError: the run failed and does not start again.
        ConfigError: it cannot start here, as where its folder has no room for another attempt.
    """
    deny_others_writing()
    refuse_other_code()
    stop = StopRequest()
    stop.install()
    folder = RunFolder(run_dir)
    if is_finished(folder.read_events()):  # a batch script that was submitted again, or a spare that comes late
        print(f"finished already, and not started again: {run_dir} (fresh=true runs it in a new folder)", flush=True)
        return
    keep_unwritten()
    config = read_point(folder)
    node = Node.from_env(os.environ.get(TOKEN))
    raise_open_files()
    set_default_threads()  # before the libraries are loaded that ranks are forked with
    set_defaults()
    with lasting_imports():
        from launch.agent import (
            ranks,  # all agents alike, before they meet
            rendezvous,
        )

    stop.interruptible = True
    lost: Mapping[int, LostNode] = {}
    try:
        with (
            ranks.fork_server(folder, config) as server,
            MemoryStore() as store,
            on_event(folder, config, node.is_head),  # a thread: after what forks
            Meter(folder, node, config) as meter,
            rendezvous.join(folder, node, config) as group,
        ):
            lost = group.lost
            work_in_group(AgentContext(folder, node, config, group, stop, meter, server, store))
    except InterruptedError as error:
        with on_event(folder, config, node.is_head):
            handle_early_stop(RunContext(folder, node, config), str(error))
    finally:
        end_lost_agents(RunContext(folder, node, config), lost.values())
        os.umask(0o077)  # what follows is submitit's pickle of the result


def work_in_group(context: AgentContext) -> None:
    """Start the ranks as long as there are nodes for them. The head node sends the end, and a failure, to the others.

    Raises:
        RunFailedError, ConfigError: as ``run``.
    """
    node, group, stop = context.node, context.group, context.stop
    failure: str | None = None
    try:
        if node.is_head:
            refuse_without_budget(context.meter)
            close_lost_attempts(context)
        start_repeatedly(context)
    except NodesMissingError as error:
        handle_missing_nodes(context, str(error))
    except SickNodesError as error:
        handle_sick_nodes(context, error.sick)
    except HeadNodeLostError as error:
        stop.interruptible = False
        with on_event(context.folder, context.config):
            take_over_as_leader(context, str(error), group.announced_attempt)
    except (RunFailedError, ConfigError) as error:
        failure = str(error)
        raise
    finally:
        stop.interruptible = False
        if node.is_head:
            group.end(failure)


def start_repeatedly(context: AgentContext) -> None:
    """Start the ranks again and again, as the head node decides; a spare waits for its turn."""
    from launch.agent import ranks

    folder, node, group, stop = context.folder, context.node, context.group, context.stop
    for number in itertools.count():
        stop.interruptible = True
        if node.is_head:
            refuse_replaced(context)
        avoid = unreliable_hosts(folder.read_events(), points_beside(folder)) if node.is_head else {}
        rdzv = group.next_round(number, avoid)
        if rdzv is None:
            return
        if node.index not in rdzv.members:
            continue
        stop.interruptible = False  # the nodes leave together from here on
        # The ranks of this start are counted by the nodes that take part in it.
        sized = replace(context, config=context.config.with_nodes(len(rdzv.members)))
        problem = ranks.run_ranks(sized, rdzv)
        ended = observed_end(folder, rdzv.attempt, problem, stop)
        if node.is_head:
            if handle_attempt_end(context, rdzv, ended).action is not Action.restart:
                return
        elif ended not in (Cause.crashed, Cause.requested):
            return


@refusing
def main() -> int:
    """Run the agent of this node. Exit status 1 where the run failed, 2 if there is no run."""
    parser = CommandParser(prog="python -m launch.agent", description="Run this node's ranks of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, on a filesystem all nodes share")
    try:
        run(str(Path(parser.parse_args().run_dir).absolute()))
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
