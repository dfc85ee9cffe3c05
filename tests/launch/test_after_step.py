"""The decision where srun has ended, a decision that waits for the controller, and reasons that must be true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from launch.agent import outcome as requeue
from launch.agent.after_step import events_of, is_alive, pending_action
from launch.agent.node import Node, RendezvousRound, start_time
from launch.agent.outcome import wait_for_controller
from launch.agent.policy import Action
from launch.agent.ranks import FixedRendezvous
from launch.runs.folder import RunFolder
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.status import outcome, why_not_restarted
from tests.support.commands import ROOT

Events = list[dict[str, Any]]
AGENT = {"event": "agent_started", "job": "slurm-7-1-0"}
STARTED = {"event": "started", "attempt": 2}
LEFT = {"event": "agent_ended", "job": "slurm-7-1-0"}


def ended(cause: str) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 2, "cause": cause}


def decided(action: Action, cause: str) -> dict[str, Any]:
    return {"event": "decided", "attempt": 2, "action": action, "cause": cause, "reason": "a reason"}


@pytest.mark.parametrize(
    ("events", "status", "expected"),
    [
        ([AGENT, STARTED], 137, Action.restart),  # killed in the middle
        ([AGENT], 137, Action.restart),  # killed while they met
        ([], 137, Action.restart),  # killed before they met
        ([], 1, None),  # refused by themselves
        ([AGENT, STARTED, LEFT], 1, None),  # an error of the agent's own
        ([AGENT, STARTED, ended("crashed"), decided(Action.stop, "crashed")], 137, None),  # over its limits
        ([AGENT, STARTED, ended("crashed"), decided(Action.restart, "crashed")], 137, Action.restart),
        ([AGENT, STARTED, ended("preempted"), decided(Action.requeue, "preempted")], 137, Action.requeue),
        ([AGENT, STARTED, ended("preempted"), decided(Action.requeue, "preempted"), LEFT], 137, Action.requeue),
        ([AGENT, decided(Action.requeue, "preempted"), {"event": "requeue_failed"}, LEFT], 1, None),
        ([AGENT, ended("crashed"), decided(Action.restart, "crashed"), STARTED], 137, Action.restart),
    ],
)
def test_only_what_the_agents_left_undone_is_done_after_the_step(
    events: Events, status: int, expected: Action | None
) -> None:
    assert pending_action(events, status) is expected


def test_the_events_of_this_start_of_the_job_are_told_from_those_of_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for job in ("slurm-7-0-0", "slurm-71-1-0", "slurm-7-1-0"):
        folder.record_event("agent_started", job=job)
    this = Node(0, 2, "slurm-7-1-0", is_slurm=True)
    assert [e["job"] for e in events_of(folder, this)] == ["slurm-7-1-0"]
    assert events_of(folder, Node(0, 2, "slurm-7-2-0", is_slurm=True)) == []


def test_an_agent_is_known_by_its_process_and_not_by_its_number_alone() -> None:
    pid = os.getpid()
    assert is_alive({"pid": pid, "pid_started": start_time(pid)})
    assert not is_alive({"pid": pid, "pid_started": "1"})


def test_a_decision_waits_for_the_controller_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requeue, "ASK_AGAIN_S", 0.0)
    folder, busy = RunFolder(tmp_path), iter(range(5))

    def ask() -> str:
        if next(busy) < 3:
            raise SlurmBusyError("scontrol: unable to contact slurm controller")
        return "answer"

    assert wait_for_controller(folder, ask) == "answer"
    assert [e["event"] for e in folder.read_events()] == ["controller_away", "controller_back"]

    def refuse() -> str:
        raise SlurmError("invalid job id")

    with pytest.raises(SlurmError, match="invalid job id"):
        wait_for_controller(folder, refuse)


def test_the_wait_for_the_controller_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue.CONTROLLER_WAIT_S >= 3600
    monkeypatch.setattr(requeue, "CONTROLLER_WAIT_S", 0.0)

    def ask() -> str:
        raise SlurmBusyError("scontrol: no answer in 30 s")

    with pytest.raises(SlurmBusyError):
        wait_for_controller(RunFolder(tmp_path), ask)


def test_a_run_that_is_not_started_again_has_failed_and_says_why(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for event in ({"event": "submitted", "cluster": "slurm", "job_id": "7"}, STARTED, {"event": "stopped"}):
        folder.record_event(**event)

    def told() -> tuple[str, str | None]:
        events = folder.read_events()
        return outcome(events), why_not_restarted(events)

    folder.record_event(**ended("preempted"))
    folder.record_event(**decided(Action.requeue, "preempted"))
    assert told() == ("stopped", None)
    folder.record_event(**decided(Action.stop, "preempted"))
    assert told() == ("failed", "a reason")
    folder.record_event(**decided(Action.stop, "cancelled"))
    assert told()[1] is None, "it ended as somebody wanted it"


def meet(members: int, leaving: list[bool], lost: str | None = None) -> list[str]:
    """Answers of nodes that are told to leave, or not, before the last of them has come."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rdzv = RendezvousRound(0, 1, tuple(range(members)), "127.0.0.1", store.port)

    def come(index: int) -> str:
        resilience = SimpleNamespace(rendezvous_timeout_s=60.0)
        attempt = SimpleNamespace(
            rdzv=rdzv, place=index, group=SimpleNamespace(token="token"),
            config=SimpleNamespace(resilience=resilience), stop=SimpleNamespace(count=int(leaving[index])),
        )  # fmt: skip
        watch = SimpleNamespace(find_lost=lambda: lost)
        try:
            FixedRendezvous(cast(Any, attempt), cast(Any, watch)).next_rendezvous()
        except InterruptedError:
            return "left"
        except dist.DistStoreError:
            return "meets again"
        return "went on"

    with ThreadPoolExecutor(members) as pool:
        return list(pool.map(come, range(len(leaving))))


def test_nodes_that_are_told_to_leave_before_the_ranks_start_leave_together_or_not_at_all() -> None:
    assert meet(2, [False, False]) == ["went on"] * 2
    assert meet(3, [True, False]) == ["left"] * 2, "the third has not come, and nobody waits for it"
    assert len(set(meet(2, [True, True]))) == 1, "whoever decides, decides for both"


def test_nodes_that_wait_for_one_that_is_lost_meet_again_without_it() -> None:
    assert meet(3, [False, False], lost="node n2 is lost") == ["meets again"] * 2
    assert meet(2, [False, False], lost="node n2 is lost") in (["went on"] * 2, ["meets again"] * 2)


CLOCK = """
import sys, time
from launch.agent import node as clock
clock.TICK_S, clock.PAUSED_S = 0.02, 1.0
ours, began = clock.RunningClock(), time.monotonic()
for _ in sys.stdin:
    print(ours.now(), time.monotonic() - began, flush=True)
"""


def test_the_clock_of_silence_runs_while_nobody_asks_it_and_stands_while_the_process_is_stopped() -> None:
    command = [sys.executable, "-c", CLOCK]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask() -> tuple[float, float]:
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            counted, passed = process.stdout.readline().split()
            return float(counted), float(passed)

        first = ask()
        time.sleep(2)  # longer than a tick may be late
        second = ask()
        assert second[0] - first[0] > (second[1] - first[1]) / 2, "a wait counts"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        third = ask()
        assert third[1] - second[1] > 2 > third[0] - second[0] + 1, "a pause does not"
        process.stdin.close()
