"""Points on this machine: side by side, after other runs, stopped at the first failure, and seen from beside a rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from launch.attach.__main__ import grouped
from launch.runs.folder import RunFolder
from launch.runs.process import share
from tests.support.commands import ROOT, run, start_fork, wait_for
from tests.support.runs import COUNTING, LOCAL, MEETING, PROGRAM, checkpoint, names, options, printed, write_script

TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
TRACKERS = ("LAUNCH_TRACKER_ID", "WANDB_RUN_ID", "NEPTUNE_CUSTOM_RUN_ID", "COMET_EXPERIMENT_KEY", "WANDB_RESUME")
FAILING_ONCE = f"""
import os, sys

print("ids", *(os.environ.get(name) for name in {TRACKERS!r}), flush=True)
sys.exit(os.environ["LAUNCH_ATTEMPT"] == "1")
"""


def folders(outputs: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(outputs.glob("*/plan.json"))]


@TWO_CPUS
def test_points_run_side_by_side_each_with_its_own_cpus(tmp_path: Path) -> None:
    script = write_script(tmp_path, MEETING)
    words = ("-m", 'script.args="a 2","b 2"', f"script.path={script}", "name=meet", *LOCAL)
    refused = run("launch launch.parallel=999", *words, cwd=tmp_path, status=2)
    assert re.search(r"found: launch.parallel=999, and this machine has \d+ [CG]PUs", refused)
    assert "launch.parallel=x" in run("launch launch.parallel=x", *words, cwd=tmp_path, status=2)
    assert not (tmp_path / "outputs").exists()
    table = run("launch launch.parallel=2", *words, cwd=tmp_path)
    one, two = folders(tmp_path / "outputs" / "meet")
    cpus = [re.findall(r"CPUs (.*)", printed(folder))[0].split() for folder in (one, two)]
    assert cpus[0] and cpus[1] and not {*cpus[0]} & {*cpus[1]}
    assert "at the same time as" in table and "no efficiency is claimed" in table


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_shares_have_every_item_once(count: int) -> None:
    for parts in (1, 2, 3):
        found = [item for part in range(parts) for item in share(range(count), part, parts)]
        assert found == [*range(count)]


def test_the_first_failure_stops_the_points_that_wait(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\nsys.exit(int(sys.argv[1]))\n")
    words = ("-m", "script.args=0,1,2", f"script.path={script}", "name=x", "launch.stop_at_first_failure=true", *LOCAL)
    text = run("launch", *words, cwd=tmp_path, status=1)
    assert text.count("launch.stop_at_first_failure=true: stopping the other points") == 1
    ran = ["agent_started" in names(folder) for folder in folders(tmp_path / "outputs" / "x")]
    assert ran == [True, True, False]
    refused = run("launch launch.detach=true fresh=true", *words, cwd=tmp_path, status=2)
    assert "launch.stop_at_first_failure=true with launch.detach=true" in refused


def test_a_run_after_another_begins_only_if_that_has_finished(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\nsys.exit(int(sys.argv[1]))\n")
    program = (f"script.path={script}", *LOCAL)
    run("launch name=good script.args=0", *program, cwd=tmp_path)
    run("launch name=bad script.args=1", *program, cwd=tmp_path, status=1)
    after = partial(run, "launch", "name=next", "script.args=0", *program, cwd=tmp_path)
    refused = after("launch.after=outputs/bad", status=2)
    assert "is failed" in refused
    assert "type next: the command of that run again, or launch.after=afterany:outputs/bad" in refused
    assert "outputs/never" in after("launch.after=outputs/never", status=2)
    assert not (tmp_path / "outputs" / "next").exists()
    after("launch.after=outputs/good")
    after("launch.after=afterany:outputs/bad", "fresh=true")


def test_trackers_continue_the_run_of_each_rank(tmp_path: Path) -> None:
    script = write_script(tmp_path, FAILING_ONCE)
    words = (f"script.path={script}", "script.resumes=true", *LOCAL[:1], "ranks_per_node=2", *LOCAL[2:])
    run("launch run_dir=run", *words, cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    ids = [[printed(folder, attempt, rank).split()[1:] for rank in (0, 1)] for attempt in (1, 2)]
    assert ids[0] == ids[1] and ids[0][0] != ids[0][1]
    for same, wandb, neptune, comet, resume in ids[0]:
        assert same == wandb == neptune == comet and resume == "allow" and re.fullmatch(r"[0-9a-f]{32}", same)
    again = run("launch run_dir=other script.env.WANDB_RUN_ID=mine", *words, cwd=tmp_path)
    assert "finished" in again
    mine = printed(RunFolder(tmp_path / "other")).split()[1:]
    assert mine[1] == "mine" and mine[0] not in ("mine", ids[0][0][0])


def test_gpus_named_by_uuid_are_handed_on_by_uuid(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import os\nprint('has', os.environ['CUDA_VISIBLE_DEVICES'])\n")
    words = (f"script.path={script}", "nodes=2", "run_dir=run", *LOCAL)
    run("launch", *words, cwd=tmp_path, CUDA_VISIBLE_DEVICES="GPU-a7, MIG-b3")
    assert [printed(RunFolder(tmp_path / "run"), 1, rank) for rank in (0, 1)] == ["has GPU-a7\n", "has MIG-b3\n"]


def test_a_script_runs_under_a_python_without_torch_and_reports_by_the_worker(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "theirs"], check=True)
    python = tmp_path / "theirs" / "bin" / "python"
    program = ("workload=script", f"script.path={PROGRAM}", *options(steps=4), *LOCAL[:2], *LOCAL[3:])
    words = (f"script.python={python}", f"script.env.PYTHONPATH={ROOT}", "nodes=2", "run_dir=run", *program)
    run("launch", *words, cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert checkpoint(folder)["step"] == 4 and "finished" in names(folder)
    there = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in there.stderr


def test_a_shell_beside_a_rank_and_the_stacks_of_all(tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    words = ("run_dir=run", "nodes=2", *LOCAL[:2], *LOCAL[3:], *COUNTING, *options(steps=1000000))
    process = start_fork("launch", *words, cwd=tmp_path, log=log)
    wait_for(lambda: folder.metrics(0).exists() and folder.metrics(0).stat().st_size, "a step")
    attach = partial(run, "launch.attach", "run", cwd=tmp_path)
    there = attach("--rank", "1", "--", "env")
    assert "\nRANK=1\n" in there and f"\nLAUNCH_RUN_DIR={folder.path}\n" in there
    stacks = attach("--stacks")
    assert re.match(r"\d of 2 ranks: 0", stacks) and "counting.py" in stacks and "most recent call first" in stacks
    assert "no process of rank 7" in attach("--rank", "7", status=2)
    run("launch.cancel run", cwd=tmp_path)
    assert process.wait(timeout=120) == 1
    assert "run is cancelled" in attach(status=2)


def test_equal_stacks_stand_together_and_the_odd_one_first() -> None:
    alike, odd = "Thread 0x00007f11 (most recent call first):\n  a", "Thread 0x00007f22 (most recent call first):\n  b"
    other = alike.replace("0x00007f11", "0x00007f33")
    text = grouped({0: alike, 1: other, 2: odd, 3: other, 5: alike})
    assert text.startswith("1 of 5 ranks: 2\n") and "4 of 5 ranks: 0-1, 3, 5\n" in text
