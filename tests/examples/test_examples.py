"""The examples do what their first lines promise, on local agents; and programs without the launcher's API."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import worker
from launch.report import build
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.script import Style, written_options
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
    write_script,
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


# Programs that know nothing of the launcher: from what they print, or only from how long they took, to the table.


# Settings from a file of Python and then from arguments, and a line for each step, in the form that nanoGPT prints.
PRINTING = """
import os, sys, time
max_iters, pause, loss = 5, 0.01, 4.0
for arg in sys.argv[1:]:
    exec(open(arg).read() if "=" not in arg else arg.removeprefix("--"))
print("tokens per iteration will be: 16,384")
last = time.time()
for iter_num in range(max_iters + 1):
    time.sleep(pause)
    now = time.time()
    dt, last = now - last, now
    if int(os.environ["RANK"]) == 0:
        print(f"iter {iter_num}: loss {loss / (iter_num + 1):.4f}, time {dt * 1000:.2f}ms, mfu -100.00%")
"""


def test_options_below_options_are_written_by_dotted_names() -> None:
    options = {"optim": {"lr": 0.1, "betas": [0.9, 0.99], "eps": None}, "seed": 3}
    assert [*written_options(options, Style.argparse)] == ["--optim.lr=0.1", "--optim.betas=0.9,0.99", "--seed=3"]
    assert [*written_options(options, Style.hydra)] == ["optim.lr=0.1", "optim.betas=[0.9,0.99]", "seed=3"]


def test_what_is_printed_is_what_metrics_table_and_curves_say(tmp_path: Path) -> None:
    write_script(tmp_path, PRINTING, "train.py")
    (tmp_path / "config").mkdir()
    write_script(tmp_path, "pause = 0.05\nloss = 2.5\n", "config/small.py")
    words = ["script.path=train.py", "script.args=config/small.py", "script.options.max_iters=30", "like=nanogpt"]
    text = run(
        "launch nodes=2 script.unit=tokens script.work_per_step=16384", *LOCAL, *words, cwd=tmp_path
    )  # fmt: skip
    (path,) = (tmp_path / "outputs" / "train").glob("*/plan.json")
    folder = RunFolder(path.parent)
    lines = re.findall(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms", printed(folder))
    told = [(int(step), float(loss), float(ms) / 1000) for step, loss, ms in lines]
    assert [step for step, _, _ in told] == list(range(31)) and told[0][1] == 2.5, "from the config file"
    records = read_records(folder.metrics(0))
    assert [(r["step"], r["loss"], r["step_time_s"]) for r in records] == told
    assert not folder.metrics(1).exists(), "the other rank prints nothing"
    (row,) = build(folder.path.parent).rows
    assert (row.loss, row.last_step) == (told[-1][1], 30)
    assert row.step_time_s == pytest.approx(statistics.median(time for _, _, time in told[5:]), rel=1e-6)
    assert row.throughput == pytest.approx(16384 / row.step_time_s) and "tokens/s" in text
    curves = EventAccumulator(str(folder.tensorboard)).Reload()
    assert "train/loss" in curves.Tags()["scalars"], curves.Tags()
    drawn = [(point.step, point.value) for point in curves.Scalars("train/loss")]
    assert drawn == [(step, pytest.approx(loss)) for step, loss, _ in told]


def test_a_program_that_says_nothing_ends_in_a_table_of_times(tmp_path: Path) -> None:
    silent = f"script.command=[{sys.executable},-c,'import time; time.sleep(1)']"
    text = run("launch nodes=2 name=python", *LOCAL, silent, cwd=tmp_path)
    (row,) = build(tmp_path / "outputs" / "python").rows
    assert (row.nodes, row.ranks, row.state, row.loss, row.last_step) == (2, 2, "finished", None, None)
    assert "run time" in text and "No step times were recorded" in text


FAILING = """
import os
def divide(): return 1 / 0
if os.environ["RANK"] == "1": divide()
"""


def test_a_failure_is_that_of_the_command_with_its_traceback_and_is_not_started_again(tmp_path: Path) -> None:
    write_script(tmp_path, FAILING, "failing.py")
    words = ["nodes=2", *LOCAL, "script.path=failing.py", f"run_dir={tmp_path / 'run'}"]
    text = run("launch", *words, cwd=tmp_path, status=1)
    assert "rank 1 on" in text and "ZeroDivisionError: division by zero" in text and "in divide" in text
    folder = RunFolder(tmp_path / "run")
    assert folder.attempts() == [1] and causes(folder) == ["crashed"]
    assert "script.resumes=true" in text
    plan = run("launch fresh=true dry_run=true", *words, cwd=tmp_path)
    assert "none: an interrupted script is not started again" in plan


ASKING = """
import os, pathlib, sys
attempt = os.environ["LAUNCH_ATTEMPT"]
print("attempt", attempt, sys.argv[1:], os.environ["WHERE"], flush=True)
if attempt == "2" and os.environ["RANK"] == "0":
    folder = pathlib.Path(os.environ["LAUNCH_CHECKPOINT_DIR"])
    folder.mkdir()
    for step in (1, 2):
        (folder / f"step{step:04}.pt").touch()
        os.utime(folder / f"step{step:04}.pt", (step, step))
