"""Slow ranks and lost efficiency, in closed form: named if the records show them, and passed over if not."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import ScalingTable, build
from launch.report.figures import picture, run_panels
from launch.report.steps import LOSSES, RankTime, RankTimes, lost
from launch.report.table import Row, RunDetail
from launch.report.text import markdown_text
from launch.runs.folder import append_lines
from tests.support.run_folders import RunBuilder
from tests.support.runs import png_shape

RANKS, STEPS = 24, 47
BASE_S = 0.5
Times = Callable[[int, int], dict[str, float]]


def run_of(folder: Path, times: Times, ranks: int = RANKS, **builder: Any) -> ScalingTable:
    """A run whose rank r records ``times(step, r)`` in each step; its report."""
    built = RunBuilder(folder, ranks, max(ranks // 8, 1), ("nodes=3",), global_batch=ranks, **builder).attempt()
    for rank in range(ranks):
        fixed = {"attempt": 1, "tokens": 128, "loss": 1.0}
        records = [{"step": s, **fixed, **times(s, rank), "time": 1e9 + s} for s in range(1, STEPS + 1)]
        append_lines(built.run.metrics(rank), records)
    built.finished()
    return build(folder)


def known_times(step: int, rank: int) -> float:
    return BASE_S + 0.001 * (step % 7) + 0.0001 * (rank % 5)


def about_ranks(table: ScalingTable) -> list[str]:
    return [note for note in table.notes if "rank 17" in note or "other ranks" in note]


def times_of(table: ScalingTable) -> RankTimes:
    found = table.details[0].rank_times
    assert found is not None
    return found


def test_a_slow_rank_is_named_with_its_host_and_what_it_costs(tmp_path: Path) -> None:
    table = run_of(tmp_path, lambda s, r: {"step_time_s": known_times(s, r) + 0.03 * (r == 17)})
    assert about_ranks(table) == [
        f"At {table.rows[0].label}, slower than the other ranks throughout the run: rank 17 on n3 by 30 ms, 5.6 % of "
        "the step time. In each step all ranks wait for the slowest."
    ]
    slowest = table.details[0].slowest[0]
    assert (slowest.time.rank, slowest.host) == (17, "n3")
    # Of the 23 others the median is 0.2 ms above the base, as is rank 17 without its delay.
    assert slowest.time.excess_s == pytest.approx(0.03, abs=1e-12)
    assert slowest.share == pytest.approx(0.03 / float(np.median([known_times(s, 17) + 0.03 for s in range(6, 48)])))
    assert "| 17 | n3 | 533 ms | 30 ms | 5.6 % |" in markdown_text(table)


def test_times_of_the_ranks_are_those_of_plain_numpy(tmp_path: Path) -> None:
    chance = random.Random(1)
    every = {(s, r): chance.uniform(0.4, 0.6) for s in range(1, STEPS + 1) for r in range(RANKS)}
    table = run_of(tmp_path, lambda s, r: {"step_time_s": every[s, r]})
    times = np.array([[every[s, r] for s in range(6, STEPS + 1)] for r in range(RANKS)])
    others = [np.median(np.delete(times.mean(axis=1), r)) for r in range(RANKS)]
    found = times_of(table)
    assert [rank.own_s for rank in found.ranks] == pytest.approx(times.mean(axis=1))
    assert [rank.excess_s for rank in found.ranks] == pytest.approx(times.mean(axis=1) - others)
    assert len(found.windows) == STEPS - 5  # fewer steps than windows: one each
    assert np.array(found.excess_s) == pytest.approx(times - np.median(times, axis=0))


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(lambda s, r: {"step_time_s": known_times(s, 0)}, id="all alike"),
        pytest.param(lambda s, r: {"step_time_s": known_times(s, r) + 0.005 * (r == 17)}, id="1 % only"),
        pytest.param(lambda s, r: {"step_time_s": known_times(s, r) + 2.0 * (r == 17 and s == 30)}, id="one step only"),
        pytest.param(lambda s, r: {"step_time_s": known_times(s, r) + 0.01 * (r % 12)}, id="others spread as much"),
    ],
)
def test_no_rank_is_named_where_the_spread_does_not_bear_it_out(tmp_path: Path, times: Times) -> None:
    assert not about_ranks(run_of(tmp_path, times))


def test_waiting_in_collectives_is_taken_off_where_a_script_records_it(tmp_path: Path) -> None:
    # All end a step together: rank 17 computes 30 ms longer, and the others wait for it as long.
    def times(step: int, rank: int) -> dict[str, float]:
        return {"step_time_s": known_times(step, 0) + 0.03, "comm_s": 0.01 + 0.03 * (rank != 17)}

    table = run_of(tmp_path, times, script={"unit": "tokens"})
    assert times_of(table).is_net
    assert "rank 17 on n3 by 30 ms, 5.6 % of the step time" in about_ranks(table)[0]


def test_one_of_two_ranks_can_be_slow(tmp_path: Path) -> None:
    table = run_of(tmp_path, lambda s, r: {"step_time_s": 0.5 + 0.1 * (r == 1)}, ranks=2)
    assert [rank.is_slow for rank in times_of(table).ranks] == [False, True]


def test_a_rank_alone_has_no_table_and_no_heat_map(tmp_path: Path) -> None:
    table = run_of(tmp_path, lambda s, r: {"step_time_s": known_times(s, r)}, ranks=1)
    assert table.details[0].rank_times is None and "Slowest ranks" not in markdown_text(table)
    assert [panel.title for panel in run_panels(table.details[0])] == ["Step times after warm-up"]


def test_the_heat_map_of_a_thousand_ranks_takes_no_more_memory_than_that_of_few() -> None:
    def peak_of(ranks: int) -> int:
        chance = np.random.default_rng(1)
        excess = tuple(tuple(row) for row in chance.normal(0, 0.01, (ranks, 60)).tolist())
        of_ranks = tuple(RankTime(rank, BASE_S, 0.0) for rank in range(ranks))
        times = RankTimes(of_ranks, tuple((at, at) for at in range(60)), excess)
        gc.collect()  # what earlier tests left is not freed, nor counted, in between
        tracemalloc.start()
        found = picture(run_panels(RunDetail("nodes=128", BASE_S, (), (), times))[:1], "", "")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert png_shape(found["png"])[0] > 800
        return peak

    peak_of(2)  # what is imported and cached once
    few, many = peak_of(64), peak_of(1024)
    assert many <= 1.25 * few, (many, few)


# Lost efficiency by phase: synthetic records whose answers are known in closed form, to the last digits.


STEPS = 25
WORK_S = 0.4
"""Time that one rank computes; the ranks share it."""


def recorded(folder: Path, ranks: int, phases: Any, **builder: Any) -> None:
    """A script's run whose rank r tells ``phases(step, r)``; its step time is the sum of them."""
    script = {"unit": "samples", "work_per_step": 64.0, "weak_scaling": False}
    words = (f"nodes={ranks}", "workload=script")
    built = RunBuilder(folder / f"nodes={ranks}", ranks, ranks, words, script=script, **builder).attempt()
    for rank in range(ranks):
        told = [phases(step, rank) for step in range(1, STEPS + 1)]
        rows = [
            {"step": step, "attempt": 1, "step_time_s": sum(of_step.values()), "time": 1e9 + step}
            | {name: value for name, value in of_step.items() if name != "compute"}
            for step, of_step in enumerate(told, start=1)
        ]
        append_lines(built.run.metrics(rank), rows)
    built.finished()


