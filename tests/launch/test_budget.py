"""The budget: what was used, what is refused, a run that stops at the cap; expected times and warnings of a plan."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config import BudgetConfig, ClusterKind
from launch.plan.budget import SILENT_S, EventLog, Rates, Use, refuse_above, spent, used
from launch.plan.plan import Plan
from launch.plan.preflight import (
    add_expected,
    add_warnings,
    expected_text,
    plan_text,
    share_budget,
    worst_case_text,
)
from launch.runs.folder import RunFolder, append_json_lines, append_lines
from launch.runs.records import read_records
from launch.slurm.limits import SlurmFacts
from tests.support.commands import TINY, run, start_fork, wait_for
from tests.support.doctor_facts import LIMITS
from tests.support.planning import config_of, plan, refused

Events = list[dict[str, Any]]
RATES = Rates(gpus_per_node=8, price_per_gpu_hour=2.5)


def started(job: str, at: float, nodes: int = 1, **more: Any) -> dict[str, Any]:
    return {"event": "agent_started", "time": at, "job": job, "nodes": nodes, "allocated_at": at, **more}


def ended(job: str, at: float) -> dict[str, Any]:
    return {"event": "agent_ended", "time": at, "job": job, "ended_at": at}


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(1, 4), st.integers(1, 8)), max_size=4),
        max_size=3,
    ),
    st.integers(0, 250),
)
def test_use_is_what_a_count_of_seconds_gives(runs: list[list[tuple[int, int, int, int]]], now: int) -> None:
    event_logs, paid = [], []
    for allocations in runs:
        events: Events = []
        clock = 0
        for number, (wait, length, nodes, gpus) in enumerate(allocations):
            begin, clock = clock + wait, clock + wait + length
            events += [started(str(number), begin, nodes, gpus=gpus), ended(str(number), clock)]
            paid.append((begin, clock, nodes, gpus))
        event_logs.append(EventLog(events))
    total = used(event_logs, 10**9, Rates())
    seconds = [(n, g) for second in range(250) for begin, end, n, g in paid if begin <= second < end]
    assert total.node_hours * 3600 == pytest.approx(sum(n for n, _ in seconds))
    assert (total.gpu_hours or 0.0) * 3600 == pytest.approx(sum(g for _, g in seconds))


def test_an_allocation_counts_to_its_end_its_limit_or_its_last_sign_of_life() -> None:
    going = started("a", 1000.0, nodes=2, gpus=16, limit_s=7200.0)
    assert used([EventLog([going], alive=4590)], 4600, RATES) == Use(2.0, 16.0, 40.0)
    assert used([EventLog([going], alive=8190)], 8200 + 50000, RATES).node_hours == pytest.approx(2 * 7190 / 3600)
    assert used([EventLog([going], alive=8190)], 8210, RATES) == Use(4.0, 32.0, 80.0), "never beyond the time limit"
    killed = EventLog([going], alive=2800)
    assert used([killed], 2800 + SILENT_S, RATES).node_hours == pytest.approx(2 * (1800 + SILENT_S) / 3600)
    assert used([killed], 2801 + SILENT_S, RATES) == Use(1.0, 8.0, 20.0), "silent for too long"
    assert used([EventLog([going, started("b", 2800.0, nodes=0, gpus=0)], 2800)], 2800, RATES).node_hours == 1.0


def test_the_node_of_a_spare_job_counts_until_it_leaves_or_the_job_ends() -> None:
    def spare(kind: str, node: int, at: float) -> dict[str, Any]:
        return {"event": kind, "job": "a", "node": node, "time": at, "ended_at": at}

    events = [started("a", 0.0, nodes=2, gpus=16), spare("spare_started", 2, 600.0), spare("spare_started", 3, 1800.0)]
    # The node enters the next term of the same job; the other node has recorded no end.
    events += [spare("spare_ended", 2, 1200.0), spare("spare_started", 2, 1200.0), spare("spare_ended", 2, 2400.0)]
    use = used([EventLog([*events, ended("a", 3600.0)])], 3600, RATES)
    assert use.node_hours == pytest.approx(2 + 0.5 + 0.5)
    assert use.gpu_hours == pytest.approx(16 + 4 + 4) and use.cost == pytest.approx(60)


def test_what_the_event_log_does_not_say_is_charged_as_the_command_says() -> None:
    hour = [started("a", 0.0, nodes=2), ended("a", 3600.0)]
    assert used([EventLog(hour)], 3600, RATES) == Use(2.0, 16.0, 40.0)
    assert used([EventLog(hour)], 3600, Rates()) == Use(2.0, None, None)
    dearer = [started("a", 0.0, nodes=2, gpus=4, price_per_gpu_hour=10.0), ended("a", 3600.0)]
    assert used([EventLog(dearer)], 3600, RATES) == Use(2.0, 4.0, 40.0)


def test_a_worst_case_above_the_cap_is_refused_with_what_fits() -> None:
    budget, worst = BudgetConfig(gpu_hours=100.0), Use(4.0, 32.0, 80.0)
    refuse_above(budget, Use(8.5, 68.0, 170.0), worst, 60)
    refusal = refused(refuse_above, budget, Use(11.25, 90.0, 225.0), worst, 60)
    assert "90 used so far, and a worst case of 32 GPU-hours more" in refusal.found
    assert "at most 10 GPU-hours more" in refusal.expected
    assert refusal.fix == "cluster.timeout_min=18, or budget.gpu_hours=122"  # 60 min x 10 / 32 = 18.75
    assert refused(refuse_above, BudgetConfig(cost=250.0), Use(12.0, 100.0, 250.0), worst, 60).fix == "budget.cost=330"


def test_a_cap_is_reached_before_it_is_passed() -> None:
    budget = BudgetConfig(gpu_hours=10.0)
    assert spent(budget, Use(1, 9.0, None), Use(1, 9.9, None)) is None
    why = spent(budget, Use(1, 9.0, None), Use(1, 10.0, None))
    assert why is not None and "budget.gpu_hours=10 is used up: 9 GPU-hours so far" in why


def test_the_command_refuses_before_it_writes_or_submits(tmp_path: Path) -> None:
    words = ["-m", "nodes=1,2", "budget.gpu_hours=2.9", "cluster.gpus_per_node=1", "device=cpu", *TINY]
    text = run("launch", *words, cwd=tmp_path, status=2)
    assert "cluster.timeout_min=58" in text.split("type next: ")[1]
    assert list(tmp_path.iterdir()) == []


GPUS = ("cluster.gpus_per_node=8", "optim.global_batch=32")


def announced(*points: str, more: Sequence[str] = ()) -> str:
    """Text before the submission of points, each with its overrides."""
    typed = [[*point.split(), *more] for point in points]
    configs = [config_of("cluster=slurm", *words) for words in typed]
    return worst_case_text(share_budget([plan(*words) for words in typed], configs), configs)


def test_the_worst_case_is_shown_with_what_was_used(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.record_event("agent_started", job="a", nodes=2, gpus=16, price_per_gpu_hour=1.5, allocated_at=0.0)
    folder.record_event("agent_ended", job="a", ended_at=1800.0)
    point = f"nodes=2 cluster.price_per_gpu_hour=2 run_dir={folder.path}"
    assert announced(point, more=GPUS).splitlines()[:3] == [
        "worst case: 2 node-hours, 16 GPU-hours, cost 32, if the run lasts until the time limit of 60 min",
        "used so far: 1 node-hour, 8 GPU-hours, cost 12",
        "a requeued job may use as much again; budget.gpu_hours=N limits all attempts together",
    ]
    assert "limit: budget.cost=44 for all attempts together" in announced(point, more=(*GPUS, "budget.cost=44"))
    above = partial(announced, point, more=(*GPUS, "budget.cost=43"))
    assert refused(above, found="budget.cost=43, 12 used so far").fix.endswith("budget.cost=44")
    refused(announced, "nodes=2 budget.gpu_hours=5", found="without cluster.gpus_per_node")


def test_the_worst_case_has_the_nodes_of_spare_jobs() -> None:
    words = "nodes=4 resilience.min_nodes=2 optim.global_batch=32 cluster.kind=slurm cluster.gpus_per_node=8"
    assert "worst case: 5 node-hours, 40 GPU-hours" in announced(f"{words} spare_jobs=1")


def test_the_worst_case_of_a_sweep_is_the_sum_of_its_points(tmp_path: Path) -> None:
    points = [f"nodes={nodes} cluster.timeout_min=30 output_dir={tmp_path}" for nodes in (1, 2, 4)]
    text = announced(*points, more=("resilience.requeue=false",))
    assert text == "worst case: 3.5 node-hours, if all 3 runs last until the time limit of 30 min"


WORDS = [*TINY, "optim.max_steps=100000", "eval.interval=0", "checkpoint.interval=20", "device=cpu", "name=capped"]
WORDS += ["cluster.gpus_per_node=1", "launch.poll_s=0.5", "budget.gpu_hours=100", "launch.report_files=[md]"]


def test_at_the_cap_the_points_save_and_stop_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    process = start_fork("launch -m seed=1,2", *WORDS, cwd=tmp_path, log=tmp_path / "log")
    sweep = tmp_path / "outputs" / "capped"
    wait_for(lambda: (sweep / "sweep.json").exists() or process.poll() is not None, "the sweep")
    points = json.loads((sweep / "sweep.json").read_text())["points"]
    first, second = (RunFolder(sweep / point) for point in points)
    wait_for(lambda: read_records(first.metrics(0)) or process.poll() is not None, "the first step")
    # What the other point would enter on a cluster, where both run at the same time: 99.99 GPU-hours.
    second.record_event("agent_started", job="x", nodes=1, gpus=9999, allocated_at=time.time() - 36, limit_s=3600.0)
    second.record_event("agent_ended", job="x", ended_at=time.time())
    assert process.wait(timeout=120) == 1
    text = (tmp_path / "log").read_text()
    assert text.count("budget_exceeded (budget.gpu_hours=100 is used up: ") >= 2, text
    assert "the same command with a higher budget.gpu_hours" in text
    events = first.read_events()
    assert [e["cause"] for e in events if e["event"] == "attempt_ended"] == ["budget"]
    assert [e["action"] for e in events if e["event"] == "decided"] == ["stop"]
    stopped = next(e["step"] for e in events if e["event"] == "stopped")
    assert (first.checkpoints / f"step_{stopped:08d}" / "manifest.json").is_file()
    assert second.attempts() == [], "nothing is started that would have to stop at once"
    rows = json.loads(run("launch.status --json outputs", cwd=tmp_path))
    assert {row["state"] for row in rows} == {"budget_exceeded"}

    process = start_fork("launch seed=1", *WORDS, "budget.gpu_hours=1000", cwd=tmp_path, log=tmp_path / "log2")
    wait_for(lambda: first.environment(2).exists() or process.poll() is not None, "the second attempt")
    (first.path / "STOP").touch()
    process.wait(timeout=120)
    begun = [e["from_step"] for e in first.read_events() if e["event"] == "started"]
    assert begun == [0, stopped], (tmp_path / "log2").read_text()


# Expected times of a plan, its warnings of saves that take longer than the grace period, and its announcement.


H100S = ("cluster.gpus_per_node=8", "optim.global_batch=64", "cluster.gpu_name='NVIDIA H100 80GB HBM3'")


local_plan = partial(plan, "optim.max_steps=100", kind=ClusterKind.local)


def ran(of: Plan, steps: int) -> RunFolder:
    """A run that makes steps of 2 s."""
    folder = RunFolder(of.run_dir)
    records = [{"step": n, "attempt": 1, "step_time_s": 1.5, "time": 1011.0 + 2 * n} for n in range(1, steps + 1)]
    append_lines(folder.metrics(0), records)
    return folder


def test_what_a_run_has_measured_tells_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = local_plan("nodes=2")
    assert add_expected(made) == made, "nothing is known of it"
    own = ran(local_plan("nodes=2", write=True), 70)
    own.record_event("saved", step=60, attempt=1)
    told = add_expected(local_plan("nodes=2"))
    assert told.expected_s == pytest.approx(40 * 2)
    said = "80 s on this machine (measured in this run: 2 s a step; start-up is not counted)"
    assert f"expected    {said}" in plan_text(told)
    assert f"\nexpected: {said}" in worst_case_text([told], [config_of("nodes=2")])
    assert expected_text([told, replace(local_plan("nodes=4"), label="nodes=4")]) == said
    two = [told, replace(told, label="nodes=4", expected_s=100.0)]
    assert expected_text(two).startswith("3 min 00 s on this machine; the longest run, nodes=4, takes 1 min 40 s (")


def test_the_model_of_known_gpus_tells_it_where_no_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan("optim.max_steps=100", "nodes=2", *H100S)
    step_s = made.promised.step_s
    assert step_s is not None and add_expected(made).expected_s == pytest.approx(100 * step_s)
    text = plan_text(add_expected(made))
    assert f"(estimated: {step_s:.3g} s a step; start-up, evaluation and saving are not counted)" in text
    assert any(line.startswith("  expected") and "GPU-hours, in " in line for line in text.splitlines())
    assert plan("nodes=2", *H100S[:2]).promised.step_s is None, "of GPUs that nobody names"


def ran_before(folder: RunFolder, save_s: float, step_s: float) -> RunFolder:
    """A run folder with some saves and steps, the last but one of each the slowest."""
    for number, (save, step) in enumerate(((save_s / 2, step_s / 3), (save_s, step_s), (save_s / 4, step_s / 2)), 1):
        folder.record_event("saved", attempt=1, step=number, seconds=save)
        append_json_lines(folder.metrics(0), [{"step": number, "attempt": 1, "step_time_s": step}])
    return folder


# The doctor's recorded cluster: partition low, the default, has GraceTime=10, and KillWait is 5.
RECORDED = SlurmFacts(limits=LIMITS)


def warnings(*words: str, known: SlurmFacts | None = RECORDED) -> tuple[str, ...]:
    return add_warnings(plan(*TINY, *words), config_of("cluster=slurm", *TINY, *words), known).warnings


@pytest.mark.parametrize(
    ("save_s", "step_s", "said"),
    [
        (60.0, 20.0, []),
        (90.0, 20.0, ["resilience.grace_period_s=100", "type resilience.grace_period_s=170"]),  # 1.5 x 110
        (90.0, 45.0, ["resilience.grace_period_s=100", "type resilience.grace_period_s=210"]),
    ],
)
def test_a_save_that_takes_longer_than_the_lead_is_warned_about(
    save_s: float, step_s: float, said: list[str], tmp_path: Path
) -> None:
    ran_before(RunFolder(tmp_path / "run"), save_s, step_s)
    found = warnings(f"run_dir={tmp_path / 'run'}", "cluster.partition=short")  # which is never preempted
    assert len(found) == bool(said)
    for words in said:
        assert words in found[0] and f"up to {save_s:g} s" in found[0]


def test_a_partition_that_preempts_sooner_is_warned_about(tmp_path: Path) -> None:
    ran_before(RunFolder(tmp_path / "run"), save_s=14.0, step_s=2.0)
    here = f"run_dir={tmp_path / 'run'}"
    for words in ((here,), (here, "cluster.partition='short,low'")):
        (found,) = warnings(*words)
        assert "a job that partition low preempts has 15 s (GraceTime and KillWait)" in found
    assert warnings(here, "cluster.partition=short") == () and warnings(here, known=None) == ()
    ran_before(RunFolder(tmp_path / "other"), save_s=12.0, step_s=2.0)
    assert warnings(f"run_dir={tmp_path / 'other'}") == ()
