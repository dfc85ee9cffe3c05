"""Every parallelism over hosts: the losses of one process, and one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, TINY, run

pytestmark = pytest.mark.slurm

TOPOLOGIES = ("ddp", "fsdp", "pp", "zero2", "ds_pp")


def test_every_parallelism_over_hosts_has_the_losses_of_one_process_and_a_row_in_one_table(
    sandbox: Cluster, tmp_path: Path
) -> None:
    steps = [*TINY, "optim.max_steps=12", "eval.interval=0", "checkpoint.interval=0"]
    run("launch", "cluster=local", "nodes=1", "run_dir=alone", *steps, cwd=tmp_path)
    alone = [record["loss"] for record in read_records(RunFolder(tmp_path / "alone").metrics(0))]
    assert len(alone) == 12
    words = ["-m", "nodes=2", f"parallel={','.join(TOPOLOGIES)}", "ranks_per_node=2", *ON_SLURM, "name=t"]
    text = run("launch", *words, *steps, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])

    outputs = tmp_path / "outputs" / "t"
    folders = {plan.parent.name: RunFolder(plan.parent) for plan in outputs.glob("*/plan.json")}
    assert len(folders) == len(TOPOLOGIES)
    for name, folder in folders.items():
        assert [record["loss"] for record in read_records(folder.metrics(0))] == pytest.approx(alone, rel=1e-5), name
        hosts = [rank["host"] for rank in json.loads(folder.environment(1).read_text())["ranks"]]
        assert len(hosts) == 4 and len(set(hosts)) == 2, name

    with (outputs / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["nodes"], row["ranks"]) for row in rows] == [("2", "4")] * len(TOPOLOGIES)
    assert {row["topology"] for row in rows} == {
        "ddp dp_replicate=4",
        "fsdp dp_shard=4",
        "ddp dp_replicate=2 pp=2",
        "deepspeed_zero2 dp_replicate=4",
        "deepspeed_zero0 dp_replicate=2 pp=2",
    }
    wanted = {f"parallel={topology}" for topology in TOPOLOGIES}
    assert {row["label"] for row in rows} == wanted, "what tells the points apart is not cut off"
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert text.count("finished") >= len(rows)
