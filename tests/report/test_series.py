"""Series of points: labels, intervals, scaling laws; and slow ranks and lost efficiency, in closed form."""

from __future__ import annotations

import gc
import hashlib
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.report import ScalingTable, build, tiles
from launch.report.figures import picture, run_panels
from launch.report.series import Medians, block_length, ratio, student
from launch.report.steps import LOSSES, RankTime, RankTimes, lost
from launch.report.table import Row, RunDetail
from launch.report.text import markdown_text
from launch.runs.find import point_labels
from launch.runs.folder import append_lines
from launch.runs.overrides import point_name
from tests.support.run_folders import RunBuilder, column, notes_with
from tests.support.runs import png_shape


def alike(chance: np.random.Generator, steps: int, median: float, spread: float, rho: float) -> np.ndarray:
    """Step times of which each is like the one before: an autoregressive series around its median."""
    noise = chance.normal(size=steps + 40)
    times = np.zeros(steps + 40)
    for at in range(1, len(times)):
        times[at] = rho * times[at - 1] + noise[at] * np.sqrt(1 - rho * rho)
    return median + spread * times[40:]


def test_the_interval_holds_the_true_efficiency_in_95_of_100_seeds() -> None:
    held, widths = 0, []
    for seed in range(100):
        chance = np.random.default_rng(seed)
        base, point = alike(chance, 80, 1.0, 0.02, 0.6), alike(chance, 80, 0.3, 0.01, 0.6)
        efficiency = float(np.median(base) / np.median(point)) / 4
        low, high = ratio(efficiency, Medians(point, 1), Medians(base, 0))
        held += low <= 1 / 0.3 / 4 <= high
        widths.append(high - low)
    assert held >= 95
    # Not by being wide: the median of as many steps that are alike strays by so much.
    every = [np.median(alike(np.random.default_rng(seed), 80, 1.0, 0.02, 0.6)) for seed in range(300)]
    relative = np.hypot(np.std(every), np.std(every) * 0.01 / 0.02 / 0.3)
    assert np.mean(widths) < 1.6 * 2 * 1.96 * relative / 0.3 / 4


def test_the_interval_of_an_efficiency_of_few_steps_ends_at_zero() -> None:
    base, point = Medians(np.array([0.1, 1.0, 3.0, 0.2]), 0), Medians(np.array([0.1, 2.0, 9.0, 0.2]), 1)
    low, high = ratio(base.value / point.value, point, base)
    assert low == 0 < high


def test_steps_that_are_alike_are_drawn_together() -> None:
    chance = np.random.default_rng(1)
    lengths = [block_length(alike(chance, 400, 1.0, 0.1, rho)) for rho in (0.0, 0.5, 0.9)]
    assert lengths[0] <= 3 < lengths[1] < lengths[2]
    assert block_length(np.ones(50)) == 1


def test_quantiles_are_those_of_students_distribution() -> None:
    known = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}  # any table of it
    assert {freedom: round(student(freedom), 3) for freedom in known} == pytest.approx(known, abs=0.012)


@pytest.mark.parametrize("weak", [False, True])
def test_intervals_of_a_sweep_hold_its_efficiencies(tmp_path: Path, weak: bool) -> None:
    """A sweep with a serial share of 5 % but for noise, by Amdahl's law or by Gustafson's."""
    chance = np.random.default_rng(5)
    for ranks in (1, 2, 4):
        step_s = ranks / (ranks - 0.05 * (ranks - 1)) if weak else 0.05 + 0.95 / ranks
        built = RunBuilder.of_nodes(tmp_path, ranks, global_batch=8 * ranks if weak else 64, weak_scaling=weak)
        built.steps(1, (step_s * chance.normal(1, 0.005, 45)).tolist()).finished()
    table = build(tmp_path)
    for row in table.rows[1:]:
        expected = (row.ranks - 0.05 * (row.ranks - 1)) / row.ranks if weak else 1 / (0.05 * row.ranks + 0.95)
        assert row.efficiency_low is not None and row.efficiency_high is not None
        assert row.efficiency_low < (row.efficiency or 0) < row.efficiency_high
        assert row.efficiency_low - 0.004 < expected < row.efficiency_high + 0.004
    [note] = [note for note in table.notes if note.startswith("95 % intervals of efficiency")]
    assert "nodes=2" in note and f"nodes=4 {100 * table.rows[2].efficiency_low:.1f} to" in note
    assert table.rows[0].efficiency_low is None and "nodes=1" not in note, "it is compared with itself"
    assert build(tmp_path).rows == table.rows, "the same each time"


# Labels of points in tables and notes: what sets a point apart, which its folder's name may not show.


STEADY = [1.0] * 10


def test_points_are_shown_by_what_sets_them_apart(tmp_path: Path) -> None:
    shared = ("optim.max_steps=12", "name=t", "data.max_bytes=200000")
    for nodes, strategy in ((1, "ddp"), (1, "ds_zero0"), (2, "ddp"), (2, "ds_zero0")):
        words = (f"nodes={nodes}", f"parallel={strategy}", *shared)
        RunBuilder(tmp_path / f"cut-{nodes}{strategy}", nodes, nodes, words, strategy=strategy).attempt().steps(
            1, STEADY
        ).event("finished")
    table = build(tmp_path)
    assert {row.point: row.label for row in table.rows} == {
        f"cut-{nodes}{strategy}": f"nodes={nodes},parallel={strategy}"
        for nodes in (1, 2)
        for strategy in ("ddp", "ds_zero0")
    }
    topologies = {row.topology for row in table.rows if row.nodes == 2}
    assert topologies == {"ddp dp_replicate=2", "deepspeed_zero0 dp_replicate=2"}
    assert not notes_with(table, "cut-")


