"""What the login node refuses: in three parts, without torch, and without leaving anything behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import OptimConfig, TrainConfig
from gpt.config.compose import NOT_IN_POINT, RESUMABLE, compose_train
from gpt.topology.batch import split_batch
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import make_plan
from launch.runs import compose
from launch.runs.compose import to_schema
from launch.runs.identity import choose_folder, refuse_other_run
from tests.support.commands import environment, run

REFUSED = [
    (["model.n_layr=3"], "unknown key model.n_layr", "model.n_layer=VALUE"),
    (["+foo=1"], "unknown key foo", "=VALUE"),
    (["node=2"], "unknown key node", "nodes=VALUE"),
    (["model=gpt5"], "model=gpt5", "model=gpt2_124m"),
    (["optim.max_steps=many"], "optim.max_steps=many", "optim.max_steps=1"),
    (["precision=fp8"], "precision=fp8", "precision=fp32"),
    (["cluster=mars"], "cluster=mars", "cluster=auto"),
    (["nodes"], "nodes, which cannot be read", "nodes=VALUE"),
    (["cluster.exclude=n[3-4]"], "cluster.exclude=n[3-4], which cannot be read", "'cluster.exclude=\"n[3-4]\"'"),
    (["cluster.setup=[a b,c=d]"], "which cannot be read", """'cluster.setup=["a b","c=d"]'"""),
    (["nodes=0"], "nodes=0", "nodes=1"),
    (
        ["nodes=3"],
        "nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=16 is not a multiple of 3",
        "optim.global_batch=18",
    ),
    (["model.n_head=3"], "model.n_head=3 does not divide model.n_embd=128", "model.n_head=2"),
    (["model.n_kv_head=3"], "model.n_kv_head=3 does not divide model.n_head=4", "model.n_kv_head="),
    (["model.position=rope", "model.n_embd=20"], "rope with heads 5 wide", "model.position=learned"),
    (["data=text"], "data=text without data.path", "data.path=FILE"),
    (["data=text", "data.path=/nowhere.txt"], "/nowhere.txt", "data.path="),
    (["data.max_bytes=1000"], "validation tokens", "model.block_size="),
    (["model.vocab_size=100"], "model.vocab_size=100", "model.vocab_size=256"),
    (["optim.min_lr=1"], "optim.min_lr=1", "optim.min_lr="),
    (["cluster.gpus_per_node=2", "ranks_per_node=4"], "ranks_per_node=4 on nodes with cluster.gpus_per_node=2", "=2"),
    (["device=cuda", "nodes=64", "optim.global_batch=64"], "64 ranks on a machine with", "device=cpu"),
    (["model=llama_1p3b", "nodes=64", "optim.global_batch=64", "device=cpu"], "64 ranks x ", "parallel=fsdp"),
    (["cluster.timeout_min=1", "cluster.signal_delay_s=90"], "cluster.signal_delay_s=90", "cluster.signal_delay_s=0"),
]


@pytest.mark.parametrize(("words", "found", "fix"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_refused_in_three_parts(words: list[str], found: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config = compose_launch(words)
        make_plan(typed_config(config), words, ClusterKind.local)
    assert found in refusal.value.found
    assert refusal.value.expected
    assert fix in refusal.value.fix


def test_the_command_refuses_with_status_2_and_writes_nothing(tmp_path: Path) -> None:
    text = run("launch", "-m", "nodes=2,3", cwd=tmp_path, status=2)
    assert text.splitlines()[-3:] == [
        "found: nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=16 is not a multiple of 3",
        "expected: the same number of sequences for every rank",
        "type next: optim.global_batch=18, or 2 ranks in all",
    ]
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_points_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    text = run("launch", "-m", "resilience.grace_period_s=10,20", cwd=tmp_path, status=2)
    assert "two points of the sweep with the folder" in text


LOADS_NO_TORCH = """
import runpy, sys
sys.argv = ["launch", *sys.argv[1:]]
try:
    runpy.run_module("launch", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("status", end.code)
print("torch loaded:", "torch" in sys.modules, "deepspeed" in sys.modules, "matplotlib" in sys.modules)
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["-m", "nodes=1,2", "parallel=auto", "dry_run=true"], ["nodes=3"]], ids=" ".join
)
def test_help_dry_run_and_refusal_load_no_torch(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS_NO_TORCH, *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "torch loaded: False False False" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_the_same_keys(tmp_path: Path) -> None:
    text = run("gpt.train", "optim.lrr=1", cwd=tmp_path, status=2)
    assert "type next: optim.lr=VALUE" in text


def test_half_an_environment_of_ranks_is_refused(tmp_path: Path) -> None:
    text = run("gpt.train", cwd=tmp_path, status=2, RANK="0")
    assert "RANK in the environment, but not WORLD_SIZE" in text


@given(
    global_batch=st.integers(1, 4096),
    micro_batch=st.integers(1, 64),
    ranks=st.integers(1, 64),
    weak=st.booleans(),
)
def test_a_batch_is_cut_without_rest_or_refused(global_batch: int, micro_batch: int, ranks: int, weak: bool) -> None:
    optim = OptimConfig(global_batch=global_batch, max_micro_batch=micro_batch, weak_scaling=weak)
    try:
        batch = split_batch(optim, ranks)
    except ConfigError:
        assert not weak and global_batch % ranks != 0
        return
    assert batch.global_batch == global_batch * (ranks if weak else 1)
    assert batch.micro * batch.accumulation * ranks == batch.global_batch
    assert batch.micro <= micro_batch


def test_another_config_is_refused_in_the_folder_of_a_run(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}"]
    composed = compose_train(words)
    config = to_schema(composed, TrainConfig)
    folder = choose_folder(config, words, NOT_IN_POINT)
    compose.write_config(folder, composed, words)
    refuse_other_run(folder, config, TrainConfig, RESUMABLE)
    config.optim.lr = 0.5
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.002, and now optim\.lr=0\.5"):
        refuse_other_run(folder, config, TrainConfig, RESUMABLE)
