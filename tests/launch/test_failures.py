"""Failures, and what the person at the keyboard is told: any rank that fails fails the run, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.report import build
from launch.report.goodput import measure_goodput
from launch.runs.environment import GAUGES, read_samples, telemetry_nodes
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, read_json_lines
from launch.runs.records import read_records
from tests.support.commands import (
    ROOT,
    TINY,
    Process,
    descendants,
    is_alive,
    ranks_of,
    run,
    start,
    start_fork,
    wait_for,
)
from tests.support.runs import causes, start_training

UNDRAWN = "launch.report_files=[md]"
LONG = [*TINY, "optim.max_steps=100000", "eval.interval=0", "checkpoint.interval=50", UNDRAWN]
ONE_NODE = ["nodes=1", "ranks_per_node=2"]
"""Two ranks of one agent, where another agent proves nothing more: it costs its start, and a real one imports torch."""

# What a mistake in somebody's training code looks like from outside: a rank raises in the middle of the run, rank 0 in
# the first attempt and rank 1 in the second.
SABOTAGE = """
import os
if "SABOTAGE" in os.environ:  # also where ranks are forked from a process that is none
    import importlib.machinery, sys

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # which the launcher has set to none: it finds no driver here

    class Saboteur:
        def find_spec(self, name, path=None, target=None):
            spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "gpt.training.step" else None
            if spec is not None:
                execute = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (execute(module), self.sabotage(module))
            return spec

        def wait_for_records(self):
            # What rank 0 has done in the second attempt: its agent kills it with what its thread has not written yet.
            import time

            path, ends = os.path.join(os.environ["LAUNCH_RUN_DIR"], "metrics/rank_00000.jsonl"), time.monotonic() + 60
            while os.environ["RANK"] == "1" and time.monotonic() < ends:
                if os.path.exists(path) and '"attempt":2' in open(path).read().replace(" ", ""):
                    return
                time.sleep(0.05)

        def sabotage(self, module):
            lr_at = module.lr_at
            def sabotaged(config, step):
                if step == 3 and "SABOTAGED_LR" in os.environ:
                    return float(os.environ["SABOTAGED_LR"]) if os.environ["RANK"] == "1" else lr_at(config, step)
                if step == 3 and int(os.environ["LAUNCH_ATTEMPT"]) == int(os.environ["RANK"]) + 1:
                    self.wait_for_records()
                    raise ZeroDivisionError("the data of step 3 has no tokens")
                return lr_at(config, step)
            module.lr_at = sabotaged

    sys.meta_path.insert(0, Saboteur())
