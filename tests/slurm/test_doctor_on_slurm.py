"""The doctor against a real Slurm: what it calls an error Slurm does not run, and a slow cable is named."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch, sweep_points, typed_config
from launch.doctor.__main__ import examine
from launch.doctor.findings import gather
from launch.slurm import client as scheduler
from launch.slurm.checks import Level
from launch.slurm.limits import advice
from slurm.sandbox import cluster as faults
from slurm.sandbox import state as packages
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.state import SandboxError, Settings, require_state
from tests.support.commands import run, wait_for

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def strict(namespaces: None) -> Iterator[Cluster]:
    """Two nodes behind partitions that allow little."""
    partitions = ("low:MaxTime=60,MaxNodes=1", "phys:AllowAccounts=phys", "closed:State=DOWN", "high")
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        cluster.up(Settings(nodes=2, partitions=partitions, slurm_conf=("JobRequeue=0",)))
        yield cluster


def doctor(cluster: Cluster, cwd: Path, *words: str, status: int | Collection[int]) -> dict[str, Any]:
    """``python -m launch.doctor --json`` as a user of this cluster."""
    text = run("launch.doctor --json", *words, cwd=cwd, status=status, **cluster.env)
    progress, begin, rest = text.partition("{\n")
    report = json.loads(begin + rest)
    assert isinstance(report, dict) and '"' not in progress
    assert report["status"] in ({status} if isinstance(status, int) else status)
    return report


def found(report: dict[str, Any], level: str) -> dict[str, str]:
    """Findings of a level, by check."""
    return {finding["check"]: finding["found"] for finding in report["findings"] if finding["level"] == level}


def slurm_runs(cluster: Cluster, batch_text: str, script: Path) -> bool:
    """Tell whether Slurm runs such a job; not where it refuses it, or leaves it for a reason that stays."""
    asked = [line for line in batch_text.splitlines() if line.startswith("#SBATCH") and "put=" not in line]
    options = [line for line in asked if "--error" not in line]
    script.write_text("\n".join(["#!/bin/sh", *options, "#SBATCH --output=/dev/null", "#SBATCH --chdir=/", "true", ""]))
    try:
        job = cluster.slurm("sbatch", "--parsable", str(script)).strip()
    except SandboxError:
        return False
    words: list[str] = []

    def decided() -> bool:
        rows = cluster.slurm("squeue", "--array", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r")
        words[:] = [row.strip() for row in rows.splitlines()]
        return all(row.startswith("COMPLETED") or is_stuck(row) for row in words)

    wait_for(decided, "the end of a job, or the reason why it does not start", 60)
    if any(is_stuck(row) for row in words):
        cluster.slurm("scancel", job)
        return False
    return True


def is_stuck(row: str) -> bool:
    """Tell whether a job pends for a reason that no waiting removes."""
    state, reason = row.split("|", 1)
    return state == "PENDING" and advice(reason) is not None


@pytest.mark.parametrize(
    ("words", "check"),
    [
        ("cluster.timeout_min=60 cluster.gpus_per_node=2 cluster.cpus_per_task=8 cluster.mem_gb=200", None),
        ("seed=1,2,3 cluster.partition=high nodes=2 cluster.timeout_min=90", None),
        ("cluster.timeout_min=61", "time limit"),
        ("nodes=2", "nodes"),
        ("nodes=3 optim.global_batch=12 cluster.partition=high", "nodes"),
        ("cluster.partition=high nodes=2 cluster.exclude=n[2-3]", "nodes"),
        ("cluster.partition=phys", "account"),
        ("cluster.partition=closed", "partition"),
        ("cluster.gpus_per_node=3 ranks_per_node=1", "resources"),
        ("cluster.gres=gpu:a100:1", "resources"),
        ("cluster.mem_gb=300", "resources"),
        ("cluster.constraint=fast", "constraint"),
    ],
)
def test_what_is_an_error_slurm_does_not_run_and_the_rest_it_does(
    strict: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, check: str | None
) -> None:
    monkeypatch.setenv("SLURM_CONF", strict.env["SLURM_CONF"])
    typed = ["cluster=slurm", f"output_dir={tmp_path}", *words.replace("n[2-3]", "'n[2-3]'").split()]
    _, findings, (request,), _ = examine(sweep_points(typed))
    errors = {finding.check for finding in findings if finding.level is Level.error}
    assert errors == ({check} if check else set()), findings
    assert slurm_runs(strict, request.batch_text, tmp_path / "job.sh") is (check is None)


def test_the_command_tells_all_that_is_wrong_at_once_and_submits_nothing(strict: Cluster, tmp_path: Path) -> None:
    wrong = ("nodes=2", "cluster.timeout_min=90", "cluster.gpus_per_node=3", "cluster.cpus_per_task=8")
    before = strict.slurm("squeue", "--noheader", "--states=all")
    report = doctor(strict, tmp_path, "cluster=slurm", "optim.global_batch=12", *wrong, "--on-cluster", status=1)
    assert {"time limit", "nodes"} <= set(found(report, "error"))
    assert {"job", "shared folder"} <= set(found(report, "warning"))
    assert report["on_cluster"] is None
    assert strict.slurm("squeue", "--noheader", "--states=all") == before and list(tmp_path.iterdir()) == []


def test_a_controller_that_is_not_there(tmp_path: Path, slurm_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(scheduler.SlurmError):
        scheduler.run("scontrol", "ping", timeout_s=10.0, retries=1)
    asked, automatic = (typed_config(compose_launch([f"cluster={kind}"])) for kind in ("slurm", "auto"))
    gone = gather([asked])
    assert gone.limits is None and gone.client and gone.slurm_problem
    assert gather([automatic]).kind is ClusterKind.local


def test_a_folder_that_the_nodes_do_not_see(sandbox: Cluster, tmp_path: Path) -> None:
    # Every node of the sandbox has a /dev/shm of its own.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as own:
        report = doctor(sandbox, tmp_path, "cluster=slurm", f"output_dir={own}", "--on-cluster", status=1)
    assert "tmpfs is each machine's own" in found(report, "error")["shared folder"]
    assert "no node wrote anything" in found(report, "error")["job"]


def test_a_firewall_between_nodes_is_named(sandbox: Cluster, tmp_path: Path) -> None:
    if packages.missing_packages(packages.WITH_LOSS):
        pytest.skip("needs nftables")
    state = require_state(sandbox.directory)
    inside = ["nsenter", f"--net=/proc/{state.processes['n2'].pid}/ns/net", "nft"]
    new = f"tcp flags syn / syn,ack tcp dport != {state.port} drop"
    chain = f"chain input {{ type filter hook input priority 0; iifname eth0 {new}; }}"
    subprocess.run([*inside, "-f", "-"], input=f"table ip doctor {{\n{chain}\n}}\n", text=True, check=True)
    try:
        words = ("cluster=slurm", "nodes=2", 'cluster.exclude="n[3-4]"', "--on-cluster")
        report = doctor(sandbox, tmp_path, *words, status=1)
    finally:
        subprocess.run([*inside, "delete table ip doctor"], check=True)
    assert [f["found"] for f in report["findings"] if f["check"] == "ports"] == ["n1 does not reach n2: timed out"]
    assert "not every node reaches every other" in found(report, "warning")["links"]


def test_sound_nodes_are_measured_and_nothing_is_an_error(sandbox: Cluster, tmp_path: Path) -> None:
    report = doctor(sandbox, tmp_path, "cluster=slurm", "nodes=2", "ranks_per_node=1", "--on-cluster", status=0)
    measured = report["on_cluster"]
    # A folder of this machine's disk, which the sandbox's nodes share: only the measurement can tell.
    fine = {"shared folder", "ports", "clocks", "matmul", "bandwidth", "job"}
    assert fine <= set(found(report, "ok"))
    assert not {"shared folder", "program"} & set(found(report, "warning")), "the nodes have measured it"
    assert [node["host"] for node in measured["nodes"]] == [rank["host"] for rank in measured["ranks"]] == ["n1", "n2"]
    assert all(link["bandwidth_gbit"] > 0 for rank in measured["ranks"] for link in rank["links"])
    assert json.loads((Path(measured["folder"]) / "results.json").read_text()) == measured


def test_a_slow_cable_is_named_and_no_other(sandbox: Cluster, tmp_path: Path) -> None:
    faults.link(sandbox, "n2", bandwidth_mbit=20)
    try:
        words = ("cluster=slurm", "nodes=3", "optim.global_batch=12", "cluster.exclude=n4", "--on-cluster")
        report = doctor(sandbox, tmp_path, *words, status=(0, 1))
    finally:
        faults.heal(sandbox, "n2")
    (named,) = [finding for finding in report["findings"] if finding["check"] == "bandwidth"]
    # By how much it is slower depends on what the others reach, and that on what else this machine does.
    assert named["level"] in ("warning", "error")
    assert [*found(report, "error")] == ["bandwidth"] * (named["level"] == "error")
    assert report["status"] == (named["level"] == "error")
    assert named["found"].startswith("every link of n2 is slow")
    assert named["fix"] == "cluster.exclude=n2"
    rates = {
        rank["host"]: max(link["bandwidth_gbit"] for link in rank["links"]) for rank in report["on_cluster"]["ranks"]
    }
    # The cable lets 0.02 Gbit/s through.
    assert rates["n2"] < 0.022
    assert min(rates["n1"], rates["n3"]) > 3 * rates["n2"]
