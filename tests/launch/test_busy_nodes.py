"""The doctor on nodes that others use: one slow measurement names nobody, and not every node can be excluded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.config.compose import compose_launch, typed_config
from launch.doctor import __main__ as command
from launch.doctor import machine, on_cluster, verdict
from launch.doctor.links import PASSES, merge
from launch.slurm import facts
from launch.slurm.facts import Facts, Folder, Level, warn
from tests.launch.test_doctor_verdict import all_rates, bad, results
from tests.support.doctor_facts import FACTS, LIMITS, request


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


def test_nodes_left_over_are_those_that_work_and_fit() -> None:
    # n1 and n3 work, n2 is drained; n3 lacks the feature.
    for words, left in (((), 1), (("nodes=2",), 0), (("cluster.constraint=fast",), 0), (("nodes=3",), 0)):
        assert command.left_over(FACTS, request(*words)) == left
    assert command.left_over(replace(FACTS, limits=None, slurm_problem="away"), request()) is None


def test_the_results_of_a_cluster_that_is_gone_tell_nothing(tmp_path: Path) -> None:
    here = on_cluster.name_of(replace(LIMITS, config={**LIMITS.config, "SlurmctldHost[0]": "ctl(10.0.0.9)"}))
    assert here == "sandbox ctl(10.0.0.9)"
    folder = tmp_path / ".doctor" / "20261122-000000-a"
    folder.mkdir(parents=True)
    for known, is_told in (
        ({"cluster": here, "time_s": 1e12}, True),
        ({"cluster": here, "time_s": 0.0}, False),
        ({"cluster": "sandbox ctl(10.9.9.9)", "time_s": 1e12}, False),
        ({}, False),
    ):
        (folder / "results.json").write_text(json.dumps({**results(all_rates(2), 2), **known}))
        assert (on_cluster.earlier_results(tmp_path, here) is not None) is is_told


def test_advice_that_only_repeats_the_command_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    again = warn("host name", "login resolves to 127.0.1.1", "why", "python -m launch.doctor --on-cluster ...")
    other = warn("disk", "full", "why", "output_dir=PATH")
    examined: tuple[list[Any], list[Any], list[Any], Facts] = ([again, other], [], [], FACTS)
    measured = results(all_rates(2), 2) | {"folder": "/none"}
    measured["nodes"][0]["unseen"] = [1]
    monkeypatch.setattr(command, "examine", lambda *_: examined)
    monkeypatch.setattr(command, "run_on_cluster", lambda *_: ([], measured))
    found, _ = command.diagnose(command.arguments(["--on-cluster"]), command.Console())
    assert found == [other]
    assert command.diagnose(command.arguments([]), command.Console())[0] == [again, other]


def test_gpus_that_the_launcher_would_ask_for_are_in_the_request() -> None:
    config = typed_config(compose_launch(["cluster=slurm", "optim.global_batch=96"]))
    (gpus, cpus) = command.settle_resources(config, replace(FACTS, torch="2.13.0"))
    assert config.cluster.gpus_per_node == 2 and gpus.level is Level.ok and "every node of low has 2" in gpus.found
    assert cpus.check == "cpus" and config.cluster.cpus_per_task == 8


def test_a_warning_is_said_once_for_all_points_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Folder("/home/ada/code/.venv", "/home/ada/code/.venv", "ext4")
    code = Folder("/home/ada/code", "/home/ada/code", "ext4")
    elsewhere = replace(inner, filesystem="overlay")
    for programs, said in (((code, inner), ["/home/ada/code"]), ((code, elsewhere), [code.path, elsewhere.path])):
        seen = replace(FACTS, machine=replace(FACTS.machine, programs=programs))
        assert [found.found.partition(":")[0] for found in machine.check_programs(seen)] == said
    monkeypatch.setattr(facts, "gather", lambda *_: replace(FACTS, torch="2.13.0+cpu"))
    points = [["cluster=slurm", f"nodes={nodes}", f"output_dir={tmp_path}"] for nodes in (1, 2)]
    _, found, requests, _ = command.examine(points)
    assert len(requests) == 2 and len(set(found)) == len(found)
    assert [one.level for one in found if one.check in ("gpus", "cpus")] == [Level.warning, Level.ok]


def test_nodes_with_too_few_cpus_are_named_together() -> None:
    measured = results(all_rates(4), 4)
    for index, cpus in ((0, 2), (2, 2), (3, 4)):
        measured["nodes"][index] |= {"cpus": cpus, "cpus_of_machine": 2}
    few, fewer = bad(measured)
    assert few.found.startswith("each of the agents on n1, n3 may use 2 CPUs") and few.level is Level.warning
    assert fewer.found.startswith("the agent on n4 may use 4 CPUs") and fewer.level is Level.error
