"""Reports of programs other than the GPT library: what they do not say is absent, and no more is claimed than known."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.report import Row, build, write
from launch.report.table import ScalingTable
from launch.report.text import point_tables
from launch.runs import progress
from launch.runs.folder import ReportFile
from launch.workload import RankContract
from tests.support.planning import refused
from tests.support.run_folders import RunBuilder, column, notes_with, read_events, scalars, shown
from tests.support.runs import png_shape

SAMPLES = {"unit": "samples", "work_per_step": 512}


def points(folder: Path, script: dict[str, Any], times: dict[int, float], **records: Any) -> ScalingTable:
    """Points of as many ranks as ``times`` has keys, which took that long for each of eleven steps."""
    for ranks, time_s in times.items():
        builder = RunBuilder(
            folder / f"nodes={ranks}", ranks, ranks, (f"nodes={ranks}", "workload=script"), script=script
        )
        # The first record has no step before it: ten step times are known, and the first five are warm-up.
        builder.attempt().records([time_s] * 11, **records).ran(20 * time_s)
    return build(folder)


def titles(table: ScalingTable) -> list[str]:
    return [title.replace("\n", " ") for title in point_tables(table)[0].titles]


def figures(rows: tuple[Row, ...], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(row, name) for name in names) for row in rows]


@pytest.mark.parametrize(("steps", "claimed"), [(21, False), (400, True)])
def test_times_of_lines_that_were_read_together_have_no_spread_and_no_efficiency_below_their_resolution(
    tmp_path: Path, steps: int, claimed: bool
) -> None:
    for ranks, time_s in ((1, 0.08), (2, 0.04)):
        built = RunBuilder.of_nodes(tmp_path, ranks, script=SAMPLES)
        built.records([time_s] * steps, ranks=1, step_time_s=time_s, step_time_resolution_s=1.0).ran(steps * time_s)
    table = build(tmp_path)
    assert column(table.rows, "step_time_s") == [0.08, 0.04]
    assert (
        figures(table.rows, "step_time_s_spread", "step_time_resolution_s", "efficiency_low") == [(None, 1.0, None)] * 2
    )
    assert table.rows[1].speedup == pytest.approx(2.0)
    assert table.rows[1].efficiency == (pytest.approx(1.0) if claimed else None)
    assert not notes_with(table, "95 % interval")
    [note] = notes_with(
        table, "At nodes=2 a step time is a mean over about 25 steps", "script.progress with a group step_time_s"
    )
    assert ("no efficiency is claimed" in note) is not claimed and ("exact to about 6 %" in note) is claimed
    assert write(table, files={ReportFile.png}), "a chart without the quartiles"


def test_samples_of_the_ranks_add_up(tmp_path: Path) -> None:
    table = points(tmp_path / "s", {"unit": "samples"}, {1: 2.0, 2: 1.25}, samples=64, loss=0.5)
    # 64 samples in 2 s; twice 64 in 1.25 s, which is 1.6 times as much on each of two ranks.
    assert figures(table.rows, "throughput", "throughput_per_rank", "step_time_s", "speedup", "efficiency") == [
        pytest.approx((32, 32, 2.0, 1, 1)),
        pytest.approx((102.4, 51.2, 1.25, 3.2, 1.6)),
    ]
    assert column(table.rows, "steps_measured") == [5, 5]
    expected = "point|nodes|ranks|samples/s|samples/s per rank|step time|spread|speedup|efficiency|loss|state"
    assert titles(table) == expected.split("|")
    assert table.sections()[0][0] == "Strong scaling of s"
    assert table.conditions == "AMD EPYC 7763; torch 2.13.0; command python train.py --lr 0.1."


@pytest.mark.parametrize(
    ("unit", "fields", "throughput"),
    [
        (None, {"images": 3, "work": 2}, ("images", 12.0)),
        ("images", {"samples": 4}, ("samples", 16.0)),
        ("samples", {"samples_per_s": 50.0}, ("samples", 50.0)),
        (None, {}, (None, None)),
    ],
)
def test_the_work_of_a_step_is_what_its_records_name(
    tmp_path: Path, unit: str | None, fields: dict[str, Any], throughput: tuple[Any, Any]
) -> None:
    table = points(tmp_path, {"unit": unit}, {2: 0.5}, **fields)
    assert figures(table.rows, "unit", "throughput") == [throughput]


def test_work_that_was_stated_stands_in_for_ranks_that_say_nothing(tmp_path: Path) -> None:
    table = points(tmp_path / "s", SAMPLES, {1: 2.0, 4: 0.8}, ranks=1)
    # 512 samples in 2 s and in 0.8 s: 2.5 times as fast on four times the ranks.
    assert figures(table.rows, "throughput", "speedup", "efficiency") == [
        pytest.approx((256, 1, 1)),
        pytest.approx((640, 2.5, 0.625)),
    ]
    assert table.sections()[0][0] == "Strong scaling of s with 512 samples per step"
    assert "loss" not in titles(table)


def test_weak_scaling_of_a_script(tmp_path: Path) -> None:
    for ranks in (1, 2):
        words = (f"nodes={ranks}", f"script.work_per_step={256 * ranks}")
        script = {"unit": "images", "work_per_step": 256 * ranks, "weak_scaling": True}
        builder = RunBuilder(tmp_path / "w" / f"p{ranks}", ranks, ranks, words, script=script)
        builder.attempt().records([1.0 if ranks == 1 else 1.25] * 11)
    table = build(tmp_path / "w")
    assert column(table.rows, "series") == ["", ""], "the work of a step tells no programs apart"
    assert column(table.rows, "label") == ["nodes=1", "nodes=2"]
    assert column(table.rows, "efficiency") == pytest.approx([1, 0.8])
    assert table.sections()[0][0] == "Weak scaling of w with 256 images per step and rank"


def test_the_work_of_some_ranks_is_told_as_such(tmp_path: Path) -> None:
    table = points(tmp_path, {}, {1: 1.0, 2: 1.0}, ranks=1, tokens=100.0)
    assert [(row.unit, row.throughput) for row in table.rows] == [("tokens", 100), ("tokens", 100)]
    assert notes_with(table, "throughput counts only the ranks that did: nodes=2 (1 of 2)")


def test_steps_wait_for_the_ranks_that_record(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "p", 4, 4, script=SAMPLES).attempt()
    builder.records([1.0] * 20, ranks=2)
    lines = builder.run.metrics(1).read_text().splitlines(keepends=True)
    builder.run.metrics(1).write_text("".join(lines[:12]))
    [row] = build(tmp_path / "p").rows
    # Steps 2 to 12 have times on both ranks that record at all, and the first five of these are warm-up.
    assert (row.steps_measured, row.last_step, row.state) == (6, 20, "running")


def test_without_the_work_only_step_times_are_compared(tmp_path: Path) -> None:
    table = points(tmp_path, {}, {1: 2.0, 2: 1.25}, loss=1.0)
    assert figures(table.rows, "throughput", "speedup", "efficiency") == [(None, 1, None), (None, 1.6, None)]
    assert "efficiency" in titles(table) and not any("/s" in title for title in titles(table))
    assert shown(table).count("not claimed") == 2
    assert notes_with(table, "Speedup is the ratio of step times")
    write(table)
    found = [name.removeprefix("scaling/") for name in read_events(tmp_path / "Scaling").Tags()["scalars"]]
    assert sorted(found) == ["loss", "step_time_s", "step_time_s_high", "step_time_s_low"]


def test_a_program_that_records_nothing_has_a_run_time(tmp_path: Path) -> None:
    for ranks, seconds in ((1, 100.0), (2, 60.0)):
        builder = RunBuilder.of_nodes(tmp_path, ranks, script={}).ran(seconds)
    builder.event("started", attempt=2, time=2e9).attempt(2).finished(2, time=2e9 + 30)
    table = build(tmp_path)
    assert titles(table) == ["point", "nodes", "ranks", "run time", "attempts", "state"]
    assert figures(table.rows, "run_time_s", "attempts", "speedup", "efficiency", "state") == [
        (100, 1, None, None, "finished"),
        (90, 2, None, None, "finished"),
    ]
    assert "1 min 40 s" in shown(table)
    [note] = notes_with(table, "Run time is")
    assert "no speedup or efficiency is claimed" in note
    assert write(table), "without a drawing"


def test_a_run_that_goes_on_has_no_run_time_yet(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "p", script={}).attempt().event("started", attempt=1)
    assert figures(build(tmp_path / "p").rows, "run_time_s", "state") == [(None, "running")]
    builder.finished()
    assert "Summary of p" in shown(build(tmp_path / "p"))


@pytest.mark.parametrize("script", [{"unit": "samples"}, SAMPLES])
def test_what_both_points_tell_must_be_the_same(tmp_path: Path, script: dict[str, Any]) -> None:
    for ranks, unit in ((1, "samples"), (2, "images")):
        told = {**script, "unit": unit}
        RunBuilder.of_nodes(tmp_path, ranks, script=told).records([1.0] * 11, samples=4)
    refused(build, tmp_path, found="different unit in one scaling series")


def test_options_of_a_script_tell_series_apart(tmp_path: Path) -> None:
    for option in ("adam", "sgd"):
        for nodes in (1, 2):
            words = (f"nodes={nodes}", f"script.options=[--optimizer,{option}]", "script.path=train.py")
            builder = RunBuilder(tmp_path / f"{option}{nodes}", nodes, nodes, words, script=SAMPLES)
            builder.attempt().records([1.0 / nodes] * 11)
    table = build(tmp_path)
    assert list(dict.fromkeys(row.series for row in table.rows)) == [
        f"script.options=[--optimizer,{option}]" for option in ("adam", "sgd")
    ]
    assert table.rows[0].label == "nodes=1,script.options=[--optimizer,adam]"


PRINTS = """
import sys, time
began = time.monotonic()
for step in range(1, 31):
    time.sleep(0.05 / int(sys.argv[1]))
    print(f"step {step} loss {1 / step:.3f}", flush=True)
