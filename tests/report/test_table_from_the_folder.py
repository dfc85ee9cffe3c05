"""Every number of the scaling table, had again from the run folders by a few lines of numpy."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import build
from launch.report.table import Row
from launch.runs.environment import GpuSample, append_samples
from launch.runs.records import append_records


def recorded(folder: Path, make_run: Any) -> None:
    """Points of 2, 4 and 8 ranks with times, phases and work that nothing chose."""
    chance = np.random.default_rng(11)
    for ranks in (2, 4, 8):
        built = make_run(folder / f"nodes={ranks}", ranks, ranks, (f"nodes={ranks}",)).attempt()
        step_s = chance.uniform(0.9, 1.1, 40) / ranks
        for rank in range(ranks):
            comm, data, optimizer = chance.uniform(0, 0.02, (3, 40))
            rows = [
                {"step": s + 1, "attempt": 1, "tokens": 2048 // ranks, "loss": 5 / (s + 1), "step_time_s": step_s[s]}
                | {"comm_s": comm[s], "data_wait_s": data[s], "optimizer_s": optimizer[s]}
                | {"mfu_palm": chance.uniform(0.3, 0.4), "time": 1e9 + s}
                for s in range(40)
            ]
            append_records(built.run.metrics(rank), rows)
        built.event("finished", attempt=1)


def column(run: Path, name: str) -> np.ndarray:
    """A field of all records after warm-up, [ranks, steps]."""
    files = sorted((run / "metrics").glob("rank_*.jsonl"))
    return np.array([[json.loads(line)[name] for line in file.open()][5:] for file in files])


def test_every_number_of_the_table_follows_from_the_records(tmp_path: Path, make_run: Any) -> None:
    recorded(tmp_path, make_run)
    rows = build(tmp_path).rows
    base: dict[str, Any] = {}
    for row in rows:
        run = tmp_path / row.point
        seconds, comm, data, opt = (column(run, f"{n}_s") for n in ("step_time", "comm", "data_wait", "optimizer"))
        low, step_s, high = np.quantile(seconds.max(0), (0.25, 0.5, 0.75))
        rate, ranks = np.median(column(run, "tokens").sum(0)) / step_s, len(seconds)
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
        assert (row.noisy, row.mfu_bf16, row.oversubscribed) == (noisy, None, False)
        assert row.mfu_palm == pytest.approx(np.median(column(run, "mfu_palm").mean(0)), rel=1e-12)
        assert row.loss == column(run, "loss")[0, -1]
        if ranks > 2:
            assert list(row.losses.values()) == pytest.approx([*lost, 1 - efficiency - lost.sum()], abs=1e-12)
        else:
            assert row.losses == {}, "against itself"


GPUS, PRICE = 4, 2.5


def interrupted(folder: Path, make_run: Any) -> Path:
    """A run of two nodes that waited, evaluated, saved, lost 7 steps with its first attempt, and sampled its GPUs."""
    chance = np.random.default_rng(3)
    place = {"device": "cuda:{local_rank}"}
    built = make_run(folder, GPUS, 2, ("nodes=2",), global_batch=GPUS, machines=2, extra_rank=place)
    now = [1.7e9]

    def event(name: str, after_s: float, **details: Any) -> None:
        now[0] += after_s
        built.event(name, time=now[0], **details)

    event("submitted", 0, cluster="slurm", job_id="1", nodes=2, candidate=0)
    begun = {"job": "1", "nodes": 2, "gpus": GPUS, "price_per_gpu_hour": PRICE, "limit_s": 1e5}
    event("agent_started", 311.5, allocated_at=now[0] + 311.5, **begun)
    for attempt, first, last in ((1, 1, 27), (2, 21, 60)):
        built.attempt(attempt)
        event("started", 12.25, attempt=attempt, world_size=GPUS)
        since, records = now[0], []
        now[0] += 30.0
        for step in range(first, last + 1):
            took = chance.uniform(0.9, 1.1)
            now[0] += took
            record = {"step": step, "attempt": attempt, "loss": 6 / step, "tokens": 512, "step_time_s": took}
            record |= {"mfu_palm": (mfu := chance.uniform(0.3, 0.4)), "mfu_bf16": mfu / 2, "time": now[0]}
            if step == first:
                record |= {"compile_s": took / 3} | ({"restore_s": 7.25} if attempt == 2 else {})
            records.append(record | ({"val_loss": 1.0} if step in (10, 40) else {}))
            now[0] += 0.125 if step == 33 else 4.5 if step in (10, 40) else 0.0
            if step in (20, 50):
                event("saved", 3.75, attempt=attempt, step=step, seconds=3.75)
        for rank in range(GPUS):
            append_records(built.run.metrics(rank), records)
        for node in range(2):
            rows = zip(np.arange(since, now[0], 5.0), chance.uniform(300, 700, (99, 2)), strict=False)
            append_samples(built.run, node, [watched(at, attempt, node, row) for at, row in rows])
        event("rank_failed" if attempt == 1 else "finished", 1.5, attempt=attempt, rank=1)
        if attempt == 1:
            event("attempt_ended", 0.5, attempt=1, cause="crashed", job="1")
    event("agent_ended", 2.5, job="1", ended_at=now[0] + 2.5)
    return folder


def watched(time: float, attempt: int, node: int, power: np.ndarray) -> GpuSample:
    gauges = {"throttle_reasons": 0x04 if power[0] > 600 else 0x01}
    return GpuSample(time, attempt, f"n{node + 1}", {f"b{i}": {**gauges, "power_w": power[i]} for i in (0, 1)})


def test_time_cost_and_energy_follow_from_the_files_of_the_run(tmp_path: Path, make_run: Any) -> None:
    run = interrupted(tmp_path, make_run)
    lines = {path: [json.loads(line) for line in path.open()] for path in sorted(run.rglob("*.jsonl"))}
    events, records = lines[run / "events.jsonl"], lines[run / "metrics" / "rank_00000.jsonl"]
    at = {(e["event"], e.get("attempt")): e["time"] for e in events if e["event"] != "saved"}
    begun, ended = events[1]["allocated_at"], events[-1]["ended_at"]
    attempt, step, took, time = (np.array([r[n] for r in records]) for n in ("attempt", "step", "step_time_s", "time"))
    counts = (attempt == 2) | (step < 21)
    gaps, save = (time - took)[1:] - time[:-1], sum(e.get("seconds", 0.0) for e in events)
    after = {name: np.array([name in r for r in records])[:-1] for name in ("val_loss",)}["val_loss"]
    between = np.diff(attempt) == 1
    compiled, restored = (np.array([r.get(f"{n}_s", 0.0) for r in records]) for n in ("compile", "restore"))
    own = [gaps[after].sum(), gaps[between].sum() - restored.sum(), ended - time[-1]]
    in_place_s = time[27] - took[27] - restored.sum() - at["attempt_ended", 1]  # the first of attempt 2, in its order
    cost_s = took[~counts].sum() + gaps[between].sum() + compiled[attempt == 2].sum()
    other = gaps[~after & ~between].sum() - save
    hours = (ended - begun) / 3600 * GPUS
    samples = [s for path, found in lines.items() if "telemetry" in str(path) for s in found]
    use = [(np.diff(t)[:, None] * (p[1:] + p[:-1]) / 2, np.diff(t).sum() * 2) for t, p in power_of(samples)]
    energy = sum(joules.sum() for joules, _ in use)
    mfu = np.array([r["mfu_bf16"] for r in records])[counts & ((step > 5) & (attempt == 1) | (step > 25))]
    parts = {
        "waiting": begun - events[0]["time"],
        "start": time[0] - took[0] - begun,
        "compile": compiled.sum(),
        "restore": 7.25,
        "steps": took[counts].sum() - compiled.sum(),
        "lost": took[~counts].sum(),
        "saves": save,
        **dict(zip(("evaluations", "restarts", "shutdown"), own, strict=True)),
        "other": other,
    }
    expected = {
        "goodput": (took[counts].sum() - compiled.sum()) / (ended - begun),
        "gpu_hours": hours,
        "cost": hours * PRICE,
        "cost_per_billion": hours * PRICE / (60 * 512 * GPUS / 1e9),
        "run_time_s": at["rank_failed", 1] - at["started", 1] + at["finished", 2] - at["started", 2],
        "attempts": 2,
        "energy_kwh": energy / 3.6e6,
        "joules_per_work": energy / (60 * 512 * GPUS),
        "gpu_power_w": energy / sum(seconds for _, seconds in use),
        "throttled": np.mean([reason == 4 for s in samples for reason in s["throttle_reasons"]]),
        "mfu_bf16": np.median(mfu),
        "interruptions": 1,
        "restarts_in_place": 1,
        "interrupted_s": cost_s,
        "interrupted_h": cost_s / 3600 * GPUS,
        "saved_in_place_h": (time[0] - took[0] - begun - in_place_s) / 3600 * GPUS,
        "saved_in_place_wait_s": begun - events[0]["time"],
    }
    (row,) = build(run).rows
    assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert row.parts_s == pytest.approx(parts, abs=1e-5) and row.causes_h == {"crashed": row.interrupted_h}
    assert sum(parts.values()) == pytest.approx(ended - events[0]["time"], abs=1e-5)
    told = {field.name for field in fields(Row) if "float" in str(field.type) or "int" in str(field.type)}
    assert told == expected.keys() | FROM_THE_RECORDS | {"parts_s", "causes_h", "losses"} | ELSEWHERE


FROM_THE_RECORDS = {
    *("nodes", "ranks", "throughput", "throughput_per_rank", "throughput_low", "throughput_high", "throughput_ideal"),
    *("step_time_s", "step_time_s_low", "step_time_s_high", "step_time_s_spread", "steps_measured", "last_step"),
    *("speedup", "efficiency", "mfu_palm", "loss"),
}
"""Columns of the test before."""
ELSEWHERE = {"efficiency_low", "efficiency_high", "ratio_to_first", "unread_lines", "step_time_resolution_s"}
"""Columns that come of random draws (test_series.py), of two folders (test_report_files.py), of lines that are no
records (test_read.py), or of lines that were read together (test_scripts.py)."""


def power_of(samples: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Times and power, [samples] and [samples, GPUs], of each host in each attempt."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault((sample["host"], sample["attempt"]), []).append(sample)
    return [(np.array([s["time"] for s in of]), np.array([s["power_w"] for s in of])) for of in found.values()]
