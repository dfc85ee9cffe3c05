"""The plain batch scripts, and Hydra's stock Slurm launcher, on a real Slurm."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.storm import injection
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ROOT, TIMEOUT_S, TINY, environment, run, wait_for
from tests.support.runs import COUNTING, options, rank_hosts

STEPS = 12
WORDS = [*TINY, f"optim.max_steps={STEPS}", "eval.interval=0"]


def typed(sandbox: Cluster, *words: str, status: int = 0, **extra: str) -> str:
    """A command typed in the folder of the checkout, with this Python first on the PATH, as in an activated venv."""
    env = environment(PATH=f"{Path(sys.executable).parent}:{environment()['PATH']}", **sandbox.env, **extra)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def wait_for_end(sandbox: Cluster, *jobs: str) -> list[str]:
    """The last states of jobs, in their order. (sbatch --wait looks at 2, 10 and 42 s.)"""

    def states() -> list[str]:
        rows = sandbox.slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T")
        known = dict(row.split() for row in rows.splitlines())
        return [known[job] for job in jobs]

    going = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
    wait_for(lambda: not going & set(states()), f"the end of the jobs {', '.join(jobs)}")
    return states()


def submit_batch_script(sandbox: Cluster, folder: Path, *words: str, **extra: str) -> str:
    """Submit the plain batch script, which prints into ``folder/out``, with more for sbatch's environment; its job."""
    command = ("sbatch", "--parsable", f"--output={folder / 'out'}", "slurm/multi_node.sh")
    return typed(sandbox, *command, *words, **extra).strip()


@pytest.mark.slurm
def test_a_sweep_of_batch_scripts_takes_the_same_road_and_ends_in_a_table(sandbox: Cluster, tmp_path: Path) -> None:
    words = [*COUNTING, "ranks_per_node=2", f"output_dir={tmp_path / 'outputs'}", 'name="it\'s mine"']
    begin = tmp_path / "begin"  # no run ends before its batch script has looked at it
    words += options(steps=STEPS, begin=begin)
    there = {"NODES": "1 2", "SBATCH_OUTPUT": str(tmp_path / "%j.out"), "SBATCH_TIMELIMIT": "17"}
    refused = typed(sandbox, "bash", "slurm/scaling.sh", "script.resume=true", *words, status=2, **there)
    assert "type next: " in refused and "script.resume" in refused
    refused = typed(sandbox, "bash", "slurm/scaling.sh", "nodes=3", *words, status=2, **there)
    assert 'type next: NODES="1 3" bash slurm/scaling.sh' in refused
    assert sandbox.slurm("squeue", "--noheader") == "", "a point that cannot work has no other submitted"

    text = typed(sandbox, "bash", "slurm/scaling.sh", *words, "fresh=true", **there)
    jobs = re.findall(r"^\S+: job (\d+)", text, re.MULTILINE)
    sweep = tmp_path / "outputs" / "it's mine"
    assert len(jobs) == 3 and text.endswith(f"then {sweep}/scaling.md\n")
    printed = {job: tmp_path / f"{job}.out" for job in jobs}

    def of_two_nodes() -> RunFolder | None:
        plans = {json.loads(path.read_text())["nodes"]: path for path in sweep.glob("*/plan.json")}
        return RunFolder(plans[2].parent) if 2 in plans else None

    def has(event: str) -> bool:
        found = of_two_nodes()
        return found is not None and any(e["event"] == event for e in found.read_events())

    wait_for(lambda: has("agent_started"), "the agents on two nodes")
    found = injection.of_job(jobs[1], "srun", sandbox.env["SLURM_CONF"])
    injection.send(found, signal.SIGKILL)  # the agents go on without it
    wait_for(lambda: has("srun_lost"), "the batch script to look")
    begin.touch()
    ended = wait_for_end(sandbox, *jobs)
    assert ended == ["COMPLETED"] * 3, [path.read_text() for path in printed.values() if path.exists()]
    run, report = printed[jobs[1]].read_text(), printed[jobs[2]].read_text()
    assert "2 x 2 = 4 ranks on slurm" in run and "Summary of" in run
    assert "2 nodes for 17 min)" in run, "the worst case is that of the job, not of the config"
    folder = of_two_nodes()
    assert folder is not None
    hosts = rank_hosts(folder)
    assert len(hosts) == 4 and len({*hosts}) == 2
    assert read_records(folder.metrics(3))[-1]["step"] == STEPS
    events = [e["event"] for e in folder.read_events()]
    assert events[0] == "submitted" and "srun_lost" in events and events.count("attempt_ended") == 1
    assert len(list(sweep.glob("*/plan.json"))) == 2, "each job went on in the folder that was made for it"
    assert "Strong scaling of it's mine" in report
    with (sweep / "scaling.csv").open() as file:
        assert [row["nodes"] for row in csv.DictReader(file)] == ["1", "2"]
    again = typed(sandbox, "bash", "slurm/scaling.sh", *words, **there)
    assert again.count("finished already, and not submitted") == 2 and "Strong scaling of it's mine" in again
    assert sandbox.slurm("squeue", "--noheader") == ""


