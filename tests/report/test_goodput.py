"""Where the time of a run went: parts, GPU-hours and cost of runs whose clock is known, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.report import build, write
from launch.report.goodput import PARTS
from launch.report.views.text import markdown
from launch.runs.records import append_records
from launch.runs.tensorboard import png_shape

T0 = 1.7e9
STEP_S, SAVE_S, EVALUATION_S = 0.5, 20.0, 6.0
GPUS, PRICE = 16, 2.0
TOKENS = 4096


class Timeline:
    """Writes a run as its clock goes on, and adds up by hand where it went."""

    def __init__(self, path: Path, make_run: Any) -> None:
        self.builder = make_run(path, 2, 2, ("nodes=2",), global_batch=4, block_size=TOKENS // 2)
        self.now = T0
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.allocated = 0.0

    def event(self, event: str, **details: Any) -> None:
        self.builder.event(event, time=self.now, **details)

    def spend(self, part: str, seconds: float) -> None:
        self.now += seconds
        self.parts[part] += seconds
        self.allocated += 0.0 if part == "waiting" else seconds

    def allocation(self, job: str) -> None:
        begun = {"job": job, "nodes": 2, "gpus": GPUS, "price_per_gpu_hour": PRICE, "limit_s": 36000.0}
        self.event("agent_started", **begun, allocated_at=self.now)

    def steps(self, attempt: int, first: int, last: int, *, kept_until: int, saves_every: int = 100) -> None:
        records = []
        for step in range(first, last + 1):
            self.spend("steps" if step <= kept_until else "lost", STEP_S)
            known = {"loss": 1.0, "tokens": TOKENS, "step_time_s": STEP_S, "time": self.now}
            record: dict[str, Any] = {"step": step, "attempt": attempt, **known}
            if step % 50 == 0 and step != last:
                record["val_loss"] = 1.0
                self.spend("evaluations", EVALUATION_S)
            if step % saves_every == 0:
                self.spend("saves", SAVE_S)
                self.event("saved", attempt=attempt, step=step, seconds=SAVE_S)
            records.append(record)
        for rank in (0, 1):
            append_records(self.builder.run.metrics(rank), records)


@pytest.fixture
def two_attempts(tmp_path: Path, make_run: Any) -> Timeline:
    """100 steps, a save, 37 steps that a crash takes, and the rest of 300 steps by a second attempt."""
    line = Timeline(tmp_path / "run", make_run)
    line.event("submitted", cluster="slurm", job_id="1", nodes=2, candidate=0)
    line.spend("waiting", 300.0)
    line.allocation("slurm-1-0-0")
    line.spend("start", 45.0)
    line.builder.attempt(1)
    line.steps(1, 1, 137, kept_until=100)
    line.event("rank_failed", attempt=1, rank=1)
    line.spend("restarts", 30.0)
    line.builder.attempt(2)
    line.steps(2, 101, 300, kept_until=300)
    line.event("finished", attempt=2, step=300)
    line.spend("shutdown", 4.0)
    line.event("agent_ended", job="slurm-1-0-0", ended_at=line.now)
    return line


def test_parts_of_two_attempts_add_up_to_the_whole_and_cost_what_arithmetic_says(two_attempts: Timeline) -> None:
    (row,) = build(two_attempts.builder.path).rows
    found = {part: row.parts_s.get(part, 0.0) for part in PARTS}
    # Clocks of 1.7e9 seconds have a resolution of 2.4e-7.
    assert found == pytest.approx(two_attempts.parts, abs=1e-4)
    assert found["lost"] == pytest.approx(37 * STEP_S, abs=1e-4)
    assert found["steps"] == pytest.approx(300 * STEP_S, abs=1e-4)
    assert found["saves"] == pytest.approx(3 * SAVE_S, abs=1e-4)
    assert sum(found.values()) == pytest.approx(two_attempts.now - T0, abs=1e-4)
    gpu_hours = two_attempts.allocated / 3600 * GPUS
    assert row.gpu_hours == pytest.approx(gpu_hours)
    assert row.cost == pytest.approx(gpu_hours * PRICE)
    assert row.cost_per_billion == pytest.approx(gpu_hours * PRICE / (300 * 2 * TOKENS / 1e9))
    assert row.goodput == pytest.approx(300 * STEP_S / two_attempts.allocated)


def test_shares_that_are_shown_are_a_hundred_percent(two_attempts: Timeline) -> None:
    table = build(two_attempts.builder.path)
    text = markdown(table)
    assert "## Where the time went" in text
    cells = next(line for line in text.splitlines() if line.startswith(f"| {table.rows[0].label} | 5 min 00 s"))
    shares = [float(cell.rpartition("(")[2].partition(" %")[0]) for cell in cells.split("|") if "(" in cell]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100.0, abs=0.3)  # rounded
    picture = next(path for path in write(table) if path.suffix == ".png")
    assert png_shape(picture.read_bytes())[1] > 780  # the bar lies below the other panels


def test_a_requeued_run_waits_twice_and_starts_again(tmp_path: Path, make_run: Any) -> None:
    line = Timeline(tmp_path / "run", make_run)
    line.event("submitted", cluster="slurm", job_id="1", nodes=2, candidate=0)
    for attempt, (first, last) in enumerate([(1, 20), (21, 40)], start=1):
        line.spend("waiting", 100.0 * attempt)
        line.allocation(f"slurm-{attempt}")
        line.spend("start" if attempt == 1 else "restarts", 10.0)
        line.builder.attempt(attempt)
        line.steps(attempt, first, last, kept_until=40, saves_every=20)
        line.spend("shutdown", 3.0)
        line.event("agent_ended", job=f"slurm-{attempt}", ended_at=line.now)
    (row,) = build(line.builder.path).rows
    assert {part: row.parts_s.get(part, 0.0) for part in PARTS} == pytest.approx(line.parts, abs=1e-4)
    assert row.parts_s["waiting"] == pytest.approx(300.0)


def test_without_an_agent_nothing_is_said_of_time_and_cost(tmp_path: Path, make_run: Any) -> None:
    make_run(tmp_path, 1).attempt().steps(1, [1.0] * 12).event("finished", attempt=1)
    table = build(tmp_path)
    assert table.rows[0].goodput is None
    assert table.rows[0].cost is None
    assert "Where the time went" not in markdown(table)


def test_a_step_that_is_recorded_before_and_after_its_save_is_one_step(tmp_path: Path, make_run: Any) -> None:
    built = make_run(tmp_path, 1, 1, ("nodes=1",)).attempt()
    begun = {"job": "1", "nodes": 1, "gpus": 1, "price_per_gpu_hour": PRICE, "limit_s": 3600.0}
    built.event("agent_started", time=T0 + 1, node=0, allocated_at=T0, **begun)
    built.event("started", attempt=1, time=T0 + 2, world_size=1)
    records = [{"step": s, "attempt": 1, "step_time_s": 1.0, "time": T0 + 10 + s} for s in range(1, 9)]
    saved = {**records[3], "checkpoint_s": 0.0}
    append_records(built.run.metrics(0), [*records[:4], saved, *records[4:]])
    built.event("finished", attempt=1, time=T0 + 18)
    built.event("agent_ended", node=0, job="1", time=T0 + 20, ended_at=T0 + 20)
    [row] = build(tmp_path).rows
    assert row.parts_s == {"start": 10.0, "steps": 8.0, "shutdown": 2.0}
