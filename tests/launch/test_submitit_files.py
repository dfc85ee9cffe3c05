"""Files that submitit keeps of Slurm jobs: their folder is there before a job can start, and older layouts are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.agent.after_step import run_dir_of
from launch.agent.main import run as run_agent
from launch.agent.node import Node
from launch.plan.plan import Plan, refuse_exposed
from launch.slurm.adoption import submitted_jobs
from launch.slurm.handles import SlurmJob, agent_logs, slurm_layouts
from launch.slurm.submit import submit_calls, submit_slurm
from tests.launch.test_dry_run import directives, plan

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
    for path in (folder, programs):
        path.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": ""}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
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
@pytest.mark.parametrize("words", [(), ('cluster.placement=[{cluster: "b"}]',)])
def test_the_folder_of_the_logs_is_there_before_sbatch_is_called(
    count: int, words: tuple[str, ...], seen: Path, tmp_path: Path
) -> None:
    """submitit would make a folder of each job only afterwards; slurmd fails a job whose log it cannot open."""
    plans = plans_of(tmp_path / "sweep", count, *words)
    jobs = submit_slurm([made.choose_candidate(0) for made in plans])
    where = str(tmp_path / "sweep" / ".submitit" / ("on-b" if words else "slurm"))
    assert (seen / "folders").read_text().splitlines() == [where, where]
    assert [job.job_id for job in jobs] == ([NUMBER] if count == 1 else [f"{NUMBER}_0", f"{NUMBER}_1"])
    pickles = {job.name: pickle for job, pickle in submitted_jobs(Path(plans[0].run_dir))}
    assert sorted(pickles) == [job.name for job in jobs]
    for made, job in zip(plans, jobs, strict=True):
        assert run_dir_of(where, Node(0, 2, "", is_slurm=True, slurm_job=job.job_id)) == made.run_dir
        assert list(map(str, agent_logs(made.run_dir, job, 0))) == logs_named_by(seen / "script", job)
        assert pickles[job.name].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cluster", [None, "b"])
def test_what_earlier_versions_have_submitted_is_found(
    count: int, cluster: str | None, seen: Path, tmp_path: Path
) -> None:
    runs = [str(tmp_path / "sweep" / f"run{index}") for index in range(count)]
    earlier = slurm_layouts(runs[0], cluster)[1]
    clusters = {"additional_parameters": {"clusters": cluster}} if cluster else {}
    made = submit_calls(earlier, clusters, run_agent, runs)
    found = {job.name: pickle for job, pickle in submitted_jobs(Path(runs[0]))}
    assert sorted(found) == [job.name for job in made]
    for run, job in zip(runs, made, strict=True):
        assert found[job.name] == Path(str(earlier).replace("%j", job.job_id)) / f"{job.job_id}_submitted.pkl"
        assert run_dir_of(str(earlier), Node(0, 2, "", is_slurm=True, slurm_job=job.job_id)) == run
        logs = [Path(path) for path in logs_named_by(seen / "script", job)]
        logs[0].write_text("what it said")
        assert agent_logs(run, job, 0) == logs


def test_agents_on_this_machine_are_no_jobs_of_slurm(seen: Path, tmp_path: Path) -> None:
    """A process may have the number of a job: their files do not meet."""
    (made,) = plans_of(tmp_path / "sweep", 1)
    local = tmp_path / "sweep" / ".submitit"
    local.mkdir(parents=True)
    (local / f"{NUMBER}_submitted.pkl").write_text("of a process")
    (job,) = submit_slurm([made])
    assert (local / f"{NUMBER}_submitted.pkl").read_text() == "of a process"
    assert [pickle.parent.name for _, pickle in submitted_jobs(Path(made.run_dir))] == ["slurm"]
    assert job.job_id == NUMBER


def test_a_folder_of_jobs_that_others_can_change_is_refused(seen: Path, tmp_path: Path) -> None:
    (made,) = plans_of(tmp_path / "sweep", 1)
    submit_slurm([made])
    refuse_exposed(Path(made.run_dir))
    (tmp_path / "sweep" / ".submitit" / "slurm").chmod(0o777)
    with pytest.raises(ValueError, match=r"\.submitit/slurm with mode 0777"):
        refuse_exposed(Path(made.run_dir))
