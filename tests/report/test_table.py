"""The figures of a scaling table, against numbers computed by hand, and what holds for any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.report import Row, build
from launch.report.points import Point, PointState, read_point
from launch.report.read import Environment, RankPlace
from launch.report.selection import Selection
from launch.report.steps import MIN_STEPS, WARMUP_STEPS, Steps, measure_steps
from launch.report.table import tabulate
from launch.report.text import efficiency as efficiency_text
from launch.runs.folder import append_lines
from tests.support.planning import refused
from tests.support.run_folders import RunBuilder, column, notes_with

STEADY = [1.0] * 10


def rows(folder: Path) -> dict[str, Row]:
    return {row.point: row for row in build(folder).rows}


def test_no_efficiency_at_all_against_a_crowded_point(tmp_path: Path) -> None:
    for nodes, cores in ((1, 1), (2, 8)):
        RunBuilder.of_nodes(tmp_path, nodes, cores=cores, threads=2).steps(1, STEADY)
    table = build(tmp_path)
    assert column(table.rows, "oversubscribed") == [True, False]
    assert column(table.rows, "efficiency") == column(table.rows, "throughput_ideal") == [None, None]
    assert notes_with(table, "no efficiency is claimed for any point")


@pytest.mark.parametrize(("uuid", "shared"), [("GPU-{rank}", False), ("GPU-0", True)])
def test_ranks_on_one_gpu_are_told_by_its_identity(tmp_path: Path, uuid: str, shared: bool) -> None:
    builder = RunBuilder(tmp_path, 2, device="cuda:0", device_name="NVIDIA H200", extra_rank={"device_uuid": uuid})
    builder.attempt().steps(1, STEADY)
    table = build(tmp_path)
    assert table.rows[0].oversubscribed is shared
    assert bool(notes_with(table, "2 ranks on one GPU of n1")) is shared


def test_cores_are_counted_per_machine_not_per_node(tmp_path: Path) -> None:
    for name, machines in (("one_machine", 1), ("two_machines", 2)):
        RunBuilder(tmp_path / name, 2, 2, (f"x={name}",), cores=1, machines=machines).attempt().steps(1, STEADY)
    crowded = {name: row.oversubscribed for name, row in rows(tmp_path).items()}
    assert crowded == {"one_machine": True, "two_machines": False}


def test_warmup_is_left_out_of_each_attempt_and_steps_done_again_count_once(tmp_path: Path) -> None:
    # Steps 11 to 20 were lost with the first attempt and done again, twice as slow, by the second.
    builder = RunBuilder(tmp_path).attempt(1).steps(1, [1.0] * 20, attempt=1)
    builder.attempt(2).steps(11, [9.0] * 5 + [2.0] * 15, attempt=2)
    steps = read_point(tmp_path).steps
    assert steps.step.tolist() == list(range(1, 31))
    assert steps.attempt.tolist() == [1] * 10 + [2] * 20
    figures = measure_steps(steps)
    assert figures is not None
    assert figures.steps == 20  # 6 to 10, and 16 to 30
    assert figures.step_time_s == 2.0


def test_steps_made_in_another_setup_are_not_mixed_in(tmp_path: Path) -> None:
    RunBuilder(tmp_path, 1).attempt(1).steps(1, [5.0] * 30, attempt=1)
    RunBuilder(tmp_path, 2).attempt(2).steps(31, [1.0] * 12, attempt=2)
    row = build(tmp_path).rows[0]
    assert (row.ranks, row.step_time_s, row.steps_measured, row.last_step) == (2, 1.0, 7, 42)


def test_an_attempt_without_steps_does_not_hide_those_before_it(tmp_path: Path) -> None:
    RunBuilder(tmp_path, 2).attempt(1).steps(1, STEADY).finished()
    RunBuilder(tmp_path, 1).attempt(2).finished(2)
    row = build(tmp_path).rows[0]
    assert (row.ranks, row.step_time_s, row.state) == (2, 1.0, "finished")


def test_too_few_steps_are_said_instead_of_a_figure(tmp_path: Path) -> None:
    RunBuilder(tmp_path / "nodes=1").attempt().steps(1, [1.0] * (WARMUP_STEPS + MIN_STEPS - 1))
    RunBuilder(tmp_path / "nodes=2", 2).attempt().steps(1, [1.0] * (WARMUP_STEPS + MIN_STEPS))
    table = build(tmp_path)
    assert column(table.rows, "step_time_s") == [None, 1.0]
    assert notes_with(table, "Too few steps", "nodes=1 (4 of 9)")
    assert notes_with(table, "against nodes=2 (2 ranks), because nodes=1 gave no figures")


def test_a_point_without_figures_keeps_its_row_and_its_state(tmp_path: Path) -> None:
    RunBuilder.of_nodes(tmp_path, 1).steps(1, STEADY).finished()
    RunBuilder.of_nodes(tmp_path, 2).event("rank_failed", attempt=1, rank=1)
    RunBuilder.of_nodes(tmp_path, 4)
    table = build(tmp_path)
    assert [(row.state, row.ranks) for row in table.rows] == [("finished", 1), ("failed", 2), ("no records", 4)]
    assert all(row.throughput is row.efficiency is row.mfu_palm is None for row in table.rows[1:])
    assert notes_with(table, "nodes=2 failed")


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], PointState.RUNNING),
        ([("finished", 2)], PointState.FINISHED),
        ([("stopped", 2)], PointState.STOPPED),
        ([("rank_failed", 1)], PointState.RUNNING),
        ([("rank_failed", 1), ("finished", 2)], PointState.FINISHED),
        ([("rank_failed", 2), ("stopped", 2)], PointState.FAILED),
        ([("finished", 1)], PointState.RUNNING),
        ([("cancelled", 2), ("stopped", 2)], PointState.CANCELLED),
        ([("cancelled", 2), ("rank_failed", 2)], PointState.CANCELLED),
        ([("rank_failed", 2), ("cancelled", 2)], PointState.FAILED),
        ([("cancelled", 2), ("finished", 2)], PointState.FINISHED),
        ([("budget_reached", 2), ("stopped", 2)], PointState.BUDGET_EXCEEDED),
        ([("cancelled", 1), ("submitted", 0), ("stopped", 2)], PointState.STOPPED),
    ],
)
def test_the_state_is_that_of_the_last_attempt(
    tmp_path: Path, events: list[tuple[str, int]], state: PointState
) -> None:
    builder = RunBuilder(tmp_path).attempt(1).attempt(2).steps(1, STEADY, attempt=2)
    for event, attempt in events:
        builder.event(event, attempt=attempt)
    assert read_point(tmp_path).state is state


def test_two_series_have_their_own_smallest_points(tmp_path: Path) -> None:
    for strategy, slow in (("ddp", 1.0), ("fsdp", 3.0)):
        for nodes in (1, 2):
            builder = RunBuilder.of_nodes(tmp_path, nodes, f"parallel={strategy}", strategy=strategy)
            builder.steps(1, [slow * (1.0 if nodes == 1 else 0.6)] * 10)
    table = build(tmp_path)
    assert column(table.rows, "series") == ["parallel=ddp"] * 2 + ["parallel=fsdp"] * 2
    assert column(table.rows, "ranks") == [1, 2] * 2
    assert column(table.rows, "efficiency") == pytest.approx([1, 1 / 1.2] * 2)


def test_points_of_different_clusters_are_not_measured_against_each_other(tmp_path: Path) -> None:
    for nodes, cluster, time_s in ((1, "local", 8.0), (2, "slurm", 2.0), (4, "slurm", 1.0)):
        builder = RunBuilder.of_nodes(tmp_path, nodes, machines=nodes).steps(1, [time_s] * 10)
        builder.event("submitted", cluster=cluster, job_id="7")
    table = build(tmp_path)
    assert column(table.rows, "series") == ["cluster=local", "cluster=slurm", "cluster=slurm"]
    assert column(table.rows, "speedup") == [None, pytest.approx(1), pytest.approx(2)]
    assert table.rows[2].efficiency == pytest.approx(1)
    assert notes_with(table, "nodes=1 with cluster=local; nodes=2, nodes=4 with cluster=slurm")
    (tmp_path / "nodes=1" / "events.jsonl").unlink()
    assert column(build(tmp_path).rows, "series") == ["", "", ""], "an unknown place separates nothing"


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"device_name": "Intel Xeon 6"}, "hardware"),
        ({"precision": "bf16"}, "precision"),
        ({"model": "gpt2_124m"}, "model"),
        ({"block_size": 256}, "model"),
        ({"global_batch": 32}, "batch"),
        ({"weak_scaling": True}, "kind of scaling"),
    ],
)
def test_points_that_cannot_be_compared_are_refused(tmp_path: Path, other: dict[str, Any], what: str) -> None:
    RunBuilder.of_nodes(tmp_path, 1).steps(1, STEADY)
    RunBuilder.of_nodes(tmp_path, 2, **other).steps(1, STEADY)
    refusal = refused(build, tmp_path)
    assert refusal.found.startswith(f"different {what} in one scaling series: nodes=1 has")
    assert refusal.fix.startswith("python -m launch nodes=2 fresh=true")


def test_weak_scaling_compares_the_batch_per_rank_and_says_so(tmp_path: Path) -> None:
    for nodes in (1, 2, 4):
        builder = RunBuilder.of_nodes(tmp_path, nodes, weak_scaling=True, global_batch=8 * nodes)
        builder.steps(1, [1.0 if nodes == 1 else 1.25] * 10)
    table = build(tmp_path)
    assert column(table.rows, "efficiency") == pytest.approx([1, 0.8, 0.8])
    assert column(table.rows, "speedup") == pytest.approx([1, 1.6, 3.2])
    [(heading, _)] = table.sections()
    assert heading == f"Weak scaling of {tmp_path.name} with 8 sequences per rank"


def test_mfu_is_the_median_where_it_is_known_and_absent_elsewhere(tmp_path: Path) -> None:
    RunBuilder.of_nodes(tmp_path, 1).steps(1, STEADY, mfu_palm=0.4)
    RunBuilder.of_nodes(tmp_path, 2).steps(1, STEADY)
    assert column(build(tmp_path).rows, "mfu_palm") == [pytest.approx(0.4), None]


def test_a_sweep_file_names_the_points_in_their_order(sweep: Path) -> None:
    (sweep / "sweep.json").write_text('{"points": ["nodes=2", "nodes=1", "nodes=8"]}')
    found = rows(sweep)
    assert list(found) == ["nodes=1", "nodes=2", "nodes=8"]
    assert found["nodes=8"].state == "not started"  # as launch.status calls it


@pytest.mark.parametrize("wrong", ["absent", "empty"])
def test_a_folder_without_runs_is_refused_with_one_that_has_some(
    sweep: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sweep.parent / "empty").mkdir()
    monkeypatch.chdir(sweep.parent)  # a checkout in which runs were made would be pointed at
    expected = f"python -m launch.report {sweep}" if wrong == "absent" else "python -m launch -m nodes=1,2"
    assert refused(build, sweep.parent / wrong, found=str(sweep.parent / wrong)).fix == expected


# Every number of the table, had again from the run folders by a few lines of numpy.


def recorded(folder: Path) -> None:
    """Points of 2, 4 and 8 ranks with times, phases and work that nothing chose."""
    chance = np.random.default_rng(11)
    for ranks in (2, 4, 8):
        built = RunBuilder.of_nodes(folder, ranks)
        step_s = chance.uniform(0.9, 1.1, 40) / ranks
        for rank in range(ranks):
            comm, data, optimizer = chance.uniform(0, 0.02, (3, 40))
            rows = [
                {"step": s + 1, "attempt": 1, "tokens": 2048 // ranks, "loss": 5 / (s + 1), "step_time_s": step_s[s]}
                | {"comm_s": comm[s], "data_wait_s": data[s], "optimizer_s": optimizer[s]}
                | {"mfu_palm": chance.uniform(0.3, 0.4), "time": 1e9 + s}
                for s in range(40)
            ]
            append_lines(built.run.metrics(rank), rows)
        built.finished()


def recorded_column(run: Path, name: str) -> np.ndarray:
    """A field of all records after warm-up, [ranks, steps]."""
    files = sorted((run / "metrics").glob("rank_*.jsonl"))
    return np.array([[json.loads(line)[name] for line in file.open()][5:] for file in files])


def test_every_number_of_the_table_follows_from_the_records(tmp_path: Path) -> None:
    recorded(tmp_path)
    rows = build(tmp_path).rows
    base: dict[str, Any] = {}
    for row in rows:
        run = tmp_path / row.point
        seconds, comm, data, opt = (
            recorded_column(run, f"{n}_s") for n in ("step_time", "comm", "data_wait", "optimizer")
        )
        low, step_s, high = np.quantile(seconds.max(0), (0.25, 0.5, 0.75))
        rate, ranks = np.median(recorded_column(run, "tokens").sum(0)) / step_s, len(seconds)
        own, work, at = seconds - comm, seconds - comm - data - opt, np.arange(seconds.shape[1])
        late = own.argmax(0), at
        parts = [seconds.max(0) - own[late], work[late] - work.mean(0), data[late], opt[late]]
        shares = np.array([part.sum() for part in parts]) / seconds.max(0).sum()
        quartiles = np.array([low, high]) / step_s
        base = base or {"rate": rate, "ranks": ranks, "shares": shares, "quartiles": quartiles}
        efficiency = rate / base["rate"] * base["ranks"] / ranks
        lost = shares - efficiency * base["shares"]

        assert (row.ranks, row.nodes, row.steps_measured, row.last_step) == (ranks, ranks, 35, 40)
        found = (row.step_time_s, row.step_time_s_low, row.step_time_s_high, row.step_time_s_spread)
        assert found == pytest.approx((step_s, low, high, high - low), rel=1e-12)
        assert (row.throughput, row.throughput_per_rank) == pytest.approx((rate, rate / ranks), rel=1e-12)
        assert (row.speedup, row.efficiency) == pytest.approx((rate / base["rate"], efficiency), rel=1e-12)
        ends = rate / quartiles[::-1]
        assert (row.throughput_low, row.throughput_high) == pytest.approx(tuple(ends), rel=1e-12)
        assert row.throughput_ideal == pytest.approx(base["rate"] * ranks / base["ranks"], rel=1e-12)
        noisy = ranks > 2 and max(np.ptp(quartiles), np.ptp(base["quartiles"])) > 0.1
        assert (row.noisy, row.oversubscribed) == (noisy, False)
        assert row.mfu_palm == pytest.approx(np.median(recorded_column(run, "mfu_palm").mean(0)), rel=1e-12)
        assert row.loss == recorded_column(run, "loss")[0, -1]
        if ranks > 2:
            assert list(row.losses.values()) == pytest.approx([*lost, 1 - efficiency - lost.sum()], abs=1e-12)
        else:
            assert row.losses == {}, "against itself"


# What holds for any measured times.

times = st.lists(st.floats(1e-3, 1e3), min_size=MIN_STEPS, max_size=20)


def in_memory(name: str, ranks: int, step_times: list[float]) -> Point:
    place = RankPlace(0, "n1", "boot", "cpu", "AMD EPYC 7763", cores=1024, threads=1)
    environment = Environment(
        ranks=(place,) * ranks, weak_scaling=False, mesh={"strategy": "ddp"}, global_batch=64, micro_batch=64,
        accumulation=1, block_size=128, precision="fp32", model="m", parameters=1000,
    )  # fmt: skip
    times = np.array([100.0] * WARMUP_STEPS + step_times)
    one = np.ones(len(times), np.int64)
    steps = Steps(one.cumsum(), one, times, 8192.0 * one, np.nan * one, one, 0.0 * one, {})
    return Point(
        path=Path(name), overrides=(f"nodes={ranks}",), state=PointState.FINISHED, environment=environment, steps=steps,
        last_step=len(step_times), loss=1.0, unit="tokens",
    )  # fmt: skip


@given(measured=st.dictionaries(st.integers(1, 1024), times, min_size=2, max_size=6), data=st.data())
def test_efficiency_is_speedup_over_ranks_whatever_the_order(
    measured: dict[int, list[float]], data: st.DataObject
) -> None:
    points = [in_memory(f"p{ranks}", ranks, step_times) for ranks, step_times in measured.items()]
    table = tabulate(Selection(Path("sweep"), ()), points)
    assert column(table.rows, "ranks") == sorted(measured)
    rows: list[Any] = list(table.rows)
    base = rows[0]
    assert base.speedup == base.efficiency == 1
    for row in rows:
        assert row.step_time_s_low <= row.step_time_s <= row.step_time_s_high
        assert row.throughput * row.step_time_s == pytest.approx(8192)
        assert row.efficiency * row.ranks / base.ranks == pytest.approx(row.speedup)
        assert row.efficiency == pytest.approx(row.throughput_per_rank / base.throughput_per_rank)
        assert row.efficiency == pytest.approx(row.throughput / row.throughput_ideal)
    shuffled = data.draw(st.permutations(points))
    assert tabulate(Selection(Path("sweep"), ()), shuffled).rows == table.rows


@pytest.mark.parametrize(("base", "other"), [(0.02, 0.02), (0.3, 0.02), (0.02, 0.3), (0.3, 0.3)])
def test_an_efficiency_of_noisy_step_times_is_marked_and_says_how_far_off_it_may_be(base: float, other: float) -> None:
    random = np.random.default_rng(7)
    times = {1: 0.266 * random.lognormal(0, base, 40), 2: 0.2 * random.lognormal(0, other, 40)}
    low, middle, high = (np.array([np.percentile(of, q) for of in times.values()]) for q in (25, 50, 75))
    shares = (high - low) / middle
    table = tabulate(Selection(Path("sweep"), ()), [in_memory(f"nodes={n}", n, list(of)) for n, of in times.items()])
    one, two = table.rows
    assert (one.noisy, two.noisy) == (False, bool(max(shares) > 0.1)), shares
    assert two.efficiency == pytest.approx(middle[0] / middle[1] / 2)
    assert two.efficiency_low is not None and two.efficiency_high is not None
    if two.noisy:  # the mark and the interval say the same
        ends = f"nodes=2 {100 * two.efficiency_low:.1f} to {100 * two.efficiency_high:.1f} %"
        assert sum(ends in note for note in table.notes) == 1
    exact = f"{100 * two.efficiency:.1f} %"
    assert (efficiency_text(one), efficiency_text(two)) == (
        "100.0 %",
        f"~{100 * two.efficiency:.0f} %" if two.noisy else exact,
    )
    noted = [note for note in table.notes if note.startswith("~")]
    assert len(noted) == two.noisy
    for name, share in zip(("nodes=1", "nodes=2"), shares, strict=True):
        assert (f"{name} ({100 * share:.0f} %)" in "".join(noted)) is bool(share > 0.1)
