"""Jobs on a real Slurm: in order, in arrays, several points in one job, and moved to where there is room."""

from __future__ import annotations

import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.slurm.client import JobState
from launch.slurm.failover import fail_over
from launch.slurm.jobs import SlurmJob
from launch.slurm.status import RunStatus, find_run_status
from slurm.sandbox.cluster import Cluster, preempt
from tests.support.commands import ON_SLURM, is_alive, run, start_fork, wait_for
from tests.support.runs import COUNTING, MEETING, causes, checkpoint, from_step, names, options, printed, write_script

pytestmark = pytest.mark.slurm

WAITING = """
import pathlib, sys, time

gate = pathlib.Path(sys.argv[1])
while not gate.exists() or not gate.read_text():
    time.sleep(0.1)
sys.exit(int(gate.read_text()))
"""
"""A program that ends when a file has its exit status."""
DETACHED = ("launch.detach=true", *ON_SLURM)


def events(folder: RunFolder, name: str) -> list[dict]:
    return [event for event in folder.read_events() if event["event"] == name]


@pytest.fixture
def held(sandbox: Cluster) -> str:
    """The id of a job of two nodes, as in a shell of salloc."""
    sandbox.slurm("salloc", "--nodes=2", "--gpus-per-node=1", "--time=30", "--job-name=held", "--no-shell")
    return sandbox.slurm("squeue", "--noheader", "--name=held", "--states=running", "--format=%i").strip()


