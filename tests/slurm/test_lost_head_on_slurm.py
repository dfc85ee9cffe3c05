"""The head node is lost: another node decides from then on, inside of the same job, and the old one no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.storm import injection
from slurm.sandbox.cluster import Cluster, cut_link, heal, power_cut
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, start_fork, wait_for
from tests.support.runs import COUNTING, StormyRun, checkpoint, from_step, options, paced

pytestmark = pytest.mark.slurm

STEPS = 60
GPT = (*TINY, f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=20", "model.dropout=0.1")
QUICK = "resilience.node_timeout_s=5"


def saved_before(run: StormyRun, attempt: int) -> int:
    """The newest step that the attempts before this one have saved."""
    return max(int(e["step"]) for e in run.of("saved") if e["attempt"] < attempt)


def ranks_of_attempt(run: StormyRun, attempt: int) -> list[int]:
    """Process ids of the ranks of an attempt, on all nodes."""
    found = injection.of_run(run.folder.path)
    return [each.pid for each in found if each.info["environ"].get("LAUNCH_ATTEMPT") == str(attempt)]


def test_a_training_whose_head_node_loses_power_ends_in_the_same_weights_in_the_same_job(
    sandbox: Cluster, tmp_path: Path
) -> None:
    whole, log = RunFolder(tmp_path / "whole"), tmp_path / "log of the whole"
    alone = start_fork("launch", *GPT, "nodes=2", "cluster=local", f"run_dir={whole.path}", cwd=tmp_path, log=log)
    slowly, hurry = paced(tmp_path)
    run = StormyRun(sandbox, tmp_path, *GPT, *slowly, QUICK, "spare_nodes=1")
    run.wait(lambda: run.of("saved"), "a checkpoint")
    run.wait_for_steps(attempt=1, count=25)
    head, other = run.rank_hosts(1)
    power_cut(sandbox, head)
    run.wait_for_steps(attempt=2, count=1)
    hurry.touch()
    assert run.process.wait(timeout=300) == 0, (run.folder.read_events(), run.log.read_text())
    (replaced,) = run.of("head_replaced")
    assert {replaced["host"], other} <= set(run.rank_hosts(2)) and head not in run.rank_hosts(2)
    assert run.rank_hosts(2)[0] == replaced["host"], "where the ranks' store is"
    assert [e["host"] for e in run.of("node_lost")] == [head]
    assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed", "finished"]
    assert run.of("requeued") == [] and len(run.of("agent_started", "agent_ended")) == 2
    assert [e["from_step"] for e in run.of("started")] == [0, saved_before(run, attempt=2)]
    assert alone.wait(timeout=300) == 0, log.read_text()
    assert differing(read_weights(whole.path, STEPS, tmp_path), read_weights(run.folder.path, STEPS, tmp_path)) == []
    # No batch script is left that could end the job.
    wait_for(lambda: not sandbox.slurm("squeue", "--noheader", "--jobs", run.job).strip(), "the end of the job")


def test_a_run_goes_on_without_its_head_and_another_node_while_no_controller_answers(
    sandbox: Cluster, tmp_path: Path
) -> None:
    hurry, steps = tmp_path / "hurry", 4000
    counting = [*COUNTING, *options(save_every=20, steps=steps, hurry=hurry)]
    run = StormyRun(sandbox, tmp_path, *counting, QUICK, "resilience.min_nodes=2", "script.elastic=true", nodes=4)
    run.wait(lambda: run.of("saved"), "a checkpoint")
    hosts = run.hosts()
    sandbox.stop_controller()
    try:
        power_cut(sandbox, hosts[0])
        power_cut(sandbox, hosts[2])
        run.wait_for_steps(attempt=2, count=1)
    finally:
        sandbox.start_controller()
    head, last = run.rank_hosts(2)
    assert {head, last} == {hosts[1], hosts[3]}
    assert from_step(run.folder, attempt=2) == saved_before(run, attempt=2)
    # The head node of the second term is lost, too, and no number of nodes is left with which the run could go on.
    power_cut(sandbox, head)
    run.wait(lambda: run.of("requeued"), "the last node to put the job back into the queue")
    assert [e["host"] for e in run.of("head_replaced")] == [head, last]
    assert [e["host"] for e in run.of("node_lost")] == [hosts[0], hosts[2], head]
    for host in (hosts[0], hosts[2], head):
        heal(sandbox, host)
    hurry.touch()
    assert run.process.wait(timeout=300) == 0, (run.folder.read_events(), run.log.read_text())
    assert checkpoint(run.folder)["step"] == steps


def test_a_head_node_that_was_cut_off_ends_its_ranks_and_decides_nothing_when_it_returns(
    sandbox: Cluster, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    counting = [*COUNTING, *options(save_every=20), f"launch.on_event=\"sh -c 'echo $LAUNCH_EVENT >> {told}'\""]
    run = StormyRun(sandbox, tmp_path, *counting, QUICK, "spare_nodes=1")
    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        head = run.hosts()[0]
        cut_link(sandbox, head)
        run.wait_for_steps(attempt=2, count=1)
        wait_for(lambda: not ranks_of_attempt(run, 1), "the end of its ranks")
        heal(sandbox, head)
        saves = len(run.of("saved"))
        run.wait(lambda: len(run.of("saved")) > saves + 2, "checkpoints after its return")
        assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed"]
        assert [e["host"] for e in run.of("node_lost")] == [head]
        assert len(run.of("decided")) == 1 and run.of("agent_ended") == run.of("requeued") == []
        wait_for(lambda: told.read_text().split().count("restarted") == 1, "the command at the event")
    finally:
        run.end("--full", "--signal=KILL")
