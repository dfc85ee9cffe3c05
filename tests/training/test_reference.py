"""The training loop against a plain one: no engines, no micro-batches, torch's own clipping and schedulers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gpt.config import OptimConfig, TrainConfig
from gpt.config.train import compose_train
from gpt.data.corpus import ensure_tokens
from gpt.data.loader import Samples
from gpt.model.gpt import GPT, initialize
from gpt.training.step import lr_at
from launch.runs.compose import to_schema
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import TINY, run

STEPS = 6
WORDS = [
    *TINY,
    f"optim.max_steps={STEPS}",
    "eval.interval=0",
    "optim.warmup_steps=3",
    "optim.lr=3e-3",
    "optim.min_lr=3e-4",
    "optim.grad_clip=0.5",
]


def plain_losses(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, of the whole batch in one pass."""
    config = to_schema(compose_train(WORDS), TrainConfig)
    samples = Samples(ensure_tokens(config.data, folder), config.model.block_size, config.seed)
    model = GPT(config.model)
    initialize(model, config.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(STEPS):
        indices = torch.arange(step * 8, (step + 1) * 8).numpy()
        tokens_BT, targets_BT = samples.batch("train", indices)
        loss = F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = (
                3e-3 * (step + 1) / 3 if step < 3 else 3e-4 + 1.35e-3 * (1 + math.cos(math.pi * (step - 2) / 3))
            )
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return seen


@pytest.mark.parametrize(
    "starter",
    [("gpt.train",), ("launch", "nodes=2", "parallel=fsdp", "launch.report_files=[]")],
    ids=["alone", "fsdp on 2"],
)
def test_losses_and_gradient_norms_are_those_of_a_plain_loop(starter: tuple[str, ...], tmp_path: Path) -> None:
    run(starter[0], *starter[1:], *WORDS, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    records = read_records(RunFolder(tmp_path / "run").metrics(0))
    reference = plain_losses(tmp_path)
    assert [r["loss"] for r in records] == pytest.approx([loss for loss, _ in reference], rel=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx([norm for _, norm in reference], rel=1e-4)


def test_the_schedule_is_torchs_warm_up_and_cosine() -> None:
    config = OptimConfig(max_steps=50, lr=1e-3, min_lr=1e-4, warmup_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-4)
    expected = []
    for step in range(1, 51):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (warm_up if step < 10 else cosine).step()
    assert [lr_at(config, step) for step in range(1, 51)] == pytest.approx([*expected[:10], *expected[10:]], rel=1e-6)


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        run("gpt.train", *WORDS, f"precision={precision}", f"run_dir={folder}", cwd=tmp_path)
        losses[precision] = [r["loss"] for r in read_records(RunFolder(folder).metrics(0))]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


def test_a_budget_of_tokens_ends_the_run_and_its_schedule(tmp_path: Path) -> None:
    given = [word for word in WORDS if not word.startswith("optim.max_steps")]
    tokens = to_schema(compose_train(given), TrainConfig)
    a_step = tokens.optim.global_batch * tokens.model.block_size
    words = (*given, f"optim.max_tokens={3.5 * a_step:g}", f"run_dir={tmp_path / 'run'}")
    for _ in range(2):  # the second time it is there already
        run("gpt.train", *words, cwd=tmp_path)
    records = read_records(RunFolder(tmp_path / "run").metrics(0))
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["lr"] == pytest.approx(3e-4), "the cosine has come to its end"
