"""Inside an allocation of a real Slurm: SAVE and STOP, killed and frozen ranks, repeated crashes, left-over ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch.jobs.handles import agent_logs, job_of
from launch.runs.failures import first_failure
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import cut_link
from tests.launch.test_failures import SABOTAGE
from tests.support.commands import ON_SLURM, TINY, ranks_of, run, start, wait_for

pytestmark = pytest.mark.slurm

LONG = [*ON_SLURM, *TINY, "optim.max_steps=100000", "eval.interval=0"]


def ranks_in(folder: RunFolder) -> dict[int, int]:
    """Process ids of the ranks that work on a run folder, on whatever node of the sandbox, by rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"gpt.train" in words and str(folder.path).encode() in words:
            found.append(int(path.parent.name))
    return ranks_of(found)


def test_one_job_survives_a_killed_and_a_frozen_rank_and_obeys_the_files(sandbox: Cluster, tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    words = [*LONG, "nodes=2", "checkpoint.interval=0", "resilience.heartbeat_timeout_s=8", f"run_dir={folder.path}"]
    process = start("launch", *words, cwd=tmp_path, log=log, **sandbox.env)

    def count(name: str) -> int:
        assert process.poll() is None, (folder.read_events(), log.read_text())
        return [e["event"] for e in folder.read_events()].count(name)

    wait_for(lambda: read_records(folder.metrics(0)) or process.poll() is not None, "the first step")
    (folder.path / "SAVE").touch()
    wait_for(lambda: count("saved") == 1, "the checkpoint that was asked for")
    saved = next(e["step"] for e in folder.read_events() if e["event"] == "saved")
    os.kill(ranks_in(folder)[1], signal.SIGKILL)
    wait_for(lambda: count("recovered") == 1, "the comeback from a killed rank")
    (folder.path / "SAVE").touch()
    wait_for(lambda: count("saved") == 2, "a checkpoint of the second attempt")
    os.kill(ranks_in(folder)[1], signal.SIGSTOP)
    wait_for(lambda: count("recovered") == 2, "the comeback from a frozen rank")
    (folder.path / "STOP").touch()
    assert process.wait(timeout=120) == 1, "a run that was stopped has not finished"

    events = folder.read_events()
    assert [e["cause"] for e in events if e["event"] == "attempt_ended"] == ["crashed", "hung", "cancelled"]
    assert [e["event"] for e in events].count("submitted") == 1 and "requeued" not in {e["event"] for e in events}
    killed, frozen = first_failure(events, 1), first_failure(events, 2)
    assert killed is not None and frozen is not None
    assert (killed["rank"], killed["cause"]) == (1, "killed by SIGKILL")
    assert (frozen["rank"], frozen["host"]) == (1, killed["host"]) and "gpt/train.py" in frozen["traceback"]
    assert [e["from_step"] for e in events if e["event"] == "started"][1] == saved
    assert all(e["seconds_since_last_step"] > 0 for e in events if e["event"] == "recovered")
    assert "Restarts=0" in sandbox.slurm("scontrol", "show", "job", str(events[0]["job_id"]))
    assert not ranks_in(folder)


def test_a_bug_in_the_data_of_a_step_stops_the_job_and_does_not_loop(sandbox: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    words = [*LONG, "nodes=2", f"run_dir={tmp_path / 'run'}", "resilience.max_without_progress=2"]
    text = run("launch", *words, cwd=tmp_path, status=1, **sandbox.env, PYTHONPATH=path, SABOTAGED_RANK="1")
    assert "ZeroDivisionError: the data of step 3 has no tokens" in text and "saved nothing new" in text
    events = RunFolder(tmp_path / "run").read_events()
    assert [e["cause"] for e in events if e["event"] == "attempt_ended"] == ["crashed", "crashed"]


def test_a_rank_behind_a_cut_link_commits_nothing_once_the_job_runs_elsewhere(sandbox: Cluster, tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    words = [*LONG, "nodes=1", "checkpoint.interval=10", f"run_dir={folder.path}"]
    process = start("launch", *words, cwd=tmp_path, log=log, **sandbox.env)

    def of(name: str) -> list[dict[str, object]]:
        assert process.poll() is None, (folder.read_events(), log.read_text())
        return [e for e in folder.read_events() if e["event"] == name]

    wait_for(lambda: of("saved"), "a checkpoint")
    (left_over,) = ranks_in(folder).values()
    host = str(of("agent_started")[0].get("host") or sandbox.slurm("squeue", "--noheader", "--format=%N").strip())
    cut_link(sandbox, host)
    try:
        # It trains on, all by itself, until it finds that it was replaced.
        wait_for(lambda: any(e["attempt"] == 2 for e in of("saved")), "a checkpoint of the run elsewhere")
        wait_for(lambda: not Path(f"/proc/{left_over}").exists(), "the end of the rank that was left over")
        agent = agent_logs(folder.path, job_of(of("submitted")[0]), 0)[1]
        wait_for(lambda: "was left over" in agent.read_text(), "the end of its agent", 60)
        events = folder.read_events()
        begun = next(i for i, e in enumerate(events) if e["event"] == "started" and e["attempt"] == 2)
        assert {e["attempt"] for e in events[begun:] if e["event"] in ("saved", "started", "attempt_ended")} == {2}
        assert folder.attempts() == [1, 2], "the left-over agent started nothing"
        assert "OutdatedAttemptError" in folder.log(1, 0).read_text()
    finally:
        sandbox.slurm("scancel", str(folder.read_events()[0]["job_id"]))
        process.wait(timeout=300)
