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

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox import state as sandbox_state
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, TINY, run, start, wait_for

pytestmark = pytest.mark.slurm

ENDLESS = ["optim.max_steps=100000", "eval.interval=0", "checkpoint.interval=0"]


def runs(outputs: Path) -> dict[str, RunFolder]:
    """The run folders of a sweep by job id."""
    folders = [RunFolder(path.parent) for path in outputs.glob("*/plan.json")]
    return {submitted(folder)["job_id"]: folder for folder in folders}


def submitted(folder: RunFolder) -> dict[str, Any]:
    return next(e for e in reversed(folder.read_events()) if e["event"] == "submitted")


def names(folder: RunFolder) -> list[str]:
    return [e["event"] for e in folder.read_events()]


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
    assert [e.get("step") for e in after if e["event"] == "stopped"] == [steps(folder)]


def steps(folder: RunFolder) -> int:
    return len(read_records(folder.metrics(0)))


def test_a_sweep_over_nodes_runs_on_as_many_hosts_and_ends_in_one_table(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["-m", "nodes=1,4", *ON_SLURM, "name=s", *TINY, "optim.max_steps=12"]
    dry = run("launch", *words, "dry_run=true", cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    scripts = [part.partition("\n")[2] for part in re.split(r"^sbatch text of the .*:", dry, flags=re.MULTILINE)[1:]]
    scripts[-1] = scripts[-1].partition("dry_run=true: nothing")[0]

    text = run("launch", *words, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    by_nodes = {submitted(folder)["nodes"]: (job, folder) for job, folder in runs(tmp_path / "outputs" / "s").items()}
    assert sorted(by_nodes) == [1, 4]
    for (nodes, (job, folder)), script in zip(sorted(by_nodes.items()), scripts, strict=True):
        assert re.search(rf"^\s*NumNodes={nodes} ", sandbox.slurm("scontrol", "show", "job", job), re.MULTILINE)
        assert sandbox.slurm("scontrol", "write", "batch_script", job, "-").strip() == script.strip()
        hosts = {rank["host"] for rank in json.loads(folder.environment(1).read_text())["ranks"]}
        assert len(hosts) == nodes and hosts <= set(sandbox.nodes)
        assert "finished" in names(folder) and steps(folder) == 12
        assert queue(sandbox, job) == "COMPLETED"
    assert "Strong scaling of s" in text
    rows = (tmp_path / "outputs" / "s" / "scaling.csv").read_text().splitlines()
    assert len(rows) == 3


def test_a_detached_array_is_looked_after_by_element(sandbox: Cluster, tmp_path: Path) -> None:
    def ask(command: str, *more: str, status: int = 0) -> str:
        return run(f"launch.{command}", *more, cwd=tmp_path, status=status, SLURM_CONF=sandbox.env["SLURM_CONF"])

    def states() -> dict[str, str]:
        return {known["job_id"]: known["state"] for known in json.loads(ask("status", "--json"))}

    words = ["-m", "nodes=1", "optim.max_steps=100000,30", "cluster=slurm", "name=a", "launch.detach=true", *TINY]
    text = run(
        "launch", *words, "eval.interval=0", "checkpoint.interval=0", cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"]
    )
    array = next(iter(runs(tmp_path / "outputs" / "a"))).split("_")[0]
    assert f"job {array}_0" in text and "python -m launch.status" in text
    endless, short = (runs(tmp_path / "outputs" / "a")[f"{array}_{i}"] for i in (0, 1))
    assert "launch.detach" not in endless.point

    wait_for(lambda: steps(endless) > 2, "a few steps")
    assert states()[f"{array}_0"] == "running"
    followed = tmp_path / "followed"
    conf = sandbox.env["SLURM_CONF"]
    following = start("launch.logs", "-f", str(endless.path), cwd=tmp_path, log=followed, SLURM_CONF=conf)
    wait_for(lambda: "attempt 1, from step 0" in followed.read_text(), "the log of the first attempt")
    sandbox.slurm("scontrol", "requeue", f"{array}_0")
    wait_for(lambda: "attempt 2, from step" in followed.read_text(), "the log of the second attempt")
    wait_for(lambda: read_records(endless.metrics(0))[-1]["attempt"] == 2, "its first step")
    text = ask("cancel", str(endless.path))
    assert f"cancelled after step {steps(endless)}; the last checkpoint is of step {steps(endless)}" in text
    assert_saved_and_cancelled(endless)
    assert queue(sandbox, f"{array}_0") == "COMPLETED"
    assert following.wait(timeout=60) == 0

    assert ask("logs", "-f", str(short.path)).count("step 30/30") == 1
    assert states() == {f"{array}_0": "cancelled", f"{array}_1": "finished"}
    assert "cancelled" not in names(short) and steps(short) == 30
    assert "submitit" in ask("logs", "--agent", str(short.path))
    assert "finished" in ask("report", "outputs/a")


def test_a_job_that_waits_says_why_and_leaves_the_queue(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["nodes=1", "cluster=slurm", "run_dir=run", "launch.detach=true", *TINY]
    held = "++cluster.additional_parameters={hold: true}"
    run("launch", *words, held, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    folder = RunFolder(tmp_path / "run")
    (known,) = json.loads(run("launch.status", "--json", "run", cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"]))
    assert (known["state"], known["detail"]) == ("pending", "JobHeldUser")
    refused = run("launch.logs", "run", cwd=tmp_path, status=2, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert "pending, JobHeldUser" in refused
    again = run("launch", *words, cwd=tmp_path, status=2, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert f"is being worked on by job {submitted(folder)['job_id']}, pending" in again
    assert "run: cancelled" in run("launch.cancel", "run", cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])
    assert queue(sandbox, submitted(folder)["job_id"]) == "CANCELLED"
    assert names(folder) == ["submitted", "cancelled"]


def test_watching_outlives_a_controller_that_does_not_answer_and_ctrl_c_saves(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["nodes=1", *ON_SLURM, "run_dir=run", *TINY, *ENDLESS]
    log, folder = tmp_path / "log", RunFolder(tmp_path / "run")
    process = start("launch", *words, cwd=tmp_path, log=log, SLURM_CONF=sandbox.env["SLURM_CONF"])
    wait_for(lambda: steps(folder) > 2, "a few steps")
    controller = sandbox_state.require(sandbox.directory).processes["slurmctld"].pid
    os.kill(controller, signal.SIGSTOP)
    try:
        wait_for(lambda: "the jobs go on" in log.read_text(), "the launcher to notice")
    finally:
        os.kill(controller, signal.SIGCONT)
    wait_for(lambda: "Slurm answers again" in log.read_text(), "the launcher to go on")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert_saved_and_cancelled(folder)
    assert f"the last checkpoint is of step {steps(folder)}" in log.read_text()
    assert queue(sandbox, submitted(folder)["job_id"]) == "COMPLETED"
