"""A node that its agent finds sick, on a real Slurm: a spare takes its place, and the run is done without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, run
from tests.support.scripts import write_script

CHECK = "import os, sys\nsys.exit('the fan is dead' if os.environ['SLURM_PROCID'] == '1' else 0)\n"


@pytest.mark.slurm
def test_a_spare_takes_the_place_of_a_sick_node(sandbox: Cluster, tmp_path: Path) -> None:
    here = RunFolder(tmp_path / "run")
    check = write_script(tmp_path, CHECK, "check.py")
    script = write_script(tmp_path, "print('done')\n")
    words = ["nodes=2", "spare_nodes=1", "ranks_per_node=1", "workload=script", f"script.path={script}"]
    words += [f"resilience.health_check.command=[{sys.executable},{check}]", f"run_dir={here.path}"]
    run("launch", *ON_SLURM, *words, cwd=tmp_path, **sandbox.env)
    (members,) = [e for e in here.read_events() if e["event"] == "members"]
    (sick,) = [e for e in here.read_events() if e["event"] == "node_sick"]
    assert sick["attempt"] == members["attempt"] == 1 and "the fan is dead" in sick["cause"]
    assert len(members["hosts"]) == 2 and sick["host"] not in members["hosts"] and members["spares"] == []
    status = run("launch.status", str(here.path), cwd=tmp_path, **sandbox.env)
    assert f"node {sick['host']} is sick and was left out: " in status and "the fan is dead" in status
