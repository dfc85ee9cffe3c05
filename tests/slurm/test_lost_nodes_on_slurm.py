"""Nodes lost under a running job: a spare takes over, a cut link is named, another node becomes head node."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.storm import injection
from slurm.sandbox.cluster import Cluster, cut_link, freeze, heal, power_cut
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, start_fork, wait_for
from tests.support.runs import COUNTING, StormyRun, checkpoint, from_step, options, paced

pytestmark = pytest.mark.slurm

# Slurm itself calls a lost node down after 13 s or so and requeues the job: the agents have to be well ahead of it.
WORDS = [*COUNTING, *options(save_every=20), "resilience.node_timeout_s=5"]


KILL = ("--full", "--signal=KILL")
"""End a job without a save, where its end is not what is tested."""


def test_a_spare_takes_the_place_of_a_node_that_loses_power_and_a_cancel_stays_a_cancel(
    sandbox: Cluster, tmp_path: Path
) -> None:
    run = StormyRun(sandbox, tmp_path, *WORDS, "spare_nodes=1")
    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        (members,) = run.of("members")
        assert run.rank_hosts(1) == members["hosts"] and len(members["spares"]) == 1
        dead = members["hosts"][1]
        power_cut(sandbox, dead)
        run.wait_for_steps(attempt=2, count=1)
        assert run.rank_hosts(2) == [members["hosts"][0], *members["spares"]]
        assert [(e["host"], e["attempt"]) for e in run.of("node_lost")] == [(dead, 1)]
        assert run.of("attempt_ended")[0]["cause"] == "node_failed"
        assert run.of("requeued") == [], "inside the same job"
        saved = max(e["step"] for e in run.of("saved") if e["attempt"] == 1)
        assert from_step(run.folder, attempt=2) == saved
    finally:
        status = run.end()
    assert status == 1
    assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed", "cancelled"]
    assert run.of("requeued") == []
    assert "PENDING" not in sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", run.job)


def test_a_run_without_a_spare_goes_on_with_the_node_that_is_left_and_has_both_again_after_a_requeue(
    sandbox: Cluster, tmp_path: Path
) -> None:
    run = StormyRun(sandbox, tmp_path, *WORDS, "script.elastic=true", "resilience.min_nodes=1")
    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        stays, dead = run.rank_hosts(1)
        power_cut(sandbox, dead)
        run.wait_for_steps(attempt=2, count=1)
        assert run.rank_hosts(2) == [stays] and run.of("requeued") == [], "inside the same job"
        assert [(e["host"], e["attempt"]) for e in run.of("node_lost")] == [(dead, 1)]
        (fewer,) = run.of("fewer_nodes")
        assert (fewer["nodes"], fewer["asked"], fewer["hosts"]) == (1, 2, [stays])
        assert from_step(run.folder, attempt=2) == max(e["step"] for e in run.of("saved") if e["attempt"] == 1)
        # Slurm takes the node from the job, and must leave the job alone.
        wait_for(lambda: "down" in sandbox.slurm("sinfo", "--noheader", "--nodes", dead, "--format=%T"), "DOWN")
        done = len(run.of("saved"))
        run.wait(lambda: len(run.of("saved")) > done, "a checkpoint after Slurm has called the node down")
        assert len(run.of("attempt_ended")) == 1

        sandbox.slurm("scontrol", "requeue", run.job)
        run.wait_for_steps(attempt=3, count=1)
        assert len(run.rank_hosts(3)) == 2 and dead not in run.rank_hosts(3)
        assert [e["attempt"] for e in run.of("all_nodes")] == [3]
        assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed", "preempted"]
    finally:
        run.end(*KILL)


def test_a_cut_link_and_a_frozen_head_node_are_noticed_and_named_and_the_job_comes_back_without_them(
    sandbox: Cluster, tmp_path: Path
) -> None:
    run = StormyRun(sandbox, tmp_path, *WORDS)
    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        cut = run.rank_hosts(1)[1]
        cut_link(sandbox, cut)
        run.wait_for_steps(attempt=2, count=1)
        (lost,) = run.of("node_lost")
        assert lost["host"] == cut and "silent for" in lost["cause"]
        assert f"ExcNodeList={cut}" in sandbox.slurm("scontrol", "show", "job", run.job)
        frozen = run.rank_hosts(2)[0]
        assert cut not in run.rank_hosts(2)

        freeze(sandbox, frozen)
        run.wait(lambda: len(run.of("requeued")) == 2, "the others to notice that their head node is frozen")
        # Slurm's step on the other node reports its end to the srun there, whose kernel takes the message: it waits six
        # times MessageTimeout for the answer. Nobody answers at all where an operator pulls the plug.
        power_cut(sandbox, frozen)
        run.wait_for_steps(attempt=3, count=1)
        assert [e["host"] for e in run.of("node_lost")] == [cut, frozen]
        assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed", "node_failed"]
        assert [e["hosts"] for e in run.of("excluded")] == [[cut], sorted([cut, frozen])], "with those before"
        assert set(run.rank_hosts(3)) == set(sandbox.nodes) - {cut, frozen}
    finally:
        run.end(*KILL)


def test_a_spare_job_replaces_a_lost_node_and_the_run_survives_its_head_node_with_it(
    sandbox: Cluster, tmp_path: Path
) -> None:
    words = ("script.elastic=true", "resilience.min_nodes=1", "spare_jobs=1")
    run = StormyRun(sandbox, tmp_path, *WORDS, *words, nodes=3)
    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        head, stays, dead = run.rank_hosts(1)
        power_cut(sandbox, dead)
        run.wait_for_steps(attempt=3, count=1)
        assert run.rank_hosts(2) == [head, stays]
        assert run.rank_hosts(3)[:2] == [head, stays]
        (joined,) = set(run.rank_hosts(3)) - {head, stays}
        assert joined != dead
        (spare,) = run.of("spare_job_submitted")
        assert spare["job_id"] != run.job and [e["host"] for e in run.of("spare_started")] == [joined]
        assert [e["cause"] for e in run.of("attempt_ended")] == ["node_failed", "node_joined"]
        assert [e["attempt"] for e in run.of("all_nodes")] == [3] and run.of("requeued") == []
        last = max(r["step"] for r in read_records(run.folder.metrics(0)) if r["attempt"] == 2)
        assert from_step(run.folder, attempt=3) == last, "the ranks have saved before they left"

        power_cut(sandbox, head)
        run.wait_for_steps(attempt=4, count=1)
        if run.rank_hosts(4) != [stays, joined]:  # The node joins the next head node a moment later.
            run.wait_for_steps(attempt=5, count=1)
            assert run.rank_hosts(5) == [stays, joined]
        assert len(run.of("spare_job")) == 1 and run.of("requeued") == []
        assert run.of("attempt_ended")[2]["cause"] == "node_failed"
    finally:
        run.end()
    assert run.of("attempt_ended")[-1]["cause"] == "cancelled"
    wait_for(lambda: run.of("agent_ended"), "the end of the head node's agent")


def test_a_spare_job_that_waits_in_the_queue_is_cancelled_with_the_run(sandbox: Cluster, tmp_path: Path) -> None:
    run = StormyRun(sandbox, tmp_path, *WORDS, "script.elastic=true", "resilience.min_nodes=1", "spare_jobs=1")
    blocking = ""

    def state(job: str) -> str:
        return sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job).strip()

    try:
        run.wait(lambda: run.of("saved"), "a checkpoint")
        stays, dead = run.rank_hosts(1)
        others = ",".join(set(sandbox.nodes) - {stays, dead})
        command = ("sbatch", "--parsable", "--exclusive", f"--nodelist={others}", "--wrap=sleep infinity")
        blocking = sandbox.slurm(*command, "--output=/dev/null").strip()
        wait_for(
            lambda: sandbox.slurm("squeue", "--noheader", "--format=%t", "--jobs", blocking).strip() == "R",
            "a full cluster",
        )
        power_cut(sandbox, dead)
        run.wait(lambda: run.of("spare_job_submitted"), "a spare job")
        run.wait_for_steps(attempt=2, count=1)
        (spare,) = run.of("spare_job_submitted")
        assert state(spare["job_id"]) == "PENDING"
    finally:
        run.end()
        sandbox.slurm("scancel", blocking)
    assert run.of("spare_started") == []
    assert state(spare["job_id"]) == "CANCELLED"


# The head node is lost: another node decides from then on, inside of the same job, and the old one no more.


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
