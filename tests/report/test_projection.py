"""Projections of a sweep: fits against closed forms, the held-out point, failures, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scale.projection import TITLES, predict
from gpt.planning import CPU_FLOPS_PER_S
from launch.config import ClusterKind
from launch.project.__main__ import main, parse_node_counts
from launch.project.models import Measured, cost_model, fit_costs, fit_trend, minimum, spread_of
from launch.report.goodput import Failures
from launch.report.read import Floats
from launch.runs.folder import RunFolder
from launch.runs.measured import LinkFit, Network, network_document
from launch.workload import StepTime
from tests.report.conftest import RunBuilder
from tests.support.commands import call, run
from tests.support.planning import plan, refused

MODEL = ("data=synthetic", "name=project", "eval.interval=0", "optim.max_steps=40")


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("8", [8]),
        ("8,16,32", [8, 16, 32]),
        ("8,16,...,100", [8, 16, 32, 64, 100]),
        ("8,...,64", [8, 16, 32, 64]),
        ("3,9,...,81", [3, 9, 27, 81]),
    ],
)
def test_sizes_are_a_list_or_go_on(text: str, sizes: list[int]) -> None:
    assert parse_node_counts(text) == sizes


def test_what_is_no_list_of_sizes_is_refused() -> None:
    for text in ("", "0", "x", "...,8", "8,...", "8,16,...,16", "1,2,...,x", "-1", "8²", "8,4,...,64"):
        refused(parse_node_counts, text, fix="--nodes 8,16")


def test_the_interval_between_saves_loses_least() -> None:
    """Against a search over intervals of the same loss: each save, and half an interval and a restart a failure."""
    failures = Failures(mtbf_node_h=1000.0, save_s=12.0, restart_s=90.0)
    mtbf = 3600 * 1000.0 / 500
    assert failures.interval_s(500) == pytest.approx(math.sqrt(2 * 12 * mtbf))

    def lost(interval: float) -> float:
        return 12 / interval + (interval / 2 + 90) / mtbf

    best = minimum(lost, 1.0, mtbf)
    assert failures.interval_s(500) == pytest.approx(best, rel=1e-3)
    assert 1 - failures.goodput(500) == pytest.approx(lost(best), rel=0.05)  # a save is part of its own interval
    assert Failures(1000.0, 12.0, 90.0).goodput(10**6) == 0.0
    assert Failures(1000.0, 0.0, 90.0).goodput(500) == pytest.approx(1 - 90 / mtbf)


def points(seconds: Callable[[int], float], *sizes: int) -> list[Measured]:
    """Points that took just so long."""
    return [Measured(n, n, seconds(n), seconds(n), seconds(n)) for n in sizes]


@pytest.mark.parametrize("smallest", [1, 2])
def test_rate_and_links_are_found_again(smallest: int) -> None:
    """Alpha and beta of a ring and a rate that the model does not know; half of the all-reduce is hidden."""

    def costs(nodes: int, rate: float, links: float) -> StepTime:
        compute = 8.0 / nodes / rate
        ring = 2 * (nodes - 1) * (1e-3 / links + 4e9 / nodes / (1e9 * links))
        return StepTime(compute, communication_s={"dp": max(0.1 * ring, ring - compute / 2)})

    def true(nodes: int) -> float:
        return costs(nodes, 0.37, 2.9).step_s

    factors = fit_costs(points(true, smallest, 4, 8), costs)
    assert factors == pytest.approx((0.37, 2.9), rel=1e-3)
    for nodes in (16, 512):
        step = cost_model(costs, *factors).at(nodes)
        assert step.step_s == pytest.approx(true(nodes), rel=1e-3)
        assert sum(step.by_cause.values()) == pytest.approx(step.step_s)


def test_a_trend_is_found_again_and_has_no_negative_term() -> None:
    def amdahl(ranks: int) -> float:
        return 0.2 + 1.8 / ranks

    assert fit_trend(points(amdahl, 1, 2), is_weak=False) == pytest.approx((1.8, 0.2, 0.0))

    def tree(ranks: int) -> float:
        return 0.5 + 1.5 / ranks + 0.01 * math.log2(ranks)

    assert fit_trend(points(tree, 1, 2, 8, 32), is_weak=False) == pytest.approx((1.5, 0.5, 0.01))
    assert fit_trend(points(lambda n: 1 + 0.1 * math.log2(n), 1, 2, 4), is_weak=True) == pytest.approx((0.0, 1.0, 0.1))
    better_than_ideal = fit_trend(points(lambda n: n**-1.2, 1, 2, 4), is_weak=False)
    assert min(better_than_ideal) >= 0.0


def ddp_step_s(facts: Mapping[str, Any], ranks: int, rate: float = 0.1, links: float = 0.01) -> float:
    """A step of DDP by hand: compute, and of the ring what the last backward pass does not hide, a bucket at least.

    Loopback or 10 Gbit/s, 5 us a message; buckets of 25 MiB; a model smaller than one is a bucket by itself.
    """
    elements = facts["parameters"]
    compute = facts["tokens_per_step"] / ranks * facts["flops_per_token"] / (CPU_FLOPS_PER_S * rate)
    steps = 2 * (ranks - 1)
    ring = steps * (5e-6 / links + 4 * elements / ranks / (1e9 * links))
    bucket = steps * (5e-6 / links + min(4 * elements, 25 * 2**20) / ranks / (1e9 * links))
    return compute + max(bucket, ring - 2 / 3 * compute)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on 1, 2 and 4 nodes of a cluster, each step as long as ``ddp_step_s`` has it at rate 0.1 and links 0.01."""
    folder = tmp_path_factory.mktemp("sweep")
    for nodes in (1, 2, 4):
        words = [*MODEL, f"nodes={nodes}", f"run_dir={folder / f'n{nodes}'}"]
        seconds = ddp_step_s(plan(*words, kind=ClusterKind.local, write=True).promised.facts, nodes)
        builder = RunBuilder(folder / f"n{nodes}", nodes, nodes, (f"nodes={nodes}", *MODEL), machines=nodes)
        builder.attempt().steps(1, [seconds] * 12).finished()
    return folder


