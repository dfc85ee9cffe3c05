"""Failures and lost nodes: what the user is told, nothing is left, and runs go on with fewer nodes or from memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpt import checkpoint as folders
from launch.plan.plan import Plan
from launch.plan.preflight import plan_text
from launch.report import build
from launch.report.goodput import measure_goodput
from launch.runs.environment import GAUGES, read_samples, telemetry_nodes
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, read_json, read_json_lines
from launch.runs.records import read_records
from launch.slurm.jobs import sbatch_text
from launch.slurm.status import find_run_status, poll
from tests.support.commands import (
    ROOT,
    TINY,
    Process,
    agents_of,
    descendants,
    is_alive,
    ranks_of,
    run,
    start,
    start_fork,
    wait_for,
)
from tests.support.planning import plan, refused
from tests.support.runs import COUNTING, LOCAL, causes, checkpoint, from_step, options, start_training

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


# Lost nodes: sizes that are allowed, a run that goes on without a node, and one that restarts from memory.


SCRIPT = "workload=script script.command=[sleep]"
ELASTIC = f"{SCRIPT} script.resumes=true script.elastic=true"


@pytest.mark.parametrize(
    ("words", "fewer"),
    [
        ("nodes=4 resilience.min_nodes=1", (2, 1)),  # 16 sequences over 3 ranks do not go
        ("nodes=4 resilience.min_nodes=2 optim.global_batch=12", (3, 2)),
        ("nodes=4 resilience.min_nodes=1 ranks_per_node=2 parallel=fsdp parallel.tp=4", (2,)),
        ("nodes=4 resilience.min_nodes=1 parallel=hsdp parallel.dp_shard=2", (2,)),
        ("nodes=2 resilience.min_nodes=2", ()),
        (f"{ELASTIC} nodes=4 resilience.min_nodes=2", (3, 2)),
    ],
)
def test_the_plan_shows_with_how_many_nodes_a_run_can_continue(words: str, fewer: tuple[int, ...]) -> None:
    planned = plan(*words.split())
    assert planned.promised.fewer_nodes == fewer
    assert Plan.from_dict(planned.as_dict()).promised.fewer_nodes == fewer
    told = f"continues with {' or '.join(map(str, fewer))} in the same job"
    assert (told in plan_text(planned)) == bool(fewer)
    assert ("--no-kill" in sbatch_text([planned])) == bool(fewer), "the loss of a node must not end the job"


NO_SIZE = "resilience.min_nodes=3, and with nodes=3: nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=16 is not a"
# 2.1 GiB a rank on two nodes, and 3 on one.
LARGE = "parallel=fsdp model=gpt2_124m optim.max_micro_batch=1 precision=bf16"
LARGE += " cluster.gpus_per_node=1 cluster.gpu_memory_gib=2.5"


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        ("nodes=2 resilience.min_nodes=3", "resilience.min_nodes=3 with nodes=2", "resilience.min_nodes=2"),
        ("nodes=2 resilience.min_nodes=0", "resilience.min_nodes=0", "resilience.min_nodes=1"),
        ("nodes=4 resilience.min_nodes=3", NO_SIZE, ", or resilience.min_nodes=null"),
        ("nodes=2 resilience.min_nodes=1 parallel.tp=2 parallel=fsdp", "with 1 rank", "parallel.tp=1"),
        ("nodes=2 resilience.min_nodes=1 optim.weak_scaling=true", "weak_scaling", "optim.weak_scaling=false"),
        (f"nodes=2 resilience.min_nodes=1 {LARGE}", "with nodes=1: a rank of 2.53 GiB", "resilience.min_nodes=null"),
        ("nodes=2 spare_jobs=1", "spare_jobs=1 for a run that cannot continue with fewer", "resilience.min_nodes=1"),
        (f"{SCRIPT} nodes=2 resilience.min_nodes=1", "a script that is not", "script.elastic=true"),
        (f"{SCRIPT} nodes=2 script.elastic=true", "without script.resumes=true", "script.resumes=true"),
    ],
)
def test_impossible_fewer_nodes_are_refused_before_the_queue(words: str, found: str, fix: str) -> None:
    refused(plan, *words.split(), found=found, fix=fix)


def test_a_run_continues_without_a_lost_node_and_uses_all_nodes_when_the_command_is_typed_again(
    tmp_path: Path,
) -> None:
    folder, hurry = RunFolder(tmp_path / "run"), tmp_path / "hurry"
    words = [*LOCAL, *COUNTING, "nodes=2", "script.elastic=true", "resilience.min_nodes=1", f"run_dir={folder.path}"]
    words += [*options(steps=400, save_every=5, hurry=hurry), "resilience.node_timeout_s=5", "script.max_steps=400"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")

    def steps(attempt: int) -> list[dict[str, Any]]:
        return [r for r in read_records(folder.metrics(0)) if r["attempt"] == attempt]

    def of(name: str) -> list[dict[str, Any]]:
        return select_events(folder.read_events(), name)

    def wait(condition: Any, what: str) -> None:
        wait_for(lambda: condition() or process.poll() is not None, what)
        assert process.poll() is None, (folder.read_events(), (tmp_path / "log").read_text())

    wait(lambda: of("saved"), "a checkpoint")
    for pid in descendants(agents_of(process.pid)[1]):  # the agent first, as it would tell the others of its ranks
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: len(steps(2)) > 5, "steps on one node")
    saved = max(e["step"] for e in of("saved") if e["attempt"] == 1)
    assert from_step(folder, attempt=2) == saved
    assert [e["world_size"] for e in of("started")] == [2, 1]
    (lost,), (end,), (decided,) = of("node_lost"), of("attempt_ended"), of("decided")
    assert (lost["node"], end["cause"], decided["action"]) == (1, "node_failed", "restart")
    assert "the run continues on 1 of 2 nodes" in decided["reason"]
    wait(folder.environment(2).exists, "what the agent tells of the attempt")
    assert len(read_json(folder.environment(2))["ranks"]) == 1
    point = find_run_status(folder)
    poll([point])
    assert point.state == "running" and point.fewer_nodes() is not None
    shown = run(f"launch.status {folder.path}", cwd=tmp_path)
    assert "1 of 2" in shown and "silent for" in shown

    os.kill(process.pid, signal.SIGINT)  # saves, and leaves
    process.wait(300)
    left_at = checkpoint(folder)["step"]
    hurry.touch()
    run("launch", *words, cwd=tmp_path)
    assert [e["world_size"] for e in of("started")] == [2, 1, 2]
    assert [e["attempt"] for e in of("all_nodes")] == [3]
    assert (from_step(folder, attempt=3), checkpoint(folder)["step"]) == (left_at, 400)
    made = [r["step"] for r in read_json_lines(folder.metrics(0)) if r["attempt"] == 2]
    assert made[0] == saved + 1 and sorted(set(made)) == list(range(saved + 1, left_at + 1))


STEPS, DISK = 60, 20
IN_MEMORY = (
    *TINY,
    *(f"optim.max_steps={STEPS}", "eval.interval=0", f"checkpoint.interval={DISK}", "nodes=2", "cluster=local"),
    *("model.n_layer=1", "optim.max_micro_batch=4", "parallel=fsdp"),
    *("logging.tensorboard=false", "resilience.health_check=false"),
)
AGENTS = 3
"""Of two nodes and a spare."""


def state_files(folder: RunFolder) -> dict[str, bytes]:
    """The files of the last checkpoint, but for the manifest, which has the time."""
    last = folders.final_for(folder.checkpoints, STEPS)
    return {path.name: path.read_bytes() for path in last.iterdir() if path.name.startswith(("__", "rank"))}


def test_restarts_from_memory_after_a_killed_rank_and_a_lost_node_give_the_same_weights(tmp_path: Path) -> None:
    quiet, doomed = RunFolder(tmp_path / "quiet"), RunFolder(tmp_path / "doomed")
    run(f"launch run_dir={quiet.path}", *IN_MEMORY, cwd=tmp_path)
    doomed.config.parent.mkdir(parents=True)
    shutil.copy(quiet.plan, doomed.plan)
    config = quiet.config.read_text().replace(str(quiet.path), str(doomed.path))
    doomed.config.write_text(config.replace("memory_interval: 0", "memory_interval: 1"))

    where = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": str(AGENTS)}
    agents = [
        start_fork(
            f"tests.support.programs.doomed_agent {doomed.path}",
            cwd=tmp_path,
            log=tmp_path / f"agent_{index}",
            **where,
            SUBMITIT_LOCAL_GLOBALID=str(index),
            LAUNCH_TOKEN="drill",
        )
        for index in range(AGENTS)
    ]
    ended = [agent.wait(timeout=280) for agent in agents]
    events = doomed.read_events()
    told = [(e["event"], e.get("attempt"), e.get("cause")) for e in events]
    assert ended == [0, -9, 0], ((tmp_path / "agent_0").read_text(), told)
    assert [cause for event, _, cause in told if event == "attempt_ended"] == ["crashed", "node_failed", "finished"]
    for attempt in (2, 3):
        on_disk = max(e["step"] for e in select_events(events, "saved") if e["attempt"] < attempt)
        (loaded,) = select_events(events, "loaded_from_memory", attempt=attempt)
        (started,) = select_events(events, "started", attempt=attempt)
        assert started["from_step"] == loaded["step"] > on_disk
    assert "memory_passed_over" not in {event for event, _, _ in told}
    assert state_files(doomed) == state_files(quiet) and len(state_files(quiet)) == 4
