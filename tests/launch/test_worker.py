"""The worker API of one process: what it writes, what it hears, and what it is in a process that is no rank."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import worker
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import HeartbeatFile, Request, read
from launch.runs.records import read_records
from launch.worker import Run
from tests.support.commands import ROOT, environment, is_alive, wait_for


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


def test_a_record_keeps_the_real_numbers_and_drops_the_rest_with_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = in_folder(tmp_path)
    run.record(1, loss=Scalar(2.5), tokens=8, mfu=None, samples=(0, 7), norms={"a": 1.0}, name="x", z=Scalar(1j))
    run.record(2, loss=float("nan"), device=object())
    run.record(4, loss=2.0, step_time_s=0.5)
    run.record("no step", loss=1.0)  # type: ignore[arg-type]
    run.flush()
    first, second, third = read_records(RunFolder(tmp_path).metrics(0))
    assert {k: first[k] for k in ("step", "attempt", "loss", "tokens", "samples", "norms")} == {
        "step": 1, "attempt": 1, "loss": 2.5, "tokens": 8, "samples": [0, 7], "norms": {"a": 1.0},
    }  # fmt: skip
    assert set(first) == {"step", "attempt", "time", "loss", "tokens", "samples", "norms"}
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


def test_a_line_torn_by_a_crash_spoils_itself_only(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).metrics(0)
    path.parent.mkdir()
    path.write_text('{"step": 1, "attempt": 1}\n{"step": 2, "att')
    run = in_folder(tmp_path)
    run.record(3, loss=1.0)
    wait_for(lambda: [r["step"] for r in read_records(path)] == [1, 3], "the record, without being asked for", 10)


def test_a_filesystem_that_fails_is_told_of_once_and_loses_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics").write_text("in the way")
    run = in_folder(tmp_path)
    for step in range(1, 4):
        run.record(step, loss=1.0)
        run.flush()
    assert capfd.readouterr().err.count("cannot be written") == 1
    (tmp_path / "metrics").unlink()
    run.record(4, loss=1.0)
    run.flush()
    assert [r["step"] for r in read_records(RunFolder(tmp_path).metrics(0))] == [1, 2, 3, 4]


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
    env = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, timeout=60)
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


def test_a_helper_that_is_forked_off_is_no_rank(tmp_path: Path) -> None:
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
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(**told), check=True, timeout=60)
    assert HeartbeatFile(tmp_path / "0").wants(Request.stop) == 0


def test_a_rank_behind_a_wrapper_ends_with_it(tmp_path: Path) -> None:
    script = "import time; from launch import worker; worker.attach(); time.sleep(600)"
    told = environment(
        LAUNCH_RUN_DIR=str(tmp_path), LAUNCH_HEARTBEAT_DIR=str(tmp_path), LAUNCH_AGENT_PID=str(os.getpid())
    )
    shell = subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} -c '{script}'; true"], cwd=ROOT, env=told)
    wait_for(lambda: read(tmp_path / "0") is not None, "the rank")
    sign = read(tmp_path / "0")
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


def test_multiprocessing_is_told_from_a_rank() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(worker.is_child) and not worker.is_child()