@pytest.fixture
def gpt_sweep(swept: Path, tmp_path: Path) -> Path:
    """A copy of the runs for one test."""
    return shutil.copytree(swept, tmp_path / "project")


def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    """The rows of ``projection.csv`` by nodes."""
    with (folder / "projection.csv").open() as file:
        return {int(row["nodes"]): row for row in csv.DictReader(file)}


def test_a_sweep_of_the_gpt_is_projected(gpt_sweep: Path) -> None:
    text = run(f"launch.project {gpt_sweep} --nodes 8,16,32 --mtbf-hours 5000", cwd=gpt_sweep)
    assert "held out: 4 nodes, predicted from nodes=1, 2" in text
    assert "no goodput: nodes=4 recorded no save" in text
    assert "not in it: slow ranks (nodes=4 lacks each rank's waits, comm_s), congestion" in text
    assert "refused: nodes=32" in text and "optim.global_batch=16 is not a multiple of 32" in text
    rows = rows_of(gpt_sweep)
    assert [row["is_measured"] for row in rows.values()] == ["True"] * 3 + ["False"] * 3
    known = json.loads((gpt_sweep / "n4" / "plan.json").read_text())
    for nodes in (8, 16):
        expected = ddp_step_s(known, nodes)
        row = rows[nodes]
        # The cost model counts attention by what the kernel computes, a little less than the FLOPs of the plan.
        assert float(row["step_s"]) == pytest.approx(expected, rel=0.02)
        assert float(row["low_s"]) <= float(row["step_s"]) <= float(row["high_s"])
        assert float(row["throughput"]) == pytest.approx(known["tokens_per_step"] / float(row["step_s"]))
        first = float(rows[1]["step_s"])
        assert float(row["efficiency"]) == pytest.approx(first / (nodes * float(row["step_s"])))
    assert rows[32]["step_s"] == ""
    document = json.loads((gpt_sweep / "projection.json").read_text())
    assert abs(document["held_out"]["error"]) < 0.02
    parts = document["rows"][3]["parts"]
    assert sum(parts.values()) == pytest.approx(document["rows"][3]["step_s"])
    assert (gpt_sweep / "projection.png").read_bytes().startswith(b"\x89PNG")


