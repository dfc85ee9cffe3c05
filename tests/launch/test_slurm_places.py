"""Checks before submission: a job that Slurm would never start is refused, with what fits; a doubt goes on."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launch.config import Config
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import Plan
from launch.slurm.facts import SlurmFacts
from launch.slurm.places import check_before_submitting, refuse_missing_nodes
from tests.launch.test_dry_run import plan
from tests.support.commands import TINY, run
from tests.support.doctor_facts import LIMITS

SEEN = SlurmFacts(limits=LIMITS, groups=("users",))


def look(*points: tuple[str, ...], seen: SlurmFacts = SEEN) -> tuple[list[Plan], str]:
    """The plans that are left of these points, and what was printed."""
    configs: list[Config] = [typed_config(compose_launch(["cluster=slurm", *TINY, *words])) for words in points]
    console = Console(file=StringIO(), width=1000)
    plans = check_before_submitting(seen, [plan(*TINY, *words) for words in points], configs, console)
    assert isinstance(console.file, StringIO)
    return plans, console.file.getvalue()


def test_a_request_that_fits_passes_without_a_word() -> None:
    plans, text = look(("nodes=1",), ("nodes=2", "cluster.cpus_per_task=8", "cluster.mem_gb=200"))
    assert [plan.nodes for plan in plans] == [1, 2] and text == ""


REFUSED = [
    (["nodes=8"], "which Slurm would never start: nodes=8 in partition low: it has 3", "nodes=3;"),
    (["cluster.cpus_per_task=999"], "the best node of low has 8 CPUs", "cluster.cpus_per_task=8;"),
    (["cluster.partition=lwo"], "cluster.partition=lwo, and there are low, short", "cluster.partition=low;"),
    (["cluster.partition=short"], "MaxTime of short is 30 min", "cluster.timeout_min=30;"),
    (["nodes=8", "cluster.gpus_per_node=8", "ranks_per_node=1"], "nodes=8 in partition low", "nodes=3;"),
]


@pytest.mark.parametrize(("words", "found", "fix"), REFUSED, ids=[found for _, found, _ in REFUSED])
def test_what_could_never_start_is_refused_with_what_fits(words: list[str], found: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refused:
        look(("nodes=1", "seed=3"), tuple(words))
    assert found in refused.value.found and fix in refused.value.fix
    assert "launch.check_limits=false" in refused.value.fix
    low = "partition low: at most 3 nodes for 1440 min, each of up to 8 CPUs, 256 GiB of memory, gpu:2, gpu:a100:4"
    short = "partition short: at most 2 nodes for 30 min, each of up to 8 CPUs"
    assert (short if words == ["cluster.partition=short"] else low) in refused.value.expected


def test_spares_are_given_up_before_nodes_and_the_advice_suits_the_largest_point() -> None:
    for points, fix in (
        ((("nodes=2", "spare_nodes=3"),), "spare_nodes=1;"),
        ((("nodes=1", "spare_nodes=3"), ("nodes=3", "spare_nodes=3", "optim.global_batch=12")), "spare_nodes=0;"),
        ((("nodes=8", "spare_nodes=1"),), "nodes=2;"),
        ((("nodes=1",), ("nodes=8",)), "nodes=3;"),
    ):
        with pytest.raises(ConfigError) as refused:
            look(*points)
        assert refused.value.fix.startswith(fix), (points, refused.value.fix)


def test_nodes_that_no_partition_has_are_refused_before_what_the_program_would_refuse() -> None:
    def configs(*words: str) -> list[Config]:
        return [typed_config(compose_launch(["cluster=slurm", *words]))]

    with pytest.raises(ConfigError) as refused:
        refuse_missing_nodes(SEEN, configs("nodes=9"))  # 9 does not divide the batch of the default either
    assert "nodes=9, and 3 nodes at most" in refused.value.found and refused.value.fix.startswith("nodes=3;")
    for words in (
        ("nodes=3",),
        ("nodes=9", "cluster.partition=nope"),
        ("nodes=9", "+cluster.additional_parameters.nodelist=x"),
    ):
        refuse_missing_nodes(SEEN, configs(*words))
    refuse_missing_nodes(SlurmFacts(limits=None), configs("nodes=9"))


def test_an_array_that_is_too_large_is_refused_before_it_is_made() -> None:
    seeds = [(f"seed={seed}",) for seed in range(6)]
    assert len(look(*seeds[:5])[0]) == 5
    with pytest.raises(ConfigError, match="MaxArraySize=5"):
        look(*seeds)


def test_what_is_in_doubt_is_submitted_with_a_warning() -> None:
    plans, text = look(("cluster.partition=closed",))
    assert plans[0].slurm["partition"] == "closed"
    assert text.startswith("warning: partition closed is DOWN: jobs wait there until somebody brings it up, unless")
    listed = "cluster.placement=[{partition: closed}, {partition: low}]"
    plans, text = look((listed,))
    assert plans[0].slurm["partition"] == "low" and "partition=closed is skipped" in text
    plans, text = look(("cluster.placement=[{partition: closed}, {partition: nowhere}]",))
    assert plans[0].slurm["partition"] == "closed" and "partition=nowhere is skipped" in text


def test_a_controller_that_does_not_answer_refuses_nothing(tmp_path: Path) -> None:
    plans, text = look(("nodes=8",), seen=replace(SEEN, limits=None, slurm_problem="scontrol ping: no answer in 10 s"))
    assert len(plans) == 1
    assert "warning: scontrol ping: no answer in 10 s: what is asked of Slurm was not compared" in text
    text = run("launch", "cluster=slurm", "nodes=8", "dry_run=true", "launch.check_limits=false", cwd=tmp_path, PATH="")
    assert "#SBATCH --nodes=8" in text and "was not compared" not in text