def test_points_that_nothing_sets_apart_keep_their_names(tmp_path: Path) -> None:
    for name, words in (("a", ("nodes=1",)), ("b", ("nodes=1", "output_dir=elsewhere"))):
        RunBuilder(tmp_path / name, overrides=words).attempt().steps(1, STEADY)
    assert column(build(tmp_path).rows, "label") == ["a", "b"]
    assert column(build(tmp_path / "a").rows, "label") == ["a"]


def test_a_label_keeps_its_generation_and_a_folder_that_was_typed_its_name() -> None:
    runs = [("a-1", ["nodes=1", "seed=2", "cluster.partition=x"]), ("a-1~2", ["seed=2", "nodes=1", "fresh=true"])]
    runs += [("b", ["seed=2", "nodes=2"]), ("here", ["seed=2", "nodes=4", "run_dir=/elsewhere/here"])]
    labels = point_labels([(Path("s", name), typed) for name, typed in runs])
    assert labels == ["nodes=1", "nodes=1~2", "nodes=2", "here"]


def test_a_run_alone_whose_folder_says_nothing_is_called_by_its_name() -> None:
    typed = ["nodes=1", f"script.args={'a' * 200}"]
    cut = point_name(typed, ())
    for path, words, label in (
        ("s/one", ["nodes=1"], "one"),
        ("outputs/quick_test/default", ["cluster=local"], "quick_test"),
        ("outputs/quick_test/default~2", ["fresh=true"], "quick_test~2"),
        ("mine/default", ["run_dir=mine/default"], "default"),
        (f"outputs/mine/{cut}", typed, "mine"),
        (f"outputs/mine/{cut}~2", typed, "mine~2"),
        (f"elsewhere/{cut}", [*typed, f"run_dir=elsewhere/{cut}"], cut),
    ):
        assert point_labels([(Path(path), words)]) == [label]
    beside = [(Path("outputs/quick_test/default"), []), (Path("outputs/quick_test/nodes=2"), ["nodes=2"])]
    assert point_labels(beside) == ["default", "nodes=2"]


@given(st.lists(st.tuples(st.sampled_from(["nodes=1", "nodes=2", "fresh=true"]), st.sampled_from("ab")), max_size=6))
def test_labels_always_differ(drawn: list[tuple[str, str]]) -> None:
    runs = [(Path(f"{text}~{index + 1}"), [text, f"seed={seed}"]) for index, (text, seed) in enumerate(drawn)]
    assert len(set(point_labels(runs))) == len(runs)


# Points made otherwise are told apart.


EMPTY = hashlib.sha256(b"").hexdigest()
SAME: dict[str, Any] = {"software": {"torch": "2.13.0"}, "git": {"commit": "a" * 40, "diff_sha256": EMPTY}}


def sweep_made(folder: Path, made: dict[int, dict[str, Any]]) -> ScalingTable:
    """A sweep whose points were made with what is told of each number of ranks."""
    for ranks, entries in made.items():
        RunBuilder.of_nodes(folder, ranks, told=SAME | entries).steps(1, [1.0 / ranks] * 12).finished()
    return build(folder)


@pytest.mark.parametrize(
    ("entries", "name", "value"),
    [
        ({"software": {"torch": "2.11.0"}}, "software", "torch 2.11.0"),
        ({"git": {"commit": "b" * 40, "diff_sha256": EMPTY}}, "code", "commit bbbbbbbbbbbb"),
        ({"git": {"commit": "a" * 40, "diff_sha256": "c" * 64}}, "code", "commit aaaaaaaaaaaa with changes cccccccc"),
    ],
    ids=["software", "commit", "uncommitted changes"],
)
def test_points_made_otherwise_are_told_apart(tmp_path: Path, entries: dict[str, Any], name: str, value: str) -> None:
    table = sweep_made(tmp_path, {1: {}, 2: {}, 4: entries, 8: entries})
    assert len({row.series for row in table.rows}) == 2 and value in table.rows[-1].series
    assert column(table.rows, "efficiency") == pytest.approx([1] * 4)
    assert column(table.rows, "speedup") == pytest.approx([1, 2, 1, 2]), "each against the smallest of its kind"
    assert len(notes_with(table, f"different {name}", f"nodes=4, nodes=8 with {value}", "fresh=true")) == 1


def test_points_made_alike_or_of_which_one_does_not_tell_are_compared(tmp_path: Path) -> None:
    table = sweep_made(tmp_path, {1: {}, 2: {"software": {}, "git": {}}, 4: {}})
    assert {row.series for row in table.rows} == {""}
    assert column(table.rows, "efficiency") == pytest.approx([1, 1, 1])
    assert not notes_with(table, "different")


def test_the_page_begins_with_the_largest_point_that_claims_an_efficiency(sweep: Path) -> None:
    first, *others = tiles(build(sweep))
    assert (first.name, first.value) == ("Efficiency at nodes=2", "96.2 %")
    assert "Efficiency at nodes=4" not in [tile.name for tile in others]


# Slow ranks and lost efficiency, in closed form: named if the records show them, and passed over if not.


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
