"""What a command leaves open is chosen and printed: the cluster, GPUs and CPUs on Slurm, ranks on this machine."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from launch import batch
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch
from launch.plan.placement import place_point
from launch.plan.plan import Plan
from launch.slurm import client, limits
from launch.slurm.limits import SlurmFacts
from launch.slurm.resolve import (
    OpenPoint,
    choose_clusters,
    choose_local_ranks,
    choose_resources,
    gpu_type,
    plan_points,
    plan_sweep,
)
from tests.support.commands import TINY
from tests.support.doctor_facts import LIMITS
from tests.support.planning import config_of, refused
from tests.support.runs import write_program

SCRIPT = ("workload=script", "script.path=setup.cfg")
TWO_PLACES = "cluster.placement=[{partition: low},{partition: short}]"
SEEN = SlurmFacts(limits=LIMITS, torch="2.13.0")


def with_n3(gres: str = "gpu:a100:4", torch: str = "2.13.0") -> SlurmFacts:
    """The recorded cluster, whose nodes n1 and n2 have gpu:a100:4, with other GPUs in n3."""
    nodes = [replace(node, gres=limits.gres(gres)) if node.name == "n3" else node for node in LIMITS.nodes]
    return SlurmFacts(limits=replace(LIMITS, nodes=tuple(nodes)), torch=torch)


def silent_console() -> Console:
    """A console that keeps what it prints."""
    return Console(file=io.StringIO(), width=1000, record=True)


def chosen(slurm: SlurmFacts, *words: str) -> tuple[Config, str]:
    """The config of a point after the choice, which its run folder has as well, and what is printed."""
    document = compose_launch(["cluster=slurm", *(words if "workload=script" in words else (*TINY, *words))])
    point, console = OpenPoint(document, ClusterKind.slurm), silent_console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "ask_slurm", lambda: slurm)  # in place of the commands of a cluster
        assert choose_resources([point], console) is slurm
    assert document.cluster.gpus_per_node == point.config.cluster.gpus_per_node
    assert document.cluster.cpus_per_task == point.config.cluster.cpus_per_task
    return point.config, console.export_text()


@pytest.mark.parametrize(
    ("words", "n3", "gpus", "ranks", "text"),
    [
        ((), "gpu:a100:4", 4, 4, "every node of low has 4 (a100); cluster.gpus_per_node=0 computes on CPUs"),
        (("cluster.partition='low,short'",), "gpu:2", 2, 2, "every node of low, short has 2;"),
        ((TWO_PLACES,), "gpu:h100:8", 4, 4, "every node of low, short"),
        (("ranks_per_node=2",), "gpu:a100:4", 2, 2, "every node of low has 4 (a100)"),
        (("cluster.constraint=fast",), "(null)", 4, 4, "every node of low has 4 (a100)"),
        (SCRIPT, "gpu:a100:4", 4, 4, "every node of low"),
    ],
)
def test_a_point_requests_the_gpus_that_every_node_has(
    words: tuple[str, ...], n3: str, gpus: int, ranks: int, text: str
) -> None:
    config, printed = chosen(with_n3(n3), *words)
    assert (config.cluster.gpus_per_node, config.ranks_on_node) == (gpus, ranks)
    assert printed.startswith(f"cluster.gpus_per_node={gpus}: {text}")
    assert {candidate.slurm["gpus_per_node"] for candidate in place_point(config, "run").candidates} == {gpus}


@pytest.mark.parametrize(
    "words",
    [
        ("cluster.gpus_per_node=0",),
        ("cluster.gres='gpu:a100:2'",),
        ("cluster.placement=[{partition: low, gpus_per_node: 1}]",),
        ("+cluster.additional_parameters.gpus_per_task=1",),
        ("device=cpu",),
        ("cluster.partition=nowhere",),
    ],
)
def test_gpus_that_the_config_names_stay(words: tuple[str, ...]) -> None:
    before = config_of("cluster=slurm", *TINY, *words).cluster.gpus_per_node
    config, printed = chosen(with_n3(), *words)
    assert config.cluster.gpus_per_node == before and "gpus_per_node" not in printed
    asked = place_point(config, "run").candidates[0].slurm
    assert before != 0 or ("gpus_per_node" not in asked and config.ranks_on_node == 1), "no option of sbatch"


def test_gpus_that_cannot_be_chosen_are_reported() -> None:
    for slurm, start, end in (
        (with_n3("(null)"), "some nodes of low have up to 4 GPUs", "=4 for those, or cluster.gpus_per_node=0"),
        (with_n3(torch="2.13.0+cpu"), "torch 2.13.0+cpu is built for CPUs, and nodes of low have GPUs (a100)", "=4"),
    ):
        config, printed = chosen(slurm)
        line = printed.splitlines()[0]
        assert config.cluster.gpus_per_node is None and line.startswith(f"warning: {start}") and line.endswith(end)
    refusal = refused(chosen, with_n3(), "ranks_per_node=6", found="ranks_per_node=6 on nodes of low with 4 GPUs")
    assert refusal.fix == "ranks_per_node=4, or cluster.gpus_per_node=0"
    assert chosen(SlurmFacts(limits=None)) == (config_of("cluster=slurm", *TINY), "")


def plan_of(slurm: SlurmFacts, *words: str) -> Plan:
    typed = ["cluster=slurm", "optim.global_batch=16", *words]
    point = OpenPoint(compose_launch([*TINY, *typed]), ClusterKind.slurm, [*TINY, *typed])
    point.config, _ = chosen(slurm, *typed[1:])
    return plan_points([point], slurm)[0]


@pytest.mark.parametrize(
    ("kind", "factor"), [("h100", 15), ("nvidia_a100-sxm4-80gb", 16), ("1g.5gb", None), ("", None)]
)
def test_fp32_costs_what_the_type_in_gres_implies(kind: str, factor: int | None) -> None:
    # 312 TFLOP/s in bf16 and 19.5 in fp32 (A100), 989 and 67 (H100): NVIDIA's data sheets.
    slurm = with_n3(f"gpu:{kind}:4" if kind else "gpu:4")
    assert slurm.limits is not None
    only_n3 = tuple(node for node in slurm.limits.nodes if node.name == "n3")
    slurm = replace(slurm, limits=replace(slurm.limits, nodes=only_n3))
    assert gpu_type(config_of("cluster=slurm"), slurm) == (kind or None)
    warnings = [text for text in plan_of(slurm, "precision=fp32", "tf32=false").warnings if "precision" in text]
    assert [f"peak is about {factor} times higher in bf16" in text for text in warnings] == [True] * bool(factor)


def test_a_proposal_suits_the_chosen_gpus() -> None:
    refusal = refused(plan_of, with_n3(), "optim.global_batch=6")
    number = int(refusal.fix.partition("optim.global_batch=")[2].split(",")[0].split()[0])
    assert number % 4 == 0


def test_a_batch_script_without_gpus_is_refused_where_all_nodes_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_PARTITION": "short"}

    def refuse(slurm: SlurmFacts, *words: str) -> None:
        monkeypatch.setattr(limits, "ask_slurm", lambda: slurm)  # in place of the commands of a cluster
        monkeypatch.setattr(limits, "torch_version", lambda: slurm.torch)
        batch.refuse_idle_gpus(config_of("cluster=slurm", *TINY, *words), job)

    assert refused(refuse, with_n3(), found="a job without GPUs").fix.startswith("sbatch --gpus-per-node=4 ...")
    refuse(with_n3("(null)"))
    refuse(with_n3(torch="2.13.0+cpu"))
    for word in ("cluster.gpus_per_node=0", "cluster.gpus_per_node=2", "launch.check_limits=false", "device=cpu"):
        refuse(with_n3(), word)


@pytest.mark.parametrize(
    ("words", "cpus", "text"),
    [
        (("cluster.gpus_per_node=0", "ranks_per_node=2"), 8, "4 for each of 2 ranks on a node"),
        (("cluster.gpus_per_node=2",), 8, "4 for each of 2 ranks on a node"),
        (("cluster.gpus_per_node=4", "ranks_per_node=1"), 8, "all of n1 in low, as the job has all its GPUs"),
        (("cluster.gpus_per_node=0", "ranks_per_node=3", TWO_PLACES), 8, "all of n1 in low, for"),
        # Named by the user or given by the site, or unknown: unchanged.
        (("cluster.cpus_per_task=2",), 2, ""),
        (("cluster.exclusive=true",), None, ""),
        (("+cluster.additional_parameters.cpus_per_gpu=8",), None, ""),
    ],
)
def test_a_node_has_the_cpus_that_its_ranks_need(words: tuple[str, ...], cpus: int | None, text: str) -> None:
    config, printed = chosen(SEEN, *words)
    assert config.cluster.cpus_per_task == cpus
    lines = [line for line in printed.splitlines() if line.startswith("cluster.cpus_per_task")]
    assert bool(lines) is bool(text)
    if text:
        assert lines[0].startswith(f"cluster.cpus_per_task={cpus}: {text}")
        asked = place_point(config, "run").candidates[0].slurm
        assert asked["cpus_per_task"] == cpus and f"--cpus-per-task={cpus}" in asked["srun_args"]


@pytest.mark.parametrize("line", [{"JobDefaults": "DefCpuPerGPU=8"}, {"SelectTypeParameters": "NONE"}, None])
def test_cpus_are_not_chosen_if_the_site_gives_them_or_does_not_answer(line: dict[str, str] | None) -> None:
    other = None if line is None else replace(LIMITS, config={**LIMITS.config, **line})
    assert chosen(replace(SEEN, limits=other))[0].cluster.cpus_per_task is None


@pytest.mark.parametrize(("checks", "found"), [("true", (2, 8)), ("false", (None, None))])
def test_a_launch_asks_slurm_once_or_not_at_all(
    checks: str, found: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    # In place of the commands of a cluster.
    monkeypatch.setattr(limits, "ask_slurm", lambda: asked.append(None) or SEEN)
    words = ("cluster=slurm", f"launch.check_limits={checks}", "cluster.exclusive=false", *TINY)
    points = [OpenPoint(compose_launch([*words, f"nodes={nodes}"]), ClusterKind.slurm) for nodes in (1, 2)]
    assert choose_resources(points, silent_console()) is (SEEN if asked else None)
    clusters = [point.config.cluster for point in points]
    assert [(cluster.gpus_per_node, cluster.cpus_per_task) for cluster in clusters] == [found] * 2
    assert len(asked) == (checks == "true")


# Ranks on this machine.


@pytest.mark.parametrize(
    ("points", "ranks", "torch"),
    [
        ([()], [4], "2.13.0"),
        ([()], [1], "2.13.0+cpu"),
        ([("seed=1",), ("seed=2", "ranks_per_node=2"), ("device=cpu",)], [4, 2, 1], "2.13.0"),
        ([("cluster.gpus_per_node=0",)], [1], "2.13.0"),
        ([("nodes=1",), ("nodes=2",)], [1, 1], "2.13.0"),
    ],
)
def test_a_local_point_starts_a_rank_on_each_gpu(
    points: list[tuple[str, ...]], ranks: list[int], torch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "torch_version", lambda: torch)
    documents = [compose_launch(["cluster=local", *TINY, *point]) for point in points]
    made = [OpenPoint(document, ClusterKind.local) for document in documents]
    configs = [point.config for point in made]
    text = choose_local_ranks(made, 4)
    assert [document.ranks_per_node for document in documents] == [config.ranks_per_node for config in configs]
    assert [config.ranks_on_node for config in configs] == ranks
    line = "ranks_per_node=4: this machine has 4 GPUs; ranks_per_node=1 takes one of them"
    assert text == ([line] if 4 in ranks else [])


@pytest.mark.parametrize(
    ("gpus", "ranks", "check_limits"), [("0,1,2,3", 4, "true"), ("0", 1, "false"), ("", 1, "true")]
)
def test_the_plan_of_a_local_command_has_a_rank_for_each_visible_gpu(
    gpus: str, ranks: int, check_limits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(limits, "torch_version", lambda: "2.13.0")
    words = ["cluster=local", "workload=script", f"script.path={tmp_path / 'train.py'}"]
    words += [f"launch.check_limits={check_limits}", f"output_dir={tmp_path}"]
    console = silent_console()
    (plan,), (config,) = plan_sweep([compose_launch(words)], [words], console)
    assert (plan.world_size, plan.ranks_per_node, config.ranks_on_node) == (ranks, ranks, ranks)
    assert ("ranks_per_node=4: this machine has 4 GPUs" in console.export_text()) is (ranks == 4)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("Slurmctld(primary) at ctl is UP", None),
        ("scontrol: fatal: Could not establish a configuration source", ""),
        ("Slurmctld(primary) at ctl is DOWN", "scontrol ping: Slurmctld(primary) at ctl is DOWN"),
    ],
)
def test_cluster_auto_trains_nothing_here_while_the_controller_is_away(
    said: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "scontrol"):
        write_program(tmp_path / name, f"#!/bin/sh\necho '{said}'\n{'exit 1' if problem is not None else ''}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    assert client.controller_problem() == problem
    console, asked = silent_console(), OmegaConf.create({"cluster": {"kind": "auto"}, "dry_run": False})
    asked.cluster.kind = ClusterKind.auto
    if not problem:
        assert choose_clusters([asked], console) == [ClusterKind.slurm if problem is None else ClusterKind.local]
        return
    refusal = refused(choose_clusters, [asked], console, found="is DOWN")  # this may be a login node
    assert refusal.fix == "the same command when scontrol ping says UP, or cluster=local"
    asked.dry_run = True
    assert choose_clusters([asked], console) == [ClusterKind.local]
