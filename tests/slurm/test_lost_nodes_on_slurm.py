"""Nodes lost under a running job: a spare takes over, a cut link is named, and a lost head node is survived."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster, cut_link, freeze, power_cut
from tests.support.commands import wait_for
from tests.support.runs import COUNTING, StormyRun, from_step, options

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
