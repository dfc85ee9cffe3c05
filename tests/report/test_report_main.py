"""The command: several sweeps and runs in one report, and a report that is made again while runs continue."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.report.__main__ import main
from launch.report.selection import Selection, compare, select, source_labels
from launch.report.table import ScalingTable, tabulate_selection
from launch.runs.find import record_sweep

STEP_S = {"old": {1: 1.0, 2: 0.8, 4: 0.5}, "new": {1: 0.5, 2: 0.25, 8: 0.1}}


@pytest.fixture
def sweeps(tmp_path: Path, make_run: Any) -> dict[str, Path]:
    """Two sweeps with points of the same names; the second one with other GPUs and in bf16."""
    other = {"device_name": "NVIDIA H100", "precision": "bf16"}
    for name, times in STEP_S.items():
        for ranks, step_s in times.items():
            point = tmp_path / name / f"nodes={ranks}"
            built = make_run(point, ranks, ranks, (f"nodes={ranks}",), **(other if name == "new" else {}))
            built.attempt().steps(1, [step_s] * 12).event("finished", attempt=1)
    return {name: tmp_path / name for name in STEP_S}


def compared(*folders: Path) -> ScalingTable:
    return tabulate_selection(compare([select(folder) for folder in folders]))


def test_each_sweep_has_its_own_baseline_and_sizes_compare_across(sweeps: dict[str, Path]) -> None:
    table = compared(*sweeps.values())
    work = 16 * 128  # tokens of a step in every run
    for row in table.rows:
        times = STEP_S[row.source]
        assert row.ranks is not None and row.label == f"{row.source}/nodes={row.ranks}" and row.series == row.source
        assert row.throughput == pytest.approx(work / times[row.ranks])
        assert row.efficiency == pytest.approx(times[1] / times[row.ranks] / row.ranks)
        there = STEP_S["old"].get(row.ranks) if row.source == "new" else None
        assert row.ratio_to_first == (None if there is None else pytest.approx(there / times[row.ranks]))
    [intervals] = [note for note in table.notes if "intervals of efficiency of new" in note]
    assert "new/nodes=2" in intervals and "old" not in intervals
    [differences] = [note for note in table.notes if note.startswith("new differs from old in ")]
    assert "hardware (NVIDIA H100, not AMD EPYC 7763)" in differences and "precision (bf16, not fp32)" in differences
    assert "software" not in differences
    for name in sweeps:
        assert any(
            note.startswith(f"Speedup and efficiency of {name} are against {name}/nodes=1") for note in table.notes
        )


def test_a_comparison_is_written_beside_the_first_and_takes_nothing_from_its_report(
    sweeps: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = map(str, sweeps.values())
    kinds = "--files=md,csv,json,html"
    assert main([old, kinds]) == 0
    before = {path.name: path.read_bytes() for path in sweeps["old"].iterdir() if path.is_file()}
    assert main([old, new, kinds]) == 0
    assert main([old, new, kinds, "--out", str(sweeps["old"].parent / "both")]) == 0
    assert "times" in capsys.readouterr().out
    for folder in (sweeps["old"], sweeps["old"].parent / "both"):
        with (folder / "comparison.csv").open() as file:
            rows = {row["label"]: row for row in csv.DictReader(file)}
        assert list(rows) == [f"{name}/nodes={ranks}" for name, times in STEP_S.items() for ranks in times]
        assert float(rows["new/nodes=2"]["ratio_to_first"]) == pytest.approx(3.2)
        report = json.loads((folder / "comparison.json").read_text())
        assert report["title"] == "Comparison of old and new" and len(report["rows"]) == 6
        for ending in ("md", "html"):
            assert "new/nodes=8" in (folder / f"comparison.{ending}").read_text()
    assert {name: (sweeps["old"] / name).read_bytes() for name in before} == before
    assert not list(sweeps["new"].glob("comparison*"))


def test_runs_typed_one_by_one_compare_as_the_points_of_their_folder(sweeps: dict[str, Path]) -> None:
    table = compared(sweeps["old"] / "nodes=1", sweeps["old"] / "nodes=4", sweeps["new"] / "nodes=1")
    assert [row.label for row in table.rows] == ["old/nodes=1", "old/nodes=4", "new/nodes=1"]
    assert [row.efficiency for row in table.rows] == [1.0, pytest.approx(0.5), None], "one alone scales nothing"
    assert table.rows[2].ratio_to_first == pytest.approx(2.0)


def test_sweeps_of_one_folder_are_typed_by_their_records(sweeps: dict[str, Path]) -> None:
    old = sweeps["old"]
    for nodes in ((1, 2), (1, 2, 4)):
        record_sweep(old, [f"nodes={n}" for n in nodes], ["nodes=" + ",".join(map(str, nodes))])
    table = compared(old / "sweeps/0001", old / "sweeps/0002")
    assert [row.label for row in table.rows[:3]] == [f"old sweep 1/nodes={n}" for n in (1, 2)] + ["old sweep 2/nodes=1"]
    assert [row.efficiency for row in table.rows] == [pytest.approx(e) for e in (1, 0.625, 1, 0.625, 0.5)]
    assert [row.ratio_to_first for row in table.rows] == [None, None, 1.0, 1.0, None]
    assert not any(row.oversubscribed for row in table.rows), "a run is no neighbour of itself"


def test_folders_of_the_same_name_are_told_apart_by_those_above() -> None:
    parts = [Selection(Path(path), ()) for path in ("/a/x/scaling", "/a/y/scaling", "/a/other")]
    assert source_labels(parts) == ["x/scaling", "y/scaling", "other"]


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["{old}", "{new}", "{old}"], "{old}, with the same runs as {old}", "launch.report {old} {new}"),
        (["{old}", "{old}/nodes=2"], "{old}/nodes=2, which belongs to {old}", "python -m launch.report {old}"),
        (["{old}", "{old}/absent"], "no folder {old}/absent", "python -m launch.report {old}"),
        (["{old}", "{old}/nodes=1/metrics"], "no run in {old}/nodes=1/metrics", "python -m launch"),
        (["{old}", "{new}", "--sweep", "2"], "--sweep 2 with 2 folders", "{old}/sweeps/0002 {new}"),
        (["{old}", "--out", "/proc/report"], "--out /proc/report, which cannot be written", "the same without --out"),
        (["{old}", "--out", "/proc"], "--out /proc, which cannot be written", "the same without --out"),
        (["{old}", "--out", "{new}"], "--out {new}, with runs in it", "--out {above}/report"),
        (["{old}", "{new}", "--out", "{new}/nodes=1/metrics/rank_00000.jsonl"], "which is a file", "/comparison"),
    ],
    ids=["twice", "a run of the sweep", "no folder", "no run", "a number", "/proc/x", "/proc", "runs", "a file"],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    sweeps: dict[str, Path], words: list[str], found: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    above = sweeps["old"].parent
    before = sorted(above.rglob("*"))
    names = {"above": above, **sweeps}
    assert main([word.format(**names) for word in words]) == 2
    error = capsys.readouterr().err
    assert found.format(**names) in error and fix.format(**names) in error.replace("'", "")
    assert sorted(above.rglob("*")) == before


# A watched report follows its runs, and ends with them.


PATIENCE_S = 120
PARTS = ["found", "expected", "type next"]


def until(what: str, true: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)  # between two looks


def test_a_report_follows_its_runs_until_they_end(tmp_path: Path, make_run: Any) -> None:
    built = [make_run(tmp_path / "s" / f"nodes={n}", n, n, (f"nodes={n}",)).attempt() for n in (1, 2)]
    for run in built:
        run.steps(1, [1.0 / run.ranks] * 12)
    page, table = tmp_path / "s" / "scaling.html", tmp_path / "s" / "scaling.csv"
    words = [sys.executable, "-m", "launch.report", str(tmp_path / "s"), "--watch", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        until("the page", page.exists)
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        built[0].steps(13, [1.0] * 8)
        until("the new steps", lambda: ",15," in table.read_text().splitlines()[1])
        assert process.poll() is None
        for run in built:
            run.event("finished", attempt=1)
        text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "running" in text and "again in 0.2 s" in text and text.count("finished") >= 2
    assert "refresh" not in page.read_text()


@pytest.mark.parametrize("event", ["cancelled", "budget_reached"])
def test_a_run_that_was_called_off_has_ended(
    tmp_path: Path, make_run: Any, event: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a [red] sweep"
    run = make_run(folder, 1, 1, ()).attempt()
    run.steps(1, [1.0] * 12)
    run.event(event)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for a run that has ended"))
    assert main([str(folder), "--watch", "0.2", "--files", "md"]) == 0
    assert f"wrote summary.md in {folder}" in " ".join(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("typed", ["0", "-1", "soon", "inf"])
def test_an_interval_that_is_none_is_refused(tmp_path: Path, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), f"--watch={typed}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert f"'{typed}', and not seconds above 0" in told[0] and [line.split(":")[0] for line in told] == PARTS
