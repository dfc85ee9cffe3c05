"""Several points in one job of a real Slurm: shares, cancel of one, requeue of the rest, and the table."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster, preempt
from tests.support.commands import ON_SLURM, run, wait_for
from tests.support.runs import COUNTING, causes, checkpoint, from_step, names, options, printed, write_script

pytestmark = pytest.mark.slurm

TWO_IN_A_JOB = (*ON_SLURM, "launch.detach=true", "cluster.points_per_job=2", "name=s")


def folders(outputs: Path) -> list[RunFolder]:
    """The run folders of the sweep ``s``, in the order of their labels."""
    plans = {path: json.loads(path.read_text()) for path in (outputs / "s").glob("*/plan.json")}
    return [RunFolder(path.parent) for path in sorted(plans, key=lambda path: str(plans[path]["label"]))]


def job(folder: RunFolder) -> str:
    return str(next(event["job_id"] for event in folder.read_events() if event["event"] == "submitted"))


def test_one_of_two_points_of_a_job_is_cancelled_and_the_other_is_requeued(sandbox: Cluster, tmp_path: Path) -> None:
    command, hurry = partial(run, cwd=tmp_path, **sandbox.env), tmp_path / "hurry"
    words = ["ranks_per_node=1", *COUNTING, *options(hurry=hurry, save_every=5), "script.options.steps=901,902,903,904"]
    command("launch", "-m", *TWO_IN_A_JOB, *words)
    points = folders(tmp_path / "outputs")
    assert len(points) == 4 and len({job(point) for point in points}) == 2
    first, second, third, _ = points
    assert job(first) == job(second) != job(third)
    for point in points:
        wait_for(lambda here=point: len(read_records(here.metrics(0))) > 3, "steps side by side")
    refused = command("launch.cancel --now", str(first.path), status=2)
    assert f"whose job has other points: {second.point}" in refused
    assert "cancelled after step" in command("launch.cancel", str(first.path))
    assert not (first.path / "STOP").exists() and checkpoint(first)["step"] > 0
    states = command("launch.status", "outputs")
    assert re.findall(r"^\S+ +(\w+)  +\d", states, re.MULTILINE) == ["cancelled", "running", "running", "running"]
    assert "nothing to cancel, cancelled" in command("launch.cancel", str(first.path))

    preempt(sandbox, job(second))
    wait_for(lambda: from_step(second, attempt=2) is not None, "the comeback")
    hurry.touch()
    wait_for(lambda: not sandbox.slurm("squeue", "--noheader", "--states=running,pending").strip(), "the ends")
    assert causes(second) == ["preempted", "finished"] and names(second).count("requeued") == 1
    ended = next(event for event in second.read_events() if event["event"] == "attempt_ended")
    assert from_step(second, attempt=2) == ended["step"]
    assert causes(first) == ["cancelled"] and names(first).count("agent_started") == 1
    for point, steps in zip(points[1:], (902, 903, 904), strict=True):
        assert checkpoint(point)["step"] == steps
    table = command("launch.report", "outputs/s")
    assert table.count("on a node at the same time as") == 4 and "no efficiency is claimed" in table


SHARE = """
import os
print(len(os.sched_getaffinity(0)), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["SLURM_MEM_PER_NODE"])
"""


def test_points_of_a_job_have_their_shares_and_leave_its_queue_alone_or_together(
    sandbox: Cluster, tmp_path: Path
) -> None:
    command, script = partial(run, cwd=tmp_path, **sandbox.env), write_script(tmp_path, SHARE)
    held = ["cluster.additional_parameters.hold=true", "ranks_per_node=1", "workload=script", f"script.path={script}"]
    held += ["cluster.mem_gb=2", "-m", *TWO_IN_A_JOB, "script.args=a,b"]
    assert "cluster.gpus_per_node=2, and the best node of low has 1 GPUs for each of 2 points" in command(
        "launch cluster.gpus_per_node=2", *held, status=2
    )
    command("launch cluster.gpus_per_node=1", *held)
    one, two = folders(tmp_path / "outputs")
    assert "cancelled" in command("launch.cancel", str(one.path))
    assert "pending" in command("launch.status", str(two.path))
    sandbox.slurm("scontrol", "release", job(two))
    wait_for(lambda: "agent_ended" in names(one) and "agent_ended" in names(two), "their ends")
    assert causes(one) == [] and causes(two) == ["finished"]
    cpus, gpu, memory = printed(two).split()
    assert (gpu, memory) == ("1", "2048") and int(cpus) >= 1

    command("launch cluster.gpus_per_node=1 fresh=true", *held)
    third = folders(tmp_path / "outputs")[-1]
    command("launch.cancel outputs/s")
    assert not sandbox.slurm("squeue", "--noheader", "--states=pending", "--jobs", job(third)).strip()


@pytest.mark.parametrize("word", ["nodes=2", "resilience.requeue=chain", "launch.sequential=true", "cluster.gres=a:1"])
def test_points_that_cannot_share_a_job_are_refused(word: str, tmp_path: Path) -> None:
    refused = run("launch cluster.points_per_job=2 dry_run=true", *ON_SLURM, word, cwd=tmp_path, status=2)
    assert "cluster.points_per_job=2 with " in refused and "type next: cluster.points_per_job=1" in refused
