"""Every number of the scaling table, had again from the run folders by a few lines of numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report import build
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
        ends = efficiency * base["quartiles"] / quartiles[::-1] if ranks > 2 else np.ones(2)
        assert (row.efficiency_low, row.efficiency_high) == pytest.approx(tuple(ends), rel=1e-12)
        noisy = ranks > 2 and max(np.ptp(quartiles), np.ptp(base["quartiles"])) > 0.1
        assert (row.noisy, row.mfu_bf16, row.oversubscribed) == (noisy, None, False)
        assert row.mfu_palm == pytest.approx(np.median(column(run, "mfu_palm").mean(0)), rel=1e-12)
        assert row.loss == column(run, "loss")[0, -1]
        if ranks > 2:
            assert list(row.lost_to().values()) == pytest.approx([*lost, 1 - efficiency - lost.sum()], abs=1e-12)
        else:
            assert row.lost_to() == {}, "against itself"