"""


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder]:
    """A run of two ranks of which one raises in its third step; what the launcher printed, and the run folder."""
    return run_sabotaged(tmp_path_factory.mktemp("sabotaged"), "resilience.max_restarts.crashed=1")


def run_sabotaged(folder: Path, *words: str, **environment: str) -> tuple[str, RunFolder]:
    """A run of two ranks with a mistake in its code; with SABOTAGED_LR rank 1 takes that for the learning rate."""
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    shutil.copy(ROOT / "tests" / "support" / "programs" / "fake_pynvml.py", folder / "pynvml.py")
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    words = ("nodes=2", *TINY, "optim.max_steps=9", UNDRAWN, f"run_dir={folder / 'run'}", *words)
    text = run("launch", *words, cwd=folder, status=1, PYTHONPATH=path, SABOTAGE="1", **environment)
    return text, RunFolder(folder / "run")


def test_an_exception_on_any_rank_is_recorded_and_told_with_its_traceback_and_the_second_stops_the_run(
    sabotaged: tuple[str, RunFolder],
) -> None:
    text, folder = sabotaged
    events, cause = folder.read_events(), "ZeroDivisionError: the data of step 3 has no tokens"
    failed = next(e for e in select_events(events, "rank_failed") if not e.get("echo"))
    assert (failed["attempt"], failed["rank"], failed["step"], failed["cause"]) == (1, 0, 2, cause)
    log = folder.log(2, 1)
    assert "rank 1 on" in text and f"log: {log}" in text and f"failed first after step 2: {cause}" in text
    for told in (folder.log(1, 0).read_text(), text):
        assert all(part in told for part in ("Traceback (most recent call last)", "queue_step", "ZeroDivisionError"))
    assert "ZeroDivisionError" in log.read_text()
    assert causes(folder) == ["crashed", "crashed"]
    assert "its limit is 1" in select_events(events, "decided")[-1]["reason"]


def test_the_report_counts_the_time_that_a_crash_cost(sabotaged: tuple[str, RunFolder]) -> None:
    folder = sabotaged[1]
    (row,) = build(folder.path).rows
    measured = measure_goodput(folder, folder.read_events())
    assert measured is not None
    first, again = ([r for r in read_json_lines(folder.metrics(0)) if r["attempt"] == attempt] for attempt in (1, 2))
    assert first and again and "crashed" in row.causes_h and row.interruptions == 1
    # From the first step, which the second attempt did again, to where that began.
    lost_s = again[0]["time"] - again[0]["step_time_s"] - (first[0]["time"] - first[0]["step_time_s"])
    assert measured.lost_s == {"crashed": pytest.approx(lost_s, abs=1e-3)}
    assert row.causes_h == measured.lost_h


def test_status_and_logs_show_the_failed_rank_first(sabotaged: tuple[str, RunFolder]) -> None:
    folder = sabotaged[1]
    there, name = folder.path.parent, folder.path.name
    (seen,) = json.loads(run("launch.status --json", name, cwd=there))
    assert seen["state"] == "failed"
    expected = {"rank": 1, "step": 2, "log": str(folder.log(2, 1))}
    assert {k: seen["failure"][k] for k in expected} == expected
    assert "failed first after step 2: ZeroDivisionError" in run("launch.status", name, cwd=there)
    assert folder.log(2, 1).read_text() in run("launch.logs", name, cwd=there)
    assert folder.log(1, 0).read_text() in run("launch.logs", name, "--rank", "0", "--attempt", "1", cwd=there)
    assert "RunFailed" in run("launch.logs", name, "--rank", "1", "--agent", cwd=there)
    text = run("launch.logs", name, "--rank", "7", cwd=there, status=2)
    assert "found: --rank 7 of a run with 2 ranks" in text and "expected: 0 to 1" in text
    text = run("launch.logs", name, "--attempt", "9", cwd=there, status=2)
    assert "attempts: 1, 2)" in text and "waits" not in text, "of a run that is over nothing more comes"


def test_gpus_are_sampled_from_the_start_of_each_attempt_to_its_end(sabotaged: tuple[str, RunFolder]) -> None:
    """The one GPU of this machine is seen by both agents, and counted once."""
    folder = sabotaged[1]
    by_node = [list(read_samples(folder, node)) for node in telemetry_nodes(folder)]
    assert [{sample.attempt for sample in samples} for samples in by_node] == [{1, 2}] * 2
    ends = {e["attempt"]: e["time"] for e in select_events(folder.read_events(), "attempt_ended")}
    joules = seconds = 0.0  # What was used between the attempts is not the run's.
    for attempt in (1, 2):
        first, *_, last = (sample for sample in by_node[0] if sample.attempt == attempt)
        assert first.time < last.time < ends[attempt]
        assert first.gauges["0000:3b:00.0"].keys() == set(GAUGES)
        joules += last.gauges["0000:3b:00.0"]["energy_j"] - first.gauges["0000:3b:00.0"]["energy_j"]
        seconds += last.time - first.time
    (row,) = build(folder.path).rows
    assert (row.energy_kwh, row.gpu_power_w) == pytest.approx((joules / 3.6e6, joules / seconds))
    assert row.throttled == 1.0


def start_long_run(
    tmp_path: Path, *words: str, begin: Callable[..., Process] = start
) -> tuple[Process, RunFolder, list[int]]:
    """A run of two ranks that does not end, in its third step, and the ids of all its processes.

    On two nodes, or where words say so with one agent less.
    """
    folder = RunFolder(tmp_path / "run")
    shape = [] if set(ONE_NODE) & set(words) else ["nodes=2"]
    process = start_training(folder, *shape, *LONG, *words, begin=begin)
    return process, folder, descendants(process.pid)


def test_a_second_command_is_refused_and_ctrl_c_saves_and_ends_all_processes(tmp_path: Path) -> None:
    process, folder, family = start_long_run(tmp_path, *ONE_NODE, begin=start_fork)
    text = run(f"launch run_dir={folder.path}", *LONG, *ONE_NODE, cwd=tmp_path, status=2)
    assert "is being worked on by process" in text
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole foreground group
    assert process.wait(timeout=120) == 130
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of all processes")
    events = folder.read_events()
    assert [e["event"] for e in events][-5:] == ["saved", "stopped", "attempt_ended", "decided", "agent_ended"]
    assert causes(folder) == ["cancelled"]
    saved = [e["step"] for e in select_events(events, "saved")][-1]
    assert read_records(folder.metrics(0))[-1]["step"] == saved
    assert "the same command resumes from the last checkpoint" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_promises_no_checkpoint_to_a_script_without_one(number: int, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import signal\nopen('began', 'w').close()\nsignal.pause()\n")
    words = ["workload=script", "script.path=wait.py", "cluster=local"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: (tmp_path / "began").exists() or process.poll() is not None, "the script")
    family = descendants(process.pid)
    os.kill(process.pid, number)
    assert process.wait(timeout=120) == 128 + number
    text = (tmp_path / "log").read_text()
    if number == signal.SIGTERM:
        assert "runs on this machine save a checkpoint if they can, and end" in text
        wait_for(lambda: not any(map(is_alive, family)), "the end of all processes")
        return
    assert "the runs leave within " in text and "begins again without one" in text
    assert "the last checkpoint is of step" not in text


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path) -> None:
    process, _, family = start_long_run(tmp_path, *ONE_NODE, begin=start_fork)
    for pid in ranks_of(family).values():
        os.kill(pid, signal.SIGSTOP)  # ranks that cannot save
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in (tmp_path / "log").read_text(), "the answer to the first Ctrl-C")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of all processes")


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    process, _, family = start_long_run(tmp_path, *ONE_NODE)
    os.kill(process.pid, signal.SIGKILL)  # and nobody asks after it: it stays in the table of processes
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of all processes", 120)


def test_ranks_end_with_their_agent(tmp_path: Path) -> None:
    process, _, family = start_long_run(tmp_path, "resilience.max_restarts.node_failed=0", begin=start_fork)
    agents = [pid for pid in family if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(agents) == 2
    os.kill(agents[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of all processes")


def test_a_loss_that_diverges_again_after_one_restart_stops_the_run(tmp_path: Path) -> None:
    """Every number of it is the same again, so a second attempt tells hardware that miscalculates, a third nothing."""
    words = [*TINY, "optim.lr=1e30", "optim.min_lr=0", "optim.warmup_steps=0", "optim.max_steps=9", "optim.grad_clip=0"]
    words.append(UNDRAWN)
    folder = RunFolder(tmp_path / "run")
    text = run(f"launch run_dir={folder.path}", *words, cwd=tmp_path, status=1)
    events = folder.read_events()
    assert causes(folder) == ["diverged", "diverged"]
    assert len({e["step"] for e in select_events(events, "rank_failed")}) == 1, "the same step"
    assert "FloatingPointError: found: steps 2 to 9: a loss or gradients that are not finite" in text
    assert "no checkpoint to go back to" in text and "type next: optim.lr=3.3e+29" in text
    assert "diverged 2 times, and its limit is 1" in text


def test_a_run_that_rolls_back_without_success_is_not_restarted(tmp_path: Path) -> None:
    """The weights of one rank become worthless in step 3, right before they are saved, and do so each time."""
    words = ("checkpoint.interval=1", "checkpoint.keep_last=3", "divergence.max_skipped_steps=2", "eval.interval=0")
    text, folder = run_sabotaged(tmp_path, *words, SABOTAGED_LR="nan")
    events = folder.read_events()
    assert [(e["step"], e["first"]) for e in select_events(events, "rolled_back")] == [(2, 4)] * 2
    assert causes(folder) == ["repeated"] and folder.attempts() == [1]
    assert "RepeatedFailureError: found: steps 4 to 5: 2 steps in a row" in text
    assert "batches 8 to 9 (samples 56 to 71)" in text and "gone back 2 times" in text
    assert "not started again: the ranks have tried again by themselves" in text
