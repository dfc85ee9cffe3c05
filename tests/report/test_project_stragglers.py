"""Stragglers of a projection: expected maxima by closed forms and simulations, and a sweep that tells own times."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan, write_run
from launch.project.__main__ import main
from launch.project.models import Sample, maximum_weights, normal_maximum, spread_of
from launch.project.projection import project, read_sweep
from launch.report.read import Floats
from launch.report.selection import select
from launch.runs.records import append_records
from tests.report.conftest import RunBuilder


def test_weights_are_those_of_every_choice() -> None:
    values = np.sort(np.random.default_rng(1).gumbel(size=9))
    for draws in range(1, 10):
        choices = [max(choice) for choice in itertools.combinations(values.tolist(), draws)]
        assert maximum_weights(9, draws) @ values == pytest.approx(np.mean(choices), rel=1e-12)
    places = np.arange(1, 10**6 + 1)  # of M numbers the largest of N is N (M + 1) / (N + 1) on average
    assert maximum_weights(10**6, 700) @ places == pytest.approx(700 * (10**6 + 1) / 701, rel=1e-9)


def test_maxima_of_exponential_and_uniform_samples_are_those_in_closed_form() -> None:
    """Harmonic numbers, and N / (N + 1); means over samples, held against their standard errors."""
    generator = np.random.default_rng(2)
    exponential = [Sample(np.sort(generator.exponential(size=2500))) for _ in range(60)]
    uniform = [Sample(np.sort(generator.random(2500))) for _ in range(60)]
    assert exponential[0].reach == 50
    for draws in (1, 2, 10, 50, 5000):
        harmonic = sum(1 / k for k in range(1, draws + 1))
        of_exponential = [sample.expected_maximum(draws) for sample in exponential]
        error = np.std(of_exponential, ddof=1) / math.sqrt(60)
        assert np.mean(of_exponential) == pytest.approx(harmonic, abs=4 * error + 0.02)  # H(N) is ln N + 0.58 + 1 / 2N
        if draws <= 50:
            assert np.mean([s.expected_maximum(draws) for s in uniform]) == pytest.approx(draws / (draws + 1), abs=0.01)
    beyond = np.mean([sample.expected_maximum(500) for sample in uniform])
    assert 500 / 501 < beyond < 1.05  # an upper estimate where values are bounded


def test_maxima_of_normal_draws() -> None:
    assert normal_maximum(1) == pytest.approx(0, abs=1e-6)
    assert normal_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-5)
    assert normal_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-5)
    maxima = np.random.default_rng(3).normal(size=(4000, 256)).max(axis=1)
    assert normal_maximum(256) == pytest.approx(maxima.mean(), abs=4 * maxima.std() / math.sqrt(4000))


def own_times(seed: int, ranks: int, lasting: float, noise: float, steps: int = 120) -> Floats:
    """Own times of some ranks around 1 s: what a rank is slower throughout, its noise, and what all have in common."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.05, size=(steps, 1))
    return 1 + common + generator.normal(0, lasting, ranks) + generator.normal(0, noise, (steps, ranks))


@pytest.mark.parametrize("lasting, noise", [(0.0, 0.02), (0.03, 0.01), (0.03, 0.0)])
def test_the_slowest_of_more_ranks_is_as_slow_as_simulated(lasting: float, noise: float) -> None:
    spreads = [spread_of(own_times(seed, 8, lasting, noise)) for seed in range(150)]
    for ranks in (2, 4, 8, 64):
        simulated = [(own - own.mean(axis=1, keepdims=True)).max(axis=1).mean() for own in (
            own_times(1000 + seed, ranks, lasting, noise, steps=20) for seed in range(300)
        )]  # fmt: skip
        found = [spread.share(ranks) * spread.own_s for spread in spreads]
        error = math.hypot(np.std(simulated) / math.sqrt(300), np.std(found) / math.sqrt(150))
        # From eight ranks a standard deviation is 3.5 % too small on average, and an exponential tail is too long.
        assert np.mean(found) == pytest.approx(np.mean(simulated), abs=4 * error, rel=0.1 if ranks == 64 else 1e-9)
    measured = own_times(0, 8, lasting, noise)
    exact = (measured.max(axis=1) - measured.mean(axis=1)).mean()
    assert spreads[0].share(8) * spreads[0].own_s == pytest.approx(exact, rel=1e-9)
    assert np.mean([one.lasting for one in spreads]) == pytest.approx(lasting, rel=0.1, abs=0.001)
    assert np.mean([one.noise.values.std() for one in spreads]) == pytest.approx(noise, rel=0.02)


