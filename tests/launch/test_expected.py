"""The expected time beside the worst case: by earlier runs of the same kind, and absent where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import Plan, make_plan, write_run
from launch.plan.preflight import add_expected, plan_text, total_text, worst_case_text
from launch.runs.folder import RunFolder
from launch.runs.records import append_records

GPUS = ("cluster=slurm", "cluster.gpus_per_node=8", "optim.global_batch=64", "cluster.gpu_name='NVIDIA H100 80GB HBM3'")


def plan(*words: str, write: bool = False) -> Plan:
    words = (*words[:1], "optim.max_steps=100", *words[1:])
    composed = compose_launch(words)
    kind = ClusterKind.slurm if "cluster=slurm" in words else ClusterKind.local
    made = make_plan(typed_config(composed), words, kind)
    if write:
        write_run(made, composed, words)
    return made


def ran(of: Plan, steps: int) -> RunFolder:
    """An allocation from 990 on, whose ranks start at 1005 and make steps of 2 s from 1011 on; it ends 3 s after."""
    folder = RunFolder(of.run_dir)
    folder.record_event("agent_started", job="1", allocated_at=990.0, nodes=of.nodes, time=1000.0)
    folder.record_event("started", attempt=1, from_step=0, time=1005.0)
    records = [{"step": n, "attempt": 1, "step_time_s": 1.5, "time": 1011.0 + 2 * n} for n in range(1, steps + 1)]
    append_records(folder.metrics(0), records)
    folder.record_event("agent_ended", job="1", ended_at=1011.0 + 2 * steps + 3)
    return folder


def test_an_earlier_run_of_the_same_kind_tells_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan("nodes=2")
    assert add_expected(made) == made, "nothing is known of it"
    for other in ("nodes=1", "nodes=2 seed=2 optim.global_batch=32", "nodes=2 model.n_layer=2"):
        ran(plan(*other.split(), write=True), 100)
    assert add_expected(made) == made, "neither of other nodes nor of another batch or model"
    ran(plan("nodes=2", "optim.lr=0.01", write=True), 100)
    told = add_expected(made)
    assert told.expected_s == pytest.approx(15 + 6 + 100 * 2 + 3)
    assert "expected    3.7 min on this machine, by the 2 s a step of nodes=2,optim.lr=0.01" in plan_text(told)
    assert "; expected: 3.7 min on this machine, by" in worst_case_text(
        [told], [typed_config(compose_launch(["nodes=2"]))]
    )

    own = ran(plan("nodes=2", write=True), 70)
    own.record_event("saved", step=60, attempt=1)
    again = add_expected(plan("nodes=2"))
    assert again.expected_s == pytest.approx(15 + 6 + 40 * 2 + 3) and again.expected_by == "the 2 s a step of this run"
    some = total_text([replace(again, label="nodes=2"), replace(plan("nodes=4"), label="nodes=4")])
    assert some.startswith("expected of nodes=2: 1.7 min on this machine, 1.7 min for the longest point")
    assert total_text([replace(again, finished=True)]) == ""


def test_the_model_of_known_gpus_tells_it_where_no_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan("nodes=2", *GPUS)
    step_s = made.promised.step_s
    assert step_s is not None and add_expected(made).expected_s == pytest.approx(100 * step_s)
    text = plan_text(add_expected(made))
    assert f"by an estimate of {step_s:.3g} s a step, without start-up, evaluation and saving" in text
    assert "GPU-hours, by" in text
    assert plan("nodes=2", *GPUS[:3]).promised.step_s is None, "of GPUs that nobody names"
