"""fp16 with a dynamic loss scale, against a plain loop with torch.amp.GradScaler; every engine skips the same steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from gpt.data.corpus import ensure_tokens
from gpt.data.loader import Samples
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.gpt import GPT, initialize
from gpt.parallel import engine as module
from gpt.parallel.engine import LossScale, skipping
from gpt.training.guards import is_bad
from gpt.training.run import Run
from gpt.training.step import lr_at, queue_step
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.runs.records import StepRecord, read_records
from tests.support.commands import TINY
from tests.support.commands import run as run_command
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, MODELS, compose, save, start, whole

STEPS, MICRO, GROWTH_INTERVAL, HIGH = 8, 4, 2, 2.0**19
"""Gradients overflow at the scale ``HIGH``, and again where it has grown."""
WORDS = ("precision=fp16", f"optim.max_micro_batch={MICRO}", "optim.lr=3e-3", *MODELS["experts"])
ENGINES = {
    "ddp": (2, False),
    "zero1": (1, False),
    "fsdp": (2, True),
    "pp parallel.pp=2": (1, False),
    "ep parallel.ep=2": (1, False),
}
"""Parallelism on two ranks; the factor of its gradients before they are averaged over ranks, with which they overflow
earlier; and True where it computes with weights of 16 bits, whose gradients overflow earlier as well."""
RESUMED = ("cp parallel.cp=2", "zero1", "fsdp")
CROSSED = {"zero1": "fsdp"}
"""A checkpoint of each goes on under the other, with its loss scale."""


def plain_loop(folder: Path, factor: int, casts: bool) -> dict[str, Any]:
    """Records and weights of a loop of torch's own parts, whose loss is ``factor`` times as large."""
    config = compose(*WORDS)
    samples = Samples(ensure_tokens(config.data, folder.parent / "cache"), config.model.block_size, config.seed)
    model = GPT(config.model)
    initialize(model, config.seed)
    optim = config.optim
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=GROWTH_INTERVAL)
    seen: dict[str, list[Any]] = {"losses": [], "norms": [], "scales": [], "skipped": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        scale, total = scaler.get_scale(), 0.0
        # The losses of routing enter the gradient inside the model, so they are scaled there.
        set_auxiliary_scale(model, factor / BATCH, torch.tensor(scale))
        for first in range(step * BATCH, (step + 1) * BATCH, MICRO):
            tokens_BT, targets_BT = samples.batch("train", torch.arange(first, first + MICRO).numpy())
            with torch.autocast("cpu", torch.float16):
                cast = {name: p.half() if casts else p for name, p in model.named_parameters()}
                logits_BTV = functional_call(model, cast, (tokens_BT,))
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten()) * MICRO / BATCH
            scaler.scale(loss * factor).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        for parameter in parameters:
            parameter.grad /= factor
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip).item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step + 1)
        scaler.step(optimizer)
        scaler.update()
        seen["losses"].append(total)
        seen["norms"].append(norm if math.isfinite(norm) else None)
        seen["scales"].append(scale)
        seen["skipped"].append(seen["norms"].count(None))
    return seen | {"weights": {name: p.detach() for name, p in model.named_parameters()}}


def plain_loops(rank: int, size: int, folder: Path, kinds: list[tuple[int, bool]]) -> dict[Any, dict[str, Any]]:
    return {kind: plain_loop(folder, *kind) for kind in kinds}


def record_of(run: Run) -> StepRecord:
    record, _ = queue_step(run, None, Phase.training).finish(0.0)
    assert run.guard.judge(record) is None
    return record


def begin(rank: int, size: int, folder: Path, *words: str) -> Run:
    run = start(rank, size, folder, *words)
    if not run.step:
        run.engine.loss_scale.load({"scale": HIGH, "steps": 0})
    return run


def figures_of(records: list[StepRecord]) -> dict[str, Any]:
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "scales": [r.loss_scale for r in records],
        "skipped": [r.skipped_steps for r in records],
    }


