"""Series of points: what sets them apart, their labels, intervals of efficiencies, and scaling laws."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.report import ScalingTable, build, tiles
from launch.report.series import Medians, block_length, ratio, student
from launch.runs.find import point_labels
from launch.runs.overrides import point_name
from tests.support.run_folders import RunBuilder, column, notes_with


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
