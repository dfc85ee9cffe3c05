"""Decisions of an agent, and of the batch script after it, through a scontrol that does not answer for a while."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.agent import outcome as requeue
from launch.agent.after_step import requeue_unless_ended
from launch.agent.node import Node, RunContext
from launch.agent.outcome import cause_of_stop
from launch.agent.policy import Cause, RunFailedError
from launch.config import Config
from launch.config.compose import compose_launch, typed_config
from launch.runs.folder import RunFolder
from launch.slurm import client
from tests.support.commands import ROOT

NODE = Node(0, 2, "slurm-7-0-0", is_slurm=True, slurm_job="7", hosts=("n1", "n2"))
BUSY = client.RETRIES + 2
"""Questions that are not answered: more than a command of its own asks again."""
PROGRAM = """#!{python}
import sys
from pathlib import Path
folder, asked, words = Path({folder!r}), Path({folder!r}, "asked"), sys.argv[1:]
with asked.open("a") as file:
    print(Path(sys.argv[0]).name, *words, file=file)
if len(asked.read_text().splitlines()) <= int((folder / "busy").read_text()):
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
if "job" in words:
    print("JobId=7 JobState=RUNNING Restarts=0 PreemptTime=2026-01-01T00:00:09 StartTime=2026-01-01T00:00:00 "
          "EndTime=2026-01-01T02:00:00 TimeLimit=02:00:00 Partition=p ExcNodeList=(null) Reason=None")
elif Path(sys.argv[0]).name == "sinfo":
    print("n1", "n2", "n3", sep="\\n")
"""


class Controller:
    """Slurm's commands as programs on the PATH, which answer for job 7 after a number of questions."""

    def __init__(self, folder: Path, busy: int) -> None:
        self.folder = folder
        (folder / "busy").write_text(str(busy))
        for name in ("scontrol", "sinfo"):
            (folder / name).write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            (folder / name).chmod(0o755)

    def asked(self, beginning: str) -> list[str]:
        """The questions that began so, without those that were not answered."""
        lines = (self.folder / "asked").read_text().splitlines()[int((self.folder / "busy").read_text()) :]
        return [line for line in lines if line.startswith(beginning)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    before = signal.getsignal(signal.SIGTERM)  # a batch script ignores it from its decision on
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(client, "missing_configuration", lambda: "")  # these commands need none
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    yield RunFolder(tmp_path / "run")
    signal.signal(signal.SIGTERM, before)


def config(*words: str) -> Config:
    return typed_config(compose_launch(["cluster=slurm", "nodes=2", *words]))


def names(folder: RunFolder) -> list[str]:
    return [event["event"] for event in folder.read_events()]


def test_why_a_run_was_told_to_stop_is_learned_from_a_controller_that_comes_back(
    folder: RunFolder, tmp_path: Path
) -> None:
    Controller(tmp_path, BUSY)
    assert cause_of_stop(RunContext(folder, NODE, config()), 1) is Cause.preempted
    assert names(folder) == ["controller_away", "controller_back"]


def test_a_job_is_requeued_once_by_a_controller_that_comes_back_and_kept_away_from_hosts(
    folder: RunFolder, tmp_path: Path
) -> None:
    slurm = Controller(tmp_path, BUSY)
    requeue.requeue(RunContext(folder, NODE, config()), Cause.node_failed, {"n2": "lost in attempt 1"})
    assert names(folder) == ["controller_away", "requeued", "controller_back", "excluded"]
    assert slurm.asked("scontrol requeue") == ["scontrol requeue 7"]
    assert slurm.asked("scontrol update") == ["scontrol update JobId=7 ExcNodeList=n2"]


def test_a_decision_that_cannot_be_carried_out_is_in_the_event_log(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Controller(tmp_path, 1000)
    monkeypatch.setattr(requeue, "CONTROLLER_WAIT_S", 0.0)
    with pytest.raises(RunFailedError, match="not started again: Slurm did not requeue it: scontrol show job"):
        requeue.requeue(RunContext(folder, NODE, config()), Cause.node_failed)
    with pytest.raises(RunFailedError, match="not started again: scontrol show job"):
        cause_of_stop(RunContext(folder, NODE, config()), 1)
    failed = [event["cause"] for event in folder.read_events() if event["event"] == "requeue_failed"]
    assert len(failed) == 2 and all("Unable to contact slurm controller" in cause for cause in failed)


def killed_in_the_middle(folder: RunFolder) -> None:
    """The event log of a run whose agent was killed while its ranks trained."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    events: list[dict[str, Any]] = [
        {"event": "submitted", "cluster": "slurm", "job_id": "7"},
        {"event": "agent_started", "job": NODE.job, "pid": gone.pid, "pid_started": "1"},
        {"event": "started", "attempt": 1, "job": NODE.job},
    ]
    for event in events:
        folder.record_event(**event)


@pytest.mark.parametrize("status", [1, 137], ids=["srun gave up for a node that rebooted", "srun killed"])
def test_a_batch_script_whose_agents_were_killed_puts_its_job_back(
    status: int, folder: RunFolder, tmp_path: Path
) -> None:
    slurm = Controller(tmp_path, BUSY)
    killed_in_the_middle(folder)
    assert requeue_unless_ended(RunContext(folder, NODE, config()), status) == status
    ended = next(event for event in folder.read_events() if event["event"] == "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "node_failed")
    assert slurm.asked("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize(("of_step", "after"), [(0, None), (1, 1), (137, 0)])
def test_multi_node_sh_looks_at_its_run_where_srun_has_failed_and_ends_as_that_says(
    of_step: int, after: int | None, tmp_path: Path
) -> None:
    """With programs in place of srun and python, which tell what they were asked."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("sandbox", "__pycache__"))
    told = f'echo "${{0##*/}} $*" >> {tmp_path}/told; case "$*" in '
    answers = f"*--agent-command*) echo agent;; *batch*) echo {tmp_path}/run;; *after_step*) exit {after};; esac"
    for name, ending in (("python", answers), ("srun", f"*) exit {of_step};; esac")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{told}{ending}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", "slurm/multi_node.sh", "nodes=2"], cwd=tmp_path, env=env, check=False)
    lines = (tmp_path / "told").read_text().splitlines()
    srun = next(line for line in lines if line.startswith("srun"))
    assert {"--kill-on-bad-exit=0", "--no-kill", "--wait=0", "agent"} <= set(srun.split())
    looked = [line for line in lines if "after_step" in line]
    assert looked == [f"python -m gpt_launch launch.agent.after_step {of_step} {tmp_path}/run"] * (after is not None)
    assert done.returncode == (after or 0) and lines[-1] == f"python -m gpt_launch report {tmp_path}/run"


def test_it_does_so_within_the_limits_of_the_run(folder: RunFolder, tmp_path: Path) -> None:
    slurm = Controller(tmp_path, BUSY)
    killed_in_the_middle(folder)
    with pytest.raises(RunFailedError, match="srun ended with exit status 137\nnot started again: "):
        requeue_unless_ended(RunContext(folder, NODE, config("resilience.max_restarts.node_failed=0")), 137)
    assert slurm.asked("scontrol requeue") == []
    decided = next(event for event in folder.read_events() if event["event"] == "decided")
    assert (decided["action"], decided["cause"]) == ("stop", "node_failed")
