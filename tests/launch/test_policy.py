"""The decision after an attempt, restarts in place, STOP and SAVE; and ranks that stop without dying are found."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.agent.node import process_state
from launch.agent.policy import (
    Action,
    Cause,
    Decision,
    attempt_ends,
    attempts_without_progress,
    cause_of_failure,
    cause_of_signal,
    decide_next,
    hosts_to_avoid,
    unreliable_hosts,
)
from launch.agent.watch import Watchdog, stack_of
from launch.config import ResilienceConfig, RestartLimits
from launch.runs.events import events_since_submission, select_events
from launch.runs.folder import RunFolder, read_json_lines
from launch.runs.process import HeartbeatFile, Phase, read_heartbeat
from launch.runs.records import read_records
from launch.slurm.client import JobDetails
from launch.slurm.jobs import agent_logs, job_of
from tests.support.commands import ROOT, TINY, descendants, environment, ranks_of, run, start_fork, wait_for
from tests.support.runs import causes

Events = list[dict[str, Any]]


def attempt(number: int, cause: Cause, from_step: int = 0, saved: int | None = None) -> Events:
    """The event log of one attempt."""
    events: Events = [{"event": "started", "attempt": number, "from_step": from_step}]
    if saved is not None:
        events.append({"event": "saved", "attempt": number, "step": saved})
    return [*events, {"event": "attempt_ended", "attempt": number, "cause": cause}]


def history(causes: str) -> Events:
    """Attempts that each saved ten steps more, and ended for these causes, such as ``crashed*2 preempted``."""
    named = (part.partition("*") for part in causes.split())
    ended = [Cause[name] for name, _, times in named for _ in range(int(times or 1))]
    return [e for i, cause in enumerate(ended) for e in attempt(i + 1, cause, 10 * i, 10 * (i + 1))]


LIMITS = RestartLimits(crashed=2)


def decide(
    events: Events, cause: Cause, limits: RestartLimits | None = None, without_progress: int = 3,
    resumes: bool = True, forgive_after_s: float = math.inf,
) -> Decision:  # fmt: skip
    config, constants = ResilienceConfig(max_restarts=limits or RestartLimits()), {"forgive_after_s": forgive_after_s}
    with mock.patch.multiple(ResilienceConfig, max_without_progress=without_progress, **constants):
        return decide_next([{"time": 0.0, **event} for event in events], cause, config, resumes)


@pytest.mark.parametrize(
    ("causes", "action"),
    [
        ("finished", "stop"),
        ("cancelled", "stop"),
        ("timed_out", "requeue"),
        ("crashed*2", "restart"),
        ("crashed*3", "stop"),
        ("preempted*50", "requeue"),
        ("preempted*50 crashed", "restart"),
        ("crashed*2 preempted", "requeue"),
        ("hung*3", "stop"),
        ("crashed*2 hung*2", "restart"),
        ("out_of_memory", "restart"),
        ("out_of_memory*2", "stop"),
        ("diverged", "restart"),
        ("diverged*2", "stop"),
        ("node_failed*10", "restart"),
        ("node_failed*11", "stop"),
        ("repeated", "stop"),
    ],
)
def test_each_cause_has_its_own_limit(causes: str, action: str) -> None:
    events = history(causes)
    assert decide(events, events[-1]["cause"], LIMITS).action == action


@pytest.mark.parametrize(
    ("cause", "step", "stops"),
    [
        (Cause.preempted, None, False),  # told to leave before it could do anything
        (Cause.node_failed, None, False),
        (Cause.preempted, 25, True),  # made steps, and saved none of them
        (Cause.timed_out, None, True),  # a time limit that is too short for its start
        (Cause.requested, None, True),  # by itself
        (Cause.crashed, None, True),
    ],
)
def test_an_attempt_interrupted_before_its_first_step_does_not_count(
    cause: Cause, step: int | None, stops: bool
) -> None:
    events = [e for n in (1, 2, 3) for e in attempt(n, cause, from_step=20)]
    events = [{**e, "step": step} if e["event"] == "attempt_ended" else e for e in events]
    events.insert(0, {"event": "saved", "attempt": 0, "step": 20})
    decision = decide(events, cause)
    assert (decision.action is Action.stop) is stops
    # They forgive nothing either: two that were the run's own fault, with one of these between them, are two.
    mixed = [*attempt(1, Cause.crashed, 20), *events[3:5], *attempt(3, Cause.crashed, 20)]
    assert attempts_without_progress([{"event": "saved", "attempt": 0, "step": 20}, *mixed]) == 2 + stops


def timed(events: Events, hours: float) -> Events:
    """Give events times, so that each attempt lasts so many hours."""
    return [{**event, "time": 3600 * hours * event["attempt"]} for event in events]


@pytest.mark.parametrize(
    ("causes", "hours", "forgive_after_s", "stops"),
    [
        ("crashed*100", 2, 3600, False),  # weeks, with a new checkpoint between any two
        ("crashed*3", 2, 4 * 3600 + 1, True),
        ("crashed*3", 2, 4 * 3600, False),  # the first counts no longer
        ("crashed*3", 0.1, 3600, True),  # too many in an hour, although each has saved
        ("crashed*2 preempted*50 crashed", 0.01, 3600, True),
        ("crashed*2 preempted*50 crashed", 1, 3600, False),
    ],
)
def test_failures_are_forgiven_after_progress(causes: str, hours: float, forgive_after_s: float, stops: bool) -> None:
    events = timed(history(causes), hours)
    decision = decide(events, Cause.crashed, LIMITS, forgive_after_s=forgive_after_s)
    assert (decision.action is Action.stop) is stops, decision
    assert ("are forgiven" in decision.reason) is (not stops)


def test_time_without_progress_forgives_no_failure() -> None:
    """A job that waits for a day in the queue, or does old steps again, has not progressed."""
    first = [*attempt(1, Cause.crashed, 0, 20), *attempt(2, Cause.crashed, 20), *attempt(3, Cause.crashed, 10, 20)]
    assert decide(timed(first, 24), Cause.crashed, LIMITS, 9, forgive_after_s=60).action is Action.stop
    newer = [*first[:-2], {"event": "saved", "attempt": 3, "step": 21}, first[-1]]
    decision = decide(timed(newer, 24), Cause.crashed, LIMITS, 9, forgive_after_s=60)
    assert decision.action is Action.restart and decision.reason == (
        "crashed, 1 of 2; 2 before newer checkpoints are forgiven"
    )


def failed(number: int, host: str, cause: Cause = Cause.crashed, **more: Any) -> Events:
    """An attempt whose rank 5, on ``host``, has failed first."""
    told = {"event": "rank_failed", "attempt": number, "rank": 5, "host": host, "cause": "why", "time": 1.0, **more}
    echo = {**told, "rank": 0, "host": "echo", "cause": "connection reset by peer", "echo": True, "time": 0.5}
    *before, end = attempt(number, cause)
    return [*before, echo, told, end]


def lost(number: int | None, host: str) -> Events:
    """A node that was lost in an attempt."""
    return [{"event": "node_lost", "attempt": number, "host": host}]


def test_a_host_that_failed_in_two_attempts_is_avoided_with_the_reason() -> None:
    events = [*failed(1, "n1"), *lost(2, "n1"), *lost(2, "n1"), *failed(2, "n2", Cause.node_failed, echo=True)]
    assert unreliable_hosts(events) == {"n1": "lost in attempt 2; rank 5 failed first in attempt 1: why"}
    assert (
        unreliable_hosts([{"event": "submitted", "job_id": "1"}, *events, {"event": "submitted", "job_id": "2"}]) == {}
    )
    # Two ranks that hung at the same time are one failure, and an echo is none.
    hung = [*failed(1, "n1", Cause.hung, hung=True, since=3.0), *failed(1, "n1", hung=True, rank=6)[:-1]]
    assert unreliable_hosts(hung) == {}
    assert [*unreliable_hosts([*hung, *failed(2, "n1")])] == ["n1"]
    # What is run is no fault of the host it runs on.
    for cause in (Cause.out_of_memory, Cause.diverged, Cause.refused, Cause.preempted):
        assert unreliable_hosts([*failed(1, "n1", cause), *failed(2, "n1", cause)]) == {}
    # A majority of replicas tells for certain whose parameters are wrong; of two, each may be the one.
    drift = {"event": "replicas_differ", "attempt": 1, "hosts": ["n4"], "certain": True, "cause": "rank 7 on n4"}
    told = [*failed(1, "n1")[:-1], drift, failed(1, "n1")[-1]]
    assert unreliable_hosts(told) == {"n4": "in attempt 1: rank 7 on n4"}, "and not where the first rank failed of it"
    of_two = [{**event, "hosts": ["n1", "n4"], "certain": False} if event is drift else event for event in told]
    assert unreliable_hosts(of_two) == {}
    assert [*unreliable_hosts([*of_two, *failed(2, "n4")])] == ["n4"]
    # A node that was lost once is no place to come back to at once, but takes part again where it is there.
    assert unreliable_hosts(lost(None, "n3")) == {}
    assert hosts_to_avoid([*lost(None, "n3"), *failed(4, "n4")]) == {"n3": "lost before the ranks started"}


def test_two_ends_of_one_attempt_count_once() -> None:
    ends = history("node_failed*10")
    twice = [e for e in ends for _ in range(2 if e["event"] == "attempt_ended" else 1)]
    assert decide(twice, Cause.node_failed, RestartLimits(node_failed=10)).action is Action.restart
    # The node that took over, then the one that was cut off and came back: the first holds.
    incident = [*attempt(1, Cause.node_failed), {"event": "attempt_ended", "attempt": 1, "cause": Cause.preempted}]
    assert [e["cause"] for e in attempt_ends(incident)] == [Cause.node_failed]
    assert attempts_without_progress(incident) == 1
    # Of starts of the job that came to no attempt each counts.
    early = [{"event": "attempt_ended", "attempt": None, "job": f"slurm-7-{n}-0", "cause": "x"} for n in (0, 1, 1)]
    assert len(attempt_ends(early)) == 2


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_progress_counts_the_attempts_since_the_last_one_that_saved(gains: list[bool]) -> None:
    events: Events = []
    step = 0
    for number, gain in enumerate(gains, start=1):
        events += attempt(number, Cause.crashed, step, step + 5 if gain else None)
        step += 5 if gain else 0
    expected = len(gains) if True not in gains else gains[::-1].index(True)
    assert attempts_without_progress(events) == expected


def test_typing_the_command_again_resets_the_limits() -> None:
    events = [{"event": "submitted"}, *history("crashed"), {"event": "submitted"}, {"event": "started"}]
    assert events_since_submission(events) == events[-2:]


def test_a_program_without_checkpoints_is_not_restarted() -> None:
    decision = decide(history("crashed"), Cause.crashed, resumes=False)
    assert decision.action is Action.stop
    assert "would run again from its first step (script.resumes=true where it looks" in decision.reason


# What `scontrol show job` of Slurm 22.05 said when a task of the job got SIGTERM: JobState, PreemptTime, Restarts, and
# seconds since the start of StartTime and EndTime.
@pytest.mark.parametrize(
    ("state", "preempted", "restarts", "end", "reason", "cause"),
    [
        ("COMPLETING", False, 0, 2, "None", Cause.cancelled),  # scancel
        ("COMPLETING", False, 1, 120, "None", Cause.preempted),  # scontrol requeue, and preemption after its grace time
        ("COMPLETING", False, 0, 120, "None", Cause.timed_out),  # the time limit itself
        ("RUNNING", True, 0, 120, "None", Cause.preempted),  # preemption with a grace time
        ("RUNNING", False, 0, 120, "None", Cause.timed_out),  # the signal ahead of the limit
        ("RUNNING", False, 0, 7200, "None", Cause.preempted),  # a signal long before the limit
        ("SIGNALING", True, 0, 7200, "None", Cause.preempted),  # the controller is busy, and still sends the signal
        ("CANCELLED", False, 0, 2, "None", Cause.cancelled),
        ("COMPLETING", False, 0, 2, "NonZeroExitCode", Cause.node_failed),  # a killed batch script
        ("COMPLETING", False, 0, 2, "JobLaunchFailure", Cause.node_failed),
    ],
)
def test_a_cancel_is_never_taken_for_a_preemption(
    state: str, preempted: bool, restarts: int, end: float, reason: str, cause: Cause
) -> None:
    job = JobDetails(state, preempted, restarts, 1000.0, 1000.0 + end, 120.0 if end <= 120 else 7200.0, reason)
    assert cause_of_signal(job, restarts=0, signal_delay_s=30, now=1060.0) is cause


def test_out_of_memory_and_divergence_differ_from_other_crashes() -> None:
    assert cause_of_failure({"cause": "OutOfMemoryError: CUDA out of memory"}) is Cause.out_of_memory
    assert cause_of_failure({"cause": "FloatingPointError: the loss of step 7 is nan"}) is Cause.diverged
    assert cause_of_failure({"cause": "RepeatedFailureError: found: the loss of step 7"}) is Cause.repeated
    assert cause_of_failure({"cause": "killed by SIGKILL"}) is Cause.crashed
    assert cause_of_failure(None) is Cause.crashed


UNDRAWN = "launch.report_files=[md]"
LONG = [*TINY, "optim.max_steps=90", "eval.interval=0", "checkpoint.interval=10", UNDRAWN]


def test_a_killed_rank_is_restarted_in_place_and_nothing_is_lost(tmp_path: Path) -> None:
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    run(f"launch nodes=2 run_dir={whole.path}", *LONG, cwd=tmp_path)
    process = start_fork(f"launch nodes=2 run_dir={killed.path}", *LONG, cwd=tmp_path, log=tmp_path / "log")
    wait_for(
        lambda: any(e["event"] == "saved" for e in killed.read_events()) or process.poll() is not None, "a checkpoint"
    )
    submitted = select_events(killed.read_events(), "submitted")
    os.kill(ranks_of(descendants(process.pid))[1], signal.SIGKILL)
    assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    events = killed.read_events()
    assert causes(killed) == ["crashed", "finished"]
    assert "killed by SIGKILL" in {e["cause"] for e in select_events(events, "rank_failed") if e["rank"] == 1}
    assert select_events(events, "submitted") == submitted, "the same job went on"
    assert [e["event"] for e in events].count("recovered") == 1
    for node in range(2):
        assert all("executed" not in log.read_text() for log in agent_logs(killed.path, job_of(submitted[0]), node))
    losses = [[r["loss"] for r in read_records(folder.metrics(0))] for folder in (whole, killed)]
    assert losses[0] == losses[1]
    (restored,) = [record for record in read_json_lines(killed.metrics(0)) if "restore_s" in record]
    assert restored["attempt"] == 2 and restored["restore_s"] > 0


# Ranks that stop without dying: found, named with their stacks, and the run goes on.


SILENCE = ResilienceConfig(heartbeat_timeout_s=10**6, hang_timeout_s=20, startup_and_save_timeout_s=40)
STUCK = """
import threading, time
from launch import worker
run = worker.attach()
def deep(frames):
    deep(frames - 1) if frames else time.sleep(600)
