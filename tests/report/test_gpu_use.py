"""What GPUs did, from recorded samples: energy, power and throttling, against plain arithmetic over them."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import ScalingTable, build
from launch.report.points import MOST_WINDOWS, GpuUse, energy_between, read_gpu_use
from launch.report.views.page import page
from launch.report.views.text import csv_text, markdown
from launch.report.views.write import json_text
from launch.runs.environment import GpuSample, append_samples
from launch.runs.folder import RunFolder

A, B = "0000:3b:00.0", "0000:d8:00.0"
CAPPED = 0x04 | 0x01


def sample(folder: RunFolder, node: int, times: list[float], attempt: int = 1, **gauges: list[list[Any]]) -> None:
    """Write samples of the two GPUs of a node: of each gauge a list of values for each GPU."""
    append_samples(
        folder,
        node,
        [
            GpuSample(
                time, attempt, f"n{node + 1}",
                {
                    bus: {name: of[gpu][index] for name, of in gauges.items()}
                    for gpu, bus in enumerate((A, B))
                },
            )
            for index, time in enumerate(times)
        ],
    )  # fmt: skip


def run_of(folder: Path, make_run: Any, nodes: int = 2) -> Any:
    """A run of two ranks a node, each with a GPU, of eleven steps of 128 tokens for each rank."""
    ranks, place = 2 * nodes, {"device": "cuda:{local_rank}"}
    builder = make_run(
        folder, ranks, nodes, (f"nodes={nodes}",), global_batch=ranks, machines=nodes, extra_rank=place
    )  # fmt: skip
    return builder.attempt().steps(1, [0.5] * 11).event("finished", attempt=1)


def use_of(table: ScalingTable) -> GpuUse:
    use = table.gpus[0]
    assert use is not None
    return use


def test_energy_power_and_clocks_are_those_of_plain_numpy(tmp_path: Path, make_run: Any) -> None:
    run, chance = run_of(tmp_path, make_run).run, random.Random(4)
    times = [1e9 + 5 * index + round(chance.random(), 3) for index in range(40)]
    counter = np.cumsum([[chance.randint(1000, 4000) for _ in times] for _ in range(2)], axis=1)
    power = [[round(chance.uniform(90, 700), 1) for _ in times] for _ in range(2)]
    clock = [[chance.randint(1200, 1980) for _ in times] for _ in range(2)]
    heat = [[chance.randint(40, 88) for _ in times] for _ in range(2)]
    sample(run, 0, times, energy_j=counter.tolist(), power_w=power, sm_clock_mhz=clock, temperature_c=heat)
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
    assert first.sm_clock_mhz == pytest.approx(np.mean(clock)) and first.hottest_c == np.max(heat)
    assert (second.sm_clock_mhz, second.hottest_c, second.throttled, use.throttled) == (None, None, None, None)
    (row,) = table.rows
    assert row.energy_kwh == pytest.approx((by_counter + by_power) / 3.6e6)
    assert row.joules_per_work == pytest.approx((by_counter + by_power) / (11 * 4 * 128))
    assert row.gpu_power_w == pytest.approx((by_counter + by_power) / (4 * seconds))
    (cells,) = csv.DictReader(io.StringIO(csv_text(table)))
    assert float(cells["energy_kwh"]) == row.energy_kwh and row.throttled is None
    assert [w.values["power_w"] for w in use.windows] == pytest.approx(np.mean(power, axis=0))


def test_throttled_hosts_are_named_with_reason_and_share(tmp_path: Path, make_run: Any) -> None:
    run = run_of(tmp_path, make_run, nodes=3).run
    times = [1e9 + 5 * index for index in range(25)]
    idle, power = [[0x01] * 25] * 2, [[300.0] * 25] * 2
    for node in (0, 1):  # idle clocks, and clocks that somebody has set, are none
        sample(run, node, times, throttle_reasons=[[0x03] * 25, [0x00] * 25], power_w=power)
    sample(run, 2, times, throttle_reasons=[[CAPPED] * 5 + [0x24] + [0x01] * 19, idle[1]], power_w=power)
    table = build(tmp_path)
    [note] = [note for note in table.notes if "throttled: host" in note]
    title = table.rows[0].label
    assert note.startswith(f"At {title}, throttled: host n3 12 % of samples (power cap, driver's thermal limit).")
    assert use_of(table).hosts[2].reasons == {"power cap": 6 / 50, "driver's thermal limit": 1 / 50}
    assert table.rows[0].throttled == 6 / 150
    text = markdown(table)
    # 6 GPUs at 300 W for 120 s, and 11 steps of 768 tokens.
    assert f"| {title} | 6 | 0.06 kWh | 25.57 J | 300 W | 4.0 % |" in text
    assert "| n3 | 2 | 0.02 kWh | 300 W | unavailable | unavailable | 12.0 % | power cap 12.0 %, driver's" in text
    assert "GPUs by host" in page(table) and "power cap 12.0 %" in page(table)
    told = json.loads(json_text(table))["gpus"][0]
    assert told["hosts"][2]["throttled"] == 0.12 and "windows" not in told


def test_energy_is_not_claimed_where_gpus_of_the_run_were_not_sampled(tmp_path: Path, make_run: Any) -> None:
    run = run_of(tmp_path, make_run).run
    sample(run, 0, [1e9, 1e9 + 10], power_w=[[200.0] * 2] * 2)
    table = build(tmp_path)
    (row,) = table.rows
    assert (row.energy_kwh, row.joules_per_work, row.gpu_power_w) == (None, None, 200.0)
    assert use_of(table).unsampled == ("n2",) and use_of(table).hosts[0].energy_j == 4000
    assert any("energy of" in note and "GPUs of n2 were not sampled" in note for note in table.notes)


def test_a_run_without_samples_says_nothing_of_gpus(tmp_path: Path, make_run: Any) -> None:
    table = build(run_of(tmp_path / "a", make_run).path)
    assert table.gpus == (None,) and not any("of samples" in note or "energy" in note for note in table.notes)
    assert "## GPUs" not in markdown(table)
    text = page(table)
    sample(run_of(tmp_path / "b", make_run).run, 0, [1e9, 1e9 + 1], power_w=[[1.0] * 2] * 2)
    assert "GPUs sampled" not in text and "GPUs sampled" in page(build(tmp_path / "b"))


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


def test_curves_over_a_long_run_stay_short_and_keep_their_means(tmp_path: Path) -> None:
    folder, powers = RunFolder(tmp_path), np.random.default_rng(1).uniform(100, 700, 3000).round(1)
    samples = [GpuSample(1e6 + 5 * index, 1, "n1", {A: {"power_w": float(p)}}) for index, p in enumerate(powers)]
    append_samples(folder, 0, samples)
    use = read_gpu_use(folder, {})
    assert use is not None and MOST_WINDOWS / 2 <= len(use.windows) <= MOST_WINDOWS
    starts = [window.begun for window in use.windows]
    width = np.diff(starts).min()
    in_window = [powers[[s <= 1e6 + 5 * i < s + width for i in range(3000)]] for s in starts[:3]]
    assert [w.values["power_w"] for w in use.windows[:3]] == pytest.approx([p.mean() for p in in_window])