def test_runs_inside_a_held_job_leave_it_to_the_next(sandbox: Cluster, held: str, tmp_path: Path) -> None:
    command = partial(run, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"], SLURM_JOB_ID=held)
    words = ["launch.report_files=[md]", "ranks_per_node=1", *COUNTING]
    refused = command("launch", "nodes=3", *words, *options(steps=3), status=2)
    assert f"nodes=3 inside job {held}, which has 2 nodes" in refused and "type next: nodes=2; or cluster=" in refused
    detached = command("launch", "launch.detach=true", *words, *options(steps=3), status=2)
    assert "launch.detach=true with agents that this command starts (cluster=allocation)" in detached
    assert not (tmp_path / "outputs").exists()

    text = command("launch", "-m", "nodes=1,2", "name=sweep", *words, *options(steps=5))
    assert f"inside job {held}: 2 nodes, " in text and " min left" in text
    one, two = (
        RunFolder(tmp_path / "outputs" / "sweep" / f"nodes={n},ranks_per_node=1,script.options.steps=5") for n in (1, 2)
    )
    ended, begun = events(one, "agent_ended")[-1]["time"], events(two, "agent_started")[-1]["time"]
    assert ended < begun and checkpoint(two)["step"] == 5
    assert [event["cluster"] for event in events(two, "submitted")] == ["allocation"]
    assert events(two, "agent_started")[-1]["gpus"] == 2

    log, endless = tmp_path / "log", RunFolder(tmp_path / "endless")
    asked = ("nodes=2", f"run_dir={endless.path}", *words, *options(steps=1000000))
    environment = {"SLURM_CONF": sandbox.env["SLURM_CONF"], "SLURM_JOB_ID": held}
    process = start_fork("launch", *asked, cwd=tmp_path, log=log, **environment)
    wait_for(lambda: endless.metrics(1).exists() and endless.metrics(1).stat().st_size, "a step")
    outside = partial(run, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert "running" in outside("launch.status", str(endless.path))
    there = outside("launch.attach", str(endless.path), "--rank", "1", "--", "env")
    assert "RANK=1\n" in there and f"LAUNCH_RUN_DIR={endless.path}\n" in there and "rank 1 is on n" in there
    stacks = outside("launch.attach", str(endless.path), "--stacks")
    assert re.search(r"^2 of 2 ranks: 0-1$|^1 of 2 ranks: 0$", stacks, re.MULTILINE) and "counting.py" in stacks
    outside("launch.cancel", str(endless.path))
    assert process.wait(timeout=120) == 1 and "cancelled" in outside("launch.status", str(endless.path))
    assert "RUNNING" in sandbox.slurm("squeue", "--noheader", "--jobs", held, "--format=%T"), "the job goes on"
    assert "is cancelled" in outside("launch.attach", str(endless.path), status=2)


def test_a_run_waits_for_another_and_is_cancelled_if_that_fails(sandbox: Cluster, tmp_path: Path) -> None:
    command = partial(run, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    absent = command("launch", "launch.after=outputs/none", *DETACHED, *COUNTING, *options(steps=3), status=2)
    assert "outputs/none" in absent and not (tmp_path / "outputs").exists()

    gate = tmp_path / "gate"
    waits = write_script(tmp_path, WAITING)
    first = ("workload=script", f"script.path={waits}", f"script.args={gate}")
    for name, status in (("fails", "1"), ("ends", "0")):
        gate.unlink(missing_ok=True)
        command("launch", f"name={name}", *DETACHED, *first)
        after = ("-m", f"launch.after=outputs/{name}", "script.options.steps=2,3", *DETACHED, *COUNTING)
        dry = command("launch", f"name=after_{name}", *after, "dry_run=true")
        assert re.search(r"#SBATCH --dependency=afterok:\d+\n", dry) and "#SBATCH --kill-on-invalid-dep=yes" in dry
        command("launch", f"name=after_{name}", *after)
        runs = [RunFolder(path.parent) for path in (tmp_path / "outputs" / f"after_{name}").glob("*/plan.json")]
        assert len(runs) == 2 and not any(events(folder, "agent_started") for folder in runs)
        gate.write_text(status)
        wait_for(lambda: not sandbox.slurm("squeue", "--noheader").strip(), "the end of all jobs")
        assert all(bool(events(folder, "finished")) is (status == "0") for folder in runs)
        states = command("launch.status", f"outputs/after_{name}", status={0, 1})
        assert ("DependencyNeverSatisfied" in states) is (status == "1"), states
    refused = command("launch", "launch.after=outputs/fails", *DETACHED, *COUNTING, *options(steps=3), status=2)
    assert "is failed" in refused and "launch.after=afterany:outputs/fails" in refused
    command("launch", "launch.after=afterany:outputs/fails", "name=any", *ON_SLURM, *COUNTING, *options(steps=3))


def test_a_sweep_that_is_larger_than_an_array_may_be_is_split(sandbox: Cluster, tmp_path: Path) -> None:
    assert "MaxArraySize            = 4" in sandbox.slurm("scontrol", "show", "config")
    words = ("-m", "script.options.steps=1,2,3,4,5,6,7,8,9", "name=many", *ON_SLURM, *COUNTING)
    run("launch", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    runs = [RunFolder(path.parent) for path in (tmp_path / "outputs" / "many").glob("*/plan.json")]
    arrays = [str(events(folder, "submitted")[-1]["job_id"]).split("_")[0] for folder in runs]
    assert sorted(arrays.count(array) for array in set(arrays)) == [1, 4, 4]
    assert all(events(folder, "finished") for folder in runs)


def test_a_job_that_asked_for_too_much_is_told_what_to_ask_for(sandbox: Cluster, tmp_path: Path) -> None:
    command = partial(run, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    asked = ("cluster.mem_gb=2", "cluster.cpus_per_task=8", "cluster.timeout_min=30", "run_dir=run")
    command("launch", *asked, *ON_SLURM, *COUNTING, *options(steps=60))
    text = (
        r"run: used 0\.\d+ of 2 GiB of memory on a node, [\d.e-]+ of 8 CPUs on average, [\d.]+ of 30 min; next time: "
    )
    text += r"cluster\.mem_gb=1 cluster\.cpus_per_task=1 cluster\.timeout_min=1"
    assert re.search(text, command("launch.status", "run"))
    assert re.search(text.removeprefix("run: "), command("launch.report", "run"))


def test_two_commands_in_one_held_job_wait_for_each_other_and_say_so(
    sandbox: Cluster, held: str, tmp_path: Path
) -> None:
    there = {"SLURM_CONF": sandbox.env["SLURM_CONF"], "SLURM_JOB_ID": held}
    gate, program = tmp_path / "gate", write_script(tmp_path, WAITING)
    gate.touch()
    words = ("workload=script", f"script.path={program}", f"script.args={gate}", "nodes=2", "ranks_per_node=1")
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    processes = []
    for folder, wanted in ((one, "started"), (two, "submitted")):
        log = tmp_path / f"{folder.point}.log"
        processes.append(start_fork("launch", *words, f"run_dir={folder.path}", cwd=tmp_path, log=log, **there))
        wait_for(lambda here=folder, name=wanted: events(here, name), wanted)
    assert "pending, until no other run uses the nodes of its job" in run("launch.status two", cwd=tmp_path, **there)
    gate.write_text("0")
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert events(one, "attempt_ended")[0]["time"] < events(two, "agent_started")[0]["time"]


def test_a_failed_line_of_the_set_up_ends_the_job_with_its_words(sandbox: Cluster, tmp_path: Path) -> None:
    module = 'module() { echo \\"no module $2\\" >&2; return 1; }'
    lines = f'cluster.setup=["{module}","module purge || true","module load cuda/99","export NEVER=1"]'
    words = (*ON_SLURM, *COUNTING, *options(steps=3), "run_dir=run")
    text = run("launch", lines, *words, cwd=tmp_path, status=1, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert "no module cuda/99\nlaunch: status 1 of the line of cluster.setup: module load cuda/99" in text
    assert not events(RunFolder(tmp_path / "run"), "agent_started")
    run(
        "launch",
        'cluster.setup=["module() { :; }","module load cuda"]',
        *words,
        cwd=tmp_path,
        SLURM_CONF=sandbox.env["SLURM_CONF"],
    )


def test_the_first_failure_stops_the_other_points(sandbox: Cluster, tmp_path: Path) -> None:
    gate, program = tmp_path / "gate", write_script(tmp_path, WAITING)
    gate.write_text("1")
    words = ("-m", f"script.args={gate},never", "launch.stop_at_first_failure=true", "name=x", *ON_SLURM)
    words += ("workload=script", f"script.path={program}")
    text = run("launch", *words, cwd=tmp_path, status=1, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert text.count("launch.stop_at_first_failure=true: stopping the other points") == 1
    assert "script.args=never: cancelled" in text


def test_small_points_share_one_job_which_runs_them_side_by_side(sandbox: Cluster, tmp_path: Path) -> None:
    program = write_script(tmp_path, MEETING)
    words = ("cluster=local", "launch.parallel=2", "-m", 'script.args="a 2","b 2","c 0"', "name=small")
    words += ("workload=script", f"script.path={program}", "launch.report_files=[md]")
    line = shlex.join([sys.executable, "-m", "gpt_launch", *words])
    asked = ("--wait", "--nodes=1", "--cpus-per-task=2", f"--chdir={tmp_path}", "--output=out", f"--wrap={line}")
    sandbox.slurm("sbatch", *asked, timeout_s=120)
    runs = [RunFolder(path.parent) for path in sorted((tmp_path / "outputs" / "small").glob("*/plan.json"))]
    assert len(runs) == 3 and all(events(folder, "finished") for folder in runs), (tmp_path / "out").read_text()
    assert "at the same time as" in (tmp_path / "outputs" / "small" / "scaling.md").read_text()


# Several points in one job of a real Slurm: shares, cancel of one, requeue of the rest, and the table.


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


# Placement on a real Slurm: points whose GPUs are taken move to where there is room, or are given up.


NO_ROOM = "{partition: low, gres: 'gpu:2'}"
WORDS = [*ON_SLURM, *COUNTING, *options(steps=5)]


@pytest.fixture
def no_gpus(sandbox: Cluster) -> str:
    """A job that holds the GPUs of all nodes, and one CPU of each."""
    options = ["--parsable", "--partition=high", "--nodes=4", "--gpus-per-node=2", "--chdir=/", "--output=/dev/null"]
    job = sandbox.slurm("sbatch", *options, "--wrap", "exec sleep 600").strip()
    wait_for(lambda: sandbox.slurm("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING", "the GPUs to be taken")
    return job


def of(folder: RunFolder, *names: str) -> list[dict[str, Any]]:
    return [event for event in folder.read_events() if event["event"] in names]


def test_detached_points_move_to_where_there_is_room(sandbox: Cluster, no_gpus: str, tmp_path: Path) -> None:
    conf = sandbox.env["SLURM_CONF"]
    places = [NO_ROOM, "{partition: low, gres: 'gpu:9'}", "{partition: high, price_per_gpu_hour: 2}"]
    listed = f"cluster.placement=[{', '.join(places)}]"
    words = ["-m", *options(step_s="0.01,0.02"), "name=s", listed, "cluster.retry_interval_min=0.05"]
    words += ["launch.detach=true"]
    text = run("launch", *words, *WORDS, cwd=tmp_path, SLURM_CONF=conf)
    said = "partition=low gres=gpu:9 is skipped: cluster.gres=gpu:9, and the best node of low has 2 of gpu"
    assert said in text
    failover = int(text.split("process ")[1].split()[0])
    folders = [RunFolder(path.parent) for path in (tmp_path / "outputs" / "s").glob("*/plan.json")]
    try:
        wait_for(lambda: all(of(folder, "finished") for folder in folders), "both points to finish elsewhere")
        wait_for(lambda: not is_alive(failover), "the process that moved them to leave")
    finally:
        run("launch.cancel --now outputs/s", cwd=tmp_path, SLURM_CONF=conf)
    for folder in folders:
        first, moved, second = of(folder, "submitted", "moved", "stayed", "cancelled", "gave_up")
        assert (first["placement"], first["gpus"]) == ("partition=low gres=gpu:2", 2)
        assert (moved["job_id"], moved["to"]) == (first["job_id"], "partition=high") and "Resources" in moved["cause"]
        assert (second["placement"], second["partition"], second["price_per_gpu_hour"]) == ("partition=high", "high", 2)
        assert second["job_id"] != first["job_id"]
    assert {r["state"] for r in json.loads(run("launch.status --json", cwd=tmp_path, SLURM_CONF=conf))} == {"finished"}


def test_a_point_is_given_up_and_one_that_has_started_is_left_alone(
    sandbox: Cluster, no_gpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = sandbox.env["SLURM_CONF"]
    listed = f"cluster.placement=[{NO_ROOM}, {{partition: high, gres: 'gpu:1'}}]"
    words = [listed, "run_dir=run", "cluster.retry_interval_min=0.05", "cluster.give_up_after_min=0.15"]
    text = run("launch", *words, *WORDS, cwd=tmp_path, status=1, SLURM_CONF=conf)
    folder = RunFolder(tmp_path / "run")
    assert "run placement_timeout (" in text and "the same command submits it again" in text
    assert [event["event"] for event in folder.read_events()][-1] == "gave_up" and of(folder, "moved")
    (seen,) = json.loads(run("launch.status --json run", cwd=tmp_path, SLURM_CONF=conf))
    assert seen["state"] == "placement_timeout" and " s in the queue" in seen["detail"]
    assert sandbox.slurm("squeue", "-h", "-o", "%i").split() == [no_gpus]

    # The moment in which a job starts: it was seen waiting, and runs when it is to be moved.
    monkeypatch.setenv("SLURM_CONF", conf)
    folder.record_event("submitted", cluster="slurm", job_id=no_gpus, candidate=0)
    point: RunStatus = find_run_status(folder)
    assert isinstance(point.job, SlurmJob) and point.job.job_id == no_gpus
    point.state, point.job_status = "pending", JobState("PENDING", partition="low", submitted=1.0)
    point.plan = None
    assert fail_over([point], Console()) is None
    assert [event["event"] for event in folder.read_events()][-2:] == ["gave_up", "stayed"]
    assert sandbox.slurm("squeue", "-h", "-j", no_gpus, "-o", "%T").strip() == "RUNNING"
