"""The examples do what their first lines promise, on local agents."""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import worker
from launch.report import build
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import STARTED, environment, fork_server, run, start_fork, wait_for
from tests.support.distributed import run_distributed
from tests.support.forking import Job
from tests.support.runs import (
    EXAMPLES,
    LOCAL,
    PROGRESS,
    causes,
    first_step,
    last_loss,
    printed,
    printed_loss,
    rank_of_script,
)  # fmt: skip

STEPS = 600


def point(folder: Path, name: str, nodes: int) -> RunFolder:
    """The run folder of a point."""
    (found,) = (folder / "outputs" / name).glob(f"nodes={nodes},*")
    return RunFolder(found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """plain_ddp.py on one node and on two: the folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("plain")
    options = [f"script.options.steps={STEPS}", f"script.max_steps={STEPS}", "script.resumes=true", PROGRESS]
    program = ["script.work_per_step=64", f"script.path={EXAMPLES / 'plain_ddp.py'}"]
    return folder, run("launch -m nodes=1,2", *LOCAL, *options, *program, cwd=folder)


def test_plain_ddp_ends_in_a_scaling_table(plain: tuple[Path, str]) -> None:
    folder, text = plain
    assert "Strong scaling of plain_ddp with 64 samples per step" in text
    table = build(folder / "outputs" / "plain_ddp")
    assert [(row.nodes, row.ranks, row.state, row.last_step) for row in table.rows] == [
        (1, 1, "finished", STEPS), (2, 2, "finished", STEPS),
    ]  # fmt: skip
    for row in table.rows:
        assert row.nodes and row.step_time_s and row.throughput == pytest.approx(64 / row.step_time_s)
        run_folder = point(folder, "plain_ddp", row.nodes)
        assert row.loss == printed_loss(printed(run_folder), STEPS) == last_loss(run_folder)[1]


def test_a_killed_rank_of_plain_ddp_is_started_again_and_the_loss_is_that_of_the_undisturbed_run(
    plain: tuple[Path, str], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    options = [f"script.options.steps={STEPS}", "script.resumes=true", PROGRESS, f"run_dir={folder.path}"]
    process = start_fork(
        f"launch nodes=2 script.path={EXAMPLES / 'plain_ddp.py'}", *LOCAL, *options,
        cwd=tmp_path, log=tmp_path / "log",
    )  # fmt: skip
    wait_for(lambda: "step 1:" in printed(folder) or process.poll() is not None, "the first step")
    pid = rank_of_script(process.pid, "plain_ddp.py", rank=1)
    assert pid is not None, (tmp_path / "log").read_text()
    wait_for(lambda: "step 51:" in printed(folder) or process.poll() is not None, "the first checkpoint")
    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert causes(folder) == ["crashed", "finished"]
    assert first_step(printed(folder, attempt=2)) > 50, "from its own checkpoint"
    undisturbed = point(plain[0], "plain_ddp", 2)
    assert printed_loss(printed(folder, 2), STEPS) == printed_loss(printed(undisturbed), STEPS)


def test_records_of_the_worker_api_end_in_a_table(tmp_path: Path) -> None:
    program = ["script.resumes=true", f"script.path={EXAMPLES / 'ddp_with_worker.py'}"]
    options = ["script.options.steps=100", "script.max_steps=100"]
    assert "Summary of " in run("launch -m nodes=2", *LOCAL, *options, *program, cwd=tmp_path)
    (row,) = build(tmp_path / "outputs" / "ddp_with_worker").rows
    assert (row.ranks, row.state, row.last_step) == (2, "finished", 100)
    assert row.throughput == pytest.approx(64 / (row.step_time_s or 0), rel=0.01)
    two = point(tmp_path, "ddp_with_worker", 2)
    assert [r["samples"] for r in read_records(two.metrics(1))] == [32] * 100
    assert [e["step"] for e in two.read_events() if e["event"] == "saved"] == [50, 100]


def test_a_stop_of_the_worker_example_loses_no_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    program = ["script.resumes=true", f"script.path={EXAMPLES / 'ddp_with_worker.py'}", f"run_dir={folder.path}"]
    args = ["nodes=2", *LOCAL, *program, "script.options.steps=100000", "script.options.save-every=100000"]
    process = start_fork("launch", *args, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: read_records(folder.metrics(0)) or process.poll() is not None, "a step")
    (folder.path / "STOP").touch()
    process.wait(timeout=300)
    saved = [e["step"] for e in folder.read_events() if e["event"] == "saved"]
    assert len(saved) == 1 and saved[0] == read_records(folder.metrics(1))[-1]["step"]
    assert causes(folder) == ["cancelled"] and not (folder.path / "STOP").exists()


def launch_with(library: str, *words: str, cwd: Path) -> None:
    """Launch a script to its end, its ranks forked from a process that has imported what takes them seconds."""
    log = cwd / "log"
    process = fork_server(library).start(Job("launch", words, str(cwd), environment(), own_session=True), log)
    STARTED.append(process)
    assert process.wait(timeout=300) == 0, log.read_text()


def test_deepspeed_trains_and_saves(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    options = ["script.options.stage=2", "script.options.steps=20", "script.options.save-every=10"]
    program = [f"script.path={EXAMPLES / 'deepspeed_zero.py'}", f"run_dir={folder.path}", "script.resumes=true"]
    launch_with("deepspeed", "nodes=2", *LOCAL, *options, *program, cwd=tmp_path)
    assert causes(folder) == ["finished"]
    assert [e["step"] for e in folder.read_events() if e["event"] == "saved"] == [10, 20]
    losses = [r["loss"] for r in read_records(folder.metrics(1))]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert (folder.checkpoints / "latest").read_text() == "step_20"


TRAINER = "transformers.trainer"


def call_back(rank: int, world_size: int, path: Path) -> None:
    """Hand the callback of the example what a Trainer hands it."""
    transformers = importlib.import_module("transformers")
    callback_class = runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))["LauncherCallback"]
    folder = RunFolder(path)
    folder.create_attempt()
    attached = worker.Run()
    attached.open_folder(folder.path, attempt=1)
    callback, state, control = callback_class(attached), SimpleNamespace(global_step=3), transformers.TrainerControl()
    args = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert not callback.on_step_end(args, state, control).should_save
    callback.on_log(args, state, control, logs={"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 1.0})
    callback.on_log(args, state, control, logs={"train_loss": 2.5, "train_runtime": 1.0})
    (folder.path / "STOP").touch()
    wait_for(lambda: callback.on_step_end(args, state, control).should_training_stop, "the stop")
    assert control.should_save
    callback.on_save(args, state, control)
    (record,) = read_records(folder.metrics(0))
    assert (record["step"], record["loss"], record["lr"], record["samples"]) == (3, 2.5, 1e-3, 16)
    assert [(e["event"], e["step"]) for e in folder.read_events()] == [("saved", 3)]
    assert not (folder.path / "STOP").exists()


def test_the_callback_of_the_trainer_tells_of_steps_and_obeys(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    run_distributed(call_back, 1, tmp_path / "run", timeout_s=300, imports=[TRAINER])


def test_a_trainer_of_transformers_tells_of_its_steps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    folder = RunFolder(tmp_path / "run")
    options = ["script.options.max_steps=12", "script.options.save_steps=6", f"run_dir={folder.path}"]
    program = f"script.path={EXAMPLES / 'transformers_trainer.py'}"
    launch_with(TRAINER, "nodes=2", *LOCAL, *options, program, cwd=tmp_path)
    assert causes(folder) == ["finished"]
    assert [e["step"] for e in folder.read_events() if e["event"] == "saved"] == [6, 12]
    records = read_records(folder.metrics(0))
    assert [r["step"] for r in records] == list(range(1, 13)) and records[-1]["loss"] < records[0]["loss"]


def test_no_thread_of_its_process_group_outlives_an_example(tmp_path: Path) -> None:
    """One that did could abort the process while Python ends, after the last step."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    program = tmp_path / "both.py"
    program.write_text(f"""
import glob, os, runpy, sys
for name in ("plain_ddp.py", "ddp_with_worker.py"):
    if (pid := os.fork()) == 0:
        sys.argv = [name, "--steps=2"]
        os.mkdir(name.partition(".")[0])
        os.chdir(name.partition(".")[0])
        runpy.run_path({str(EXAMPLES)!r} + "/" + name, run_name="__main__")
        left = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
        print(name, [thread for thread in left if "gloo" in thread], flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
""")
    log = tmp_path / "log"
    process = fork_server().start(Job(str(program), (), str(tmp_path), environment(**alone), is_file=True), log)
    STARTED.append(process)
    process.wait(timeout=300)
    told = [line for line in log.read_text().splitlines() if line.endswith("]")]
    assert told == ["plain_ddp.py []", "ddp_with_worker.py []"], log.read_text()
