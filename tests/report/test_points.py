"""Figures of single points: telemetry, fewer nodes, profiled steps; and programs other than the GPT library."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import Row, ScalingTable, build, page, write
from launch.report.points import GpuUse, energy_between, read_gpu_use
from launch.report.text import csv_text, json_text, markdown_text, point_tables
from launch.runs import progress
from launch.runs.environment import GpuSample, append_samples
from launch.runs.folder import ReportFile, RunFolder, append_lines
from launch.slurm.status import RunStatus, update_steps
from launch.workload import RankContract
from tests.support.planning import refused
from tests.support.run_folders import RunBuilder, column, notes_with, read_events, scalars, shown
from tests.support.runs import png_shape

A, B = "0000:3b:00.0", "0000:d8:00.0"
CAPPED = 0x04 | 0x01


def sample(folder: RunFolder, node: int, times: list[float], attempt: int = 1, **gauges: list[list[Any]]) -> None:
    """Write samples of the two GPUs of a node: of each gauge a list of values for each GPU."""
    for index, at in enumerate(times):
        of_gpus = {bus: {name: of[gpu][index] for name, of in gauges.items()} for gpu, bus in enumerate((A, B))}
        append_samples(folder, node, [GpuSample(at, attempt, f"n{node + 1}", of_gpus)])


def run_of(folder: Path, nodes: int = 2) -> Any:
    """A run of two ranks a node, each with a GPU, of eleven steps of 128 tokens for each rank."""
    ranks, place = 2 * nodes, {"device": "cuda:{local_rank}"}
    builder = RunBuilder(
        folder, ranks, nodes, (f"nodes={nodes}",), global_batch=ranks, machines=nodes, extra_rank=place
    )  # fmt: skip
    return builder.attempt().steps(1, [0.5] * 11).finished()


def use_of(table: ScalingTable) -> GpuUse:
    use = table.gpus[0]
    assert use is not None
    return use


def test_energy_and_power_are_those_of_plain_numpy(tmp_path: Path) -> None:
    run, chance = run_of(tmp_path).run, random.Random(4)
    times = [1e9 + 5 * index + round(chance.random(), 3) for index in range(40)]
    counter = np.cumsum([[chance.randint(1000, 4000) for _ in times] for _ in range(2)], axis=1)
    power = [[round(chance.uniform(90, 700), 1) for _ in times] for _ in range(2)]
    sample(run, 0, times, energy_j=counter.tolist(), power_w=power)
    sample(run, 1, times, power_w=power)  # an older kind, without a counter
    table = build(tmp_path)
    use = use_of(table)
    first, second = use.hosts
    by_counter = float(sum(counter[:, -1] - counter[:, 0]))
    by_power = float(np.trapezoid(np.array(power), np.array(times), axis=1).sum())
    seconds = times[-1] - times[0]
    assert (first.host, second.host, first.gpus) == ("n1", "n2", 2)
    assert (first.energy_j, second.energy_j) == (pytest.approx(by_counter), pytest.approx(by_power))
    assert first.mean_power_w == pytest.approx(by_counter / (2 * seconds))
    assert (second.throttled, use.throttled) == (None, None)
    (row,) = table.rows
    assert row.energy_kwh == pytest.approx((by_counter + by_power) / 3.6e6)
    assert row.joules_per_work == pytest.approx((by_counter + by_power) / (11 * 4 * 128))
    assert row.gpu_power_w == pytest.approx((by_counter + by_power) / (4 * seconds))
    (cells,) = csv.DictReader(io.StringIO(csv_text(table)))
    assert float(cells["energy_kwh"]) == row.energy_kwh and row.throttled is None


def test_throttled_hosts_are_named_with_reason_and_share(tmp_path: Path) -> None:
    run = run_of(tmp_path, nodes=3).run
    times = [1e9 + 5 * index for index in range(25)]
    idle, power = [[0x01] * 25] * 2, [[300.0] * 25] * 2
    for node in (0, 1):  # idle clocks, and clocks that somebody has set, are none
        sample(run, node, times, throttle_reasons=[[0x03] * 25, [0x00] * 25], power_w=power)
    sample(run, 2, times, throttle_reasons=[[CAPPED] * 5 + [0x24] + [0x01] * 19, idle[1]], power_w=power)
    table = build(tmp_path)
    [note] = notes_with(table, "throttled: host")
    title = table.rows[0].label
    assert note.startswith(f"At {title}, throttled: host n3 12 % of samples (power cap, driver's thermal limit).")
    assert use_of(table).hosts[2].reasons == {"power cap": 6 / 50, "driver's thermal limit": 1 / 50}
    assert table.rows[0].throttled == 6 / 150
    text = markdown_text(table)
    # 6 GPUs at 300 W for 120 s, and 11 steps of 768 tokens.
    assert f"| {title} | 6 | 0.06 kWh | 25.57 J | 300 W | 4.0 % |" in text
    assert "| n3 | 2 | 0.02 kWh | 300 W | 12.0 % | power cap 12.0 %, driver's" in text
    assert "GPUs by host" in page(table) and "power cap 12.0 %" in page(table)
    assert json.loads(json_text(table))["gpus"][0]["hosts"][2]["throttled"] == 0.12


def test_energy_is_not_claimed_where_gpus_of_the_run_were_not_sampled(tmp_path: Path) -> None:
    run = run_of(tmp_path).run
    sample(run, 0, [1e9, 1e9 + 10], power_w=[[200.0] * 2] * 2)
    table = build(tmp_path)
    (row,) = table.rows
    assert (row.energy_kwh, row.joules_per_work, row.gpu_power_w) == (None, None, 200.0)
    assert use_of(table).unsampled == ("n2",) and use_of(table).hosts[0].energy_j == 4000
    assert any("energy of" in note and "GPUs of n2 were not sampled" in note for note in table.notes)


def test_a_run_without_samples_says_nothing_of_gpus(tmp_path: Path) -> None:
    table = build(run_of(tmp_path).path)
    assert table.gpus == (None,) and not any("of samples" in note or "energy" in note for note in table.notes)
    assert "## GPUs" not in markdown_text(table) and "GPUs sampled" not in page(table)


def test_the_time_between_two_attempts_is_not_the_runs_and_a_gpu_seen_twice_counts_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for node in (0, 1):  # two agents on one machine
        for attempt, start in ((1, 0.0), (2, 1000.0)):
            samples = [
                GpuSample(start + at, attempt, "n1", {A: {"energy_j": start * 100 + at * 50.0}}) for at in (0, 4, 10)
            ]
            append_samples(folder, node, samples)
    use = read_gpu_use(folder, {})
    assert use is not None and (use.energy_j, use.mean_power_w) == (1000.0, 50.0)


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"energy_j": 5.0, "power_w": 9.0}, {"energy_j": 25.0, "power_w": 9.0}, 20.0),
        (
            {"energy_j": 25.0, "power_w": 100.0},
            {"energy_j": 5.0, "power_w": 200.0},
            600.0,
        ),  # the driver was loaded anew
        ({"energy_j": 25.0}, {"energy_j": 5.0}, None),
        ({"power_w": 100.0}, {"sm_clock_mhz": 1}, None),
    ],
)
def test_energy_between_two_samples(before: dict[str, float], after: dict[str, float], joules: float | None) -> None:
    assert energy_between(before, after, 4.0) == joules


# Steps on fewer nodes than asked: told apart from the others, and never part of a point's figures.


FEWER = {"nodes": 1, "asked": 2, "hosts": ["n1"], "cause": "n2: lost, nothing heard for 30 s"}


def run_on(path: Path, nodes: int, attempt: int, first: int, times: list[float]) -> Any:
    """Add an attempt on so many nodes of one rank each to the run of a point that asks for two."""
    builder = RunBuilder(path, nodes, nodes, ("nodes=2",), machines=2)
    return builder.attempt(attempt).steps(first, times, attempt)


@pytest.mark.parametrize("grows_back", [True, False])
def test_a_point_is_measured_by_its_steps_on_all_nodes(tmp_path: Path, grows_back: bool) -> None:
    RunBuilder.of_nodes(tmp_path, 1).steps(1, [1.0] * 20).finished()
    path = tmp_path / "nodes=2"
    run_on(path, 2, 1, 1, [0.5] * 20)
    run = run_on(path, 1, 2, 16, [1.0] * 10)  # five are done again
    run.event("fewer_nodes", attempt=2, **FEWER)
    last = 25
    if grows_back:
        run = run_on(path, 2, 3, 26, [0.5] * 10)
        last = 35
    run.event("finished", attempt=2 + grows_back, step=last)
    table = build(tmp_path)
    row = table.rows[1]
    assert (row.nodes, row.ranks, row.last_step, row.attempts) == (2, 2, last, 2 + grows_back)
    assert (row.step_time_s, row.speedup, row.efficiency) == (0.5, pytest.approx(2.0), pytest.approx(1.0))
    assert row.steps_measured == (10 + 5 if grows_back else 10), "of 15 and of 10, without five to warm up in each"
    (note,) = notes_with(table, "nodes were lost")
    assert "10 steps on 1 node; its figures are without these steps" in note


def test_a_run_of_which_only_steps_on_fewer_nodes_are_known_has_their_size(tmp_path: Path) -> None:
    run = run_on(tmp_path / "nodes=2", 1, 1, 1, [1.0] * 20)
    run.event("fewer_nodes", attempt=1, **FEWER).finished(1, step=20)
    (row,) = (table := build(tmp_path)).rows
    assert (row.nodes, row.step_time_s) == (1, 1.0)
    assert notes_with(table, "20 steps on 1 node; figures and size are those of these steps")


def test_the_time_that_is_left_is_reckoned_by_steps_on_as_many_nodes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    point = RunStatus(folder, nodes=2, max_steps=100, state="running")
    for attempt in (1, 2):
        folder.attempt(attempt).mkdir(parents=True)
    now = time.time()
    for attempt, first, steps, took in ((1, 1, 10, 50.0), (2, 11, 3, 100.0)):
        known = {"attempt": attempt, "step_time_s": took, "time": now}
        append_lines(folder.metrics(0), [{"step": first + n, **known} for n in range(steps)])
    update_steps(point)
    assert point.eta_s == pytest.approx((100 - 13) * 50.0)
    folder.record_event("fewer_nodes", attempt=2, **FEWER)
    update_steps(point)
    assert point.eta_s == pytest.approx((100 - 13) * 100.0)
    assert point.fewer_nodes() == {"nodes": 1, "asked": 2, "cause": FEWER["cause"]}


# Points that ran side by side on one machine measured each other: no efficiency is claimed for them.


@pytest.mark.parametrize(
    ("cores", "first", "machine", "crowded"),
    [
        (2, (0.0, 50.0), "one", [True, True]),  # 1 + 2 threads at the same time on 2 cores
        (2, (0.0, 100.0), "one", [False, False]),  # one after the other
        (4, (0.0, 50.0), "one", [False, False]),  # cores enough for both
        (2, (0.0, 50.0), "machine {node} of {rank}", [False, False]),
    ],
    ids=["together", "in turn", "enough cores", "two machines"],
)
def test_points_beside_each_other_disturb_each_other(
    tmp_path: Path, cores: int, first: Any, machine: str, crowded: list[bool]
) -> None:
    for at, nodes in enumerate((1, 2)):
        place = {"machine": f"{machine}{at}" if "node" in machine else machine}
        builder = RunBuilder.of_nodes(tmp_path, nodes, cores=cores, extra_rank=place)
        builder.steps(1, [1.0] * 5, time=first[at]).steps(6, [1.0] * 6, time=first[at] + 99.0)
    table = build(tmp_path)
    assert column(table.rows, "oversubscribed") == crowded
    assert [row.efficiency is None for row in table.rows] == [any(crowded)] * 2
    assert bool(notes_with(table, "at the same time as nodes=2")) == any(crowded)


def test_profiled_steps_are_told_as_means_of_the_first_rank(tmp_path: Path) -> None:
    built = RunBuilder.of_nodes(tmp_path, 2).steps(1, [0.5] * 10)
    for rank in range(2):
        for step in (11, 12):
            parts = {"compute": 0.25, "comm": 0.3, "exposed": 0.1, "copies": 0.05, "idle": 0.1}
            record = {"step": step, "attempt": 1, "step_time_s": 0.5, "tokens": 1}
            told = {f"breakdown_{part}_s": seconds * (step - 10) for part, seconds in parts.items()}
            append_lines(built.run.metrics(rank), [record | told])
    built.finished()
    expected = (
        "Of 2 steps of nodes=2 that were profiled: computing 50.0 %, exposed communication 20.0 %, copies 10.0 %, "
        "idle 20.0 %; communication, hidden or not, takes 60.0 %."
    )
    assert expected in build(tmp_path).notes


# Reports of programs other than the GPT library: what they do not say is absent, and no more is claimed than known.


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
        table, "at nodes=1 (12 steps in 1 s; ", "nodes=2 (25 steps in 1 s; ", "script.progress with a group step_time_s"
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