def learn(rank: int, size: int, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    with mock.patch.object(module, "GROWTH_INTERVAL", GROWTH_INTERVAL):
        for name in names:
            run = begin(rank, size, folder / name, *WORDS, *f"parallel={name}".split())
            records = [record_of(run) for _ in range(STEPS)]
            found[name] = figures_of(records) | {"weights": whole(run, dict(run.engine.module.named_parameters()))}
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Check that the same steps were skipped, and that the rest agrees to the digits of fp16."""
    assert found["norms"] == [None if n is None else pytest.approx(n, rel=0.02) for n in expected["norms"]], name
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3), name
    for parameter, weight in expected["weights"].items():
        error = (found["weights"][parameter].float() - weight).norm() / weight.norm()
        assert error < 0.02, f"{name}: {parameter} {error:.1e}"


def test_every_engine_skips_and_learns_as_a_plain_loop_with_torchs_scaler(tmp_path: Path) -> None:
    kinds = sorted(set(ENGINES.values()))
    references = run_distributed(plain_loops, 1, tmp_path / "runs", kinds)[0]
    found = run_distributed(learn, 2, tmp_path / "runs", list(ENGINES), timeout_s=300)
    for name, kind in ENGINES.items():
        expected = references[kind]
        for rank, told in enumerate(found):
            for what in ("scales", "skipped"):
                assert told[name][what] == expected[what], f"{name}, rank {rank}: {what}"
        assert_close(found[0][name], expected, name)
    for expected in references.values():
        assert 1 < expected["skipped"][-1] < STEPS - 2, "it overflows twice, and learns"


def go_on(rank: int, size: int, folder: Path, names: list[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Figures before a checkpoint, after it, and of the runs that go on from it."""
    found = {}
    dense = ("precision=fp16", f"optim.max_micro_batch={MICRO}", *MODELS["untied, grouped queries"])
    with mock.patch.object(module, "GROWTH_INTERVAL", GROWTH_INTERVAL):
        for name in names:
            run = begin(rank, size, folder / name, *dense, *f"parallel={name}".split())
            before = figures_of([record_of(run) for _ in range(5)])
            save(run)
            to_come = figures_of([record_of(run) for _ in range(2)])
            for other in filter(None, (name, CROSSED.get(name))):
                again = begin(rank, size, folder / name, *dense, *f"parallel={other}".split())
                assert again.step == 5
                found[name, other] = [before, to_come, figures_of([record_of(again) for _ in range(2)])]
    return found


def expected_scales(norms: list[float | None]) -> list[float]:
    """The scale of each step, and of the one after, by torch's scaler where these steps overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=GROWTH_INTERVAL)
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scales = [scaler.get_scale()]
    for norm in norms:
        scaler.scale(parameter * (math.inf if norm is None else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def test_a_resumed_run_has_the_same_scale_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = run_distributed(go_on, 2, tmp_path / "runs", list(RESUMED), timeout_s=400)
    assert len(found[0]) == len(RESUMED) + len(CROSSED)
    for told in found:
        for (name, other), (before, to_come, again) in told.items():
            if name == other:
                assert again == to_come, name
            else:
                assert again["scales"][0] == to_come["scales"][0], (name, other)
                assert again["losses"][0] == pytest.approx(to_come["losses"][0], rel=2e-3)
            norms, scales = before["norms"] + to_come["norms"], before["scales"] + to_come["scales"]
            assert before["skipped"] + to_come["skipped"] == [norms[: i + 1].count(None) for i in range(7)], name
            assert None in norms and any(norms), f"{name} has skipped, and learned"
            assert scales == expected_scales(norms)[:-1], name


def test_gradients_that_overflow_without_a_scale_end_the_run(tmp_path: Path) -> None:
    overflowing = [StepRecord(1, 1, 2.0, 1e-3, None, 8, (0, 1), 0.1, loss_scale=scale) for scale in (None, 1.0, 2.0)]
    assert [is_bad(record) for record in overflowing] == [True, True, False]
    scale = LossScale(torch.device("cpu"))
    scale.load({"scale": 2.0, "steps": 0})
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.full((2,), math.nan)
    for _ in range(2):
        with skipping(optimizer, torch.tensor(True)):
            optimizer.step()
        scale.update(torch.tensor(True))
        assert scale.state() == {"scale": 1.0, "steps": 0}, "never below its least"
    assert torch.equal(parameter, torch.ones(2)) and optimizer.state[parameter]["step"] == 0
    scale.unscale([parameter.grad])


def test_scale_and_skipped_steps_are_in_the_records_and_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*TINY, "precision=fp16", "optim.max_steps=2")
    run_command("gpt.train", *words, f"run_dir={folder.path}", cwd=tmp_path)
    records = read_records(folder.metrics(0))
    assert [(r["loss_scale"], r["skipped_steps"]) for r in records] == [(2.0**16, 0)] * 2
    assert json.loads(folder.run_json.read_bytes())["summary"]["skipped_steps"] == 0
    assert "loss_scale,skipped_steps" in folder.steps_csv.read_text()
