"""The API of a rank: records, requests, stand-ins, and whole runs that stop at the same step on all ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launch import worker
from launch.agent.exchange import DECODER, Agreement, Message, Ticket
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from launch.runs.process import HeartbeatFile, Request, read_heartbeat
from launch.runs.records import read_records
from launch.worker import Run
from tests.support.commands import ROOT, environment, is_alive, python, run, wait_for
from tests.support.runs import start_training


def in_folder(path: Path, rank: int = 0, size: int = 1) -> Run:
    run = Run(rank, rank, size)
    run.open_folder(path, 1)
    return run


class Scalar:
    """As numpy and torch have them."""

    def __init__(self, value: object) -> None:
        self._value = value

    def item(self) -> object:
        return self._value


def test_a_record_keeps_real_numbers_and_drops_other_values_with_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = in_folder(tmp_path)
    run.record(1, loss=Scalar(2.5), tokens=8, mfu=None, samples=(0, 7), norms={"a": 1.0}, name="x", z=Scalar(1j))
    run.record(2, loss=float("nan"), device=object())
    run.record(4, loss=2.0, step_time_s=0.5)
    run.record("no step", loss=1.0)  # type: ignore[arg-type]
    run.flush()
    first, second, third = read_records(RunFolder(tmp_path).metrics(0))
    known = {"step": 1, "attempt": 1, "loss": 2.5, "tokens": 8, "samples": [0, 7], "norms": {"a": 1.0}}
    assert first == {**known, "time": first["time"]}
    assert second["loss"] != second["loss"] and second["step_time_s"] > 0 and "device" not in second
    assert third["step_time_s"] == 0.5
    assert capfd.readouterr().err.count("was dropped") == 1


def test_the_time_of_a_step_leaves_out_evaluations_and_saves(tmp_path: Path) -> None:
    run = in_folder(tmp_path)
    began = time.perf_counter()
    run.record(1)
    run.phase("saving", 1)
    time.sleep(0.5)  # is what is measured
    run.saved(1, 0.5)
    run.record(3)
    both_steps_s = time.perf_counter() - began - 0.5
    run.flush()
    assert 0 < read_records(RunFolder(tmp_path).metrics(0))[-1]["step_time_s"] <= both_steps_s / 2
    (saved,) = RunFolder(tmp_path).read_events()
    assert (saved["event"], saved["step"], saved["seconds"]) == ("saved", 1, 0.5)


def test_a_line_cut_off_by_a_crash_damages_no_other_line(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).metrics(0)
    path.parent.mkdir()
    path.write_text('{"step": 1, "attempt": 1}\n{"step": 2, "att')
    run = in_folder(tmp_path)
    run.record(3, loss=1.0)
    wait_for(lambda: [r["step"] for r in read_records(path)] == [1, 3], "the record, without being asked for", 10)


def test_the_stand_in_writes_nothing_and_answers_by_its_signals(tmp_path: Path) -> None:
    script = """
import os, signal
from launch import worker
run = worker.attach()
assert worker.attach() is run and run.is_first and run.agrees and run.folder is None and run.checkpoint_dir is None
run.phase("training", 1)
run.record(1, loss=1.0)
run.saved(1)
assert run.is_current() and not run.save_requested() and not run.stop_requested()
os.kill(os.getpid(), signal.SIGTERM)
assert run.stop_requested() and run.stop_requested() and run.signal_name == "SIGTERM"
"""
    python(script, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_the_standard_library_is_needed(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from launch import worker
run = worker.attach()
run.record(1, loss=1.0)
assert not {{"torch", "numpy", "yaml", "hydra", "omegaconf", "gpt"}} & set(sys.modules)
"""
    told = environment(LAUNCH_RUN_DIR=str(tmp_path), LAUNCH_ATTEMPT="3", RANK="2", WORLD_SIZE="4")
    # -I and -S: no site-packages, no user's folder
    subprocess.run([sys.executable, "-I", "-S", "-c", script], env=told, check=True, timeout=60)
    (record,) = read_records(RunFolder(tmp_path).metrics(2))
    assert (record["step"], record["attempt"]) == (1, 3)


