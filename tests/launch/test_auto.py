"""``parallel=auto``: shown before anything is submitted, written into the run folder, and kept from then on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.plan.plan import Plan
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run
from tests.support.planning import plan, refused

H100 = 'cluster.gpu_name="NVIDIA H100 80GB HBM3"'
BIG = ["nodes=2", "model=llama_1p3b", "data=synthetic", "precision=bf16"]
BIG += ["optim.global_batch=64", "optim.max_micro_batch=1"]
GPUS = ["cluster.gpus_per_node=8", H100]
plan_of = cache(plan)


def stored(run_dir: Path | str) -> Any:
    """The config in a run folder."""
    return yaml.safe_load(RunFolder(run_dir).config.read_text())


def test_the_plan_shows_the_first_five_and_takes_the_first() -> None:
    made = plan_of(*GPUS, *BIG, "parallel=auto")
    choices, facts = made.facts["choices"], made.facts
    assert len(choices) == 5
    assert choices[0]["memory_bytes"] == facts["memory_bytes"]["total"]
    assert facts["parallel"]["strategy"] == facts["topology"]["strategy"].replace("hsdp", "fsdp") != "auto"
    text = plan_text(made)
    assert "NVIDIA H100 80GB HBM3: 494 TFLOP/s attained" in text
    for number, choice in enumerate(choices, start=1):
        assert f"{number}. {choice['layout']}" in text
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))).facts["choices"] == choices


def test_the_point_is_named_by_what_was_typed_and_the_folder_holds_what_was_chosen(tmp_path: Path) -> None:
    words = [*GPUS, *BIG, "parallel=auto", f"output_dir={tmp_path}"]
    made = plan(*words, write=True)
    assert "parallel=auto" in made.point
    assert stored(made.run_dir)["parallel"] == made.facts["parallel"] and made.facts["parallel"]["strategy"] != "auto"
    # A start after the queue chooses nothing, even on nodes that would have it otherwise.
    again = plan_of(*words, "cluster.interconnect.inter_node.bandwidth_gb_per_s=0.1", "cluster.gpu_memory_gib=200")
    kept = (again.run_dir, again.facts["parallel"], again.facts["choices"])
    assert kept == (made.run_dir, made.facts["parallel"], [])
    assert "as this run began" in plan_text(again)
    assert plan_of(*words, "fresh=true").facts["choices"]


def test_passes_that_were_made_smaller_are_shown_and_kept(tmp_path: Path) -> None:
    small = [*BIG, "parallel=auto", "parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "cluster.gpu_memory_gib=14"]
    words = [*GPUS, *small, "optim.max_micro_batch=4", f"output_dir={tmp_path}"]
    made = plan(*words, write=True)
    facts, micro = made.facts, made.facts["micro_batch"]
    assert micro == facts["micro_batch_limit"] < 4
    assert micro * facts["accumulation"] * facts["topology"]["dp_shard"] * facts["topology"]["dp_replicate"] == 64
    assert f"optim.max_micro_batch={micro} instead of 4" in plan_text(made)
    assert stored(made.run_dir)["optim"]["max_micro_batch"] == micro
    again = plan_of(*words, "cluster.gpu_memory_gib=80")
    kept = (again.run_dir, again.facts["micro_batch"], again.facts["parallel"])
    assert kept == (made.run_dir, micro, facts["parallel"])


def test_a_node_too_small_for_what_is_offloaded_is_refused() -> None:
    words = [*GPUS, *BIG, "parallel=fsdp_offload", "checkpoint.asynchronous=false"]
    needed = plan_of(*words).facts["memory_bytes"]["host"] * 8 / 2**30
    assert plan_of(*words, f"cluster.mem_gb={1.1 * needed:.2f}").facts["memory_bytes"]["host"]
    less, more = f"cluster.mem_gb={0.9 * needed:.2f}", f"cluster.mem_gb={1.1 * needed:.2f}"
    assert "of a node's memory" in str(refused(plan, *words, less))
    assert "checkpoints that are staged in" in str(refused(plan, *words[:-1], more))


def test_links_that_are_stated_count() -> None:
    words = [*GPUS, *BIG, "parallel=auto"]
    slow = plan_of(*words, "cluster.interconnect.inter_node.bandwidth_gb_per_s=1")
    assert slow.facts["choices"][0]["tokens_per_s"] < plan_of(*words).facts["choices"][0]["tokens_per_s"] / 2


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (GPUS[:1], "GPUs of which nothing is known", "cluster.gpu_name="),
        ([*GPUS[:1], "cluster.gpu_name=H20"], "H20, which is not known", "cluster.gpu_memory_gib="),
        ([*GPUS[:1], "cluster.gpu_name=H200x"], "H200x, which is not known", ", or cluster.gpu_name='NVIDIA H200'"),
        ([*GPUS[:1], "cluster.gpu_name=A100"], "one of NVIDIA A100-SXM4-40GB", "=A100-80GB"),
        ([], "nodes of unknown memory", "cluster.mem_gb=64"),
        ([*GPUS, "cluster.gpu_memory_gib=2"], "nothing fits (nearest: ", "nodes="),
    ],
    ids=["no name", "unknown name", "mistyped name", "two memories", "no memory", "too small"],
)
def test_what_cannot_be_chosen_is_refused(words: list[str], found: str, fix: str) -> None:
    layout = ("model.block_size=1026", "parallel=auto", "parallel.tp=1", "parallel.pp=1")
    refused(plan, *BIG, *layout, *words, found=found, fix=fix)


def test_a_layout_that_was_typed_is_held_against_a_gpu_that_has_a_short_name() -> None:
    words = [*BIG, "cluster.gpus_per_node=8", "parallel=ddp", "cluster.gpu_name=H100"]
    assert plan(*words).nodes == 2
    refused(plan, *words, "model.n_embd=8192", found="on a GPU (cluster.gpu_name: NVIDIA H100 80GB HBM3)")


def test_what_is_said_of_an_unknown_gpu_is_enough() -> None:
    said = ["cluster.gpu_tflops=150", "cluster.gpu_memory_gib=64"]
    said.append("cluster.interconnect.intra_node.bandwidth_gb_per_s=100")
    chosen = plan("cluster.gpus_per_node=8", *said, *BIG, "parallel=auto").facts["chosen"]
    assert "a GPU: 75 TFLOP/s attained, 100 GB/s inside a node" in chosen


def test_a_run_of_two_ranks_chooses_and_learns(tmp_path: Path) -> None:
    words = [*TINY, "optim.max_steps=2", "ranks_per_node=2", "parallel=auto", "cluster=local", "run_dir=run"]
    words.append("launch.report_files=[md]")
    text = run("launch", *words, cwd=tmp_path)
    assert "finished" in text or "tokens/s" in text
    folder = RunFolder(tmp_path / "run")
    strategy = stored(folder.path)["parallel"]["strategy"]
    assert strategy in ("ddp", "zero1", "fsdp")
    started = next(event for event in folder.read_events() if event["event"] == "started")
    assert started["topology"].split()[0] in (strategy, "hsdp")


def test_ranks_that_nobody_planned_for_choose_for_their_device(tmp_path: Path) -> None:
    words = [*TINY, "optim.max_steps=2", "parallel=auto", "run_dir=run"]
    text = run("gpt.train", *words, cwd=tmp_path)
    assert "parallel.strategy=auto: 1 of 1 layouts that fit" in text and "1. ddp" in text
    assert stored(tmp_path / "run")["parallel"]["strategy"] == "ddp"
