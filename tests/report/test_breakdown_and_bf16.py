"""What a report shows of profiled steps, and MFU of the bf16 peak: records whose answers are known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.report import build
from launch.report.views.text import columns, markdown
from launch.runs.records import append_records


def test_profiled_steps_are_told_as_means_over_ranks(tmp_path: Path, make_run: Any) -> None:
    built = make_run(tmp_path / "nodes=2", 2, 2, ("nodes=2",)).attempt().steps(1, [0.5] * 10)
    for rank in range(2):
        for step in (11, 12):
            parts = {
                "compute": 0.2 + 0.1 * rank,
                "comm": 0.3,
                "exposed": 0.1,
                "copies": 0.05,
                "idle": 0.15 - 0.1 * rank,
            }
            record = {"step": step, "attempt": 1, "step_time_s": 0.5, "tokens": 1}
            told = {f"breakdown_{part}_s": seconds for part, seconds in parts.items()}
            append_records(built.run.metrics(rank), [record | told])
    built.event("finished", attempt=1)
    expected = (
        "Of 2 steps of nodes=2 that were profiled on 2 ranks: computing 50.0 %, exposed communication 20.0 %, "
        "copies 10.0 %, idle 20.0 %; communication, hidden or not, takes 60.0 %."
    )
    assert expected in build(tmp_path).notes


def test_a_run_without_profiled_steps_tells_none(tmp_path: Path, make_run: Any) -> None:
    make_run(tmp_path / "nodes=1").attempt().steps(1, [0.5] * 10).event("finished", attempt=1)
    table = build(tmp_path)
    assert table.rows[0].steps_measured > 0 and not any("profiled" in note for note in table.notes)


def test_mfu_of_the_bf16_peak_is_a_column_where_it_differs(tmp_path: Path, make_run: Any) -> None:
    """A run in fp32, with an eighth of the peak, beside one in bf16, of which both are the same."""
    for name, known in {"nodes=1": (0.4, 0.05), "nodes=2": (0.3, 0.3)}.items():
        ranks = int(name[-1])
        run = make_run(tmp_path / "both" / name, ranks, ranks, (name,)).attempt()
        run.steps(1, [0.5] * 10, mfu_palm=known[0], mfu_bf16=known[1]).event("finished", attempt=1)
    table = build(tmp_path / "both")
    assert [row.mfu_bf16 for row in table.rows] == [pytest.approx(0.05), pytest.approx(0.3)]
    assert "MFU of bf16" in markdown(table) and "| 40.0 % | 5.0 % |" in markdown(table)
    run = make_run(tmp_path / "one" / "nodes=1").attempt()
    run.steps(1, [0.5] * 10, mfu_palm=0.3, mfu_bf16=0.3).event("finished", attempt=1)
    titles = [column.title for column in columns(build(tmp_path / "one"))]
    assert "MFU" in titles and "MFU\nof bf16" not in titles
