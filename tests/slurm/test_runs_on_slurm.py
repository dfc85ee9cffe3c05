"""Whole runs on a real Slurm: too short a grace, a sick node, a plain script, own names, every parallelism."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster, power_cut, preempt
from tests.slurm.test_batch_script import submit_batch_script, wait_for_end
from tests.support.commands import ON_SLURM, TINY, environment, run, wait_for
from tests.support.runs import (
    COUNTING,
    EXAMPLES,
    PROGRESS,
    StormyRun,
    causes,
    checkpoint,
    first_step,
    from_step,
    options,
    printed,
    printed_loss,
    rank_hosts,
    write_script,
)

pytestmark = pytest.mark.slurm


def test_too_short_a_grace_falls_back_to_the_periodic_checkpoint(sandbox: Cluster, tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    # A save that hangs, as on a disk that many share.
    words = [*COUNTING, *options(save_every=5, hang=hang), "copy_code=true", "cluster.gpus_per_node=1"]
    storm = StormyRun(sandbox, tmp_path, *words, nodes=1)
    here = storm.folder
    storm.wait(lambda: storm.of("saved"), "a checkpoint")
    hang.touch()
    sandbox.slurm("scontrol", "requeue", storm.job)  # SIGTERM, and SIGKILL after KillWait
    storm.wait(lambda: len(storm.of("agent_started")) == 2, "the comeback")
    saved = checkpoint(here)["step"]
    hang.unlink()
    storm.wait(lambda: from_step(here, attempt=2) is not None, "its ranks")
    assert storm.end() == 1
    events = here.read_events()
    assert saved == max(e["step"] for e in events if e["event"] == "saved" and e["attempt"] == 1)
    ended = next(e for e in events if e["event"] == "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "preempted"), (events, (tmp_path / "log").read_text())
    assert ended["reason"] == f"killed before it could save; continues from step {saved}"
    assert [from_step(here, attempt) for attempt in (1, 2)] == [0, saved]
    first, second = (e for e in events if e["event"] == "agent_started")
    assert (first["gpus"], first["limit_s"]) == (1, 3600) and first["allocated_at"] <= first["time"]
    killed = [e for e in events if e["event"] == "agent_ended" and e["job"] == first["job"]]
    assert [e["cause"] for e in killed] == ["killed"] and first["time"] <= killed[0]["ended_at"] <= second["time"]
    code = [json.loads(here.environment(attempt).read_text())["code"] for attempt in (1, 2)]
    assert code[0]["is_snapshot"] and code[0] == code[1], "the requeued job runs the same copy"


CHECK = "import os, sys\nsys.exit('the fan is dead' if os.environ['SLURM_PROCID'] == '1' else 0)\n"


def test_a_spare_takes_the_place_of_a_sick_node(sandbox: Cluster, tmp_path: Path) -> None:
    here = RunFolder(tmp_path / "run")
    check = write_script(tmp_path, CHECK, "check.py")
    script = write_script(tmp_path, "print('done')\n")
    words = ["nodes=2", "spare_nodes=1", "ranks_per_node=1", "workload=script", f"script.path={script}"]
    words += [f"resilience.health_check=[{sys.executable},{check}]", f"run_dir={here.path}"]
    run("launch", *ON_SLURM, *words, cwd=tmp_path, **sandbox.env)
    (members,) = [e for e in here.read_events() if e["event"] == "members"]
    (sick,) = [e for e in here.read_events() if e["event"] == "node_sick"]
    assert sick["attempt"] == members["attempt"] == 1 and "the fan is dead" in sick["cause"]
    assert len(members["hosts"]) == 2 and sick["host"] not in members["hosts"] and members["spares"] == []
    status = run(f"launch.status {here.path}", cwd=tmp_path, **sandbox.env)
    assert f"node {sick['host']} is sick and was left out: " in status and "the fan is dead" in status


STEPS = 300
SCRIPT = [
    "workload=script", f"script.path={EXAMPLES / 'plain_ddp.py'}", f"script.options.steps={STEPS}",
    f"script.max_steps={STEPS}", "script.work_per_step=64", "script.resumes=true", "ranks_per_node=1", PROGRESS,
]  # fmt: skip
SLOW_TERMINAL = """
import builtins, os, time
plainly = builtins.print
def slowly(*words, **options):
    plainly(*words, **options)
    if not os.path.exists(os.environ["HURRY"]):
        time.sleep(0.2)
