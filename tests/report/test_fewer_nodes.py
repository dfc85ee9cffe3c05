"""Steps on fewer nodes than asked: told apart from the others, and never part of a point's figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launch.report import build
from launch.report.views.text import markdown
from launch.runs.folder import RunFolder
from launch.runs.records import append_records
from launch.slurm.status import RunStatus, read_steps

FEWER = {"nodes": 1, "asked": 2, "hosts": ["n1"], "cause": "n2: lost, nothing heard for 30 s"}
T0 = 1.7e9


def run_on(make_run: Any, path: Path, nodes: int, attempt: int, first: int, times: list[float]) -> Any:
    """Add an attempt on so many nodes of one rank each to the run of a point that asks for two."""
    builder = make_run(path, nodes, nodes, ("nodes=2",), machines=2)
    return builder.attempt(attempt).steps(first, times, attempt)


@pytest.mark.parametrize("grows_back", [True, False])
def test_a_point_is_measured_by_its_steps_on_all_nodes(tmp_path: Path, make_run: Any, grows_back: bool) -> None:
    make_run(tmp_path / "nodes=1", 1, 1, ("nodes=1",)).attempt().steps(1, [1.0] * 20).event("finished", attempt=1)
    path = tmp_path / "nodes=2"
    run_on(make_run, path, 2, 1, 1, [0.5] * 20)
    run = run_on(make_run, path, 1, 2, 16, [1.0] * 10)  # five are done again
    run.event("fewer_nodes", attempt=2, **FEWER)
    last = 25
    if grows_back:
        run = run_on(make_run, path, 2, 3, 26, [0.5] * 10)
        last = 35
    run.event("finished", attempt=2 + grows_back, step=last)
    table = build(tmp_path)
    row = table.rows[1]
    assert (row.nodes, row.ranks, row.last_step, row.attempts) == (2, 2, last, 2 + grows_back)
    assert (row.step_time_s, row.speedup, row.efficiency) == (0.5, pytest.approx(2.0), pytest.approx(1.0))
    assert row.steps_measured == (10 + 5 if grows_back else 10), "of 15 and of 10, without five to warm up in each"
    (note,) = [note for note in table.notes if "nodes were lost" in note]
    assert "10 steps on 1 node; step time, throughput and efficiency are without these steps" in note


def test_a_run_of_which_only_steps_on_fewer_nodes_are_known_has_their_size(tmp_path: Path, make_run: Any) -> None:
    run = run_on(make_run, tmp_path / "nodes=2", 1, 1, 1, [1.0] * 20)
    run.event("fewer_nodes", attempt=1, **FEWER).event("finished", attempt=1, step=20)
    (row,) = (table := build(tmp_path)).rows
    assert (row.nodes, row.step_time_s) == (1, 1.0)
    assert any("20 steps on 1 node; its figures are of these steps" in note for note in table.notes)


def test_the_time_of_steps_on_fewer_nodes_is_a_part_of_its_own(tmp_path: Path, make_run: Any) -> None:
    run = make_run(tmp_path / "run", 2, 2, ("nodes=2",)).attempt(1).attempt(2)
    run.event("submitted", cluster="slurm", job_id="1", nodes=2, candidate=0, time=T0)
    run.event("agent_started", job="slurm-1-0-0", nodes=2, gpus=2, allocated_at=T0, limit_s=3600.0, time=T0)
    run.event("fewer_nodes", attempt=2, **FEWER, time=T0 + 20)
    begun = {1: T0 + 10, 2: T0 + 30}  # ten steps of a second, of which two are lost, and twelve of two seconds
    for attempt, first, steps, took in ((1, 1, 10, 1.0), (2, 9, 12, 2.0)):
        known = {"attempt": attempt, "step_time_s": took, "loss": 1.0, "tokens": 8}
        ends = [begun[attempt] + took * (number + 1) for number in range(steps)]
        append_records(run.run.metrics(0), [{"step": first + n, **known, "time": end} for n, end in enumerate(ends)])
    run.event("agent_ended", job="slurm-1-0-0", ended_at=T0 + 60, time=T0 + 60)
    (row,) = (table := build(tmp_path / "run")).rows
    assert [row.parts_s[part] for part in ("steps", "fewer", "lost")] == pytest.approx([8.0, 24.0, 2.0])
    assert row.goodput == pytest.approx(32 / 60), "they count"
    assert "on fewer nodes" in markdown(table)


def test_the_time_that_is_left_is_reckoned_by_steps_on_as_many_nodes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    point = RunStatus(folder, nodes=2, max_steps=100, state="running")
    for attempt in (1, 2):
        folder.attempt(attempt).mkdir(parents=True)
    now = time.time()
    for attempt, first, steps, took in ((1, 1, 10, 50.0), (2, 11, 3, 100.0)):
        known = {"attempt": attempt, "step_time_s": took, "time": now}
        append_records(folder.metrics(0), [{"step": first + n, **known} for n in range(steps)])
    read_steps(point)
    assert point.eta_s == pytest.approx((100 - 13) * 50.0)
    folder.record_event("fewer_nodes", attempt=2, **FEWER)
    read_steps(point)
    assert point.eta_s == pytest.approx((100 - 13) * 100.0)
    assert point.fewer_nodes() == {"nodes": 1, "asked": 2, "cause": FEWER["cause"]}