def test_a_forked_helper_is_not_a_rank(tmp_path: Path) -> None:
    script = """
import multiprocessing, os, signal, sys, time
from launch import worker
run = worker.attach()
up, told = multiprocessing.Pipe()
def work():
    told.send("up")
    time.sleep(600)
helper = multiprocessing.get_context("fork").Process(target=work)
helper.start()
assert up.poll(60) and up.recv() == "up"
helper.terminate()
helper.join(30)
assert helper.exitcode == -signal.SIGTERM, helper.exitcode
assert not run.stop_requested()
"""
    told = {"LAUNCH_RUN_DIR": str(tmp_path), "LAUNCH_HEARTBEAT_DIR": str(tmp_path), "RANK": "0"}
    python(script, cwd=ROOT, **told)
    assert HeartbeatFile(tmp_path / "0").wants(Request.stop) == 0


def test_a_rank_behind_a_wrapper_ends_with_it(tmp_path: Path) -> None:
    script = "import time; from launch import worker; worker.attach(); time.sleep(600)"
    place = str(tmp_path)
    told = environment(LAUNCH_RUN_DIR=place, LAUNCH_HEARTBEAT_DIR=place, LAUNCH_AGENT_PID=str(os.getpid()))
    shell = subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} -c '{script}'; true"], cwd=ROOT, env=told)
    wait_for(lambda: read_heartbeat(tmp_path / "0") is not None, "the rank")
    sign = read_heartbeat(tmp_path / "0")
    assert sign is not None and sign.pid != shell.pid
    shell.kill()
    shell.wait()
    wait_for(lambda: not is_alive(sign.pid), "the end of the rank", 30)


def test_a_later_attempt_stops_this_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create_attempt()
    run = in_folder(tmp_path)
    assert run.is_current() and not run.stop_requested()
    folder.create_attempt()
    assert not run.is_current()

    def is_outdated() -> bool:
        try:
            return run.stop_requested()
        except worker.OutdatedAttemptError:
            return True

    wait_for(is_outdated, "the look into the run folder", 10)


def test_a_process_of_multiprocessing_is_not_a_rank() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(worker.is_child) and not worker.is_child()


UNDRAWN = "launch.report_files=[md]"


def example(path: Path, steps: int) -> Path:
    """The example of docs/scripts.md, with another number of steps."""
    text = (ROOT / "docs" / "scripts.md").read_text().split("## The worker API")[1]
    script = text.split("```python\n")[1].split("```")[0]
    assert "STEPS = 1000\n" in script
    path.write_text(script.replace("STEPS = 1000\n", f"STEPS = {steps}\n"))
    return path


def test_the_example_of_the_docs_stops_at_one_step_and_resumes_there(tmp_path: Path) -> None:
    script = example(tmp_path / "train.py", 1_000_000)
    folder = RunFolder(tmp_path / "run")
    words = ["workload=script", f"script.path={script}", "script.resumes=true", "nodes=2", "ranks_per_node=1"]
    words += ["cluster=local", UNDRAWN]
    process = start_training(folder, *words, steps=5)
    (folder.path / "STOP").touch()
    assert process.wait(timeout=120) == 1, "a run that was stopped has not finished"
    assert not (folder.path / "STOP").exists()
    events = folder.read_events()
    ends = [e for e in events if e["event"] in ("stopped", "finished", "rank_failed")]
    assert [(e["event"], e["file"]) for e in ends] == [("stopped", "STOP")], events
    step = ends[0]["step"]
    assert {read_records(folder.metrics(rank))[-1]["step"] for rank in range(2)} == {step}
    assert [e["step"] for e in select_events(events, "saved")][-1] == step

    example(script, step + 3)
    run(f"launch run_dir={folder.path}", *words, cwd=tmp_path)
    assert [r["attempt"] for r in read_records(folder.metrics(0))[-4:]] == [1, 2, 2, 2]


NODES = 3
RANKS = ((0, 1), (2,), (3,))
"""Ranks of each node."""


class Agents:
    """Three agents that hear of each other late and by hand, as over a store; the first one is the head node's."""

    def __init__(self, folder: Path) -> None:
        self.files = [[HeartbeatFile(folder / str(rank)) for rank in ranks] for ranks in RANKS]
        self.agents = [Agreement(0, n, range(NODES), self.files[n]) for n in range(NODES)]
        self.messages: dict[int, Message] = {}
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
begin, limit = Path(sys.argv[1]), int(sys.argv[2])
while not begin.exists():
    time.sleep(0.01)