builtins.print = slowly
"""
"""Has the unchanged example wait after each line, so that faults find it before it is done."""


def test_a_plain_script_is_requeued_after_preemption_and_goes_on_with_a_spare_after_a_power_cut(
    sandbox: Cluster, tmp_path: Path
) -> None:
    # Undisturbed, by the plain batch script.
    whole, out = RunFolder(tmp_path / "whole"), tmp_path / "out"
    alone = submit_batch_script(sandbox, tmp_path, *SCRIPT, f"run_dir={whole.path}")
    assert wait_for_end(sandbox, alone) == ["COMPLETED"], out.read_text()
    assert "2 x 1 = 2 ranks on slurm" in out.read_text() and "64 samples per step" in out.read_text()
    assert causes(whole) == ["finished"]
    assert len({*rank_hosts(whole)}) == 2

    (tmp_path / "sitecustomize.py").write_text(SLOW_TERMINAL)
    hurry = tmp_path / "hurry"
    slowly = [f"script.env.PYTHONPATH={tmp_path}", f"script.env.HURRY={hurry}"]
    storm = StormyRun(sandbox, tmp_path, *SCRIPT, *slowly, "spare_nodes=1", "resilience.node_timeout_s=5")
    here = storm.folder
    storm.wait(lambda: "step 51:" in printed(here), "its first checkpoint")
    preempt(sandbox, storm.job)
    storm.wait(lambda: "step 101:" in printed(here, attempt=2), "the next checkpoint")
    members = storm.of("members")[-1]
    power_cut(sandbox, members["hosts"][1])
    storm.wait(lambda: printed(here, attempt=3), "the spare")
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, storm.log.read_text()
    assert causes(here) == ["preempted", "node_failed", "finished"]
    assert len(storm.of("requeued")) == 1, "for the preemption; the spare comes inside the same job"
    assert rank_hosts(here, 3) == [members["hosts"][0], *members["spares"]]
    assert first_step(printed(here, attempt=2)) > 50 and first_step(printed(here, attempt=3)) > 100
    assert printed_loss(printed(here, attempt=3), STEPS) == printed_loss(printed(whole), STEPS)
    assert "samples/s" in storm.log.read_text()
    assert {r["attempt"] for r in read_records(here.metrics(0))} == {1, 2, 3}


TOPOLOGIES = ("fsdp", "pp", "zero2")


def test_every_parallelism_over_hosts_has_the_losses_of_one_process_and_a_row_in_one_table(
    sandbox: Cluster, tmp_path: Path
) -> None:
    steps = [*TINY, "optim.max_steps=12", "eval.interval=0", "checkpoint.interval=0"]
    run("launch cluster=local nodes=1 run_dir=alone", *steps, cwd=tmp_path)
    alone = [record["loss"] for record in read_records(RunFolder(tmp_path / "alone").metrics(0))]
    assert len(alone) == 12
    words = ["-m", "nodes=2", f"parallel={','.join(TOPOLOGIES)}", "ranks_per_node=2", *ON_SLURM, "name=t"]
    text = run("launch", *words, *steps, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])

    outputs = tmp_path / "outputs" / "t"
    folders = {plan.parent.name: RunFolder(plan.parent) for plan in outputs.glob("*/plan.json")}
    assert len(folders) == len(TOPOLOGIES)
    for name, folder in folders.items():
        assert [record["loss"] for record in read_records(folder.metrics(0))] == pytest.approx(alone, rel=1e-5), name
        hosts = rank_hosts(folder)
        assert len(hosts) == 4 and len(set(hosts)) == 2, name

    with (outputs / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    topologies = {"fsdp dp_shard=4", "ddp dp_replicate=2 pp=2", "deepspeed_zero2 dp_replicate=4"}
    assert {(row["nodes"], row["ranks"], row["topology"]) for row in rows} == {("2", "4", each) for each in topologies}
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert text.count("finished") >= len(rows)


HYDRA_APP = """
import json
import os
import time

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from gpt_launch import worker

ConfigStore.instance().store(name="conf", node={"n": 1, "seconds": 0.05})


@hydra.main(version_base="1.3", config_path=None, config_name="conf")
def main(config: DictConfig) -> int:
    run = worker.attach()
    saved = run.checkpoint_dir / "saved.json"
    run.checkpoint_dir.mkdir(exist_ok=True)
    first = json.loads(saved.read_text()) if saved.exists() else 0
    for step in range(first + 1, 401):
        time.sleep(config.seconds)
        run.record(step, loss=1.0 / step, samples=64)
        if run.stop_requested():
            if os.environ["RANK"] == "0":
                saved.write_text(json.dumps(step))
                run.saved(step)
            run.stopped(step)
            return -1
    run.finished(400)
    return config.n


if __name__ == "__main__":
    main()
"""


def test_a_hydra_app_is_swept_over_nodes_preempted_and_compared(sandbox: Cluster, tmp_path: Path) -> None:
    app, log = write_script(tmp_path, HYDRA_APP, "app.py"), tmp_path / "log"
    words = [sys.executable, str(app), "-m", "n=1,2", "hydra/launcher=multinode", "hydra.launcher.nodes=${n}"]
    words += ["hydra.launcher.resumes=true", "hydra.sweep.dir=sweep", "+hydra.launcher.launch.poll_s=1"]
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(**sandbox.env), stdout=output, stderr=output)
    two = RunFolder(tmp_path / "sweep" / "launch" / "1,n=2")
    # On both ranks: one that is still importing cannot save within the grace period.
    wait_for(
        lambda: process.poll() is not None or all(len(read_records(two.metrics(rank))) > 5 for rank in (0, 1)),
        "steps of both ranks of the second point",
    )
    preempt(sandbox, next(str(e["job_id"]) for e in two.read_events() if e["event"] == "submitted"), seconds=1)
    assert process.wait(timeout=300) == 0, log.read_text()
    assert causes(two) == ["preempted", "finished"], two.read_events()
    saved, records = json.loads((two.checkpoints / "saved.json").read_text()), read_records(two.metrics(1))
    assert [r["step"] for r in records] == [*range(1, 401)]
    assert {r["attempt"] for r in records if r["step"] <= saved} == {1}, "the app resumes from its own checkpoint"
    rows = list(csv.DictReader((two.path.parent / "scaling.csv").open()))
    assert [(row["nodes"], row["state"]) for row in rows] == [("1", "finished"), ("2", "finished")]
    assert 1.5 < float(rows[1]["speedup"]) < 2.5, "points that differ in their size alone are compared"
    assert "worker.call" not in log.read_text(), "the pickled call is no command of a user"
