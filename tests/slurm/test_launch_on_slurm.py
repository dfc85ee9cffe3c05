"""The main job on a real Slurm: a sweep over hosts to its table, and looking after jobs that go on by themselves.

The sandbox has no accounting, so everything here is known from squeue, scontrol and the event logs alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan, write_run
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.slurm.submit import submit_slurm
from slurm.sandbox import state as sandbox_state
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, TINY, run, start, start_fork, wait_for
from tests.support.runs import COUNTING, checkpoint, names, options, rank_hosts

pytestmark = pytest.mark.slurm

ODD = "it's $(touch pwned) `touch pwned`; a=b,c * # -x"
AROUND = ("agent_ended", "agent_started")


def runs(outputs: Path) -> dict[str, RunFolder]:
    """The run folders of a sweep by job id."""
    folders = [RunFolder(path.parent) for path in outputs.glob("*/plan.json")]
    return {submitted(folder)["job_id"]: folder for folder in folders}


def submitted(folder: RunFolder) -> dict[str, Any]:
    return next(e for e in reversed(folder.read_events()) if e["event"] == "submitted")


def queue(sandbox: Cluster, job_id: str) -> str:
    """The state of a job, or of one element of an array, in Slurm's word."""
    lines = sandbox.slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}[job_id]


def assert_saved_and_cancelled(folder: RunFolder) -> None:
    """The cancel stands in the event log before anything it brought about, and the last step made was saved."""
    events = folder.read_events()
    events = events[max(i for i, e in enumerate(events) if e["event"] == "started") :]
    before, after = events[: (cut := [e["event"] for e in events].index("cancelled"))], events[cut:]
    assert not {"signalled", "stopped", "rank_failed"} & {e["event"] for e in before}
    assert [e["step"] for e in after if e["event"] == "saved"] == [steps(folder)]
    assert [e.get("step") for e in after if e["event"] == "stopped"] == [steps(folder)] == [checkpoint(folder)["step"]]


def steps(folder: RunFolder) -> int:
    return len(read_records(folder.metrics(0)))


