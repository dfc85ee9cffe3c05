"""A rehearsal finds what was planted into a step and nothing else, and sees what a real run does."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gpt.config import Precision, TrainConfig
from gpt.model import layers
from gpt.model.gpt import GPT
from gpt.parallel import modules, nd, optimizer, pipeline
from gpt.parallel.engine import Engine
from gpt.rehearsal import GRADIENTS, OPTIMIZER, PARAMETERS, Recorder, recording
from gpt.rehearse import Rehearsal, main, rehearsal_lines, rehearse
from gpt.training.step import queue_step
from launch.runs.process import Phase
from tests.support import faulty_parts
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
}


def config_of(kind: str, *words: str) -> TrainConfig:
    config = compose(*WORDS[kind].split(), *words)
    config.precision = Precision.fp32
    return config


def step_of(one: Any) -> tuple[Any, ...]:
    """What ranks have to agree on, without the line."""
    return one.operation, one.group, one.dtype, one.bytes, one.peer, one.batched


def recorded_steps(rank: int, size: int, folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for kind in WORDS:
        run = start(rank, size, folder / kind, "precision=fp32", *WORDS[kind].split())
        run.engine.module.train()
        queue_step(run, None, Phase.training)
        recorder = Recorder()
        with recording(recorder):
            queue_step(run, None, Phase.training)
        found[kind] = [step_of(one) for one in recorder.collectives]
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[tuple[Any, ...]]]]:
    return run_distributed(recorded_steps, 4, tmp_path_factory.mktemp("real") / "runs")


@pytest.mark.parametrize("kind", WORDS)
def test_collectives_are_those_of_a_real_run(kind: str, real: list[dict[str, list[tuple[Any, ...]]]]) -> None:
    rehearsed = rehearse(config_of(kind), 4)
    for rank in rehearsed.ranks:
        assert rank.collectives[rank.in_step :]
        assert [step_of(one) for one in rank.collectives[rank.in_step :]] == real[rank.rank][kind], f"rank {rank.rank}"
    rehearsed.refuse_faults()


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any, torch.Tensor], object]) -> None:
    """Have every engine call ``fault`` after its backward pass. Rehearsed ranks are forked, and so have it too."""
    backward = Engine.backward

    def with_fault(self: Engine, *args: Any) -> torch.Tensor:
        loss = backward(self, *args)
        fault(self, loss)
        return loss

    monkeypatch.setattr(Engine, "backward", with_fault)


# Mistakes of a programmer, planted by ``after`` the backward pass of an engine, or by a patched function.


def print_the_loss(engine: Any, loss: torch.Tensor) -> None:
    print(loss)


def leave_a_collective_out(engine: Any, _: torch.Tensor) -> None:
    if engine.world.rank < 3:
        engine.world.all_reduce(torch.zeros(5))


def reduce_another_size(engine: Any, _: torch.Tensor) -> None:
    engine.world.all_reduce(torch.zeros(6 if engine.world.rank == 3 else 5))


def reduce_in_another_order(engine: Any, _: torch.Tensor) -> None:
    for size in (6, 5) if engine.world.rank == 3 else (5, 6):
        engine.world.all_reduce(torch.zeros(size))


def reduce_over_groups_in_another_order(engine: Any, _: torch.Tensor) -> None:
    groups = [None, engine.mesh["tp"].get_group()]
    for group in groups if engine.world.rank == 3 else reversed(groups):
        engine.world.all_reduce(torch.zeros(5), group)


def copy_the_gradients(engine: Any, _: torch.Tensor) -> None:
    engine.copies = [p.grad.clone() for p in engine.trained.parameters() if p.grad is not None]


def wait_in_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> Any:
        self.param_groups[0]["params"][0].detach().norm().item()
        return torch.optim.AdamW.step(self)

    monkeypatch.setattr(optimizer.AdamW, "step", step)


def wait_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def criterion(logits_BTV: torch.Tensor, targets_BT: torch.Tensor, vocab_size: int) -> torch.Tensor:
        loss = layers.cross_entropy(logits_BTV, targets_BT, vocab_size)
        assert loss.item() >= 0
        return loss

    monkeypatch.setattr(modules, "cross_entropy", criterion)


def compute_logits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    once = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, x, targets_BT=None: (once(self, x), once(self, x))[1])


def reduce_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(param_dtype: torch.dtype, **_: object) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(param_dtype, torch.bfloat16)

    monkeypatch.setattr(nd, "MixedPrecisionPolicy", policy)


def leave_out_of_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(module: Any, **options: Any) -> Any:
        parts = module if isinstance(module, list) else [module]
        left_out = {p for part in parts for name, p in part.named_parameters() if ".down." in f".{name}"}
        return fully_shard(module, ignored_params=left_out, **options)

    monkeypatch.setattr(nd, "fully_shard", shard)


def free_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "checkpoint", lambda block, *args, **_: block(*args))


def leave_the_first_collective_out(monkeypatch: pytest.MonkeyPatch) -> None:
    split = pipeline.PipelineEngine.split_model
    silent = SimpleNamespace(**{**vars(dist), "all_reduce": lambda *_, **__: None})

    def without_it(self: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "dist", silent)
            return split(self, *args)

    monkeypatch.setattr(pipeline.PipelineEngine, "split_model", without_it)


SIZE = "model.n_embd=128 model.block_size=64 model.n_layer=4 optim.max_micro_batch=2"
GPIPE = (
    "ddp parallel.pp=4 parallel.schedule=gpipe model.n_layer=4 model.tie_embeddings=true "
    "optim.max_micro_batch=1 optim.global_batch=4"
)
HERE, PARTS = r"tests/rehearsal/test_rehearsal\.py:\d+", "tests.support.faulty_parts"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "item in the model": (f"fsdp {SIZE} model.ffn={PARTS}:Waiting", None, "for the device: MISTAKE"),
    "copy to the host": (f"ddp {SIZE} model.ffn={PARTS}:Copying", None, "for the device: MISTAKE"),
    "item in the optimizer": (f"fsdp {SIZE}", wait_in_the_optimizer, f"for the device: {HERE}"),
    "item in the loss": (f"ddp {SIZE}", wait_in_the_loss, f"for the device: {HERE}"),
    "print": (f"fsdp {SIZE}", print_the_loss, f"for the device: {HERE}"),
    "collective left out": (
        f"fsdp {SIZE}",
        leave_a_collective_out,
        f"rank 3 issues allreduce of .* allreduce of 20 bytes in float32 at {HERE}",
    ),
    "another size": (f"ddp {SIZE}", reduce_another_size, "rank 3 issues allreduce of 24 bytes"),
    "another order": (f"fsdp {SIZE}", reduce_in_another_order, "rank 3 issues allreduce of 24 bytes"),
    "groups in another order": (
        f"tp {SIZE}",
        reduce_over_groups_in_another_order,
        rf"another order: rank 2 waits in group tp with allreduce of 20 bytes .* at {HERE}, and rank 3 in world",
    ),
    "batch that a rank does not join": (
        GPIPE,
        leave_the_first_collective_out,
        r"batch of transfers at gpt/parallel/pipeline\.py:\d+ waits for rank 1, which issues no collective",
    ),
    "second copy of the gradients": (f"ddp {SIZE}", copy_the_gradients, f"rest of rank 0: .*{HERE}"),
    "activations kept": (f"ddp {SIZE} recompute=full model.ffn={PARTS}:Keeping", None, "rest of rank 0: .*MISTAKE"),
    "fp32 parameter": (f"fsdp {SIZE} model.ffn={PARTS}:Fp32", "bf16", "product in float32 in a run in bf16 at MISTAKE"),
    "reduction in bf16": (
        f"fsdp {SIZE}",
        reduce_in_bf16,
        "rank 0: gradients reduced in bfloat16 instead of float32, first in reduce_scatter",
    ),
    "logits twice": (
        f"fsdp {SIZE}",
        compute_logits_twice,
        r"computed 4 times in 2 micro-batches at gpt/model/gpt\.py:",
    ),
    "weights that fsdp leaves out": (
        f"fsdp {SIZE}",
        leave_out_of_fsdp,
        r"rank 0: parameter blocks\.0\.ffn\.down\.weight",
    ),
}
"""Mistake -> words of the run, how it is planted, and what the rehearsal says; MISTAKE is the marked line of a part."""


def config_of_fault(words: str) -> TrainConfig:
    kind, *rest = words.split()
    config = config_of(kind, *rest)
    config.precision = Precision.bf16
    return config


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_rank_or_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, planted, said = FAULTS[name]
    if "MISTAKE" in said:
        lines = inspect.getsourcelines(getattr(faulty_parts, words.split(":")[1]))
        number = next(at for at, line in enumerate(lines[0], lines[1]) if "# mistake" in line)
        said = said.replace("MISTAKE", rf"tests/support/faulty_parts\.py:{number}")
    elif len(inspect.signature(planted).parameters) == 2:
        plant(monkeypatch, planted)
    else:
        planted(monkeypatch)
    text = "\n".join(rehearsal_lines(rehearse(config_of_fault(words), 4)))
    assert re.search(said, text), text


RIGHT = [
    *((Precision.bf16, f"{kind} {SIZE}") for kind in ("ddp", "fsdp", "hsdp", "tp", "ep")),
    *((Precision.fp32, f"{kind} {SIZE}") for kind in ("ddp", "fsdp", "hsdp")),
    (Precision.bf16, f"ddp {SIZE} model.ffn={PARTS}:Ffn"),
    (Precision.bf16, GPIPE),
]


@pytest.mark.parametrize(("precision", "words"), RIGHT)
def test_nothing_is_found_where_nothing_was_planted_and_states_and_peak_are_those_of_the_plan(
    precision: Precision, words: str
) -> None:
    config = config_of_fault(words)
    config.precision = precision
    found = rehearse(config, 4)
    assert (found.hangs(), found.waits(), found.doubts()) == ([], {}, [])
    for rank in found.ranks if words != GPIPE else ():
        assert abs(found.difference(rank)) < 0.05
        if words.split()[0] in ("ddp", "fsdp", "hsdp"):
            planned = found.planned(rank.rank)
            held = [sum(rank.dtypes[part].values()) for part in (PARAMETERS, GRADIENTS, OPTIMIZER)]
            assert held == [planned.parameters, planned.gradients, planned.optimizer]


def dtypes_of(found: Rehearsal, operation: str) -> dict[str, int]:
    step = found.ranks[0].collectives[found.ranks[0].in_step :]
    return dict(Counter(one.dtype for one in step if one.operation == operation))


def test_a_silent_fp32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("fsdp")
    config.precision = Precision.bf16
    assert {*dtypes_of(rehearse(config, 4), "allgather_base")} == {"bfloat16"}
    monkeypatch.setattr(nd, "MixedPrecisionPolicy", lambda **_: MixedPrecisionPolicy())
    assert {*dtypes_of(rehearse(config, 4), "allgather_base")} == {"float32"}


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