for _ in range(80):
    threading.Thread(target=deep, args=(60,), daemon=True).start()
run.phase("training", 7)
def where_it_waits():
    time.sleep(600)
where_it_waits()
"""


class Watched:
    """A watchdog of this process as some rank, under a clock that is set forward by hand."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        rank: int = 0,
        limits: ResilienceConfig = SILENCE,
        pid: int = os.getpid(),
        **known: Any,
    ) -> None:
        self._real, self.ahead = time.monotonic, 0.0
        monkeypatch.setattr("launch.agent.watch.time.monotonic", lambda: self._real() + self.ahead)
        self._dog, self._ranks = Watchdog(folder, limits, **known), {rank: pid}

    def poll(self, after_s: float = 0.0) -> list[Any]:
        self.ahead += after_s
        return self._dog.poll(self._ranks)

    def found(self, until_s: float) -> list[Any]:
        """Return the last finding of checks every four seconds: a jump would be a pause of the agent itself."""
        while self.ahead < until_s - 4:
            self.poll(4)
        return self.poll(4)


def rank_in(folder: Path, phase: Phase) -> None:
    """Show this process as rank 3, after its seventh step."""
    file = HeartbeatFile(folder / "3")
    file.open_for_rank()
    file.move(7, phase)


@pytest.mark.parametrize(("phase", "limit"), [("training", 20), ("evaluating", 20), ("saving", 40), ("starting", 40)])
def test_a_rank_without_progress_is_stuck_after_the_limit_of_its_phase(
    phase: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_in(tmp_path, Phase[phase])
    watched = Watched(monkeypatch, tmp_path, 3)
    while watched.ahead < limit - 4:
        assert watched.poll(4) == [], watched.ahead
    (found,) = watched.found(limit + 8)
    assert (found.rank, found.pid, found.step) == (3, os.getpid(), 7)
    assert found.why.startswith("hung: no progress for ") and found.why.endswith(phase)


@pytest.mark.parametrize(("phase", "found"), [("training", ["frozen"]), ("leaving", [])])
def test_a_rank_at_its_exit_does_not_count_as_frozen(
    phase: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_in(tmp_path, Phase[phase])
    watched = Watched(monkeypatch, tmp_path, 3, replace(SILENCE, heartbeat_timeout_s=8))
    assert [one.why.partition(":")[0] for one in watched.found(16)] == found


def test_a_stopped_rank_without_a_heartbeat_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        limits = replace(SILENCE, heartbeat_timeout_s=8)
        watched = Watched(monkeypatch, tmp_path, 3, limits, pid=process.pid, must_attach=False)
        assert watched.found(40) == []
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: process_state(process.pid) == "T", "the stop")
        assert watched.poll(4) == []
        (found,) = watched.found(watched.ahead + 8)
        assert (found.rank, found.pid) == (3, process.pid) and found.why.startswith("stopped: the process has not run")
    finally:
        process.kill()
        process.wait()


def test_the_stacks_of_a_stopped_rank_are_complete(tmp_path: Path) -> None:
    told = {"RANK": "3", "LAUNCH_RUN_DIR": str(tmp_path), "LAUNCH_HEARTBEAT_DIR": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        words = [sys.executable, "-c", STUCK]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(**told), stdout=log, stderr=log)
    try:
        wait_for(lambda: (sign := read_heartbeat(tmp_path / "3")) is not None and sign.step == 7, "its heartbeat")
        process.send_signal(signal.SIGSTOP)
        stacks = stack_of(process.pid, tmp_path / "log")
    finally:
        process.kill()
        process.wait()
    assert stacks.count("(most recent call first)") == 82 and "where_it_waits" in stacks, stacks[-300:]


def test_a_pause_of_the_agent_does_not_count_as_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_in(tmp_path, Phase.training)
    watched = Watched(monkeypatch, tmp_path, 3)
    assert watched.poll() == watched.poll(1000) == []  # scontrol suspend


def test_a_rank_that_never_starts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = Watched(monkeypatch, tmp_path).found(44)
    assert (found.rank, found.step) == (0, None) and "not started after" in found.why


@pytest.mark.parametrize("silence", [None, 60])
def test_a_rank_without_a_heartbeat_is_watched_by_its_log(
    silence: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    watched = Watched(monkeypatch, tmp_path, logs={0: log}, must_attach=False, silence_timeout_s=silence)
    HeartbeatFile(tmp_path / "0")  # made by the agent: nobody has opened it
    for _ in range(30):  # two minutes in which something is printed now and then
        with log.open("a") as file:
            file.write(".")
        assert watched.poll(4) == []
    found = watched.found(200)
    assert [one.why.startswith("hung: nothing printed for ") for one in found] == ([] if silence is None else [True])


def test_a_rank_that_has_only_attached_is_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HeartbeatFile(tmp_path / "0").open_for_rank()
    watched = Watched(monkeypatch, tmp_path)
    while watched.ahead < 120:
        assert watched.poll(4) == []