def test_a_sweep_over_nodes_runs_on_as_many_hosts_and_ends_in_one_table(sandbox: Cluster, tmp_path: Path) -> None:
    """Under a name that a shell, or Slurm's own reading of #SBATCH lines, could take for something else."""
    words = ["-m", "nodes=1,2", *ON_SLURM, f'name="{ODD}"', *COUNTING, *options(steps=12), "launch.sequential=true"]
    dry = run("launch dry_run=true", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    scripts = [part.partition("\n")[2] for part in re.split(r"^sbatch text of the .*:", dry, flags=re.MULTILINE)[1:]]
    scripts[-1] = scripts[-1].partition("dry_run=true: nothing")[0]

    text = run("launch", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    by_nodes = {submitted(folder)["nodes"]: (job, folder) for job, folder in runs(tmp_path / "outputs" / ODD).items()}
    assert sorted(by_nodes) == [1, 2]
    scripts[1] = scripts[1].replace("JOBID", by_nodes[1][0])
    one, two = (by_nodes[nodes][1].read_events() for nodes in (1, 2))
    ended, started = ([e["time"] for e in of if e["event"] == name] for of, name in zip((one, two), AROUND))
    assert ended < started, "one point after another"
    for (nodes, (job, folder)), script in zip(sorted(by_nodes.items()), scripts, strict=True):
        assert re.search(rf"^\s*NumNodes={nodes} ", sandbox.slurm("scontrol", "show", "job", job), re.MULTILINE)
        assert sandbox.slurm("scontrol", "write", "batch_script", job, "-").strip() == script.strip()
        assert "OverSubscribe=NO" in sandbox.slurm("scontrol", "show", "job", job), "whole nodes"
        hosts = {*rank_hosts(folder)}
        assert len(hosts) == nodes and hosts <= set(sandbox.nodes)
        assert "finished" in names(folder) and steps(folder) == 12
        assert queue(sandbox, job) == "COMPLETED"
        known = sandbox.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%j")
        assert known.strip() == ODD
    assert f"Strong scaling of {ODD}" in text and not list(tmp_path.rglob("pwned"))
    rows = (tmp_path / "outputs" / ODD / "scaling.csv").read_text().splitlines()
    assert len(rows) == 3

    submitted_before = sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%i")
    again = run("launch", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert "finished already, and not submitted: nodes=1, nodes=2" in again and f"Strong scaling of {ODD}" in again
    assert sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%i") == submitted_before


def test_a_detached_array_is_looked_after_by_element(sandbox: Cluster, tmp_path: Path) -> None:
    def ask(command: str, *more: str, status: int = 0) -> str:
        return run(f"launch.{command}", *more, cwd=tmp_path, status=status, SLURM_CONF=sandbox.env["SLURM_CONF"])

    def states() -> dict[str, str]:
        return {known["job_id"]: known["state"] for known in json.loads(ask("status", "--json"))}

    points = options(steps="1000000,30")
    words = ["-m", "nodes=1", *points, "cluster=slurm", "name=a", "launch.detach=true", *COUNTING]
    text = run("launch", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    array = next(iter(runs(tmp_path / "outputs" / "a"))).split("_")[0]
    assert f"job {array}_0" in text and "python -m launch.status" in text
    endless, short = (runs(tmp_path / "outputs" / "a")[f"{array}_{i}"] for i in (0, 1))
    assert "launch.detach" not in endless.point

    wait_for(lambda: steps(endless) > 2, "a few steps")
    assert states()[f"{array}_0"] == "running"
    followed = tmp_path / "followed"
    conf = sandbox.env["SLURM_CONF"]
    following = start_fork(f"launch.logs -f {endless.path}", cwd=tmp_path, log=followed, SLURM_CONF=conf)
    wait_for(lambda: "goes on from step 0" in followed.read_text(), "the log of the first attempt")
    sandbox.slurm("scontrol", "requeue", f"{array}_0")
    wait_for(lambda: re.search("goes on from step [1-9]", followed.read_text()), "the log of the second attempt")
    wait_for(lambda: read_records(endless.metrics(0))[-1]["attempt"] == 2, "its first step")
    text = ask("cancel", str(endless.path))
    assert f"cancelled after step {steps(endless)}; the last checkpoint is of step {steps(endless)}" in text
    assert_saved_and_cancelled(endless)
    assert queue(sandbox, f"{array}_0") == "COMPLETED"
    assert following.wait(timeout=60) == 0

    assert ask("logs", "-f", str(short.path)).count("counted 30 steps") == 1
    assert states() == {f"{array}_0": "cancelled", f"{array}_1": "finished"}
    assert "cancelled" not in names(short) and steps(short) == 30
    assert "submitit" in ask("logs", "--agent", str(short.path))
    assert "finished" in ask("report", "outputs/a")


def test_what_could_never_start_is_refused_or_said_to_wait_for_ever(sandbox: Cluster, tmp_path: Path) -> None:
    conf = sandbox.env["SLURM_CONF"]
    before = sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%i")
    wide = ["-m", "name=many", *ON_SLURM, *TINY, "nodes=1,8"]
    text = run("launch", *wide, cwd=tmp_path, status=2, SLURM_CONF=conf)
    assert "which Slurm would never start: nodes=8 in partition low: it has 4" in text and "type next: nodes=4;" in text
    assert "expected: partition low: at most 4 nodes without a time limit, each of up to 8 CPUs" in text
    assert sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%i") == before
    assert not (tmp_path / "outputs").exists()

    # Slurm takes both all the same, and leaves them for the reasons that the table knows.
    unchecked = ["launch.check_limits=false", *ON_SLURM, *TINY]
    fat = ["run_dir=fat", "cluster.cpus_per_task=999", "launch.detach=true"]
    run("launch", *fat, *unchecked, cwd=tmp_path, SLURM_CONF=conf)
    log = tmp_path / "log"
    process = start_fork("launch nodes=8 run_dir=wide", *unchecked, cwd=tmp_path, log=log, SLURM_CONF=conf)
    said = "warning: wide: waiting does not change PartitionNodeLimit: "
    wait_for(lambda: said in log.read_text() or process.poll() is not None, "the reason in the launcher's output")
    cells = run("launch.status wide fat", cwd=tmp_path, SLURM_CONF=conf)
    for point, reason in (("wide", "PartitionNodeLimit"), ("fat", "PartitionConfig")):
        (line,) = [line for line in cells.splitlines() if line.startswith(f"{point}: waiting")]
        assert reason in line and f"type python -m launch.cancel {tmp_path / point};" in line
    run("launch.cancel wide fat", cwd=tmp_path, SLURM_CONF=conf)
    assert process.wait(timeout=120) == 1 and log.read_text().count(said) == 1


def test_a_job_whose_launcher_died_after_sbatch_is_the_runs_job(
    sandbox: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting job is found by its pickle, a running job by the entry of its agent."""
    conf = sandbox.env["SLURM_CONF"]

    def ask(command: str, *more: str, status: int = 0) -> str:
        return run(f"launch.{command}", *more, cwd=tmp_path, status=status, SLURM_CONF=conf)

    def known() -> list[tuple[str, str]]:
        return [(each["job_id"], each["state"]) for each in json.loads(ask("status", "--json", "run"))]

    words = ["nodes=1", *ON_SLURM, "run_dir=run", "launch.detach=true", *COUNTING]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", conf)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = RunFolder(tmp_path / "run")

    def submit_and_die(*more: str) -> str:
        """Do as the launcher up to the moment in which sbatch has answered, and return the id of the job."""
        composed = compose_launch([*words, *more])
        plan = make_plan(typed_config(composed), [*words, *more], ClusterKind.slurm)
        write_run(plan, composed, [*words, *more])
        return submit_slurm([plan])[0].job_id

    waiting = submit_and_die("++cluster.additional_parameters={hold: true}")
    (seen,) = json.loads(ask("status", "--json", "run"))
    assert (seen["job_id"], seen["state"], seen["detail"]) == (waiting, "pending", "JobHeldUser")
    assert f"scontrol release {waiting}" in seen["advice"] and not folder.events.exists()
    assert "no log of rank 0" in ask("logs", "run", status=2)
    assert f"is being worked on by job {waiting}, pending" in run(
        "launch", *words, cwd=tmp_path, status=2, SLURM_CONF=conf
    )
    assert "run: cancelled" in ask("cancel", "run")
    assert queue(sandbox, waiting) == "CANCELLED" and names(folder) == ["submitted", "cancelled"]
    assert known() == [(waiting, "cancelled")]

    running = submit_and_die()
    wait_for(lambda: steps(folder) > 2, "a few steps")
    assert known() == [(running, "running")]
    entered = submitted(folder)
    assert (entered["job_id"], entered["by"], entered["nodes"]) == (running, "agent", 1)
    assert "submitit" in ask("logs", "--agent", "run")
    again = run("launch", *words, cwd=tmp_path, status=2, SLURM_CONF=conf)
    assert f"is being worked on by job {running}, running" in again
    assert "cancelled after step" in ask("cancel", "run")
    assert_saved_and_cancelled(folder)
    assert names(folder).count("submitted") == 2 and known() == [(running, "cancelled")]


def test_watching_outlives_a_controller_that_does_not_answer_and_ctrl_c_saves(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["nodes=1", *ON_SLURM, "run_dir=run", *COUNTING]
    log, folder = tmp_path / "log", RunFolder(tmp_path / "run")
    process = start("launch", *words, cwd=tmp_path, log=log, SLURM_CONF=sandbox.env["SLURM_CONF"])
    wait_for(lambda: steps(folder) > 2, "a few steps")
    controller = sandbox_state.require_state(sandbox.directory).processes["slurmctld"].pid
    os.kill(controller, signal.SIGSTOP)
    try:
        wait_for(lambda: "the jobs continue" in log.read_text(), "the launcher to notice")
    finally:
        os.kill(controller, signal.SIGCONT)
    wait_for(lambda: "Slurm answers again" in log.read_text(), "the launcher to go on")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert_saved_and_cancelled(folder)
    assert f"the last checkpoint is of step {steps(folder)}" in log.read_text()
    assert queue(sandbox, submitted(folder)["job_id"]) == "COMPLETED"
