"""Every parallelism in one sweep over hosts: the same losses, and one scaling table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, TINY, run

pytestmark = pytest.mark.slurm

TOPOLOGIES = ("ddp", "fsdp", "pp", "zero2", "ds_pp")


def test_nodes_and_topologies_in_one_sweep_end_in_one_table(sandbox: Cluster, tmp_path: Path) -> None:
    words = ["-m", "nodes=1,2", f"parallel={','.join(TOPOLOGIES)}", "ranks_per_node=2", *ON_SLURM, "name=t"]
    steps = ["optim.max_steps=12", "eval.interval=0", "checkpoint.interval=0"]
    text = run("launch", *words, *TINY, *steps, cwd=tmp_path, SLURM_CONF=sandbox.env["SLURM_CONF"])

    outputs = tmp_path / "outputs" / "t"
    losses = {
        plan.parent.name: [record["loss"] for record in read_records(RunFolder(plan.parent).metrics(0))]
        for plan in outputs.glob("*/plan.json")
    }
    assert len(losses) == 2 * len(TOPOLOGIES)
    first = next(iter(losses.values()))
    assert len(first) == 12
    for name, found in losses.items():
        assert found == pytest.approx(first, rel=1e-5), name

    with (outputs / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["nodes"], row["ranks"]) for row in rows].count(("2", "4")) == len(TOPOLOGIES)
    assert {row["topology"] for row in rows if row["ranks"] == "4"} == {
        "ddp dp_replicate=4",
        "fsdp dp_shard=4",
        "ddp dp_replicate=2 pp=2",
        "deepspeed_zero2 dp_replicate=4",
        "deepspeed_zero0 dp_replicate=2 pp=2",
    }
    wanted = {f"nodes={nodes},parallel={topology}" for nodes in (1, 2) for topology in TOPOLOGIES}
    assert {row["label"] for row in rows} == wanted, "what tells the points apart is not cut off"
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert text.count("finished") >= len(rows)