def test_stages_of_a_pipeline_are_no_slow_ranks() -> None:
    own = own_times(4, 4, 0.0, 0.01) + np.array([0.0, 0.2, 0.2, 0.4])
    assert spread_of(own).share(4) > 0.15
    assert 0.005 < spread_of(own, has_stages=True).share(4) < 0.015
    assert spread_of(own, has_stages=True).lasting == 0


def sweep_of(folder: Path, make_run: type[RunBuilder], *, steps: int, with_waits: bool = True) -> None:
    """A script's steps in weak scaling on 1 to 8 nodes: the slowest of exponential own times, and an exchange."""
    script = folder.parent / "train.py"
    script.write_text("")
    generator = np.random.default_rng(5)
    for nodes in (1, 2, 4, 8):
        path = folder / f"n{nodes}"
        words = ["workload=script", f"script.path={script}", f"nodes={nodes}", f"run_dir={path}"]
        composed = compose_launch(words)
        write_run(make_plan(typed_config(composed), words, ClusterKind.local), composed, words)
        known = {"unit": "samples", "work_per_step": 64 * nodes, "weak_scaling": True}
        builder = make_run(path, nodes, nodes, (f"nodes={nodes}",), script=known, machines=nodes).attempt()
        own = 1 + generator.exponential(0.1, size=(steps, nodes))
        times = own.max(axis=1) + 0.02 * math.log2(nodes)
        for rank in range(nodes):
            rows = [
                {"step": s + 1, "attempt": 1, "step_time_s": times[s], "time": 1e9 + s}
                | ({"comm_s": times[s] - own[s, rank]} if with_waits else {})
                for s in range(steps)
            ]
            append_records(builder.run.metrics(rank), rows)
        builder.ran(2000)


def test_a_sweep_that_tells_own_times_has_stragglers_in_its_projection(
    tmp_path: Path, make_run: type[RunBuilder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    sweep_of(folder, make_run, steps=600)
    assert main([str(folder), "--nodes", "16,64,512"]) == 0
    text = capsys.readouterr().out
    assert "not in it: congestion" in text and "expected maximum over the ranks" in text
    assert "own times of 8 ranks differ" in text and "beyond 70 ranks by an exponential tail" in text
    document = json.loads((folder / "projection.json").read_text())
    rows = {row["nodes"]: row for row in document["rows"]}
    assert rows[1]["stragglers_s"] is None  # one rank waits for nobody
    for nodes in (2, 8, 16, 64, 512):
        late = 0.1 * (sum(1 / k for k in range(1, nodes + 1)) - 1)  # of exponential draws: harmonic numbers
        assert rows[nodes]["stragglers_s"] == pytest.approx(late, rel=0.12)
        if nodes > 8:
            parts = rows[nodes]["parts"]
            assert parts["stragglers"] == rows[nodes]["stragglers_s"]
            assert sum(parts.values()) == pytest.approx(rows[nodes]["step_s"])
            assert rows[nodes]["step_s"] == pytest.approx(1.1 + late + 0.02 * math.log2(nodes), rel=0.03)
    assert "stragglers" in (folder / "projection.md").read_text()
    assert "stragglers_s" in (folder / "projection.csv").read_text().splitlines()[0]


def test_without_waits_slow_ranks_are_said_to_be_left_out(tmp_path: Path, make_run: type[RunBuilder]) -> None:
    folder = tmp_path / "mine"
    sweep_of(folder, make_run, steps=20, with_waits=False)
    found = project(read_sweep(select(folder, None)), [16], None)
    assert "slow ranks (nodes=2 does not tell each rank's waits, comm_s, in every step)" in found.notes[-1]
    assert all(row.stragglers_s is None and "stragglers" not in row.parts for row in found.rows)
