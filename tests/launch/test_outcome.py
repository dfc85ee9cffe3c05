"""Decisions of agents and of the batch script: takeover of a lost head node, requeue, and a controller that is away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.agent import node
from launch.agent import outcome as requeue
from launch.agent.after_step import requeue_unless_ended
from launch.agent.node import Node, NodeProblem, RunContext
from launch.agent.outcome import cause_of_stop, end_lost_agents, events_of, pending_action
from launch.agent.policy import Action, Cause, RunFailedError
from launch.config import Config
from launch.config.compose import compose_launch, typed_config
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from launch.slurm import client
from launch.slurm.status import outcome, why_not_restarted
from tests.support.commands import ROOT, environment, wait_for
from tests.support.runs import names, recorded, write_program

Events = list[dict[str, Any]]
AGENT = {"event": "agent_started", "job": "slurm-7-1-0"}
STARTED = {"event": "started", "attempt": 2}
LEFT = {"event": "agent_ended", "job": "slurm-7-1-0"}


def ended(cause: str) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 2, "cause": cause}


def decided(action: str, cause: str = "crashed") -> dict[str, Any]:
    return {"event": "decided", "attempt": 2, "action": action, "cause": cause, "reason": "a reason"}


EVENTS = {
    "agent": AGENT,
    "started": STARTED,
    "left": LEFT,
    "ended": ended("crashed"),
    "requeue_failed": {"event": "requeue_failed"},
    **{action.name: decided(action) for action in Action},
}


@pytest.mark.parametrize(
    ("events", "status", "expected"),
    [
        ("agent started", 137, "restart"),  # killed in the middle
        ("agent", 137, "restart"),  # killed while they met
        ("", 137, "restart"),  # killed before they met
        ("", 1, None),  # refused by themselves
        ("agent started left", 1, None),  # an error of the agent's own
        ("agent started ended stop", 137, None),  # over its limits
        ("agent started ended restart", 137, "restart"),
        ("agent started ended requeue", 137, "requeue"),
        ("agent started ended requeue left", 137, "requeue"),
        ("agent requeue requeue_failed left", 1, None),
        ("agent ended restart started", 137, "restart"),
    ],
)
def test_after_the_step_only_undecided_or_unfinished_actions_are_done(
    events: str, status: int, expected: str | None
) -> None:
    assert pending_action([EVENTS[name] for name in events.split()], status) == expected


def test_only_events_of_this_start_of_the_job_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for job in ("slurm-7-0-0", "slurm-71-1-0", "slurm-7-1-0"):
        folder.record_event("agent_started", job=job)
    this = Node(0, 2, "slurm-7-1-0", is_slurm=True)
    assert [e["job"] for e in events_of(folder, this)] == ["slurm-7-1-0"]
    assert events_of(folder, Node(0, 2, "slurm-7-2-0", is_slurm=True)) == []


def test_a_run_that_is_not_restarted_has_failed_and_gives_the_reason(tmp_path: Path) -> None:
    submitted = {"event": "submitted", "cluster": "slurm", "job_id": "7"}
    folder = recorded(RunFolder(tmp_path / "run"), submitted, STARTED, {"event": "stopped"})

    def told() -> tuple[str, str | None]:
        events = folder.read_events()
        return outcome(events), why_not_restarted(events)

    recorded(folder, ended("preempted"), decided("requeue", "preempted"))
    assert told() == ("stopped", None)
    folder.record_event(**decided("stop", "preempted"))
    assert told() == ("failed", "a reason")
    folder.record_event(**decided("stop", "cancelled"))
    assert told()[1] is None, "it ended as somebody wanted it"


def test_the_running_clock_skips_the_time_in_which_the_process_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped process sees the time jump between two ticks."""
    monotonic, jumped_s = time.monotonic, 0.0
    monkeypatch.setattr(node, "TICK_S", 0.01)
    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: monotonic() + jumped_s))
    clock = node.RunningClock()
    wait_for(lambda: clock.now() > 0.1, "a wait that counts")
    jumped_s = 1000.0
    before = clock.now()
    wait_for(lambda: clock.now() > before + 0.1, "time after the jump")
    assert clock.now() < 500, "the jump does not count"
    clock.close()


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
            write_program(folder / name, PROGRAM.format(python=sys.executable, folder=str(folder)))

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


def test_the_cause_of_a_stop_is_read_once_the_controller_answers_again(folder: RunFolder, tmp_path: Path) -> None:
    Controller(tmp_path, BUSY)
    assert cause_of_stop(RunContext(folder, NODE, config()), 1) is Cause.preempted
    assert names(folder) == ["controller_away"]


def test_a_job_is_requeued_once_and_without_bad_hosts_when_the_controller_answers_again(
    folder: RunFolder, tmp_path: Path
) -> None:
    slurm = Controller(tmp_path, BUSY)
    requeue.requeue_job(RunContext(folder, NODE, config()), Cause.node_failed, {"n2": "lost in attempt 1"})
    assert names(folder) == ["controller_away", "requeued", "excluded"]
    assert slurm.asked("scontrol requeue") == ["scontrol requeue 7"]
    assert slurm.asked("scontrol update") == ["scontrol update JobId=7 ExcNodeList=n2"]