print("took", time.monotonic() - began, flush=True)
"""
RECORDS = """
import sys, time
from launch import worker
run = worker.attach()
began = time.monotonic()
for step in range(1, 31):
    time.sleep(0.05 / int(sys.argv[1]))
    run.record(step, loss=1 / step, samples=32)
run.finished(30)
print("took", time.monotonic() - began, flush=True)
"""


@pytest.mark.parametrize("program", [PRINTS, RECORDS], ids=["printed", "recorded"])
def test_real_programs_from_their_logs_or_records_to_the_table(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that takes at least 50 ms for a step of 32 samples, and half of it in the second point."""
    monkeypatch.setattr(progress, "POLL_S", 0.0)
    took: list[float] = []
    printed = program is PRINTS
    script = {"unit": "samples", "work_per_step": 32} if printed else {"unit": "tokens"}
    for ranks in (1, 2):
        run = RunBuilder(tmp_path / f"nodes={ranks}", 1, 1, (f"nodes={ranks}",), script=script).attempt().run
        run.log(1, 0).parent.mkdir()
        pattern = r"step (?P<step>\d+) loss (?P<loss>\S+)" if printed else None
        contract = RankContract(progress=pattern, unit="samples", work_per_step=32, writes_curves=True)
        watched = progress.Progress(run, 1, (0,), contract)
        told = {"RANK": "0", "WORLD_SIZE": "1", "LAUNCH_RUN_DIR": str(run.path), "LAUNCH_ATTEMPT": "1"}
        words = [sys.executable, "-c", program, str(ranks)]
        with run.log(1, 0).open("w") as log, subprocess.Popen(words, stdout=log, env={**os.environ, **told}) as process:
            while process.poll() is None:
                watched.poll()
                time.sleep(0.02)
        watched.close()
        assert process.returncode == 0
        took.append(float(run.log(1, 0).read_text().split()[-1]))
        losses = scalars(run.tensorboard, "train/loss")
        assert [*losses] == list(range(1, 31))
    table = build(tmp_path)
    for row, least, whole in zip(table.rows, (0.05, 0.025), took, strict=True):
        assert row.unit == "samples" and row.throughput is not None and row.step_time_s is not None
        # Lines are seen some milliseconds late; of 25 steps or more, half take no less than the median.
        assert 0.7 * least <= row.step_time_s < whole / 12, took
        assert row.throughput == pytest.approx(32 / row.step_time_s)
        assert (row.last_step, row.loss) == (30, pytest.approx(1 / 30, abs=1e-3))