calls, saves, stopped = 0, [], False
while calls < limit and not stopped:
    time.sleep(random.uniform(0, 0.004) + (0.4 if run.rank == 2 and calls % 50 == 20 else 0))  # a long step
    calls += 1
    stopped = run.stop_requested()
    if run.save_requested():
        saves.append(calls)
        run.saved(calls)
print(json.dumps({"calls": calls, "saves": saves, "stopped": stopped, "signal": run.signal_name}))
"""


def ranks(folder: Path, begin: Path | None = None, limit: int = 100_000) -> list[subprocess.Popen[str]]:
    """Four ranks that ask in every step, which are not of the same length: nothing else holds them together.

    The last rank waits for a file ``begin`` before its first step.
    """
    (folder / "run").mkdir()
    found = []
    for rank in range(4):
        told = {"RANK": str(rank), "WORLD_SIZE": "4", "LAUNCH_RUN_DIR": str(folder / "run")}
        told |= {"LAUNCH_HEARTBEAT_DIR": str(folder), "LAUNCH_GRACE_S": "60"}
        words = [sys.executable, "-c", ASKING, str(begin if begin and rank == 3 else folder), str(limit)]
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


def test_ranks_of_three_nodes_stop_at_the_same_call_when_one_of_them_gets_a_signal(
    agents: Agents, tmp_path: Path
) -> None:
    """The signal comes to a rank of the second node. One rank makes its first step after the agreement."""
    agents.start()
    processes = ranks(tmp_path, tmp_path / "begin")
    files = [file for of_node in agents.files for file in of_node]
    wait_for(lambda: files[3].is_open and all(f.calls(Request.stop) >= 30 for f in files[:3]), "thirty steps of three")
    processes[2].send_signal(signal.SIGUSR2)
    wait_for(lambda: agents.messages[0].tickets[Request.stop].at > 0, "the agreement")
    (tmp_path / "begin").touch()
    found = answers(processes)
    assert {(one["calls"], one["stopped"]) for one in found} == {(found[0]["calls"], True)}, found
    assert {one["signal"] for one in found} == {"SIGUSR2"}


def test_ended_ranks_do_not_delay_an_agreement(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    found = answers(ranks(tmp_path, limit=5))
    assert {(one["calls"], one["stopped"]) for one in found} == {(5, False)}
    agents.agents[0].request_stop(signal.SIGTERM)
    wait_for(lambda: agents.messages[0].tickets[Request.stop].at == 6, "the agreement", 10)


def test_saves_are_repeated_at_the_same_call_and_the_file_is_removed(agents: Agents, tmp_path: Path) -> None:
    agents.start()
    processes = ranks(tmp_path)
    for _ in range(2):
        (tmp_path / "run" / "SAVE").touch()
        wait_for(lambda: not (tmp_path / "run" / "SAVE").exists(), "the end of the file SAVE", 60)
    (tmp_path / "run" / "STOP").touch()
    found = answers(processes)
    assert [(one["saves"], one["calls"]) for one in found] == [(found[0]["saves"], found[0]["calls"])] * 4
    assert len(found[0]["saves"]) == 2 and found[0]["stopped"]
    events = RunFolder(tmp_path / "run").read_events()
    assert [e["event"] for e in events] == ["saved", "saved", "stopped"], "the script itself says nothing of its stop"
    assert events[-1]["file"] == "STOP" and events[-1]["signal"] is None
    assert [e["step"] for e in events[:2]] == found[0]["saves"]


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


def test_messages_about_another_start_are_ignored(tmp_path: Path) -> None:
    before, now = (Agreement(n, 1, (0, 1), [HeartbeatFile(tmp_path / str(n))]) for n in range(2))
    head = {0: Message(agreement=0, tickets=(Ticket(1, 7, 15), Ticket()))}
    before.turn(head)
    now.turn(head)
    assert [HeartbeatFile(tmp_path / str(n)).ask(Request.stop, 0.1) for n in range(2)] == [False, False]
    answered = [[HeartbeatFile(tmp_path / str(n)).ask(Request.stop, 0.1) for _ in range(6)][-1] for n in range(2)]
    assert answered == [True, False]
