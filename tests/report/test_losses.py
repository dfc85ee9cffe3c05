"""Lost efficiency by phase: synthetic records whose answers are known in closed form, to the last digits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.config import ReportFile
from launch.report import build, write
from launch.report.steps import LOSSES, lost
from launch.report.table import Row
from launch.runs.records import append_records

STEPS = 25
WORK_S = 0.4
"""Time that one rank computes; the ranks share it."""


def recorded(folder: Path, make_run: Any, ranks: int, phases: Any, **builder: Any) -> None:
    """A script's run whose rank r tells ``phases(step, r)``; its step time is the sum of them."""
    script = {"unit": "samples", "work_per_step": 64.0, "weak_scaling": False}
    words = (f"nodes={ranks}", "workload=script")
    built = make_run(folder / f"nodes={ranks}", ranks, ranks, words, script=script, **builder).attempt()
    for rank in range(ranks):
        told = [phases(step, rank) for step in range(1, STEPS + 1)]
        rows = [
            {"step": step, "attempt": 1, "step_time_s": sum(of_step.values()), "time": 1e9 + step}
            | {name: value for name, value in of_step.items() if name != "compute"}
            for step, of_step in enumerate(told, start=1)
        ]
        append_records(built.run.metrics(rank), rows)
    built.event("finished", attempt=1)


def rows_of(folder: Path) -> dict[int | None, Row]:
    return {row.ranks: row for row in build(folder).rows}


def test_each_phase_loses_what_was_put_into_it(tmp_path: Path, make_run: Any) -> None:
    """Four ranks: 0.1 s of work each instead of 0.4 s; rank 2 is 30 ms late, all communicate and wait for data."""
    recorded(tmp_path, make_run, 1, lambda s, r: {"compute": WORK_S, "data_wait_s": 0.0, "optimizer_s": 0.02})

    def phases(step: int, rank: int) -> dict[str, float]:
        late = 0.03 * (rank == 2)
        compute = WORK_S / 4 + late
        comm = 0.05 + 0.03 - late  # the others wait for rank 2
        return {"compute": compute, "comm_s": comm, "data_wait_s": 0.01, "bubble_s": 0.004, "optimizer_s": 0.02}

    recorded(tmp_path, make_run, 4, phases)
    row = rows_of(tmp_path)[4]
    step_s = 0.1 + 0.03 + 0.05 + 0.01 + 0.004 + 0.02
    ideal_s = 0.42 / 4
    assert row.efficiency == pytest.approx(ideal_s / step_s, rel=1e-12)
    mean_late = 0.03 / 4
    expected = {
        "communication": 0.05,
        "stragglers": 0.03 - mean_late,
        "data": 0.01,
        "bubble": 0.004,
        "optimizer": 0.02 - 0.02 / 4,
        "computation": mean_late,  # the work itself is divided as it should
    }
    assert row.losses == pytest.approx({phase: s / step_s for phase, s in expected.items()}, abs=1e-12)
    assert sum(row.losses.values()) == pytest.approx(1 - (row.efficiency or 0), abs=1e-15)


def test_the_parts_add_up_whatever_the_records_say(tmp_path: Path, make_run: Any) -> None:
    chance = np.random.default_rng(3)
    times = {size: chance.uniform(0.001, 0.1, (STEPS + 1, size, 3)) for size in (2, 4, 8)}

    def phases(size: int) -> Any:
        names = ("compute", "comm_s", "data_wait_s")
        return lambda step, rank: dict(zip(names, times[size][step, rank].tolist(), strict=True))

    for size in times:
        recorded(tmp_path, make_run, size, phases(size))
    rows = rows_of(tmp_path)
    for size in (4, 8):
        parts = rows[size].losses
        assert set(parts) == {"communication", "stragglers", "data", "computation"}
        assert sum(parts.values()) == pytest.approx(1 - (rows[size].efficiency or 0), abs=1e-14)
    # By hand: the critical rank of each step, and what the others do less.
    shares = {}
    for size, every in times.items():
        compute, _, data = np.moveaxis(every[6:], -1, 0)
        total = every[6:].sum(-1).max(-1)
        critical = (compute + data).argmax(1)
        at = np.arange(len(critical)), critical
        parts = [total - (compute + data)[at], compute[at] - compute.mean(1), data[at]]
        shares[size] = [float(part.sum() / total.sum()) for part in parts]
    efficiency = rows[8].efficiency or 0
    expected = [here - efficiency * there for here, there in zip(shares[8], shares[2], strict=True)]
    parts = rows[8].losses
    assert [parts["communication"], parts["stragglers"], parts["data"]] == pytest.approx(expected, abs=1e-12)


def test_a_phase_that_one_point_lacks_lies_in_the_rest() -> None:
    parts = lost({"communication": 0.2, "data": 0.1, "computation": 0.7}, {"data": 0.0, "computation": 1.0}, 0.6, False)
    assert parts == pytest.approx({"data": 0.1, "computation": 0.3})
    alone = lost({"communication": 0.2, "data": 0.1, "computation": 0.7}, {"data": 0.0, "computation": 1.0}, 0.6, True)
    assert alone == pytest.approx({"communication": 0.2, "data": 0.1, "computation": 0.1})
    assert list(alone) == [phase for phase in LOSSES if phase in alone]
    assert lost({}, {"computation": 1.0}, 0.5, True) == {}


def test_a_point_may_gain_where_others_lose(tmp_path: Path, make_run: Any) -> None:
    """Eight ranks compute four times as fast as one each would, with caches that hold their share."""
    recorded(tmp_path, make_run, 1, lambda s, r: {"compute": 0.8, "comm_s": 0.0})
    recorded(tmp_path, make_run, 8, lambda s, r: {"compute": 0.05, "comm_s": 0.05})
    row = rows_of(tmp_path)[8]
    assert row.efficiency == pytest.approx(1.0)
    assert row.losses == pytest.approx({"communication": 0.5, "stragglers": 0.0, "computation": -0.5})


def test_the_csv_has_the_parts(tmp_path: Path, make_run: Any) -> None:
    recorded(tmp_path, make_run, 1, lambda s, r: {"compute": 0.4, "comm_s": 0.0})
    recorded(tmp_path, make_run, 2, lambda s, r: {"compute": 0.2, "comm_s": 0.2})
    write(build(tmp_path), files={ReportFile.csv})
    with (tmp_path / "scaling_parts.csv").open() as file:
        found = {(line["point"], line["part"]): line for line in csv.DictReader(file)}
    assert float(found["nodes=2", "communication"]["value"]) == pytest.approx(0.5)
    assert found["nodes=2", "communication"]["unit"] == "share" and ("nodes=2", "data") not in found
