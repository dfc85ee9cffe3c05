"""Programs that know nothing of the launcher: from what they print, or only from how long they took, to the table."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.report import build
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.script import Style, written_options
from tests.support.commands import run
from tests.support.runs import LOCAL, causes, printed, write_script

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
        (folder / f"step{step}.pt").touch()
        os.utime(folder / f"step{step}.pt", (step, step))
sys.exit(0 if attempt == "3" else 75)  # The other rank may be ended before it prints.
"""


def test_an_exit_status_asks_for_another_start_which_gets_the_newest_checkpoint(tmp_path: Path) -> None:
    write_script(tmp_path, ASKING, "asking.py")
    folder = RunFolder(tmp_path / "run")
    resuming = ["script.resumes=true", 'script.resume_args="--resume=${newest}"', "script.args=${world_size}/${nodes}"]
    words = [f"launch nodes=2 script.path=asking.py run_dir={folder.path}", *LOCAL, *resuming]
    refused = run(*words, cwd=tmp_path, status=2)
    assert "found: ${newest} without script.checkpoint" in refused
    run(*words, "script.checkpoint=${checkpoint_dir}/*.pt", "script.env.WHERE=${checkpoint_dir}", cwd=tmp_path)
    assert causes(folder) == ["requested", "requested", "finished"]
    for attempt, resumed in ((1, []), (2, []), (3, [f"--resume={folder.checkpoints}/step2.pt"])):
        assert printed(folder, attempt) == f"attempt {attempt} {['2/2', *resumed]} {folder.checkpoints}\n"


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
