"""GPUs that nobody asked for: a point asks for those that every node of its partition has, and says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch import batch
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.placement import place
from launch.plan.plan import Plan
from launch.slurm import facts as gathered
from launch.slurm import limits
from launch.slurm.facts import SlurmFacts
from launch.slurm.points import plan_points
from launch.slurm.resources import gpu_type, refuse_without_gpus, settle_gpus
from tests.support.commands import TINY
from tests.support.doctor_facts import CONFIG, NODES, PARTITIONS

# n1 and n2 have gpu:a100:4, n3 has gpu:2 without a type.
OF_A_SITE = limits.parse(CONFIG, PARTITIONS, NODES)


def seen(n3: str = "gpu:a100:4", torch: str = "2.13.0") -> SlurmFacts:
    nodes = [replace(node, gres=limits.gres(n3)) if node.name == "n3" else node for node in OF_A_SITE.nodes]
    return SlurmFacts(limits=replace(OF_A_SITE, nodes=tuple(nodes)), torch=torch)


def settled(facts: SlurmFacts, *words: str) -> tuple[Config, str]:
    document = compose_launch(["cluster=slurm", *TINY, *words])
    config = typed_config(document)
    told = settle_gpus([document], [config], [ClusterKind.slurm], facts)
    assert document.cluster.gpus_per_node == config.cluster.gpus_per_node, "the run folder has it as well"
    return config, "\n".join(told)


@pytest.mark.parametrize(
    ("words", "n3", "gpus", "ranks", "told"),
    [
        ((), "gpu:a100:4", 4, 4, "every node of low has 4 (a100); cluster.gpus_per_node=0 computes on CPUs"),
        (("cluster.partition='low,short'",), "gpu:2", 2, 2, "every node of low, short has 2;"),
        (("cluster.placement=[{partition: low},{partition: short}]",), "gpu:h100:8", 4, 4, "every node of low, short"),
        (("ranks_per_node=2",), "gpu:a100:4", 2, 2, "every node of low has 4 (a100)"),
        (("cluster.constraint=fast",), "(null)", 4, 4, "every node of low has 4 (a100)"),
        (("workload=script", "script.path=setup.cfg"), "gpu:a100:4", 4, 4, "every node of low"),
    ],
)
def test_a_point_asks_for_the_gpus_that_every_node_has(
    words: tuple[str, ...], n3: str, gpus: int, ranks: int, told: str
) -> None:
    words = words if "workload=script" in words else (*TINY, *words)
    document = compose_launch(["cluster=slurm", *words])
    config = typed_config(document)
    (text,) = settle_gpus([document], [config], [ClusterKind.slurm], seen(n3))
    assert (config.cluster.gpus_per_node, config.ranks_on_node) == (gpus, ranks)
    assert text.startswith(f"cluster.gpus_per_node={gpus}: {told}")
    assert {candidate.slurm["gpus_per_node"] for candidate in place(config, "run").candidates} == {gpus}


@pytest.mark.parametrize(
    "words",
    [
        ("cluster.gpus_per_node=0",),
        ("cluster.gpus_per_node=1",),
        ("cluster.gres='gpu:a100:2'",),
        ("cluster.placement=[{partition: low, gpus_per_node: 1}]",),
        ("+cluster.additional_parameters.gpus_per_task=1",),
        ("device=cpu",),
        ("cluster.partition=nowhere",),
    ],
)
def test_what_somebody_said_stays(words: tuple[str, ...]) -> None:
    before = typed_config(compose_launch(["cluster=slurm", *TINY, *words])).cluster.gpus_per_node
    config, told = settled(seen(), *words)
    assert (config.cluster.gpus_per_node, told) == (before, "")


def test_none_at_all_is_asked_of_slurm_in_no_words() -> None:
    config, _ = settled(seen(), "cluster.gpus_per_node=0")
    assert "gpus_per_node" not in place(config, "run").candidates[0].slurm and config.ranks_on_node == 1


def test_what_cannot_be_decided_is_said_before_the_submission() -> None:
    config, told = settled(seen("(null)"))
    assert config.cluster.gpus_per_node is None and told.startswith("warning: some nodes of low have up to 4 GPUs")
    assert told.endswith("type cluster.gpus_per_node=4 for those, or cluster.gpus_per_node=0")
    config, told = settled(seen(torch="2.13.0+cpu"))
    assert config.cluster.gpus_per_node is None
    assert told.startswith("warning: torch 2.13.0+cpu is built for CPUs, and nodes of low have GPUs (a100)")
    with pytest.raises(ConfigError, match=r"ranks_per_node=6 on nodes of low with 4 GPUs") as refusal:
        settled(seen(), "ranks_per_node=6")
    assert refusal.value.fix == "ranks_per_node=4, or cluster.gpus_per_node=0"
    none = SlurmFacts(limits=None, slurm_problem="away")
    assert settled(none) == (typed_config(compose_launch(["cluster=slurm", *TINY])), "")


def plan_of(facts: SlurmFacts, *words: str) -> Plan:
    typed = ["cluster=slurm", "optim.global_batch=16", *words]
    document = compose_launch([*TINY, *typed])
    config = typed_config(document)
    settle_gpus([document], [config], [ClusterKind.slurm], facts)
    return plan_points([config], [[*TINY, *typed]], [ClusterKind.slurm], facts)[0]


@pytest.mark.parametrize(
    ("kind", "factor"), [("a100", 16), ("h100", 15), ("nvidia_a100-sxm4-80gb", 16), ("1g.5gb", None), ("", None)]
)
def test_fp32_costs_what_the_type_that_slurm_names_says(kind: str, factor: int | None) -> None:
    # 312 TFLOP/s in bf16 and 19.5 in fp32 (A100), 989 and 67 (H100): NVIDIA's data sheets.
    facts = seen(f"gpu:{kind}:4" if kind else "gpu:4")
    assert facts.limits is not None
    nodes = tuple(node for node in facts.limits.nodes if node.name == "n3")
    facts = replace(facts, limits=replace(facts.limits, nodes=nodes))
    assert gpu_type(typed_config(compose_launch(["cluster=slurm"])), facts) == (kind or None)
    warnings = [text for text in plan_of(facts, "precision=fp32", "tf32=false").warnings if "precision" in text]
    assert [f"peak is about {factor} times higher in bf16" in text for text in warnings] == [True] * bool(factor)


def test_a_proposal_is_checked_with_the_gpus_that_were_settled() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(seen(), "optim.global_batch=6")
    number = int(refusal.value.fix.partition("optim.global_batch=")[2].split(",")[0].split()[0])
    assert number % 4 == 0


def test_a_batch_script_without_gpus_is_told_before_it_trains_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = typed_config(compose_launch(["cluster=slurm", *TINY]))
    with pytest.raises(ConfigError, match="a job without GPUs") as refusal:
        refuse_without_gpus(config, seen())
    assert refusal.value.fix.startswith("sbatch --gpus-per-node=4 ...")
    refuse_without_gpus(config, seen("(null)"))
    refuse_without_gpus(config, seen(torch="2.13.0+cpu"))
    # In the job, its own partition counts, and what the config says of none is heard.
    monkeypatch.setattr(gathered, "torch_version", lambda: "2.13.0")
    monkeypatch.setattr(gathered, "ask_slurm", lambda: seen())
    job = {"SLURM_JOB_PARTITION": "short"}
    with pytest.raises(ConfigError, match="a job without GPUs"):
        batch.refuse_idle_gpus(config, job)
    for word in ("cluster.gpus_per_node=0", "cluster.gpus_per_node=2", "launch.check_limits=false", "device=cpu"):
        batch.refuse_idle_gpus(typed_config(compose_launch(["cluster=slurm", *TINY, word])), job)
