"""Agreement of ranks on many nodes: all obey a request at the same step, and an agent that is gone holds nobody."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launch.agent.exchange import DECODER, Agreement, Message, Ticket
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import HeartbeatFile, Request
from tests.support.commands import ROOT, environment, wait_for

NODES, EACH = 3, 2


class Agents:
    """Three agents that hear of each other late and by hand, as over a store; the first one is the head node's."""

    def __init__(self, folder: Path) -> None:
        self.files = [[HeartbeatFile(folder / str(n * EACH + i)) for i in range(EACH)] for n in range(NODES)]
        self.agents = [Agreement(0, n, range(NODES), self.files[n]) for n in range(NODES)]
        self.messages: dict[int, Message] = {}
        self.silent: set[int] = set()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def turn(self, node: int) -> None:
        """One exchange of one agent. Messages have been through JSON, as on the wire."""
        received = {n: message for n, message in self.messages.items() if (n == 0) != (node == 0)}
        message = Message(**self.agents[node].turn(received))
        self.messages[node] = DECODER.decode(msgspec.json.encode(message))

    def start(self) -> None:
        """Let every agent talk in a thread of its own."""
        self._threads = [threading.Thread(target=self._talk, args=(node,)) for node in range(NODES)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _talk(self, node: int) -> None:
        while not self._over.is_set():
            if node not in self.silent:
                self.turn(node)
            time.sleep(random.uniform(0.005, 0.03))


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    made = Agents(tmp_path)
    yield made
    made.stop()


ASKING = """
import json, os, random, sys, time
from pathlib import Path
from launch import worker
run = worker.attach()
random.seed(run.rank)
kind, late, limit = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
time.sleep(late)
calls, saves, stopped = 0, [], False
while calls < limit and not stopped:
    time.sleep(random.uniform(0, 0.004) + (0.4 if run.rank == 3 and calls % 50 == 20 else 0))  # a long step
    calls += 1
    stopped = run.stop_requested()
    if run.save_requested():
        saves.append(calls)
        run.saved(calls)
print(json.dumps({"calls": calls, "saves": saves, "stopped": stopped, "signal": run.signal_name}))
"""


def ranks(folder: Path, late: float = 0, limit: int = 100_000) -> list[subprocess.Popen[str]]:
    """Six ranks that ask in every step, which are not of the same length: nothing else holds them together."""
    (folder / "run").mkdir()
    found = []
    for rank in range(NODES * EACH):
        told = {"RANK": str(rank), "WORLD_SIZE": "6", "LAUNCH_RUN_DIR": str(folder / "run")}
        told |= {"LAUNCH_HEARTBEAT_DIR": str(folder), "LAUNCH_GRACE_S": "60"}
        words = [sys.executable, "-c", ASKING, "stop", str(late if rank == 5 else 0), str(limit)]
        found.append(subprocess.Popen(words, cwd=ROOT, env=environment(**told), stdout=subprocess.PIPE, text=True))
    return found


def answers(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Last output of the ranks."""
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found.append(json.loads(out))
    return found


def asked(agents: Agents, count: int, nodes: range = range(NODES)) -> Callable[[], bool]:
    return lambda: all(file.calls(Request.stop) >= count for node in nodes for file in agents.files[node])


def test_ranks_of_three_nodes_stop_at_the_same_call_when_one_of_them_gets_a_signal(
    agents: Agents, tmp_path: Path
) -> None:
    agents.start()
    processes = ranks(tmp_path)
    wait_for(asked(agents, 30), "thirty steps of every rank")
    processes[4].send_signal(signal.SIGUSR2)  # on the last node, whose agent only hears of it from the rank
    found = answers(processes)
    assert {(one["calls"], one["stopped"]) for one in found} == {(found[0]["calls"], True)}, found
    assert {one["signal"] for one in found} == {"SIGUSR2"}


def test_a_rank_that_starts_after_the_agreement_stops_at_the_same_call(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    processes = ranks(tmp_path, late=2)
    wait_for(lambda: all(file.is_open for files in agents.files for file in files), "all ranks")
    agents.agents[1].request_stop(signal.SIGTERM)
    found = answers(processes)
    assert {(one["calls"], one["stopped"]) for one in found} == {(found[0]["calls"], True)}, found


def test_ranks_that_have_ended_hold_up_nobody(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    found = answers(ranks(tmp_path, limit=5))
    assert {(one["calls"], one["stopped"]) for one in found} == {(5, False)}
    agents.agents[0].request_stop(signal.SIGTERM)
    wait_for(lambda: agents.messages[0].tickets[Request.stop].at == 6, "the agreement", 10)


def test_saves_are_agreed_on_again_and_again_and_the_file_goes(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    processes = ranks(tmp_path)
    for _ in range(2):
        (tmp_path / "run" / "SAVE").touch()
        wait_for(lambda: not (tmp_path / "run" / "SAVE").exists(), "the end of the file SAVE", 60)
    (tmp_path / "run" / "STOP").touch()
    found = answers(processes)
    assert {json.dumps([one["saves"], one["calls"]]) for one in found} == {
        json.dumps([found[0]["saves"], found[0]["calls"]])
    }
    assert len(found[0]["saves"]) == 2 and found[0]["stopped"]
    events = RunFolder(tmp_path / "run").read_events()
    assert [e["event"] for e in events] == ["saved", "saved", "stopped"], "the script itself says nothing of its stop"
    assert events[-1]["file"] == "STOP" and events[-1]["signal"] is None
    assert [e["step"] for e in events[:2]] == found[0]["saves"]


def test_a_node_that_answers_nothing_does_not_hold_the_others_for_ever(
    agents: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.agent.exchange.ANSWER_S", 0.2)
    agents.silent.add(2)
    agents.start()
    agents.agents[0].request_stop(signal.SIGTERM)
    wait_for(lambda: agents.files[1][0].ask(Request.stop, 5), "the answer")
    assert not agents.files[2][0].ask(Request.stop, 0.1), "nobody has told these"


def test_a_rank_does_not_wait_for_an_agent_that_is_gone(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path / "0")
    assert not file.ask(Request.stop, 0.05) and not file.ask(Request.save, 0.05)
    file.set_hold(Request.stop, 1)
    file.set_hold(Request.save, 1)
    assert file.ask(Request.stop, 0.05), "a stop is wanted for certain"
    assert not file.ask(Request.save, 0.05)
    began = time.monotonic()
    assert file.ask(Request.stop, 60) and time.monotonic() - began < 30, "it is waited for once"
    file.set_at(Request.stop, 3)
    assert file.ask(Request.stop, 60)


def test_messages_about_another_start_are_passed_over(tmp_path: Path) -> None:
    before, now = (Agreement(n, 1, (0, 1), [HeartbeatFile(tmp_path / str(n))]) for n in range(2))
    head = {0: Message(agreement=0, tickets=(Ticket(1, 7, 15), Ticket()))}
    before.turn(head)
    now.turn(head)
    assert [HeartbeatFile(tmp_path / str(n)).ask(Request.stop, 0.1) for n in range(2)] == [False, False]
    answered = [[HeartbeatFile(tmp_path / str(n)).ask(Request.stop, 0.1) for _ in range(6)][-1] for n in range(2)]
    assert answered == [True, False]