def test_every_view_names_the_unit(tmp_path: Path) -> None:
    table = points(tmp_path, SAMPLES, {1: 2.0, 2: 1.0})
    write(table)
    header = next(csv.reader((tmp_path / "scaling.csv").open()))
    assert [name for name in header if "_per_s" in name] == [*("samples_per_s", "samples_per_s_per_rank")]
    assert "| samples/s |" in (tmp_path / "scaling.md").read_text()
    assert scalars(tmp_path / "Scaling", "scaling/samples_per_s") == {1: 256, 2: 512}
    assert scalars(tmp_path / "Scaling" / "ideal", "scaling/samples_per_s") == {1: 256, 2: 512}
    layout = read_events(tmp_path / "Scaling").Tensors("custom_scalars__config__")[0]
    assert b"Samples per second" in layout.tensor_proto.string_val[0]
    assert png_shape((tmp_path / "scaling.png").read_bytes())[0] > 1000


def test_gpus_without_identity_are_shared_by_nobody_elsewhere(tmp_path: Path) -> None:
    """Two points on one machine at the same time, each on the GPUs that its job calls 0: nothing says they are one."""
    for nodes in (1, 2):
        builder = RunBuilder(
            tmp_path / f"nodes={nodes}", nodes, 1, (f"nodes={nodes}",), device="cuda:{rank}", script=SAMPLES,
            extra_rank={"device": "cuda:{rank}"}, device_name="NVIDIA H100",
        )  # fmt: skip
        builder.attempt().records([1.0 / nodes] * 11)
    assert column(build(tmp_path).rows, "oversubscribed") == [False, False]
