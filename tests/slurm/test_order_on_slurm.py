"""Jobs in order on a real Slurm: after other runs, in arrays within its limit, and inside a job that the user holds."""

from __future__ import annotations

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, run, start_fork, wait_for
from tests.support.runs import COUNTING, MEETING, checkpoint, options, write_script

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
