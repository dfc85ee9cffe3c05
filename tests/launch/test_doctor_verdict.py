"""Findings of the doctor about measured nodes and links: who is slow or broken is named, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.doctor import verdict
from launch.doctor.links import PASSES, merge, partner
from launch.slurm.facts import Finding, Level


def results(rates: dict[tuple[int, int], float], nodes: int) -> dict[str, Any]:
    """Results of a job on ``nodes`` sound nodes, with these Gbit/s from node to node."""
    limit = {"nofile": 65536, "core": 0, "memlock": -1}
    each = [
        {
            "index": i,
            "host": f"n{i + 1}",
            "cpus": 8,
            "cpus_of_machine": 64,
            "limits": limit,
            "python": "3.11.7",
            "torch": "2.13.0",
        }
        | {
            "filesystem": "nfs4",
            "names": {f"n{j + 1}": f"10.0.0.{j + 1}" for j in range(nodes)},
            "unseen": [],
            "error": "",
        }
        | {"ports": {str(j): "" for j in range(nodes) if j != i}}
        | ({"clock_offset_s": 0.01, "clock_error_s": 0.001} if i else {})
        for i in range(nodes)
    ]
    gpu = {"backend": "nccl", "device": "H200", "gpus_seen": 1, "matmul_tflops": 700.0}
    ranks: list[dict[str, Any]] = [
        {"rank": i, "node": i, "host": f"n{i + 1}", "links": [], **gpu} for i in range(nodes)
    ]
    for (a, b), rate in rates.items():
        for one, other in ((a, b), (b, a)):
            ranks[one]["links"].append({"node": other, "latency_us": 20.0, "bandwidth_gbit": rate})
    asked_for = {"nodes": nodes, "ranks_per_node": 1, "cpus_per_task": 8, "gpus_per_node": 1}
    about = {"job_id": "7", "state": "COMPLETED", "started": True, "folder": "/home/ada/.doctor/x", "logs": "/x/7"}
    return {**about, "asked": asked_for, "nodes": each, "ranks": ranks}


def all_rates(nodes: int, rate: float = 100.0) -> dict[tuple[int, int], float]:
    """The same rate between all nodes."""
    return {(a, b): rate for a in range(nodes) for b in range(a + 1, nodes)}


def bad(measured: dict[str, Any]) -> list[Finding]:
    """Warnings and errors about what was measured."""
    return [f for f in verdict.check_results(measured) if f.level is not Level.ok]


def test_sound_nodes_are_sound() -> None:
    assert bad(results(all_rates(4), 4)) == [] and verdict.is_shared(results(all_rates(2), 2))


@settings(deadline=None)
@given(st.data(), st.integers(3, 12))
def test_one_slow_node_is_the_only_one_named(data: st.DataObject, nodes: int) -> None:
    slow = data.draw(st.integers(0, nodes - 1))
    share = data.draw(st.floats(0.001, 0.38))
    rates = {
        pair: 100 * (data.draw(st.floats(0.1, 1.0)) * share if slow in pair else data.draw(st.floats(0.8, 1.0)))
        for pair in all_rates(nodes)
    }
    (found,) = bad(results(rates, nodes))
    assert found.found.startswith(f"every link of n{slow + 1} is slow") and found.fix == f"cluster.exclude=n{slow + 1}"


@settings(deadline=None)
@given(st.data(), st.integers(4, 12))
def test_one_slow_link_is_the_only_one_named(data: st.DataObject, nodes: int) -> None:
    a, b = data.draw(st.sampled_from(sorted(all_rates(nodes))))
    (found,) = bad(results({**all_rates(nodes), (a, b): 5.0}, nodes))
    assert f"the link n{a + 1} - n{b + 1}" in found.found and found.level is Level.error


@pytest.mark.parametrize("count", range(1, 41))
def test_each_node_meets_each_other_once_and_one_at_a_time(count: int) -> None:
    pairs = []
    for turn in range(count - 1 + count % 2):
        partners = {node: partner(node, turn, count) for node in range(count)}
        assert all(other is None or partners[other] == node != other for node, other in partners.items())
        pairs += [(node, other) for node, other in partners.items() if other is not None and node < other]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_every_other_thing_that_a_node_can_have_is_named() -> None:
    measured = results(all_rates(3), 3)
    first, second, third = measured["nodes"]
    first["unseen"] = [2]
    second["ports"]["0"] = "timed out"
    second["names"]["n1"] = "127.0.1.1"
    third["names"]["n2"] = "!Name or service not known"
    third |= {"clock_offset_s": -30.0, "cpus": 1, "torch": "2.12.0"}
    measured["ranks"][2] |= {"matmul_tflops": 300.0}
    measured["ranks"][1] |= {"gpus_seen": 0}
    told = {(f.check, f.level.value): f.found for f in bad(measured)}
    assert set(told) == {
        *(("shared folder", "error"), ("ports", "error"), ("host names", "warning"), ("clocks", "warning")),
        *(("cpus", "error"), ("software", "error"), ("gpus", "error"), ("gpus", "warning")),
    }
    assert "n1 does not see what n3 wrote" in told["shared folder", "error"]
    assert "n2 does not reach n1: timed out" in told["ports", "error"]
    assert "clock of n3 is -30.0 s off" in told["clocks", "warning"]
    assert "rank 2 on n3: 300 TFLOP/s" in told["gpus", "warning"] and told["gpus", "error"].startswith("n2")
    assert not verdict.is_shared(measured)
    third |= {"cpus": 4, "cpus_of_machine": 4}
    assert [f.fix for f in bad(measured) if f.check == "cpus"] == ["cluster.cpus_per_task=4"]


def test_links_that_were_not_measured_are_said_to_be_so_once() -> None:
    measured = results({}, 3)
    for node in measured["nodes"]:
        node["skipped"] = "not every node reaches every other"
    for rank in measured["ranks"]:
        del rank["links"]
    assert [(f.check, f.level) for f in bad(measured)] == [("links", Level.warning)]


def test_a_job_that_never_ran_or_left_nothing() -> None:
    nothing = results({}, 0) | {"asked": {"nodes": 2, "ranks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": None}}
    assert [f.level for f in verdict.check_results(nothing)] == [Level.error]
    assert [f.level for f in verdict.check_results(nothing | {"started": False, "state": "PENDING"})] == [Level.warning]
    partly = results(all_rates(2), 2)
    partly["asked"]["nodes"] = 3
    assert "2 of 3 nodes wrote their record: n1, n2" in bad(partly)[0].found


def with_ranges(nodes: int, slow: dict[tuple[int, int], tuple[float, float, float]]) -> dict[str, Any]:
    """Results of links that do 90 to 110 Gbit/s, but for those that are given as low, median and high."""
    measured = results(all_rates(nodes), nodes)
    for rank in measured["ranks"]:
        for link in rank["links"]:
            pair = (min(rank["rank"], link["node"]), max(rank["rank"], link["node"]))
            low, middle, high = slow.get(pair, (90.0, 100.0, 110.0))
            link |= {"low_gbit": low, "bandwidth_gbit": middle, "high_gbit": high}
    return measured


def test_a_link_is_measured_several_times_and_its_median_counts() -> None:
    passes = [{"latency_us": us, "bandwidth_gbit": rate, "bytes": 7.0} for us, rate in ((9, 90.0), (5, 4.0), (7, 96.0))]
    assert len(passes) == PASSES
    assert merge(passes) == {
        **{"latency_us": 5, "bandwidth_gbit": 90.0, "low_gbit": 4.0, "high_gbit": 96.0, "bytes": 7.0}
    }


def test_what_was_once_as_fast_as_the_others_is_not_called_slow() -> None:
    assert bad(with_ranges(4, {(1, 2): (4.0, 40.0, 95.0)})) == []
    (link,) = bad(with_ranges(4, {(1, 2): (4.0, 40.0, 60.0)}))
    assert link.found.startswith("the link n2 - n3: 40 Gbit/s")
    of_one = {(0, 3): (10.0, 30.0, 96.0), (1, 3): (10.0, 30.0, 60.0), (2, 3): (10.0, 30.0, 60.0)}
    assert not [found for found in bad(with_ranges(4, of_one)) if "every link" in found.found]
    (node,) = bad(with_ranges(4, {**of_one, (0, 3): (10.0, 30.0, 60.0)}))
    assert node.found.startswith("every link of n4 is slow")
    (well,) = [found for found in verdict.check_results(with_ranges(4, {})) if found.check == "bandwidth"]
    assert well.found.endswith("; single measurements 90 to 110")


@pytest.mark.parametrize(
    ("left_over", "fixes"),
    [
        (None, ["cluster.exclude=n1", "cluster.exclude=n3"]),
        (2, ["cluster.exclude=n1", "cluster.exclude=n3"]),
        (1, ["cluster.exclude=n1", "nodes=3 cluster.exclude=n3 (no node is left over"]),
        (0, ["nodes=3 cluster.exclude=n1 (no node is left over", "nodes=3 cluster.exclude=n3 (no node is left over"]),
    ],
)
def test_no_more_nodes_are_excluded_than_are_left_over(left_over: int | None, fixes: list[str]) -> None:
    measured = results(all_rates(4), 4)
    measured["asked"]["left_over"] = left_over
    for index in (0, 2):
        measured["nodes"][index]["error"] = "no room"
    found = [one.fix for one in bad(measured)]
    assert len(found) == 2 and all(fix.startswith(start) for fix, start in zip(found, fixes, strict=True))
    alone = results({}, 1)
    del alone["ranks"][0]["links"]
    alone["asked"]["left_over"], alone["nodes"][0]["error"] = 0, "no room"
    assert [one.fix for one in bad(alone)] == ["ask the site about n1: there is no other node to take its place"]


def test_nodes_with_too_few_cpus_are_named_together() -> None:
    measured = results(all_rates(4), 4)
    for index, cpus in ((0, 2), (2, 2), (3, 4)):
        measured["nodes"][index] |= {"cpus": cpus, "cpus_of_machine": 2}
    few, fewer = bad(measured)
    assert few.found.startswith("each of the agents on n1, n3 may use 2 CPUs") and few.level is Level.warning
    assert fewer.found.startswith("the agent on n4 may use 4 CPUs") and fewer.level is Level.error
