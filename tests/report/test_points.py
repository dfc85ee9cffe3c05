"""Figures of single points: GPUs by telemetry, steps on fewer nodes, points side by side, profiled steps."""

from __future__ import annotations

import csv
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import ScalingTable, build, page
from launch.report.points import GpuUse, energy_between, read_gpu_use
from launch.report.text import csv_text, json_text, markdown_text
from launch.runs.environment import GpuSample, append_samples
from launch.runs.folder import RunFolder, append_lines
from launch.slurm.status import RunStatus, update_steps
from tests.support.run_folders import RunBuilder, column, notes_with

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