sys.exit(0 if attempt == "3" else 75)  # The other rank may be ended before it prints.
"""


def test_an_exit_status_asks_for_another_start_which_gets_the_newest_checkpoint(tmp_path: Path) -> None:
    write_script(tmp_path, ASKING, "asking.py")
    folder = RunFolder(tmp_path / "run")
    resuming = [
        "script.resumes=true",
        'script.resume_args="--resume=${newest} ${newest_step}"',
        "script.args=${world_size}/${nodes}",
    ]
    words = [f"launch nodes=2 script.path=asking.py run_dir={folder.path}", *LOCAL, *resuming]
    refused = run(*words, cwd=tmp_path, status=2)
    assert "found: ${newest} without script.checkpoint" in refused
    refused = run(*words, "script.checkpoint=${checkpoint_dir}/*.*", cwd=tmp_path, status=2)
    assert "found: ${newest_step} with script.checkpoint=${checkpoint_dir}/*.*" in refused
    run(*words, "script.checkpoint=${checkpoint_dir}/step*.pt", "script.env.WHERE=${checkpoint_dir}", cwd=tmp_path)
    assert causes(folder) == ["requested", "requested", "finished"]
    for attempt, resumed in ((1, []), (2, []), (3, [f"--resume={folder.checkpoints}/step0002.pt", "2"])):
        assert printed(folder, attempt) == f"attempt {attempt} {['2/2', *resumed]} {folder.checkpoints}\n"


TORN = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["LAUNCH_CHECKPOINT_DIR"])
print("attempt", os.environ["LAUNCH_ATTEMPT"], sys.argv[1:], flush=True)
if os.environ["LAUNCH_ATTEMPT"] == "1":
    folder.mkdir()
    for step, text in ((1, "sound"), (2, "torn"), (3, "")):
        (folder / f"step{step}.pt").write_text(text)
        os.utime(folder / f"step{step}.pt", (step, step))
    sys.exit(75)
sys.exit((folder / f"step{sys.argv[1]}.pt").read_text() == "torn")
"""


def test_a_checkpoint_that_two_starts_cannot_load_is_left_for_an_older_one(tmp_path: Path) -> None:
    write_script(tmp_path, TORN, "torn.py")
    folder = RunFolder(tmp_path / "run")
    resuming = "script.resumes=true script.resume_args=${newest_step} script.checkpoint=${checkpoint_dir}/step*.pt"
    run(f"launch script.path=torn.py run_dir={folder.path} {resuming}", *LOCAL, cwd=tmp_path)
    assert causes(folder) == ["requested", "crashed", "crashed", "finished"]
    given = [printed(folder, attempt) for attempt in folder.attempts()]
    assert given == [f"attempt {number} {args}\n" for number, args in enumerate(([], ["2"], ["2"], ["1"]), start=1)]


COORDINATED = """
import os, socket, sys
rank, local_rank, place = sys.argv[1:]
assert (rank, local_rank) == (os.environ["RANK"], os.environ["LOCAL_RANK"]), sys.argv
assert place == os.environ["PLACE"] and not place.endswith(":" + os.environ["MASTER_PORT"])
host, port = place.split(":")
if rank == "0":
    with socket.create_server((host, int(port))) as server:
        print(sorted(server.accept()[0].recv(1) for _ in range(3)))
else:
    while True:
        try:
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(rank.encode())
                break
        except ConnectionRefusedError:  # Rank 0 starts later.
            pass
"""


def test_rank_0_opens_a_server_of_its_own_where_all_ranks_find_it(tmp_path: Path) -> None:
    write_script(tmp_path, COORDINATED, "coordinated.py")
    folder = RunFolder(tmp_path / "run")
    words = ["script.args='${rank} ${local_rank} ${coordinator}'", "script.env.PLACE=${coordinator}"]
    run(
        f"launch nodes=2 script.path=coordinated.py run_dir={folder.path}",
        *LOCAL,
        "ranks_per_node=2",
        *words,
        cwd=tmp_path,
    )
    assert printed(folder) == "[b'1', b'2', b'3']\n"


def test_a_copy_of_the_code_is_that_of_the_programs_repository(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "theirs").mkdir(parents=True)
    write_script(project, "import theirs.part\nprint(theirs.part.__file__)\n", "train.py")
    write_script(project, "", "theirs/part.py")
    write_script(project, "", "theirs/ignored.py")
    write_script(project, "theirs/ignored.py\n", ".gitignore")
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    run("launch script.path=project/train.py copy_code=true run_dir=outputs/one/run", *LOCAL, cwd=tmp_path)
    folder = RunFolder(tmp_path / "outputs" / "one" / "run")
    (copy,) = (tmp_path / "outputs" / "one" / ".code").iterdir()
    assert printed(folder) == f"{copy / 'theirs' / 'part.py'}\n"
    copied = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {"train.py", "theirs/part.py", ".gitignore"} <= copied and "theirs/ignored.py" not in copied
    assert not any(name.startswith("launch/") for name in copied)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    environment = json.loads(folder.environment(1).read_text())
    assert environment["git"]["commit"] == commit
    assert environment["code"]["root"] == str(copy) and environment["code"]["is_snapshot"]
