"""Restarts from the memory of the nodes, after the loss of a rank and of a node, give the weights of a quiet run."""

from __future__ import annotations

import shutil
from pathlib import Path

from gpt.checkpoint import folders
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run, start_fork

STEPS, DISK = 60, 20
WORDS = (
    *TINY,
    *(f"optim.max_steps={STEPS}", "eval.interval=0", f"checkpoint.interval={DISK}", "nodes=2", "cluster=local"),
    *("model.n_layer=1", "optim.max_micro_batch=4", "checkpoint.in_memory_interval=1", "parallel=fsdp"),
    *("logging.tensorboard=false", "logging.csv=false", "logging.json=false", "resilience.health_check.enabled=false"),
)
AGENTS = 3
"""Of two nodes and a spare."""


def state_files(folder: RunFolder) -> dict[str, bytes]:
    """The files of the last checkpoint, but for the manifest, which has the time."""
    last = folders.final_for(folder.checkpoints, STEPS)
    return {path.name: path.read_bytes() for path in last.iterdir() if path.name.startswith(("__", "rank"))}


def test_a_killed_rank_and_a_lost_node_are_back_from_memory_with_the_same_weights(tmp_path: Path) -> None:
    quiet, doomed = RunFolder(tmp_path / "quiet"), RunFolder(tmp_path / "doomed")
    run("launch", *WORDS, f"run_dir={quiet.path}", cwd=tmp_path)
    doomed.config.parent.mkdir(parents=True)
    shutil.copy(quiet.plan, doomed.plan)
    config = quiet.config.read_text().replace(str(quiet.path), str(doomed.path))
    doomed.config.write_text(config.replace("in_memory: false", "in_memory: true"))

    where = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": str(AGENTS)}
    agents = [
        start_fork(
            "tests.support.programs.doomed_agent",
            str(doomed.path),
            cwd=tmp_path,
            log=tmp_path / f"agent_{index}",
            **where,
            SUBMITIT_LOCAL_GLOBALID=str(index),
            LAUNCH_TOKEN="drill",
        )
        for index in range(AGENTS)
    ]
    ended = [agent.wait(timeout=280) for agent in agents]
    events = doomed.read_events()
    told = [(e["event"], e.get("attempt"), e.get("cause")) for e in events]
    assert ended == [0, -9, 0], ((tmp_path / "agent_0").read_text(), told)
    assert [cause for event, _, cause in told if event == "attempt_ended"] == ["crashed", "node_failed", "finished"]
    for attempt in (2, 3):
        on_disk = max(e["step"] for e in events if e["event"] == "saved" and e["attempt"] < attempt)
        (loaded,) = (e for e in events if e["event"] == "loaded_from_memory" and e["attempt"] == attempt)
        (started,) = (e for e in events if e["event"] == "started" and e["attempt"] == attempt)
        assert started["from_step"] == loaded["step"] > on_disk
    assert "memory_passed_over" not in {event for event, _, _ in told}
    assert state_files(doomed) == state_files(quiet) and len(state_files(quiet)) == 4