@pytest.mark.slurm
def test_points_of_batch_scripts_that_wait_are_known_and_can_be_cancelled(sandbox: Cluster, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'outputs'}", "name=s", *COUNTING]
    there = {"NODES": "1 2", "SBATCH_OUTPUT": str(tmp_path / "%j.out")}
    refused = typed(sandbox, "bash", "slurm/scaling.sh", *words, status=2, **{**there, "NODES": "1 9"})
    assert "found: nodes=9, and Slurm: " in refused and "Requested node configuration is not available" in refused
    assert "type next: " in refused and sandbox.slurm("squeue", "--noheader") == ""
    assert not (tmp_path / "outputs" / "s").exists()

    blocker = ("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    occupied = typed(sandbox, *blocker).strip()
    text = typed(sandbox, "bash", "slurm/scaling.sh", *words, **there)
    jobs = re.findall(r"^nodes=\d: job (\d+)", text, re.MULTILINE)
    told = json.loads(run(f"launch.status --json {tmp_path / 'outputs'}", cwd=tmp_path, **sandbox.env))
    assert {point["job_id"]: (point["state"], point["nodes"]) for point in told} == {
        jobs[0]: ("pending", 1),
        jobs[1]: ("pending", 2),
    }
    again = typed(sandbox, "bash", "slurm/scaling.sh", *words, status=2, **there)
    assert f"is being worked on by job {jobs[0]}, pending" in again
    said = run(f"launch.cancel {tmp_path / 'outputs' / 's'}", cwd=tmp_path, **sandbox.env)
    assert said.count(": cancelled") == 2
    waiting = sandbox.slurm("squeue", "--noheader", "--format=%i").split()
    assert not {*jobs} & {*waiting}
    sandbox.slurm("scancel", occupied)


@pytest.mark.slurm
def test_a_contradiction_ends_the_batch_script_before_anything_runs(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["nodes=3", f"output_dir={tmp_path / 'outputs'}"]
    job = submit_batch_script(sandbox, tmp_path, *words)
    assert wait_for_end(sandbox, job) == ["FAILED"]
    assert "found: nodes=3 spare_nodes=0 in a job of 2 nodes" in (tmp_path / "out").read_text()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slurm
def test_the_stock_slurm_launcher_keeps_working(sandbox: Cluster, tmp_path: Path) -> None:
    stock = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
    run("launch nodes=2", *stock, *WORDS, cwd=tmp_path, **sandbox.env)
    (plan,) = (tmp_path / "outputs" / "quick_test").glob("*/plan.json")
    folder = RunFolder(plan.parent)
    assert len({*rank_hosts(folder)}) == 2
    assert read_records(folder.metrics(1))[-1]["step"] == STEPS
