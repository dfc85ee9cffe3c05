"""Measured links: fits against closed forms, the file and who reads it, and one measurement on local ranks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from gpt.planning import Group, Link, Machine, strided_group, with_network
from launch.bench_network.__main__ import Sample, fit_link, fit_network, main
from launch.bench_network.measure import group_ranks, tier_group_sizes
from launch.runs.measured import COLLECTIVES, LinkFit, Network, network_document, read_network, terms
from tests.support.commands import call, run
from tests.support.planning import refused

SIZES = [4096 * 8**power for power in range(5)]


def ring_s(collective: str, ranks: int, size: float, latency_s: float, rate: float) -> float:
    """Time of a collective, counted message by message: what a ring, a binomial tree, and a single send do."""
    part = size / ranks
    if collective == "send":
        return latency_s + size / rate
    if collective == "broadcast":
        holders, rounds = 1, 0
        while holders < ranks:
            holders, rounds = 2 * holders, rounds + 1
        return sum(latency_s + size / rate for _ in range(rounds))
    passes = 2 if collective == "all_reduce" else 1
    return sum(latency_s + part / rate for _ in range(passes) for _ in range(ranks - 1))


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_latency_and_bandwidth_are_found_again(collective: str) -> None:
    true = (35e-6, 2.5e9)
    sizes = [2] if collective == "send" else [2, 3, 8]
    exact = [
        Sample("inter_node", collective, ranks, size, ring_s(collective, ranks, size, *true))
        for ranks in sizes
        for size in SIZES
    ]
    fit = fit_link(collective, exact)
    assert (fit.latency_s, fit.bytes_per_s) == pytest.approx(true, rel=1e-6)
    assert fit.error < 1e-6
    for ranks in (*sizes, 64):
        assert fit.seconds(collective, ranks, 1e6) == pytest.approx(ring_s(collective, ranks, 1e6, *true), rel=1e-6)


def test_the_misfit_is_the_noise_of_the_samples() -> None:
    true, noise = (35e-6, 2.5e9), random.Random(1)
    samples = [
        Sample("inter_node", "all_reduce", k, n, ring_s("all_reduce", k, n, *true) * noise.gauss(1, 0.05))
        for k in (2, 4, 8)
        for n in SIZES
    ]
    fit = fit_link("all_reduce", samples)
    assert 0.02 < fit.error < 0.1 and fit.bytes_per_s == pytest.approx(true[1], rel=0.1)


def test_what_cannot_be_told_is_not_negative() -> None:
    """A latency below the clock, or a time that does not grow with the size."""
    falling = [Sample("intra_node", "send", 2, size, 1e-3 / (1 + power)) for power, size in enumerate(SIZES)]
    fit = fit_link("send", falling)
    assert fit.latency_s >= 0 and fit.bytes_per_s > 0 and math.isfinite(fit.bytes_per_s)
    pure = [Sample("intra_node", "send", 2, size, size / 1e9) for size in SIZES]
    assert fit_link("send", pure).bytes_per_s == pytest.approx(1e9)
    assert fit_link("send", pure).latency_s == pytest.approx(0, abs=1e-9)


def test_groups_of_a_tier_are_all_ranks_once() -> None:
    assert [tier_group_sizes(most) for most in (1, 3, 6, 8)] == [[], [3], [2, 6], [2, 8]]
    assert group_ranks("intra_node", 2, nodes=2, each=4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert group_ranks("inter_node", 2, nodes=2, each=3) == [[0, 3], [1, 4], [2, 5]]
    for tier, size in (("intra_node", 4), ("inter_node", 2)):
        groups = group_ranks(tier, size, nodes=4, each=4)
        assert sorted(rank for group in groups for rank in group) == list(range(16))


def fits(latency_s: float, rate: float) -> dict[str, LinkFit]:
    """Fits of all collectives, each with a rate of its own."""
    return {name: LinkFit(latency_s, rate * (1 + index)) for index, name in enumerate(COLLECTIVES)}


NETWORK = Network(4, {"intra_node": fits(1e-6, 100e9), "inter_node": fits(20e-6, 3e9)})
MACHINE, ALONE = (Machine("CPU", 1e9, 2**30, ranks, Link(9.0, 9.0), Link(9.0, 9.0)) for ranks in (4, 1))
"""With four ranks on a node, and with one."""


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_planner_takes_each_collective_as_measured(collective: str) -> None:
    machine = with_network(MACHINE, NETWORK)
    rate = 1 + COLLECTIVES.index(collective)
    inside, between = strided_group(machine, 4, 1), strided_group(machine, 2, 4)
    for group, latency, bandwidth in ((inside, 1e-6, 100e9 * rate), (between, 20e-6, 3e9 * rate)):
        expected = ring_s(collective, group.ranks, 1e8, latency, bandwidth)
        assert group.seconds(collective, 1e8) == pytest.approx(expected)
    # A ring over two whole nodes has the adapters of all four ranks of a node.
    both = strided_group(machine, 8, 1)
    assert both.seconds(collective, 1e8) == pytest.approx(ring_s(collective, 8, 1e8, 20e-6, 4 * 3e9 * rate))


def test_ranks_share_the_adapters_of_their_node() -> None:
    """Measured with four ranks of a node sending; a run with one has the whole node's adapters."""
    assert with_network(ALONE, NETWORK).inter_node.rates("all_reduce") == (20e-6, 12e9)
    only = Network(4, {"inter_node": NETWORK.tiers["inter_node"]})
    assert with_network(MACHINE, only).intra_node == MACHINE.intra_node  # not measured: as it was
    assert Group(8, MACHINE.inter_node).all_reduce(800.0) == pytest.approx(14 * (9 + 100 / 9))


