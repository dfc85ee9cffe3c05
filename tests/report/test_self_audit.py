"""What a report says against its own figures: points made otherwise are told apart, and little use is explained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from launch.report import ScalingTable, build
from launch.report.views.page import tiles
from launch.runs.files import write_json

EMPTY = hashlib.sha256(b"").hexdigest()
SAME: dict[str, Any] = {"software": {"torch": "2.13.0"}, "git": {"commit": "a" * 40, "diff_sha256": EMPTY}}


def sweep_of(folder: Path, make_run: Any, made: dict[int, dict[str, Any]], **known: Any) -> ScalingTable:
    """A sweep whose points were made with what is told of each number of ranks."""
    for ranks, entries in made.items():
        built = make_run(folder / f"nodes={ranks}", ranks, ranks, (f"nodes={ranks}",)).attempt()
        path = built.run.environment(1)
        write_json(path, json.loads(path.read_text()) | SAME | entries)
        built.steps(1, [1.0 / ranks] * 12, **known).event("finished", attempt=1)
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
def test_points_made_otherwise_are_told_apart(
    tmp_path: Path, make_run: Any, entries: dict[str, Any], name: str, value: str
) -> None:
    table = sweep_of(tmp_path, make_run, {1: {}, 2: {}, 4: entries, 8: entries})
    assert len({row.series for row in table.rows}) == 2 and value in table.rows[-1].series
    efficiencies = {row.ranks: row.efficiency for row in table.rows}
    assert efficiencies == {1: 1.0, 2: pytest.approx(1.0), 4: 1.0, 8: pytest.approx(1.0)}
    assert [row.speedup for row in table.rows] == pytest.approx([1, 2, 1, 2]), "each against the smallest of its kind"
    [note] = [note for note in table.notes if f"different {name}" in note]
    assert f"nodes=4, nodes=8 with {value}" in note and "fresh=true" in note


def test_points_made_alike_or_of_which_one_does_not_tell_are_compared(tmp_path: Path, make_run: Any) -> None:
    table = sweep_of(tmp_path, make_run, {1: {}, 2: {"software": {}, "git": {}}, 4: {}})
    assert {row.series for row in table.rows} == {""}
    assert [row.efficiency for row in table.rows] == pytest.approx([1, 1, 1])
    assert not any("different" in note for note in table.notes)


@pytest.mark.parametrize(
    ("phases", "advice"),
    [
        ({"comm_s": 0.06}, "optim.global_batch"),
        ({"comm_s": 0.001, "data_wait_s": 0.05}, "data.path"),
        ({"comm_s": 0.001, "optimizer_s": 0.05}, "parallel=zero1"),
        ({"comm_s": 0.001}, "optim.max_micro_batch"),
    ],
)
def test_low_mfu_gets_the_advice_that_the_steps_ask_for(
    tmp_path: Path, make_run: Any, phases: dict[str, float], advice: str
) -> None:
    table = sweep_of(tmp_path, make_run, {4: {}}, mfu_palm=0.12, **phases)
    [note] = [note for note in table.notes if "MFU at" in note]
    assert "is 12.0 %, below 20 %" in note and advice in note
    share = 100 * next(iter(phases.values())) / 0.25
    assert f"exposed communication {share:.1f} %" in note


def test_mfu_that_is_not_low_gets_none(tmp_path: Path, make_run: Any) -> None:
    assert not any("MFU at" in note for note in sweep_of(tmp_path, make_run, {4: {}}, mfu_palm=0.2).notes)


def test_the_page_begins_with_the_largest_point_that_claims_an_efficiency(sweep: Path) -> None:
    first, *others = tiles(build(sweep))
    assert (first.name, first.value) == ("Efficiency at nodes=2", "96.2 %")
    assert "not claimed at nodes=4: ranks shared cores or a GPU" in first.text
    assert "Efficiency at nodes=4" not in [tile.name for tile in others]
