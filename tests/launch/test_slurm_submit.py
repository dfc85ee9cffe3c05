"""Submission: submitit's files of Slurm jobs, and a Slurm that cannot take jobs, which leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from launch.agent.after_step import submitted_run_dirs
from launch.agent.node import Node
from launch.plan.plan import Plan, refuse_exposed
from launch.runs.folder import RunFolder
from launch.slurm import client
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.jobs import SlurmJob, agent_logs
from launch.slurm.submit import explain_refusal, may_have_taken, remove_unused, submit_slurm
from tests.support.commands import run
from tests.support.planning import directives, plan
from tests.support.runs import write_program

NUMBER = "71"
SBATCH = f"""#!/bin/sh
cp "$1" "$SEEN/script"
sed -n "s/^#SBATCH --\\(output\\|error\\)=//p" "$1" | while read -r path; do
  ls -d "$(dirname "$path")" >> "$SEEN/folders" || exit 1
done
echo "Submitted batch job {NUMBER}"
"""
"""As slurmd, it looks at once for the folder of the logs."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which an ``sbatch`` that starts jobs at once leaves what it was given."""
    folder, programs = tmp_path / "seen", tmp_path / "programs"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": ""}.items():
        write_program(programs / name, text)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(folder))
    return folder


def plans_of(folder: Path, count: int, *words: str) -> list[Plan]:
    return [plan(f"run_dir={folder / f'run{index}'}", *words) for index in range(count)]


def logs_named_by(script: Path, job: SlurmJob) -> list[str]:
    """Paths that Slurm makes of a batch script's patterns for a job (sbatch(1), filename pattern)."""
    number, _, element = job.job_id.partition("_")
    asked = directives(script.read_text())
    return [
        asked[key].strip("'").replace("%A", number).replace("%a", element).replace("%j", number)
        for key in ("output", "error")
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_the_folder_of_the_logs_is_there_before_sbatch_is_called(count: int, seen: Path, tmp_path: Path) -> None:
    """submitit would make a folder of each job only afterwards; slurmd fails a job whose log it cannot open.

    A process on this machine may have the number of a job: their files do not meet.
    """
    plans = plans_of(tmp_path / "sweep", count)
    local = tmp_path / "sweep" / ".submitit" / f"{NUMBER}_submitted.pkl"
    local.parent.mkdir(parents=True)
    local.write_text("of a process")
    jobs = submit_slurm(plans)
    assert local.read_text() == "of a process"
    where = str(local.parent / "slurm")
    assert (seen / "folders").read_text().splitlines() == [where, where]
    assert [job.job_id for job in jobs] == ([NUMBER] if count == 1 else [f"{NUMBER}_0", f"{NUMBER}_1"])
    for made, job in zip(plans, jobs, strict=True):
        assert submitted_run_dirs(where, Node(0, 2, "", is_slurm=True, slurm_job=job.job_id)) == [made.run_dir]
        assert list(map(str, agent_logs(made.run_dir, job, 0))) == logs_named_by(seen / "script", job)
        assert Path(where, f"{job.job_id}_submitted.pkl").stat().st_mode & 0o777 == 0o600


def test_a_folder_of_jobs_that_others_can_change_is_refused(seen: Path, tmp_path: Path) -> None:
    (made,) = plans_of(tmp_path / "sweep", 1)
    submit_slurm([made])
    refuse_exposed(Path(made.run_dir))
    (tmp_path / "sweep" / ".submitit" / "slurm").chmod(0o777)
    with pytest.raises(ValueError, match=r"\.submitit/slurm with mode 0777"):
        refuse_exposed(Path(made.run_dir))


# A Slurm that cannot take jobs.


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


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's commands")
@pytest.mark.parametrize("words", [(), ("launch.check_limits=false",)])
def test_a_sweep_is_refused_and_leaves_nothing_behind(words: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("-m", "nodes=1,2,4", "cluster=slurm", *words)
    text = run("launch", *asked, cwd=tmp_path, status=1 if words else 2, SLURM_CONF=str(tmp_path / "gone.conf"))
    assert "found: " in text and GONE in text and "\ntype next: the same command when scontrol ping says UP" in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], text
    if not words:
        assert list(tmp_path.iterdir()) == []
        planned = run("launch dry_run=true", *asked, cwd=tmp_path, SLURM_CONF=str(tmp_path / "gone.conf"))
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
        ("sbatch: unrecognized option '--gresz=gpu:1'", SlurmError, False),
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