def test_samples_correct_the_line_by_the_bytes_of_a_message(tmp_path: Path) -> None:
    """Cables that let 64 KiB pass at once: no line, but the same for each message of a ring, however many ranks."""

    def message_s(size: float) -> float:
        return 0.02 + max(0.0, size - 2**16) / 5e6

    sizes = [2**exponent for exponent in range(10, 22)]
    samples = [Sample("inter_node", "all_gather", 2, 2 * size, message_s(size)) for size in sizes]
    network = fit_network(samples, 1)
    assert network.tiers["inter_node"]["all_gather"].error > 0.1, "a line is off"
    path = tmp_path / "network.json"
    path.write_text(json.dumps(network_document(network, {"samples": [vars(sample) for sample in samples]})))
    link = with_network(ALONE, read_network(path)).inter_node
    for ranks in (2, 3, 8):
        for size in sizes:
            found = Group(ranks, link).all_gather(ranks * size)
            assert found == pytest.approx((ranks - 1) * message_s(size), rel=1e-9)
    between = Group(3, link).all_gather(3 * 1.5 * 2**18)
    assert between == pytest.approx(2 * message_s(1.5 * 2**18), rel=0.05)
    twice = link.faster(2)
    assert Group(3, twice).all_gather(3 * 2**16) == pytest.approx(message_s(2**16))


def test_the_file_holds_what_was_fitted(tmp_path: Path) -> None:
    path = tmp_path / "network.json"
    path.write_text(json.dumps(network_document(NETWORK, {"nodes": 2})))
    found = read_network(path)
    assert found.ranks_per_node == 4
    for tier, of_tier in NETWORK.tiers.items():
        for name, fit in of_tier.items():
            again = found.tiers[tier][name]
            assert (again.latency_s, again.bytes_per_s) == pytest.approx((fit.latency_s, fit.bytes_per_s))
    assert terms("all_reduce", 1) == (0, 0) and terms("broadcast", 1) == (0, 0)


def damaged(**changes: object) -> str:
    document = network_document(NETWORK, {}) | changes
    return json.dumps({key: value for key, value in document.items() if value is not None})


LINK = {"latency_us": 1, "bandwidth_gb_per_s": 1}
DAMAGED = {
    "{": "JSONDecodeError: ",
    "[]": "TypeError: ",
    "{}": "'format'",
    damaged(format=9): "format 9",
    damaged(ranks_per_node=0): "ranks_per_node 0",
    damaged(tiers={}): "no tiers",
    damaged(tiers={"inter_node": {"send": LINK | {"latency_us": -1}}}): "latency_us -1",
    damaged(tiers={"inter_node": {"send": LINK | {"bandwidth_gb_per_s": 0}}}): "bandwidth_gb_per_s 0",
    damaged(tiers={"inter_node": {"send": {"latency_us": 1}}}): "'bandwidth_gb_per_s'",
}


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.json"
    refused(read_network, path, said="No such file")
    for text, said in DAMAGED.items():
        path.write_text(text)
        refused(read_network, path, found=said, fix="python -m launch.bench_network")


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    outputs = f"output_dir={tmp_path / 'outputs'}"
    for words, said in {
        ("nodes=1", "ranks_per_node=1", "cluster=local"): "one rank",
        ("nodes=2", "cluster=local", "launch.detach=true"): "launch.detach=true",
        ("nodes=2", "--output", str(tmp_path / "none" / "network.json")): "none/network.json",
        ("nodes=2", "--budget-s", "0"): "--budget-s 0",
        ("nodes=2", "nonsense=1"): "nonsense",
    }.items():
        refusal = call(main, outputs, *words, status=2)
        assert said in refusal and "type next: " in refusal, refusal
    assert not (tmp_path / "outputs").exists()


def test_local_ranks_are_measured_and_the_planner_reads_it(tmp_path: Path) -> None:
    """Two nodes of two ranks on this machine, by the launcher's own road."""
    shape = ("nodes=2", "ranks_per_node=2", "cluster=local")
    output = tmp_path / "network.json"
    words = [*shape, f"output_dir={tmp_path}", "--output", str(output), "--max-mib", "1", "--budget-s", "0.01"]
    text = run("launch.bench_network", *words, cwd=tmp_path)
    assert "2 nodes x 2 ranks" in text and "gloo" in text and f"wrote {output}" in text
    found, document = read_network(output), json.loads(output.read_text())
    fitted = {tier: set(fits) for tier, fits in found.tiers.items()}
    assert fitted == {"intra_node": set(COLLECTIVES), "inter_node": set(COLLECTIVES)}
    measured = document["measured"]
    assert measured["nodes"] == 2 and measured["hosts"] and measured["software"]["torch"] and measured["time"]
    samples = [Sample(**sample) for sample in measured["samples"]]
    assert all(sample.seconds > 0 for sample in samples)
    assert {sample.bytes for sample in samples} == {4096, 32768, 262144}
    refitted = fit_network(samples, 2)
    for tier, of_tier in found.tiers.items():
        for name, fit in of_tier.items():
            assert refitted.tiers[tier][name].latency_s == pytest.approx(fit.latency_s)
