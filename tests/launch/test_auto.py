"""``parallel=auto``: shown before anything is submitted, written into the run folder, and kept from then on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import yaml

from gpt.config import Strategy
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import Plan, make_plan, write_run
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run

H100 = 'cluster.gpu_name="NVIDIA H100 80GB HBM3"'
BIG = [
    "nodes=2",
    "model=llama_1p3b",
    "data=synthetic",
    "precision=bf16",
    "optim.global_batch=64",
    "optim.max_micro_batch=1",
]
GPUS = ["cluster=slurm", "cluster.gpus_per_node=8", H100]


@cache
def plan_of(*words: str) -> Plan:
    return make_plan(typed_config(compose_launch(words)), words, ClusterKind.slurm)


def test_the_plan_shows_the_first_five_and_takes_the_first() -> None:
    plan = plan_of(*GPUS, *BIG, "parallel=auto")
    assert len(plan.facts["choices"]) == 5
    assert plan.facts["choices"][0]["memory_bytes"] == plan.facts["memory_bytes"]["total"]
    assert plan.facts["parallel"]["strategy"] == plan.facts["topology"]["strategy"].replace("hsdp", "fsdp") != "auto"
    text = plan_text(plan)
    assert "NVIDIA H100 80GB HBM3: 494 TFLOP/s attained" in text
    for number, choice in enumerate(plan.facts["choices"], start=1):
        assert f"{number}. {choice['layout']}" in text
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))).facts["choices"] == plan.facts["choices"]


def test_the_point_is_named_by_what_was_typed_and_the_folder_holds_what_was_chosen(tmp_path: Path) -> None:
    words = [*GPUS, *BIG, "parallel=auto", f"output_dir={tmp_path}"]
    composed = compose_launch(words)
    plan = make_plan(typed_config(composed), words, ClusterKind.slurm)
    assert "parallel=auto" in plan.point
    write_run(plan, composed, words)
    stored = yaml.safe_load(RunFolder(plan.run_dir).config.read_text())["parallel"]
    assert stored == plan.facts["parallel"] and stored["strategy"] != "auto"
    # A start after the queue chooses nothing, even on nodes that would have it otherwise.
    again = plan_of(*words, "cluster.interconnect.inter_node.bandwidth_gb_per_s=0.1", "cluster.gpu_memory_gib=200")
    assert (again.run_dir, again.facts["parallel"], again.facts["choices"]) == (
        plan.run_dir,
        plan.facts["parallel"],
        [],
    )
    assert "as this run began" in plan_text(again)
    assert plan_of(*words, "fresh=true").facts["choices"]


def test_passes_that_were_made_smaller_are_shown_and_kept(tmp_path: Path) -> None:
    small = [*BIG, "parallel=auto", "parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "cluster.gpu_memory_gib=14"]
    words = [*GPUS, *small, "optim.max_micro_batch=4", f"output_dir={tmp_path}"]
    composed = compose_launch(words)
    plan = make_plan(typed_config(composed), words, ClusterKind.slurm)
    assert plan.facts["micro_batch"] == plan.facts["micro_batch_limit"] < 4
    assert (
        plan.facts["micro_batch"]
        * plan.facts["accumulation"]
        * plan.facts["topology"]["dp_shard"]
        * plan.facts["topology"]["dp_replicate"]
        == 64
    )
    text = plan_text(plan)
    assert f"optim.max_micro_batch={plan.facts['micro_batch']} instead of 4" in text
    write_run(plan, composed, words)
    assert (
        yaml.safe_load(RunFolder(plan.run_dir).config.read_text())["optim"]["max_micro_batch"]
        == plan.facts["micro_batch"]
    )
    again = plan_of(*words, "cluster.gpu_memory_gib=80")
    assert (again.run_dir, again.facts["micro_batch"], again.facts["parallel"]) == (
        plan.run_dir,
        plan.facts["micro_batch"],
        plan.facts["parallel"],
    )


def test_a_node_too_small_for_what_is_offloaded_is_refused() -> None:
    words = [*GPUS, *BIG, "parallel=fsdp_offload", "checkpoint.asynchronous=false"]
    needed = plan_of(*words).facts["memory_bytes"]["host"] * 8 / 2**30
    assert plan_of(*words, f"cluster.mem_gb={1.1 * needed:.2f}").facts["memory_bytes"]["host"]
    with pytest.raises(ConfigError, match="of a node's memory"):
        plan_of(*words, f"cluster.mem_gb={0.9 * needed:.2f}")
    with pytest.raises(ConfigError, match="checkpoints that are staged in"):
        plan_of(*words[:-1], f"cluster.mem_gb={1.1 * needed:.2f}")


def test_links_that_are_stated_count() -> None:
    words = [*GPUS, *BIG, "parallel=auto"]
    slow = plan_of(*words, "cluster.interconnect.inter_node.bandwidth_gb_per_s=1")
    assert slow.facts["choices"][0]["tokens_per_s"] < plan_of(*words).facts["choices"][0]["tokens_per_s"] / 2


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["cluster.gpus_per_node=8"], "GPUs of which nothing is known", "cluster.gpu_name="),
        (["cluster.gpus_per_node=8", "cluster.gpu_name=H20"], "H20, which is not known", "cluster.gpu_memory_gib="),
        (
            ["cluster.gpus_per_node=8", "cluster.gpu_name=H200x"],
            "H200x, which is not known",
            ", or cluster.gpu_name='NVIDIA H200'",
        ),
        (["cluster.gpus_per_node=8", "cluster.gpu_name=A100"], "one of NVIDIA A100-SXM4-40GB", "=A100-80GB"),
        ([], "nodes of unknown memory", "cluster.mem_gb=64"),
        (["cluster.gpus_per_node=8", H100, "cluster.gpu_memory_gib=2"], "needs least", "nodes="),
    ],
    ids=["no name", "unknown name", "mistyped name", "two memories", "no memory", "too small"],
)
def test_what_cannot_be_chosen_is_refused(words: list[str], found: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(
            "cluster=slurm", *BIG, "model.block_size=1026", "parallel=auto", "parallel.tp=1", "parallel.pp=1", *words
        )
    assert found in refusal.value.found
    assert fix in refusal.value.fix


def test_a_layout_that_was_typed_is_held_against_a_gpu_that_has_a_short_name() -> None:
    words = ["cluster=slurm", *BIG, "cluster.gpus_per_node=8", "parallel=ddp"]
    assert plan_of(*words, "cluster.gpu_name=H100").nodes == 2
    with pytest.raises(ConfigError) as too_large:
        plan_of(*words, "cluster.gpu_name=H100", "model.n_embd=8192")
    assert "on a GPU (cluster.gpu_name: NVIDIA H100 80GB HBM3)" in too_large.value.found


def test_what_is_said_of_an_unknown_gpu_is_enough() -> None:
    said = [
        "cluster.gpu_tflops=150",
        "cluster.gpu_memory_gib=64",
        "cluster.interconnect.intra_node.bandwidth_gb_per_s=100",
    ]
    plan = plan_of("cluster=slurm", "cluster.gpus_per_node=8", *said, *BIG, "parallel=auto")
    assert "a GPU: 75 TFLOP/s attained, 100 GB/s inside a node" in plan.facts["chosen"]


def test_a_run_of_two_ranks_chooses_and_learns(tmp_path: Path) -> None:
    words = [*TINY, "optim.max_steps=2", "ranks_per_node=2", "parallel=auto", "cluster=local", "run_dir=run"]
    words.append("launch.report_files=[md]")
    text = run("launch", *words, cwd=tmp_path)
    assert "finished" in text or "tokens/s" in text
    folder = RunFolder(tmp_path / "run")
    stored = yaml.safe_load(folder.config.read_text())["parallel"]
    assert stored["strategy"] in ("ddp", "zero1", "fsdp")
    started = next(event for event in folder.read_events() if event["event"] == "started")
    assert started["topology"].split()[0] in (stored["strategy"], "hsdp")


def test_ranks_that_nobody_planned_for_choose_for_their_device(tmp_path: Path) -> None:
    words = [*TINY, "optim.max_steps=2", "parallel=auto", "run_dir=run"]
    text = run("gpt.train", *words, cwd=tmp_path)
    assert "parallel.strategy=auto: 1 of 1 layouts that fit" in text and "1. ddp" in text
    stored = yaml.safe_load(RunFolder(tmp_path / "run").config.read_text())["parallel"]
    assert stored["strategy"] == Strategy.ddp.name
