"""GPUs of this machine that nobody asked for: a point on it starts a rank on each, and says so."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.slurm import facts
from launch.slurm.points import plan_sweep
from launch.slurm.resources import settle_local_ranks
from tests.support.commands import TINY

SCRIPT = ("workload=script", "script.path=setup.cfg")


def settled(*points: tuple[str, ...], gpus: int = 4, torch: str = "2.13.0") -> tuple[list[int], list[str]]:
    """Ranks of each point on this machine, and what was said."""
    documents = [compose_launch(["cluster=local", *(point or TINY)]) for point in points]
    configs = [typed_config(document) for document in documents]
    told = settle_local_ranks(documents, configs, [ClusterKind.local] * len(points), gpus, torch)
    assert [document.ranks_per_node for document in documents] == [config.ranks_per_node for config in configs]
    return [config.ranks_on_node for config in configs], told


def test_a_point_starts_a_rank_on_each_gpu_and_says_so() -> None:
    told = ["ranks_per_node=4: this machine has 4 GPUs; ranks_per_node=1 takes one of them"]
    assert settled(()) == ([4], told)
    assert settled(SCRIPT) == ([4], told)
    assert settled((*TINY, "seed=1"), (*TINY, "seed=2", "ranks_per_node=2"), (*TINY, "device=cpu")) == ([4, 2, 1], told)


@pytest.mark.parametrize(
    "words",
    [("ranks_per_node=1",), ("cluster.gpus_per_node=0",), ("device=cpu",), ("nodes=2",)],
    ids=" ".join,
)
def test_what_was_typed_holds(words: tuple[str, ...]) -> None:
    assert settled((*TINY, *words)) == ([1], [])


def test_a_sweep_over_nodes_of_one_machine_has_as_many_ranks_on_each() -> None:
    assert settled(*((*TINY, f"nodes={nodes}") for nodes in (1, 2, 4))) == ([1, 1, 1], [])


@pytest.mark.parametrize(("gpus", "torch"), [(1, "2.13.0"), (0, "2.13.0"), (4, "2.13.0+cpu")])
def test_one_gpu_none_and_a_torch_without_them_change_nothing(gpus: int, torch: str) -> None:
    assert settled((), gpus=gpus, torch=torch) == ([1], [])


@pytest.mark.parametrize("check_limits", ["true", "false"])
def test_the_plan_of_a_command_has_them(check_limits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(facts, "torch_version", lambda: "2.13.0")
    words = ["cluster=local", "workload=script", f"script.path={tmp_path / 'train.py'}"]
    words += [f"launch.check_limits={check_limits}", f"output_dir={tmp_path}"]
    console = Console(file=io.StringIO(), width=200)
    (plan,), (config,) = plan_sweep([compose_launch(words)], [words], console)
    assert (plan.world_size, plan.ranks_per_node, config.ranks_per_node) == (4, 4, 4)
    assert isinstance(console.file, io.StringIO)
    assert "ranks_per_node=4: this machine has 4 GPUs" in console.file.getvalue()
