"""The dry run: a plan for every point, and the batch script as submitit writes it, one array for each shape."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import ANY

import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch
from launch.slurm.jobs import SlurmJob, sbatch_text
from launch.slurm.resolve import OpenPoint, choose_exclusive
from launch.slurm.submit import in_line, shapes
from tests.support.commands import run
from tests.support.planning import directives, plan, refused


def test_every_shape_of_resources_is_one_array() -> None:
    plans = [plan(f"nodes={nodes}", f"seed={seed}") for nodes in (1, 2, 4) for seed in (1, 2)]
    groups = shapes(plans)
    assert [[p.nodes for p in group] for group in groups] == [[1, 1], [2, 2], [4, 4]]
    assert [directives(sbatch_text(group))["nodes"] for group in groups] == ["1", "2", "4"]
    assert [directives(sbatch_text(group))["array"] for group in groups] == ["0-1%2"] * 3
    limited = [plan(f"seed={seed}", "cluster.array_parallelism=2") for seed in (1, 2, 3)]
    assert directives(sbatch_text(limited))["array"] == "0-2%2"


def test_the_batch_script_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = "nodes=4 cluster.partition=gpu cluster.account=abc cluster.qos=high cluster.gpus_per_node=8 "
    words += "cluster.cpus_per_task=64 cluster.mem_gb=500 cluster.exclude='n[3-4]' cluster.timeout_min=90 "
    words += """cluster.signal_delay_s=300 cluster.srun_args=["--cpu-bind=none"] optim.global_batch=64"""
    setup = 'cluster.setup=["module load cuda","export X=1"]'
    more = "++cluster.additional_parameters={reservation: spring}"
    text = sbatch_text([plan(*words.split(), "name=my run", setup, more)])
    folder = tmp_path / "outputs" / "my run" / ".submitit" / "slurm"
    assert directives(text) == {
        "account": "abc",
        "cpus-per-task": "64",
        "error": f"'{folder}/%j_0_log.err'",
        "exclude": "'n[3-4]'",
        "gpus-per-node": "8",
        "job-name": "'my run'",
        "mem": "512000MB",
        "nodes": "4",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": f"'{folder}/%j_0_log.out'",
        "partition": "gpu",
        "qos": "high",
        "requeue": "",
        "reservation": "spring",
        "signal": "USR2@300",
        "time": "90",
        "wckey": "submitit",
    }
    body = text.split("# setup\n")[1]
    assert body.startswith("trap '") and "ERR\nmodule load cuda\nexport X=1\ntrap - ERR\nset +e\n" in body
    assert (
        "srun --unbuffered" in body and "--cpus-per-task=64 --cpu-bind=none" in body and "submitit.core._submit" in body
    )


def test_the_command_shows_plans_and_scripts_and_writes_nothing(tmp_path: Path) -> None:
    words = "-m nodes=1,2 cluster=slurm cluster.gpus_per_node=8 dry_run=true optim.global_batch=64"
    text = run("launch", *words.split(), cwd=tmp_path)
    for said in (
        "1 x 8 = 8 ranks on slurm", "2 x 8 = 16 ranks on slurm", "918,656 parameters",
        "worst case: 3 node-hours, 24 GPU-hours, if all 2 runs last", "cluster.exclusive=false shares them",
    ):  # fmt: skip
        assert said in text
    for said in ("#!/bin/bash", "#SBATCH --gpus-per-node=8", "#SBATCH --exclusive"):
        assert text.count(said) == 2
    assert list(tmp_path.iterdir()) == []


def settled(*commands: str) -> tuple[list[bool | None], str]:
    """Return whether each point of a sweep asks Slurm for whole nodes, and what is said about it."""
    documents = [compose_launch(command.split()) for command in commands]
    points = [OpenPoint(document, document.cluster.kind) for document in documents]
    said = choose_exclusive([point for point in points if point.kind is ClusterKind.slurm])
    found = [point.config.cluster.exclusive for point in points]
    assert [document.cluster.get("exclusive") for document in documents] == found
    return found, "".join(said)


def test_points_of_a_scaling_sweep_ask_for_whole_nodes_unless_the_command_says_otherwise() -> None:
    on = "cluster=slurm"
    assert settled(f"{on} nodes=1", f"{on} nodes=2")[0] == [True, True]
    assert settled(f"{on} ranks_per_node=1", f"{on} ranks_per_node=2")[0] == [True, True]
    assert settled(f"{on} nodes=1 cluster.exclusive=false", f"{on} nodes=2") == ([False, True], ANY)
    others = [(f"{on} nodes=2",), (f"{on} seed=1", f"{on} seed=2"), ("cluster=local nodes=1", "cluster=local nodes=2")]
    for commands in others:
        assert settled(*commands) == ([None] * len(commands), ""), commands


def test_sequential_points_wait_for_those_before_them_with_one_sbatch_call_a_shape() -> None:
    typed = "++cluster.additional_parameters={dependency: singleton}"
    plans = [plan(f"nodes={nodes}", f"seed={seed}", typed) for nodes in (1, 2) for seed in (1, 2)]
    first, second = shapes(plans)
    asked = [directives(sbatch_text(in_line(group, jobs))) for group, jobs in (
        (first, []), (second, [SlurmJob("7_0"), SlurmJob("7_1")]))]  # fmt: skip
    assert [one["array"] for one in asked] == ["0-1%1"] * 2
    assert [one["dependency"] for one in asked] == ["singleton", "singleton,afterany:7"]
    both = ("launch.sequential=true", "cluster.placement=[{partition: a}]")
    refused(plan, *both, found="launch.sequential=true with cluster.placement")


def test_it_works_where_there_is_no_slurm(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    text = run("launch nodes=2 dry_run=true", cwd=tmp_path, PATH=str(empty))
    for said in ("cluster=auto: local", "as cluster=slurm would submit it", "#SBATCH --nodes=2"):
        assert said in text


def test_mail_is_asked_for_where_somebody_is_named(tmp_path: Path) -> None:
    assert not {"mail-user", "mail-type"} & directives(sbatch_text([plan("nodes=2")])).keys()
    asked = directives(sbatch_text([plan("nodes=2", "cluster.mail_user=me@site.edu")]))
    assert (asked["mail-user"], asked["mail-type"]) == ("me@site.edu", "BEGIN,END,FAIL,REQUEUE")
    typed = plan("nodes=2", "cluster.additional_parameters={mail-user: me, mail-type: ARRAY_TASKS}")
    assert directives(sbatch_text([typed]))["mail-type"] == "ARRAY_TASKS"
