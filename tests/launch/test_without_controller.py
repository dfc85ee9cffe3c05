"""A Slurm that cannot take jobs: said at once, in three parts, and nothing is left behind."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from launch.config import ClusterKind
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.slurm import client
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.points import choose_clusters
from launch.slurm.submit import explain_refusal, may_have_taken, remove_unused
from tests.launch.test_dry_run import plan
from tests.support.commands import run

GONE = "and there is no such file: unset SLURM_CONF"


def test_a_configuration_that_is_gone_is_named_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "slurm.conf"
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(SlurmError, match=GONE) as error:
        client.run("true")
    assert not isinstance(error.value, SlurmBusyError), "nothing that waiting would mend"
    conf.touch()
    with pytest.raises(SlurmError, match="is DOWN"):  # as scontrol ping says it: on standard output, with status 1
        client.run("sh", "-c", "echo 'Slurmctld(primary) at ctl is DOWN'; exit 1")
    assert client.run("true") == "" and client.missing_configuration() == ""
    monkeypatch.setenv("SLURM_CONF", "")
    assert client.missing_configuration() == ""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("Slurmctld(primary) at ctl is UP", None),
        ("scontrol: fatal: Could not establish a configuration source", ""),
        ("Slurmctld(primary) at ctl is DOWN", "scontrol ping: Slurmctld(primary) at ctl is DOWN"),
    ],
)
def test_where_the_controller_is_away_nothing_is_trained_unasked(
    said: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n{'exit 1' if problem is not None else ''}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    assert client.controller_problem() == problem and client.controller_answers() is (problem is None)
    console, asked = Console(file=io.StringIO()), OmegaConf.create({"cluster": {"kind": "auto"}, "dry_run": False})
    asked.cluster.kind = ClusterKind.auto
    if not problem:
        kind = ClusterKind.slurm if problem is None else ClusterKind.local
        assert choose_clusters([asked], console) == [kind]
        return
    with pytest.raises(ConfigError, match="is DOWN") as refusal:  # this may be a login node
        choose_clusters([asked], console)
    assert refusal.value.fix == "the same command when scontrol ping says UP, or cluster=local"
    asked.dry_run = True
    assert choose_clusters([asked], console) == [ClusterKind.local]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's commands")
@pytest.mark.parametrize("words", [(), ("launch.check_limits=false",)])
def test_a_sweep_is_refused_and_leaves_nothing_behind(words: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("-m", "nodes=1,2,4", "cluster=slurm", *words)
    text = run("launch", *asked, cwd=tmp_path, status=1 if words else 2, SLURM_CONF=str(tmp_path / "gone.conf"))
    assert "found: " in text and GONE in text and "\ntype next: the same command when scontrol ping says UP" in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], text
    if not words:
        assert list(tmp_path.iterdir()) == []
        planned = run("launch", *asked, "dry_run=true", cwd=tmp_path, SLURM_CONF=str(tmp_path / "gone.conf"))
        assert "was not compared with what it has" in planned and planned.count("#!/bin/bash") == 3


def test_only_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    group = tmp_path / "sweep"
    for name in ("nodes=1", "nodes=2"):
        (group / name / ".hydra").mkdir(parents=True)
    (group / ".submitit" / "slurm").mkdir(parents=True)
    RunFolder(group / "nodes=2").record_event("submitted", cluster="slurm", job_id="7")
    remove_unused([str(group / "nodes=1"), str(group / "nodes=2")])
    assert sorted(path.name for path in group.iterdir()) == [".submitit", "nodes=2"]
    shutil.rmtree(group / "nodes=2")
    (group / "nodes=1").mkdir()
    remove_unused([str(group / "nodes=1")])
    assert not group.exists()


@pytest.mark.parametrize(
    ("said", "kind", "taken"),
    [
        ("Unable to contact slurm controller (connect failure)", SlurmBusyError, False),
        ("Socket timed out on send/recv operation", SlurmBusyError, True),
        ("invalid account or account/partition combination specified", SlurmError, False),
    ],
)
def test_a_job_that_may_have_been_taken_keeps_its_folder(said: str, kind: type[SlurmError], taken: bool) -> None:
    error = kind(f"sbatch: error: Batch job submission failed: {said}")
    assert may_have_taken(error) is taken
    refusal = explain_refusal(plan("nodes=1"), error)
    assert said in refusal.found and ("no Slurm controller takes its job" in refusal.found) is (kind is SlurmBusyError)
    assert ("python -m launch.status first" in refusal.fix) is (kind is SlurmBusyError)
