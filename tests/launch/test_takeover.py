"""Who goes on where the head node of a job is lost, and with what; and the end of agents that were lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.agent.node import Node, NodeProblem, RunContext
from launch.agent.outcome import end_lost_agents, orphaned_attempt
from launch.agent.policy import RunFailedError
from launch.config import Config
from launch.runs.folder import RunFolder

NODE = Node(1, 3, "slurm-7-1-0", is_slurm=True, slurm_job="7", hosts=("n1", "n2", "n3"))
BEFORE = [
    {"event": "agent_started", "job": "slurm-7-0-0"},
    {"event": "started", "attempt": 3},
    {"event": "attempt_ended", "attempt": 3},
    {"event": "decided", "action": "requeue"},
    {"event": "agent_started", "job": "slurm-7-1-0"},
]
"""Events of an earlier start of the job, which say nothing of this one."""
STARTED = [*BEFORE, {"event": "started", "attempt": 4}]
ENDED = [*STARTED, {"event": "attempt_ended", "attempt": 4}]


@pytest.mark.parametrize(
    ("events", "known", "left"),
    [
        (STARTED, 4, 4),
        (BEFORE, 4, 4),  # announced, and no rank has started yet
        (BEFORE, None, None),
        ([*ENDED, {"event": "decided", "action": "restart"}], 4, None),
    ],
)
def test_what_a_lost_head_node_leaves_is_taken_over(
    events: list[dict[str, Any]], known: int | None, left: int | None
) -> None:
    assert orphaned_attempt(events, NODE, known) == left


@pytest.mark.parametrize(
    ("events", "known", "why"),
    [
        # A node that was cut off comes back while the others train: it must not end what they do.
        ([*ENDED, {"event": "decided", "action": "restart"}, {"event": "started", "attempt": 5}], 4, "without n2"),
        (STARTED, None, "without n2"),
        ([*ENDED, {"event": "decided", "action": "requeue"}], 4, "has decided"),
    ],
)
def test_a_node_that_was_cut_off_leaves_the_others_alone(
    events: list[dict[str, Any]], known: int | None, why: str
) -> None:
    with pytest.raises(RunFailedError, match=why):
        orphaned_attempt(events, NODE, known)


def test_agents_that_were_lost_are_ended_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a ``scancel`` that writes down what it was given: only a cluster would have an agent that hangs."""
    scancel = tmp_path / "scancel"
    scancel.write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'ended'}\n")
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    folder, head = RunFolder(tmp_path / "run"), Node(0, 3, "slurm-8-1-2", is_slurm=True, slurm_job="7_1")
    lost = [NodeProblem(2, "n3", "silent for 30 s")]
    folder.record_event("submitted", job_id="7_1")
    folder.record_event("decided", action="requeue")
    end_lost_agents(RunContext(folder, head, Config()), lost)  # Slurm ends them
    folder.record_event("decided", action="stop")
    end_lost_agents(RunContext(folder, head, Config()), [])
    end_lost_agents(RunContext(folder, NODE, Config()), lost)
    assert not (tmp_path / "ended").exists()
    end_lost_agents(RunContext(folder, head, Config()), lost)
    assert (tmp_path / "ended").read_text() == "7_1.2\n"
    (told,) = [e for e in folder.read_events() if e["event"] == "step_ended"]
    assert told["hosts"] == ["n3"] and "n3 is lost" in told["cause"]