def rows_of(folder: Path) -> dict[int | None, Row]:
    return {row.ranks: row for row in build(folder).rows}


def test_each_phase_loses_what_was_put_into_it(tmp_path: Path) -> None:
    """Four ranks: 0.1 s of work each instead of 0.4 s; rank 2 is 30 ms late, all communicate and wait for data."""
    recorded(tmp_path, 1, lambda s, r: {"compute": WORK_S, "data_wait_s": 0.0, "optimizer_s": 0.02})

    def phases(step: int, rank: int) -> dict[str, float]:
        late = 0.03 * (rank == 2)
        compute = WORK_S / 4 + late
        comm = 0.05 + 0.03 - late  # the others wait for rank 2
        return {"compute": compute, "comm_s": comm, "data_wait_s": 0.01, "bubble_s": 0.004, "optimizer_s": 0.02}

    recorded(tmp_path, 4, phases)
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


def test_a_phase_that_one_point_lacks_lies_in_the_rest() -> None:
    parts = lost({"communication": 0.2, "data": 0.1, "computation": 0.7}, {"data": 0.0, "computation": 1.0}, 0.6, False)
    assert parts == pytest.approx({"data": 0.1, "computation": 0.3})
    alone = lost({"communication": 0.2, "data": 0.1, "computation": 0.7}, {"data": 0.0, "computation": 1.0}, 0.6, True)
    assert alone == pytest.approx({"communication": 0.2, "data": 0.1, "computation": 0.1})
    assert list(alone) == [phase for phase in LOSSES if phase in alone]
    assert lost({}, {"computation": 1.0}, 0.5, True) == {}


def test_a_point_may_gain_where_others_lose(tmp_path: Path) -> None:
    """Eight ranks compute four times as fast as one each would, with caches that hold their share."""
    recorded(tmp_path, 1, lambda s, r: {"compute": 0.8, "comm_s": 0.0})
    recorded(tmp_path, 8, lambda s, r: {"compute": 0.05, "comm_s": 0.05})
    row = rows_of(tmp_path)[8]
    assert row.efficiency == pytest.approx(1.0)
    assert row.losses == pytest.approx({"communication": 0.5, "stragglers": 0.0, "computation": -0.5})