def test_a_slow_rank_of_the_gpt_is_told_apart(gpt_sweep: Path) -> None:
    """The last rank of each point takes a tenth longer, for which the others wait: no compute and no link is slower."""
    own_s = {}
    for nodes in (2, 4):
        folder = RunFolder(gpt_sweep / f"n{nodes}")
        for rank in range(nodes):
            records = folder.metrics(rank).read_text().splitlines()
            even = json.loads(records[0])["step_time_s"]
            late = 0.1 * even
            changed = {"step_time_s": even + late * (nodes - 1) / nodes, "comm_s": 0.0 if rank == nodes - 1 else late}
            folder.metrics(rank).write_text("".join(f"{json.dumps(json.loads(r) | changed)}\n" for r in records))
        own_s[nodes] = [even + late * (nodes - 1) / nodes - late] * (nodes - 1) + [even + late * (nodes - 1) / nodes]
    call(main, gpt_sweep, "--nodes", 8)
    document = json.loads((gpt_sweep / "projection.json").read_text())
    _, two, four, eight = document["rows"]
    assert two["stragglers_s"] == pytest.approx(max(own_s[2]) - statistics.mean(own_s[2]))
    assert four["stragglers_s"] == pytest.approx(max(own_s[4]) - statistics.mean(own_s[4]))
    grown = 1.42360 / 1.02938  # expected maxima of 8 and of 4 standard normal draws
    assert eight["stragglers_s"] == pytest.approx(grown * four["stragglers_s"] / 2, rel=1e-4)  # half of the work
    assert eight["parts"]["stragglers"] == eight["stragglers_s"]
    known = json.loads((gpt_sweep / "n4" / "plan.json").read_text())
    assert eight["step_s"] - eight["stragglers_s"] == pytest.approx(ddp_step_s(known, 8), rel=0.02)


def test_goodput_falls_with_the_nodes(gpt_sweep: Path) -> None:
    run = RunBuilder(gpt_sweep / "n4")
    run.event("agent_started", job="j", nodes=4, gpus=None, price_per_gpu_hour=None, allocated_at=1e9, limit_s=1e4)
    run.event("saved", attempt=1, step=5, seconds=3.0).event("agent_ended", job="j", ended_at=1e9 + 100)
    call(main, gpt_sweep, "--nodes", "8,16", "--mtbf-hours", 50)
    rows = rows_of(gpt_sweep)
    goodput = [float(rows[nodes]["goodput"]) for nodes in (4, 8, 16)]
    assert 1 > goodput[0] > goodput[1] > goodput[2] > 0


def test_measured_links_are_used(gpt_sweep: Path, tmp_path: Path) -> None:
    """Each collective as it was measured: the all-reduce, which is all that DDP needs, as the steps were made."""
    fits = {"all_reduce": LinkFit(5e-4, 1e7), "all_gather": LinkFit(1.0, 1.0)}
    links = tmp_path / "network.json"
    links.write_text(json.dumps(network_document(Network(1, {"inter_node": fits}), {"nodes": 2})))
    words = (gpt_sweep, "--nodes", 8, "--network", links)
    assert "links at 1 times the assumed bandwidth" in call(main, *words)
    assert abs(json.loads((gpt_sweep / "projection.json").read_text())["held_out"]["error"]) < 0.02
    result = predict("ddp", gpt_sweep, links)  # as benchmarks/scale/projection.py does for its runs
    assert abs(result.held_out.error) < 0.02 and result.held_out.fitted_to == (1, 2)
    assert 0 < result.link_share < 1 and len(result.cells) == len(TITLES)
    links.write_text('{"tiers": {}}')
    assert "type next: python -m launch.bench_network" in call(main, *words, status=2)


def script_run(path: Path, nodes: int, **known: Any) -> RunBuilder:
    """A planned run of a script on some nodes, which records what it knows of its work."""
    script = path.parent.parent / "train.py"
    script.write_text("")
    words = ["workload=script", f"script.path={script}", f"nodes={nodes}", f"run_dir={path}"]
    plan(*words, kind=ClusterKind.local, write=True)
    known = {"unit": "samples", **known}
    return RunBuilder(path, nodes, nodes, (f"nodes={nodes}",), script=known, machines=nodes).attempt()


