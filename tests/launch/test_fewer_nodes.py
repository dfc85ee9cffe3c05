"""Lost nodes: sizes that are allowed, a run that goes on without a node, and one that restarts from memory."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpt import checkpoint as folders
from launch.plan.plan import Plan
from launch.plan.preflight import plan_text
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, read_json, read_json_lines
from launch.runs.records import read_records
from launch.slurm.jobs import sbatch_text
from launch.slurm.status import find_run_status, poll
from tests.support.commands import TINY, agents_of, descendants, run, start_fork, wait_for
from tests.support.planning import plan, refused
from tests.support.runs import COUNTING, LOCAL, checkpoint, from_step, options

SCRIPT = "workload=script script.command=[sleep]"
ELASTIC = f"{SCRIPT} script.resumes=true script.elastic=true"


@pytest.mark.parametrize(
    ("words", "fewer"),
    [
        ("nodes=4 resilience.min_nodes=1", (2, 1)),  # 16 sequences over 3 ranks do not go
        ("nodes=4 resilience.min_nodes=2 optim.global_batch=12", (3, 2)),
        ("nodes=4 resilience.min_nodes=1 ranks_per_node=2 parallel=fsdp parallel.tp=4", (2,)),
        ("nodes=4 resilience.min_nodes=1 parallel=hsdp parallel.dp_shard=2", (2,)),
        ("nodes=2 resilience.min_nodes=2", ()),
        (f"{ELASTIC} nodes=4 resilience.min_nodes=2", (3, 2)),
    ],
)
def test_the_plan_shows_with_how_many_nodes_a_run_can_continue(words: str, fewer: tuple[int, ...]) -> None:
    planned = plan(*words.split())
    assert planned.promised.fewer_nodes == fewer
    assert Plan.from_dict(planned.as_dict()).promised.fewer_nodes == fewer
    told = f"continues with {' or '.join(map(str, fewer))} in the same job"
    assert (told in plan_text(planned)) == bool(fewer)
    assert ("--no-kill" in sbatch_text([planned])) == bool(fewer), "the loss of a node must not end the job"


NO_SIZE = "resilience.min_nodes=3, and with nodes=3: nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=16 is not a"
# 2.1 GiB a rank on two nodes, and 3 on one.
LARGE = "parallel=fsdp model=gpt2_124m optim.max_micro_batch=1 precision=bf16"
LARGE += " cluster.gpus_per_node=1 cluster.gpu_memory_gib=2.5"


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        ("nodes=2 resilience.min_nodes=3", "resilience.min_nodes=3 with nodes=2", "resilience.min_nodes=2"),
        ("nodes=2 resilience.min_nodes=0", "resilience.min_nodes=0", "resilience.min_nodes=1"),
        ("nodes=4 resilience.min_nodes=3", NO_SIZE, ", or resilience.min_nodes=null"),
        ("nodes=2 resilience.min_nodes=1 parallel.tp=2 parallel=fsdp", "with 1 rank", "parallel.tp=1"),
        ("nodes=2 resilience.min_nodes=1 optim.weak_scaling=true", "weak_scaling", "optim.weak_scaling=false"),
        (f"nodes=2 resilience.min_nodes=1 {LARGE}", "with nodes=1: a rank of 2.53 GiB", "resilience.min_nodes=null"),
        ("nodes=2 spare_jobs=1", "spare_jobs=1 for a run that cannot continue with fewer", "resilience.min_nodes=1"),
        (f"{SCRIPT} nodes=2 resilience.min_nodes=1", "a script that is not", "script.elastic=true"),
        (f"{SCRIPT} nodes=2 script.elastic=true", "without script.resumes=true", "script.resumes=true"),
    ],
)
def test_impossible_fewer_nodes_are_refused_before_the_queue(words: str, found: str, fix: str) -> None:
    refused(plan, *words.split(), found=found, fix=fix)


def test_a_run_continues_without_a_lost_node_and_uses_all_nodes_when_the_command_is_typed_again(
    tmp_path: Path,
) -> None:
    folder, hurry = RunFolder(tmp_path / "run"), tmp_path / "hurry"
    words = [*LOCAL, *COUNTING, "nodes=2", "script.elastic=true", "resilience.min_nodes=1", f"run_dir={folder.path}"]
    words += [*options(steps=400, save_every=5, hurry=hurry), "resilience.node_timeout_s=5", "script.max_steps=400"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")

    def steps(attempt: int) -> list[dict[str, Any]]:
        return [r for r in read_records(folder.metrics(0)) if r["attempt"] == attempt]

    def of(name: str) -> list[dict[str, Any]]:
        return select_events(folder.read_events(), name)

    def wait(condition: Any, what: str) -> None:
        wait_for(lambda: condition() or process.poll() is not None, what)
        assert process.poll() is None, (folder.read_events(), (tmp_path / "log").read_text())

    wait(lambda: of("saved"), "a checkpoint")
    for pid in descendants(agents_of(process.pid)[1]):  # the agent first, as it would tell the others of its ranks
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: len(steps(2)) > 5, "steps on one node")
    saved = max(e["step"] for e in of("saved") if e["attempt"] == 1)
    assert from_step(folder, attempt=2) == saved
    assert [e["world_size"] for e in of("started")] == [2, 1]
    (lost,), (end,), (decided,) = of("node_lost"), of("attempt_ended"), of("decided")
    assert (lost["node"], end["cause"], decided["action"]) == (1, "node_failed", "restart")
    assert "the run continues on 1 of 2 nodes" in decided["reason"]
    wait(folder.environment(2).exists, "what the agent tells of the attempt")
    assert len(read_json(folder.environment(2))["ranks"]) == 1
    point = find_run_status(folder)
    poll([point])
    assert point.state == "running" and point.fewer_nodes() is not None
    shown = run(f"launch.status {folder.path}", cwd=tmp_path)
    assert "1 of 2" in shown and "silent for" in shown

    os.kill(process.pid, signal.SIGINT)  # saves, and leaves
    process.wait(300)
    left_at = checkpoint(folder)["step"]
    hurry.touch()
    run("launch", *words, cwd=tmp_path)
    assert [e["world_size"] for e in of("started")] == [2, 1, 2]
    assert [e["attempt"] for e in of("all_nodes")] == [3]
    assert (from_step(folder, attempt=3), checkpoint(folder)["step"]) == (left_at, 400)
    made = [r["step"] for r in read_json_lines(folder.metrics(0)) if r["attempt"] == 2]
    assert made[0] == saved + 1 and sorted(set(made)) == list(range(saved + 1, left_at + 1))


STEPS, DISK = 60, 20
IN_MEMORY = (
    *TINY,
    *(f"optim.max_steps={STEPS}", "eval.interval=0", f"checkpoint.interval={DISK}", "nodes=2", "cluster=local"),
    *("model.n_layer=1", "optim.max_micro_batch=4", "checkpoint.in_memory_interval=1", "parallel=fsdp"),
    *("logging.tensorboard=false", "resilience.health_check.enabled=false"),
)
AGENTS = 3
"""Of two nodes and a spare."""


def state_files(folder: RunFolder) -> dict[str, bytes]:
    """The files of the last checkpoint, but for the manifest, which has the time."""
    last = folders.final_for(folder.checkpoints, STEPS)
    return {path.name: path.read_bytes() for path in last.iterdir() if path.name.startswith(("__", "rank"))}


def test_restarts_from_memory_after_a_killed_rank_and_a_lost_node_give_the_same_weights(tmp_path: Path) -> None:
    quiet, doomed = RunFolder(tmp_path / "quiet"), RunFolder(tmp_path / "doomed")
    run(f"launch run_dir={quiet.path}", *IN_MEMORY, cwd=tmp_path)
    doomed.config.parent.mkdir(parents=True)
    shutil.copy(quiet.plan, doomed.plan)
    config = quiet.config.read_text().replace(str(quiet.path), str(doomed.path))
    doomed.config.write_text(config.replace("in_memory: false", "in_memory: true"))

    where = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": str(AGENTS)}
    agents = [
        start_fork(
            f"tests.support.programs.doomed_agent {doomed.path}",
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
        on_disk = max(e["step"] for e in select_events(events, "saved") if e["attempt"] < attempt)
        (loaded,) = select_events(events, "loaded_from_memory", attempt=attempt)
        (started,) = select_events(events, "started", attempt=attempt)
        assert started["from_step"] == loaded["step"] > on_disk
    assert "memory_passed_over" not in {event for event, _, _ in told}
    assert state_files(doomed) == state_files(quiet) and len(state_files(quiet)) == 4
