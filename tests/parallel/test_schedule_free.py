"""Schedule-free AdamW under every engine: the weights of the package over whole parameters, and its average."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from gpt.config import TrainConfig
from gpt.config.optim import lr_at
from gpt.conversion.state_dict import read_weights
from gpt.model.gpt import GPT, initialize
from gpt.parallel.modules import copy_shard
from gpt.training.run import Run
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    TINY,
    Chain,
    assert_followed,
    evaluated,
    follow,
    full_weights,
    held_as_planned,
    save,
    start,
    step,
)

FREE = ["optim.optimizer=adamw_schedule_free", "optim.schedule=constant", "optim.max_micro_batch=4"]
MODEL = [*FREE, "model.n_layer=4", "model.n_kv_head=2", "model.ffn_hidden=42", "model.bias=true", "model.qk_norm=true"]
"""Rows of the feed-forward layer that four ranks do not divide."""
CASES = {
    1: [("parallel=ddp", MODEL)],
    2: [(f"parallel={engine}", MODEL) for engine in ("ddp", "zero1", "fsdp")],
    4: [(words, MODEL) for words in ("parallel=zero1", "parallel=fsdp", "parallel=hsdp parallel.dp_shard=2")],
}
"""Ranks -> engines, and the models that they step."""
STEPS, SKIPPED = 10, 4
"""The fourth step has gradients that are not finite, and is skipped."""


def gradient(name: str, shape: Sequence[int], number: int) -> Tensor:
    """Gradient of a whole parameter in a step, the same on all ranks and in the reference."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
    made = torch.randn(*shape, generator=generator)
    return made.fill_(torch.nan) if number == SKIPPED else made


Weights = dict[str, Tensor]


def stepped_by_package(config: TrainConfig) -> tuple[Weights, Weights]:
    """Weights after the last step, and their average."""
    model, optim = GPT(config.model), config.optim
    initialize(model, config.seed)
    named = dict(model.named_parameters())
    optimizer = AdamWScheduleFree(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    optimizer.train()
    for number in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, number)
        for name, p in named.items():
            p.grad = gradient(name, p.shape, number)
        if number != SKIPPED:
            optimizer.step()
    newest = copied(named.items())
    optimizer.eval()
    return newest, copied(named.items())


def copied(named: Iterator[tuple[str, nn.Parameter]] | object) -> Weights:
    return {name: p.detach().clone() for name, p in named}  # type: ignore[attr-defined]


def stepped_by_engine(run: Run) -> tuple[Weights, Weights]:
    """Weights after the last step with the same gradients, and their average."""
    for number in range(1, STEPS + 1):
        for name, p in run.engine.trained.named_parameters():
            p.grad = torch.zeros_like(p)
            copy_shard(p.grad, gradient(name.removeprefix("module."), p.shape, number))
        run.engine.update(lr_at(run.config.optim, number), torch.tensor(number == SKIPPED))
    newest = full_weights(run)
    with run.engine.averaged_weights():
        return newest, full_weights(run)


def differences(rank: int, size: int, folder: Path) -> list[str]:
    """Return how each engine differs from the package, and from the plan of its memory."""
    wrong = []
    for number, (words, model) in enumerate(CASES[size]):
        run = start(rank, size, folder / str(number), *model, *words.split())
        found, held = stepped_by_engine(run), held_as_planned(run)
        if rank:
            continue
        if held:
            wrong.append(f"{words}: {held}")
        newest, average = stepped_by_package(run.config)
        assert max((newest[name] - average[name]).abs().max().item() for name in newest) > 1e-4
        for what, mine, theirs in zip(("newest", "average"), found, (newest, average), strict=True):
            assert mine.keys() == theirs.keys()
            far = {n: (mine[n] - theirs[n]).abs().max().item() for n in theirs}
            wrong += [f"{words}, {what}: {name} by {by:.1e}" for name, by in far.items() if not by <= 1e-6]
    return wrong


@pytest.mark.parametrize("ranks", CASES)
def test_every_engine_steps_as_the_package_over_whole_weights(ranks: int, tmp_path: Path) -> None:
    assert run_distributed(differences, ranks, tmp_path / "runs", timeout_s=300)[0] == []


CHAIN: dict[str, Chain] = {"free": (MODEL, ["parallel=fsdp", "parallel=zero1", "parallel=ddp"])}


def test_checkpoints_go_on_bit_for_bit_and_under_another_engine(tmp_path: Path) -> None:
    found = run_distributed(follow, 2, tmp_path / "runs", CHAIN, timeout_s=300)[0]
    assert_followed(CHAIN["free"][1], found["free"])


def saved_average(rank: int, size: int, folder: Path, engine: str) -> tuple[float, float, float]:
    """Validation losses after four steps: of the average, of what was stepped, and of what the checkpoint has."""
    run = start(rank, size, folder, *MODEL, engine)
    for _ in range(4):
        step(run)
    stepped = evaluated(run)
    with run.engine.averaged_weights():
        average = evaluated(run)
    save(run)
    stored = read_weights(run.config, run.folder.checkpoints / "step_00000004")
    tokens_BT, targets_BT = run.samples.batch("val", torch.arange(7).numpy())
    with torch.no_grad():
        logits_BTV = stored(tokens_BT)
    return average, stepped, nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).item()


@pytest.mark.parametrize("engine", ["parallel=ddp", "parallel=zero1", "parallel=fsdp"])
def test_evaluations_and_checkpoints_have_the_average(engine: str, tmp_path: Path) -> None:
    average, stepped, stored = run_distributed(saved_average, 2, tmp_path / "run", engine)[0]
    assert stored == pytest.approx(average, rel=1e-5) and abs(stepped - average) > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optim.schedule=cosine", "optim.schedule=cosine"),
        ("optim.schedule=constant optim.beta1=0", "optim.beta1=0"),
        ("optim.schedule=constant optim.options={r:1}", "optim.options={'r': 1}"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_from([*TINY, FREE[0], *words.split()]).validate()
    assert said in refusal.value.found and "optim." in refusal.value.fix