@pytest.mark.parametrize("is_weak", [False, True])
def test_the_times_of_a_script_make_a_trend(is_weak: bool, tmp_path: Path) -> None:
    def seconds(nodes: int) -> float:
        return 0.3 + (0.02 * math.log2(nodes) if is_weak else 1.2 / nodes)

    for nodes in (1, 2, 4):
        known = {"work_per_step": 64 * nodes, "weak_scaling": True} if is_weak else {"work_per_step": 64}
        builder = script_run(tmp_path / "mine" / f"n{nodes}", nodes, **known)
        builder.records([seconds(nodes)] * 12, step_time_s=seconds(nodes)).ran(20)
    call(main, tmp_path / "mine", "--nodes", "8,...,64")
    rows = rows_of(tmp_path / "mine")
    for nodes in (8, 16, 32, 64):
        assert float(rows[nodes]["step_s"]) == pytest.approx(seconds(nodes), rel=1e-6)
        work = 64 * nodes if is_weak else 64
        assert float(rows[nodes]["throughput"]) == pytest.approx(work / seconds(nodes), rel=1e-6)


def test_what_cannot_be_projected_is_refused(gpt_sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "links.yaml").write_text("between: 3\n")
    nodes = ("--nodes", "8")
    for words, said in {
        (gpt_sweep / "n1", *nodes): "step times of nodes=1",
        (gpt_sweep, *nodes, "--gpu", "H100"): "--nodes --gpu",
        (gpt_sweep, *nodes, "--network", tmp_path / "none.yaml"): "No such file",
        **{(gpt_sweep, *nodes, "--mtbf-hours", hours): f"--mtbf-hours {hours}" for hours in ("0", "nan", "inf")},
        (): "no arguments",
        (gpt_sweep, "elsewhere", *nodes): f"{gpt_sweep} elsewhere --nodes",
        (gpt_sweep,): f"found: {gpt_sweep}\n",
        (tmp_path / "links.yaml", *nodes): "links.yaml, which is a file",
        (tmp_path / "nowhere", *nodes): "no folder",
    }.items():
        refusal = call(main, *words, status=2)
        assert said in refusal and refusal.count("\n") >= 2 and "type next: " in refusal, refusal
        assert "launch.report" not in refusal, "another command"
    refusal = call(main, gpt_sweep, "--nodes", "8,16", "--sweep", 3, status=2)
    assert f"type next: python -m launch.project {gpt_sweep} --nodes 8,16\n" in refusal
    assert not (gpt_sweep / "projection.csv").exists()


# Stragglers: the excess of the slowest rank, and a sweep that records own times.


def own_times(seed: int, ranks: int, lasting: float, noise: float, steps: int = 120) -> Floats:
    """Own times of some ranks around 1 s: what a rank is slower throughout, its noise, and what all have in common."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.05, size=(steps, 1))
    return 1 + common + generator.normal(0, lasting, ranks) + generator.normal(0, noise, (steps, ranks))


@pytest.mark.parametrize("lasting, noise", [(0.0, 0.02), (0.03, 0.0)])
def test_the_slowest_of_more_ranks_is_as_slow_as_simulated(lasting: float, noise: float) -> None:
    spreads = [spread_of(own_times(seed, 8, lasting, noise)) for seed in range(150)]
    for ranks in (2, 4, 8, 64):
        simulated = [(own - own.mean(axis=1, keepdims=True)).max(axis=1).mean() for own in (
            own_times(1000 + seed, ranks, lasting, noise, steps=20) for seed in range(150)
        )]  # fmt: skip
        found = [spread.share(ranks) * spread.own_s for spread in spreads]
        error = math.hypot(np.std(simulated), np.std(found)) / math.sqrt(150)
        assert np.mean(found) == pytest.approx(np.mean(simulated), abs=4 * error)


def test_stages_of_a_pipeline_are_no_slow_ranks() -> None:
    own = own_times(4, 4, 0.0, 0.01) + np.array([0.0, 0.2, 0.2, 0.4])
    assert spread_of(own).share(4) > 0.15
    assert 0.005 < spread_of(own, has_stages=True).share(4) < 0.015
