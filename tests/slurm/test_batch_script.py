"""The plain batch scripts, and Hydra's stock Slurm launcher, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ROOT, TIMEOUT_S, TINY, environment, run, wait_for

STEPS = 12
WORDS = [*TINY, f"optim.max_steps={STEPS}", "eval.interval=0"]


def typed(sandbox: Cluster, *words: str) -> str:
    """A command typed in the folder of the checkout, with this Python first on the PATH, as in an activated venv."""
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    done = subprocess.run(
        words, cwd=ROOT, env=environment(PATH=path, **sandbox.env), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_batch_script(sandbox: Cluster, folder: Path, *words: str) -> str:
    """Submit the plain batch script and wait for its end; its state then. (sbatch --wait looks at 2, 10 and 42 s.)"""
    job = typed(sandbox, "sbatch", "--parsable", f"--output={folder / 'out'}", "slurm/multi_node.sh", *words).strip()

    def state() -> str:
        return sandbox.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    wait_for(lambda: state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "the end of the batch script")
    return state()


@pytest.mark.slurm
def test_sbatch_takes_the_same_road(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["ranks_per_node=2", f"output_dir={tmp_path / 'outputs'}", *WORDS]
    assert run_batch_script(sandbox, tmp_path, *words) == "COMPLETED", (tmp_path / "out").read_text()
    printed = (tmp_path / "out").read_text()
    assert "2 x 2 = 4 ranks on slurm" in printed and "Summary of" in printed
    (plan,) = (tmp_path / "outputs" / "quick_test").glob("*/plan.json")
    folder = RunFolder(plan.parent)
    ranks = json.loads(folder.environment(1).read_text())["ranks"]
    assert len(ranks) == 4 and len({r["host"] for r in ranks}) == 2
    assert read_records(folder.metrics(3))[-1]["step"] == STEPS
    assert folder.read_events()[0]["event"] == "submitted"


@pytest.mark.slurm
def test_a_contradiction_ends_the_batch_script_before_anything_runs(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["nodes=3", f"output_dir={tmp_path / 'outputs'}"]
    assert run_batch_script(sandbox, tmp_path, *words) == "FAILED"
    assert "found: nodes=3 spare_nodes=0 in a job of 2 nodes" in (tmp_path / "out").read_text()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slurm
def test_the_stock_slurm_launcher_keeps_working(sandbox: Cluster, tmp_path: Path) -> None:
    stock = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
    run("launch", "nodes=2", *stock, *WORDS, cwd=tmp_path, **sandbox.env)
    (plan,) = (tmp_path / "outputs" / "quick_test").glob("*/plan.json")
    folder = RunFolder(plan.parent)
    ranks = json.loads(folder.environment(1).read_text())["ranks"]
    assert len({r["host"] for r in ranks}) == 2
    assert read_records(folder.metrics(1))[-1]["step"] == STEPS
