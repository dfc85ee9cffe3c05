"""A rehearsal finds what was planted into a step and nothing else, and sees what a real run does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from gpt.config import Precision, TrainConfig
from gpt.parallel import nd, pipeline
from gpt.parallel.engine import Engine
from gpt.rehearsal.recorder import Recorder, recording
from gpt.rehearsal.report import GRADIENTS, OPTIMIZER, PARAMETERS, Rehearsal
from gpt.rehearse import main, rehearse
from gpt.training.step import queue_step
from launch.errors import ConfigError
from launch.runs.heartbeat import Phase
from tests.support.commands import run
from tests.support.distributed import run_distributed
from tests.support.learning import compose, start

WORDS = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=fsdp parallel.dp_shard=2",
    "tp": "parallel=ddp parallel.tp=2",
    "pp": "parallel=ddp parallel.pp=2 parallel.schedule=1f1b optim.max_micro_batch=1 optim.global_batch=4",
    "ring": "parallel=ddp parallel.cp=2 parallel.cp_method=ring",
    "ep": "parallel=ddp parallel.ep=2 model.ffn=moe model.n_expert=4 model.n_expert_per_token=2 "
    "model.capacity_factor=1",
    "3d": "parallel=fsdp parallel.pp=2 parallel.tp=2 optim.max_micro_batch=1 optim.global_batch=2",
}


def config_of(kind: str, *words: str) -> TrainConfig:
    config = compose(*WORDS[kind].split(), *words)
    config.precision = Precision.fp32
    return config


def step_of(one: Any) -> tuple[Any, ...]:
    """What ranks have to agree on, without the line."""
    return one.operation, one.group, one.dtype, one.bytes, one.peer, one.batched


def recorded_step(rank: int, size: int, folder: Path, *words: str) -> list[tuple[Any, ...]]:
    run = start(rank, size, folder, "precision=fp32", *words)
    run.engine.module.train()
    queue_step(run, None, Phase.training)
    recorder = Recorder()
    with recording(recorder):
        queue_step(run, None, Phase.training)
    return [step_of(one) for one in recorder.collectives]


@pytest.mark.parametrize("kind", ["zero1", "fsdp", "hsdp", "tp", "pp", "ring", "ep"])
def test_collectives_are_those_of_a_real_run(kind: str, tmp_path: Path) -> None:
    real = run_distributed(recorded_step, 4, tmp_path / "run", *WORDS[kind].split())
    rehearsed = rehearse(config_of(kind), 4)
    for rank in rehearsed.ranks:
        assert rank.collectives[rank.in_step :]
        assert [step_of(one) for one in rank.collectives[rank.in_step :]] == real[rank.rank], f"rank {rank.rank}"
    rehearsed.refuse_faults()


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Engine], object]) -> None:
    """Have every engine call ``fault`` after its backward pass. Rehearsed ranks are forked, and so have it too."""
    backward = Engine.backward

    def with_fault(self: Engine, *args: Any) -> torch.Tensor:
        loss = backward(self, *args)
        fault(self)
        return loss

    monkeypatch.setattr(Engine, "backward", with_fault)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp", "3d"])
def test_a_wait_of_the_host_and_a_rank_that_leaves_a_collective_out_are_found(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(engine: Any) -> None:
        next(engine.trained.parameters()).grad.sum().item()
        if engine.world.rank < 3:
            engine.world.all_reduce(torch.zeros(5))

    plant(monkeypatch, fault)
    found = rehearse(config_of(kind), 4)
    (hang,) = found.hangs()
    assert "group world of 4 ranks" in hang and "rank 3 issues allreduce" in hang
    assert "allreduce of 20 bytes in float32 at gpt/parallel/distributed.py" in hang
    with pytest.raises(ConfigError, match=r"the host waits at tests/rehearsal/test_rehearsal\.py:\d+"):
        found.refuse_faults()


def test_a_second_copy_of_the_gradients_is_in_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = rehearse(config_of("fsdp"), 4).ranks[0]

    def copy(engine: Any) -> None:
        engine.copies = [p.grad.clone() for p in engine.trained.parameters() if p.grad is not None]

    plant(monkeypatch, copy)
    faulty = rehearse(config_of("fsdp"), 4).ranks[0]
    more = sum(sound.dtypes[GRADIENTS].values())
    assert sound.peak + more <= faulty.peak <= sound.peak + 2 * more  # the next copy is made while there is the last


def test_a_batch_of_transfers_that_a_rank_does_not_join_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gpipe = ("parallel.pp=4", "parallel.schedule=gpipe", "model.n_layer=4", "model.tie_embeddings=true")
    config = config_of("ddp", *gpipe, "optim.max_micro_batch=1", "optim.global_batch=4")
    first_collective = pipeline.PipelineEngine.split_model
    silent = SimpleNamespace(**{**vars(dist), "all_reduce": lambda *_, **__: None})

    def without_it(self: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "dist", silent)
            return first_collective(self, *args)

    monkeypatch.setattr(pipeline.PipelineEngine, "split_model", without_it)
    (hang,) = rehearse(config, 4).hangs()
    assert "gpt/parallel/pipeline.py" in hang and "waits for rank 1, which issues no collective and no batch" in hang


def dtypes_of(found: Rehearsal, operation: str) -> dict[str, int]:
    step = found.ranks[0].collectives[found.ranks[0].in_step :]
    return dict(Counter(one.dtype for one in step if one.operation == operation))


def test_a_silent_fp32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("fsdp")
    config.precision = Precision.bf16
    assert {*dtypes_of(rehearse(config, 4), "allgather_base")} == {"bfloat16"}
    monkeypatch.setattr(nd, "MixedPrecisionPolicy", lambda *_: MixedPrecisionPolicy())
    assert {*dtypes_of(rehearse(config, 4), "allgather_base")} == {"float32"}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_states_are_those_of_the_plan_and_the_peak_is_near_it(kind: str, precision: Precision) -> None:
    config = config_of(kind, "model.n_embd=128", "model.block_size=64", "model.n_layer=4", "optim.max_micro_batch=2")
    config.precision = precision
    found = rehearse(config, 4)
    for rank in found.ranks:
        planned = found.planned(rank.rank)
        held = [sum(rank.dtypes[part].values()) for part in (PARAMETERS, GRADIENTS, OPTIMIZER)]
        assert held == [planned.parameters, planned.gradients, planned.optimizer]
        assert abs(found.difference(rank)) < 0.05


def test_thousands_of_ranks_and_a_gpu_that_is_too_small(tmp_path: Path) -> None:
    words = ["model=tiny_116k", "optim.global_batch=4096", "parallel=fsdp", "parallel.dp_shard=8"]
    told = run("gpt.rehearse --ranks 4096 --gpu-gib 0.0001", *words, cwd=tmp_path, status=2)
    assert "rehearsal of 4096 ranks (4 of them taken)" in told and "dp_replicate of 512: " in told
    assert "and a GPU has 0.0 GiB" in told


def test_a_deep_dry_run_rehearses_what_it_plans(tmp_path: Path) -> None:
    gpus = ["cluster=slurm", "cluster.gpus_per_node=2", "cluster.gpu_name=H100-80GB"]
    told = run("launch model=tiny_116k parallel=fsdp dry_run=deep", *gpus, cwd=tmp_path)
    assert "#SBATCH --gpus-per-node=2" in told and "rehearsal of 2 ranks (2 of them taken), fsdp" in told
    assert "would hang: nowhere" in told and not [*tmp_path.iterdir()]
    (tmp_path / "x.py").touch()
    refused = run("launch workload=script script.path=x.py dry_run=deep", cwd=tmp_path, status=2)
    assert "found: dry_run=deep with workload=script" in refused


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["parallel=zero3"], "parallel.strategy=deepspeed, which cannot be rehearsed"),
        (["parallel=fsdp", "parallel.cpu_offload=true"], "parallel.cpu_offload=true, which cannot be rehearsed"),
        (["--gpu", "abacus"], "--gpu abacus"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4", "model=tiny_116k", *words]) == 2
    assert f"found: {found}" in capsys.readouterr().err
