"""Findings of the doctor about measured nodes and links: who is slow or broken is named, and nobody else."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launch.doctor import verdict
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


@settings(deadline=None)  # the first example imports torch
@given(st.integers(1, 40))
def test_everybody_meets_everybody_once_and_nobody_two_at_a_time(count: int) -> None:
    from launch.doctor.links import schedule

    rounds = schedule(count)
    pairs = [pair for one in rounds for pair in one]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for one in rounds:
        busy = [index for pair in one for index in pair]
        assert len(busy) == len(set(busy))


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
