"""The dry run: a plan for every point, the batch script as submitit writes it, and ``parallel=auto``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml

from launch.config import ClusterKind
from launch.config.compose import compose_launch
from launch.plan.plan import Plan
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder
from launch.slurm.jobs import SlurmJob, sbatch_text
from launch.slurm.resolve import OpenPoint, choose_exclusive
from launch.slurm.submit import in_line, shapes
from tests.support.commands import TINY, run
from tests.support.planning import directives, plan, refused


def test_every_shape_of_resources_is_one_array() -> None:
    plans = [plan(f"nodes={nodes}", f"seed={seed}") for nodes in (1, 2, 4) for seed in (1, 2)]
    groups = shapes(plans)
    assert [[p.nodes for p in group] for group in groups] == [[1, 1], [2, 2], [4, 4]]
    assert [directives(sbatch_text(group))["nodes"] for group in groups] == ["1", "2", "4"]
    assert [directives(sbatch_text(group))["array"] for group in groups] == ["0-1%2"] * 3
    limited = [plan(f"seed={seed}", "cluster.array_parallelism=2") for seed in (1, 2, 3)]
    assert directives(sbatch_text(limited))["array"] == "0-2%2"


def test_the_batch_script_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = "nodes=4 cluster.partition=gpu cluster.account=abc cluster.qos=high cluster.gpus_per_node=8 "
    words += "cluster.cpus_per_task=64 cluster.mem_gb=500 cluster.exclude='n[3-4]' cluster.timeout_min=90 "
    words += """resilience.grace_period_s=280 cluster.srun_args=["--cpu-bind=none"] optim.global_batch=64"""
    setup = 'cluster.setup=["module load cuda","export X=1"]'
    more = "++cluster.additional_parameters={reservation: spring}"
    text = sbatch_text([plan(*words.split(), "name=my run", setup, more)])
    folder = tmp_path / "outputs" / "my run" / ".submitit" / "slurm"
    assert directives(text) == {
        "account": "abc",
        "cpus-per-task": "64",
        "error": f"'{folder}/%j_0_log.err'",
        "exclude": "'n[3-4]'",
        "gpus-per-node": "8",
        "job-name": "'my run'",
        "mem": "512000MB",
        "nodes": "4",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": f"'{folder}/%j_0_log.out'",
        "partition": "gpu",
        "qos": "high",
        "requeue": "",
        "reservation": "spring",
        "signal": "USR2@300",
        "time": "90",
        "wckey": "submitit",
    }
    body = text.split("# setup\n")[1]
    assert body.startswith("trap '") and "ERR\nmodule load cuda\nexport X=1\ntrap - ERR\nset +e\n" in body
    assert (
        "srun --unbuffered" in body and "--cpus-per-task=64 --cpu-bind=none" in body and "submitit.core._submit" in body
    )


def test_the_command_shows_plans_and_scripts_and_writes_nothing(tmp_path: Path) -> None:
    words = "-m nodes=1,2 cluster=slurm cluster.gpus_per_node=8 dry_run=true optim.global_batch=64"
    text = run("launch", *words.split(), cwd=tmp_path)
    for said in (
        "1 x 8 = 8 ranks on slurm", "2 x 8 = 16 ranks on slurm", "918,656 parameters",
        "worst case: 3 node-hours, 24 GPU-hours, if all 2 runs last", "cluster.exclusive=false shares them",
    ):  # fmt: skip
        assert said in text
    for said in ("#!/bin/bash", "#SBATCH --gpus-per-node=8", "#SBATCH --exclusive"):
        assert text.count(said) == 2
    assert list(tmp_path.iterdir()) == []


def settled(*commands: str) -> tuple[list[bool | None], str]:
    """Return whether each point of a sweep asks Slurm for whole nodes, and what is said about it."""
    documents = [compose_launch(command.split()) for command in commands]
    points = [OpenPoint(document, document.cluster.kind) for document in documents]
    said = choose_exclusive([point for point in points if point.kind is ClusterKind.slurm])
    found = [point.config.cluster.exclusive for point in points]
    assert [document.cluster.get("exclusive") for document in documents] == found
    return found, "".join(said)


def test_points_of_a_scaling_sweep_ask_for_whole_nodes_unless_the_command_says_otherwise() -> None:
    on = "cluster=slurm"
    assert settled(f"{on} nodes=1", f"{on} nodes=2")[0] == [True, True]
    assert settled(f"{on} ranks_per_node=1", f"{on} ranks_per_node=2")[0] == [True, True]
    assert settled(f"{on} nodes=1 cluster.exclusive=false", f"{on} nodes=2") == ([False, True], ANY)
    others = [(f"{on} nodes=2",), (f"{on} seed=1", f"{on} seed=2"), ("cluster=local nodes=1", "cluster=local nodes=2")]
    for commands in others:
        assert settled(*commands) == ([None] * len(commands), ""), commands


def test_sequential_points_wait_for_those_before_them_with_one_sbatch_call_a_shape() -> None:
    typed = "++cluster.additional_parameters={dependency: singleton}"
    plans = [plan(f"nodes={nodes}", f"seed={seed}", typed) for nodes in (1, 2) for seed in (1, 2)]
    first, second = shapes(plans)
    asked = [directives(sbatch_text(in_line(group, jobs))) for group, jobs in (
        (first, []), (second, [SlurmJob("7_0"), SlurmJob("7_1")]))]  # fmt: skip
    assert [one["array"] for one in asked] == ["0-1%1"] * 2
    assert [one["dependency"] for one in asked] == ["singleton", "singleton,afterany:7"]
    both = ("launch.sequential=true", "cluster.placement=[{partition: a}]")
    refused(plan, *both, found="launch.sequential=true with cluster.placement")


def test_it_works_where_there_is_no_slurm(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    text = run("launch nodes=2 dry_run=true", cwd=tmp_path, PATH=str(empty))
    for said in ("cluster=auto: local", "as cluster=slurm would submit it", "#SBATCH --nodes=2"):
        assert said in text


def test_mail_is_asked_for_where_somebody_is_named() -> None:
    assert not {"mail-user", "mail-type"} & directives(sbatch_text([plan("nodes=2")])).keys()
    typed = plan("nodes=2", "cluster.additional_parameters={mail-user: me@site.edu, mail-type: 'END,FAIL'}")
    asked = directives(sbatch_text([typed]))
    assert (asked["mail-user"], asked["mail-type"]) == ("me@site.edu", "END,FAIL")


# ``parallel=auto``: shown before anything is submitted, written into the run folder, and kept from then on.


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
    again = plan_of(*words, "cluster.inter_node_gb_per_s=0.1", "cluster.gpu_memory_gib=200")
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
    slow = plan_of(*words, "cluster.inter_node_gb_per_s=1")
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
    said.append("cluster.inter_node_gb_per_s=100")
    chosen = plan("cluster.gpus_per_node=8", *said, *BIG, "parallel=auto").facts["chosen"]
    assert "a GPU: 75 TFLOP/s attained, 32 GB/s inside a node and 12.5 between nodes for each rank" in chosen


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
