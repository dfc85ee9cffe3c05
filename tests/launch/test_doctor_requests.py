"""Requests to Slurm against a recorded cluster: what cannot run is named, and what to type repairs it."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.doctor.findings import Facts
from launch.slurm import checks as asked
from launch.slurm import limits
from launch.slurm.checks import Level
from tests.support.doctor_facts import (
    CONFIG,
    FACTS,
    LIMITS,
    NODE,
    NODES,
    PARTITIONS,
    complaints,
    request,
    with_config,
)


def test_scontrol_is_read_field_by_field() -> None:
    low, short, physics, _closed, _small = LIMITS.partitions
    assert LIMITS.number("DefMemPerNode") is None and low.is_default
    assert (low.max_time_min, low.grace_s, low.max_nodes, short.max_nodes) == (1440, 10, None, 2)
    assert physics.allow_accounts == ("phys", "chem") and low.allow_accounts is None
    first, second, third = LIMITS.nodes
    assert first.gres == (limits.Gres("gpu", "a100", 4),) and first.count("gpu") == first.count("gpu", "a100") == 4
    assert third.count("gpu") == 2 and third.count("gpu", "a100") == 0 and third.features == frozenset()
    assert not second.is_usable and second.reason == "bad fan [root@2026-11-20T10:00:00]"
    text = NODE.format(name="n", features="", gres="(null)", state="IDLE*", reason="")
    (silent,) = limits.parse_limits("", "", text).nodes
    assert not silent.is_usable and silent.gres == ()
    units = limits.gres("lustre:no_consume:4G,gpu:a100:2(S:0)")
    assert units == (limits.Gres("lustre", "", 4 * 1024**3), limits.Gres("gpu", "a100", 2))


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59))
def test_times_are_read_as_slurm_prints_them(days: int, hours: int, mins: int) -> None:
    text = f"{days}-{hours:02}:{mins:02}:00" if days else f"{hours:02}:{mins:02}:00"
    assert limits.minutes_of(text) == (days * 24 + hours) * 60 + mins
    assert limits.minutes_of("UNLIMITED") is None


def test_a_request_that_fits_has_no_complaint_but_the_known_ones() -> None:
    assert complaints(FACTS) == []
    assert complaints(FACTS, "cluster.partition=short", "cluster.timeout_min=30") == []


@pytest.mark.parametrize(
    ("words", "check", "told"),
    [
        (["cluster.partition=loww"], "partition", "loww"),
        (["cluster.partition=closed"], "partition", "closed is DOWN"),
        (["cluster.partition=short"], "time limit", "MaxTime of short is 30 min"),
        (["cluster.partition=short", "cluster.timeout_min=30", "nodes=4"], "nodes", "MaxNodes is 2"),
        (["nodes=4"], "nodes", "it has 3"),
        (["cluster.partition=physics"], "account", "phys, chem only"),
        (["cluster.partition=physics", "cluster.account=fys"], "account", "cluster.account=fys"),
        (["cluster.gpus_per_node=8"], "resources", "the best node of low has 4 GPUs"),
        (["cluster.gres=gpu:a100:8"], "resources", "has 4 of gpu"),
        (["cluster.gres=gpu:h100:1"], "resources", "nodes have gpu:2, gpu:a100:4"),
        (["cluster.cpus_per_task=9"], "resources", "8 CPUs"),
        (["cluster.mem_gb=300"], "resources", "the best node of low has 256 GiB"),
        (["cluster.constraint=fsat"], "constraint", "no node of low has fsat"),
        (["cluster.gpus_per_node=4", "nodes=4"], "nodes", "it has 3"),
        (["cluster.constraint=new", "nodes=2"], "nodes", "it has 1"),
    ],
)
def test_what_cannot_run_is_an_error_and_what_it_says_to_type_repairs_it(
    words: list[str], check: str, told: str
) -> None:
    errors = [f for f in complaints(FACTS, *words) if f.level is Level.error]
    found = [f for f in errors if f.check == check and told in f.found]
    assert found, errors
    repaired = [f for f in complaints(FACTS, *words, *shlex.split(found[0].fix)) if f.level is Level.error]
    assert found[0].check not in {f.check for f in repaired}, repaired


def test_nodes_count_if_they_have_everything_and_are_neither_drained_nor_excluded() -> None:
    (error,) = [f for f in complaints(FACTS, "nodes=3", "cluster.gpus_per_node=4") if f.level is Level.error]
    assert "2 of low have all that each node must have" in error.found and error.fix == "nodes=2"
    found = [f for f in complaints(FACTS, "nodes=3") if f.check == "nodes"]
    assert found[0].level is Level.warning and "n2 DRAIN+MIXED bad fan" in found[0].found
    asking = replace(request("nodes=2"), excluded=frozenset({"n1", "n2"}))
    assert any(f.check == "nodes" and f.level is Level.error for f in asked.check_request(LIMITS, asking))


def test_of_several_partitions_one_that_fits_is_enough() -> None:
    both = complaints(FACTS, "cluster.partition='closed,short'", "cluster.timeout_min=30")
    assert not asked.has_errors(both) and any("closed is DOWN" in f.found for f in both)
    assert asked.has_errors(complaints(FACTS, "cluster.partition='closed,short'"))


def test_preemption_that_does_not_requeue_is_said() -> None:
    assert complaints(FACTS) == complaints(with_config(PreemptType="preempt/none")) == []
    cancels = limits.parse_limits(CONFIG, PARTITIONS.replace("PreemptMode=REQUEUE", "PreemptMode=CANCEL"), NODES)
    (found,) = complaints(replace(FACTS, limits=cancels))
    assert complaints(replace(FACTS, limits=cancels), "resilience.requeue=chain") == []
    assert found.check == "preemption" and "PreemptMode of low is CANCEL" in found.found
    assert "resilience.requeue=chain" in found.fix


def test_what_a_site_gives_by_default_is_compared_with_the_ranks() -> None:
    found = {
        f.check: f
        for f in complaints(FACTS, "cluster.partition=small", "cluster.cpus_per_task=null", "cluster.mem_gb=null")
    }
    assert "0.9766 GiB" in found["memory"].found
    shared = complaints(FACTS, "cluster.gpus_per_node=4", "cluster.cpus_per_task=2")
    assert any(f.check == "cpus" and "2 for 4 ranks" in f.found for f in shared)


def unless(seen: Facts, *words: str) -> list[str]:
    """Conditions under which the errors about a request would be none; empty where one is certain."""
    return [f.unless for f in complaints(seen, *words) if f.level is Level.error]


def with_limits(**changed: object) -> Facts:
    """The recorded cluster with slurmdbd and these limits."""
    config = {**LIMITS.config, "AccountingStorageType": "accounting_storage/slurmdbd"}
    return replace(FACTS, limits=replace(LIMITS, **{"config": config, **changed}))


LONG = ("cluster.partition=short", "cluster.timeout_min=60")
MANY = ("cluster.partition=short", "cluster.timeout_min=30", "nodes=3")


def test_limits_of_a_partition_are_certain_unless_a_qos_may_lift_them() -> None:
    partitions = tuple(replace(partition, qos="long") for partition in LIMITS.partitions)
    for words in (LONG, MANY):
        assert unless(FACTS, *words) == [""]
        assert unless(FACTS, *words, "cluster.qos=long") == ["QOS long lifts it"]
        assert unless(with_limits(partitions=partitions), *words) == ["QOS long lifts it"]
    assert unless(FACTS, "nodes=4", "cluster.qos=long") == [""], "no QOS makes nodes"
    assert unless(with_config(EnforcePartLimits="ALL"), *LONG, "cluster.qos=long") == [""]


def test_what_the_checks_cannot_see_puts_their_errors_in_doubt() -> None:
    assert unless(FACTS, "nodes=8") == [""]
    assert unless(FACTS, "cluster.partition=closed") == ["an administrator does"]
    hidden = limits.parse_limits(CONFIG, PARTITIONS.replace("TotalNodes=3", "TotalNodes=64"), NODES)
    for words in ("nodes=8", "cluster.cpus_per_task=99"):
        assert unless(replace(FACTS, limits=hidden), words) == ["61 nodes that Slurm does not show have it"]
    assert unless(with_config(JobSubmitPlugins="lua"), "nodes=8") != [""]
    assert unless(with_config(JobSubmitPlugins="lua"), "nodes=8", "cluster.partition=low") == [""]
    assert "(nodelist)" in unless(FACTS, "nodes=8", "++cluster.additional_parameters={nodelist: n1}")[0]
    account = ("cluster.partition=physics", "cluster.account=sub")
    assert unless(FACTS, *account) == [""]
    assert unless(with_limits(), *account) == ["it is a subaccount of one of them"]