def test_a_requeue_that_fails_is_recorded(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(tmp_path, 1000)
    monkeypatch.setattr(requeue, "CONTROLLER_WAIT_S", 0.0)
    with pytest.raises(RunFailedError, match="not started again: Slurm did not requeue it: scontrol show job"):
        requeue.requeue_job(RunContext(folder, NODE, config()), Cause.node_failed)
    with pytest.raises(RunFailedError, match="not started again: scontrol show job"):
        cause_of_stop(RunContext(folder, NODE, config()), 1)
    failed = [event["cause"] for event in select_events(folder.read_events(), "requeue_failed")]
    assert len(failed) == 2 and all("Unable to contact slurm controller" in cause for cause in failed)


def killed_in_the_middle(folder: RunFolder) -> None:
    """The event log of a run whose agent was killed while its ranks trained."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    recorded(
        folder,
        {"event": "submitted", "cluster": "slurm", "job_id": "7"},
        {"event": "agent_started", "job": NODE.job, "pid": gone.pid, "pid_started": "1"},
        {"event": "started", "attempt": 1, "job": NODE.job},
    )


@pytest.mark.parametrize("status", [1, 137], ids=["srun gave up for a node that rebooted", "srun killed"])
def test_a_batch_script_requeues_its_job_if_its_agents_were_killed(
    status: int, folder: RunFolder, tmp_path: Path
) -> None:
    slurm = Controller(tmp_path, BUSY)
    killed_in_the_middle(folder)
    assert requeue_unless_ended(RunContext(folder, NODE, config()), status) == status
    ended = select_events(folder.read_events(), "attempt_ended")[0]
    assert (ended["attempt"], ended["cause"]) == (1, "node_failed")
    assert slurm.asked("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize(("of_step", "after"), [(0, None), (1, 1), (137, 0)])
def test_multi_node_sh_runs_after_step_if_srun_fails_and_returns_its_status(
    of_step: int, after: int | None, tmp_path: Path
) -> None:
    """With programs in place of srun and python, which tell what they were asked."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("sandbox", "__pycache__"))
    told = f'echo "${{0##*/}} $*" >> {tmp_path}/told; case "$*" in '
    answers = f"*--agent-command*) echo agent;; *batch*) echo {tmp_path}/run;; *after_step*) exit {after};; esac"
    for name, ending in (("python", answers), ("srun", f"*) exit {of_step};; esac")):
        write_program(tmp_path / name, f"#!/bin/sh\n{told}{ending}\n")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", "slurm/multi_node.sh", "nodes=2"], cwd=tmp_path, env=env, check=False)
    lines = (tmp_path / "told").read_text().splitlines()
    srun = next(line for line in lines if line.startswith("srun"))
    assert {"--kill-on-bad-exit=0", "--no-kill", "--wait=0", "agent"} <= set(srun.split())
    looked = [line for line in lines if "after_step" in line]
    assert looked == [f"python -m gpt_launch launch.agent.after_step {of_step} {tmp_path}/run"] * (after is not None)
    assert done.returncode == (after or 0) and lines[-1] == f"python -m gpt_launch report {tmp_path}/run"


def test_multi_node_sh_outside_of_a_job_prints_the_sbatch_line_with_all_nodes_of_the_plan(tmp_path: Path) -> None:
    env = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "SBATCH_"))}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    words = ["bash", "slurm/multi_node.sh", "nodes=4", "spare_nodes=1", f"output_dir={tmp_path}"]
    text = subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    line = f"sbatch --nodes=5 slurm/multi_node.sh nodes=4 spare_nodes=1 output_dir={tmp_path}"
    assert text.endswith(f"checked, and not submitted; type next: {line}\n") and "#SBATCH" not in text


def test_a_batch_script_obeys_the_restart_limits(folder: RunFolder, tmp_path: Path) -> None:
    slurm = Controller(tmp_path, BUSY)
    killed_in_the_middle(folder)
    with pytest.raises(RunFailedError, match="starter ended with exit status 137\nnot started again: "):
        requeue_unless_ended(RunContext(folder, NODE, config("resilience.max_restarts.node_failed=0")), 137)
    assert slurm.asked("scontrol requeue") == []
    decided = select_events(folder.read_events(), "decided")[0]
    assert (decided["action"], decided["cause"]) == ("stop", "node_failed")


SECOND_NODE = Node(1, 3, "slurm-7-1-0", is_slurm=True, slurm_job="7", hosts=("n1", "n2", "n3"))


def test_lost_agents_are_ended_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a ``scancel`` that writes down what it was given: only a cluster would have an agent that hangs."""
    write_program(tmp_path / "scancel", f"#!/bin/sh\necho $@ >> {tmp_path / 'ended'}\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    folder, head = RunFolder(tmp_path / "run"), Node(0, 3, "slurm-8-1-2", is_slurm=True, slurm_job="7_1")
    lost = [NodeProblem(2, "n3", "silent for 30 s")]
    folder.record_event("submitted", job_id="7_1")
    folder.record_event("decided", action="requeue")
    end_lost_agents(RunContext(folder, head, Config()), lost)  # Slurm ends them
    folder.record_event("decided", action="stop")
    end_lost_agents(RunContext(folder, head, Config()), [])
    end_lost_agents(RunContext(folder, SECOND_NODE, Config()), lost)
    assert not (tmp_path / "ended").exists()
    end_lost_agents(RunContext(folder, head, Config()), lost)
    assert (tmp_path / "ended").read_text() == "7_1.2\n"
    (told,) = select_events(folder.read_events(), "step_ended")
    assert told["hosts"] == ["n3"] and "n3 is lost" in told["cause"]
