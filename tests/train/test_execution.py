"""Recomputing, compiling and deterministic mode: what is learned stays the same, bit for bit where that is promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import AttentionBackend, CompileMode, ModelConfig, Recompute, TrainConfig
from gpt.execution import prepare_blocks
from gpt.metrics.records import read_records
from gpt.model.gpt import GPT
from gpt.run_folder import RunFolder
from tests.commands import TINY, run
from tests.model.small import LLAMA, random_tokens, small


def gradients(
    model: ModelConfig, recompute: Recompute, compile_mode: str = "none", precision: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the FLOPs of the backward pass."""
    torch.manual_seed(0)
    gpt = GPT(model)
    names = list(gpt.state_dict())
    prepare_blocks(gpt, TrainConfig(recompute=recompute, compile=CompileMode[compile_mode], model=model))
    assert list(gpt.state_dict()) == names, "a checkpoint is the same whoever wrote it"
    tokens_BT = random_tokens(model, 3)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        logits_BTV = gpt(tokens_BT)
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}, counter.get_total_flops()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention", AttentionBackend)
@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_recomputing_changes_no_bit_of_the_gradients(
    parts: dict, attention: AttentionBackend, dropout: float, precision: torch.dtype
) -> None:
    model = small(**parts, dropout=dropout, attention=attention)
    kept, flops = gradients(model, Recompute.none, precision=precision)
    selective, flops_selective = gradients(model, Recompute.selective, precision=precision)
    full, flops_full = gradients(model, Recompute.full, precision=precision)
    assert kept.keys() == selective.keys() == full.keys()
    for name, grad in kept.items():
        assert torch.equal(selective[name], grad) and torch.equal(full[name], grad), name
    assert flops <= flops_selective < flops_full
    if attention is AttentionBackend.manual or not dropout:
        assert flops_selective == flops, "no matrix product is computed again"


def test_compiled_blocks_compute_the_same() -> None:
    model = small(**LLAMA, n_layer=1)
    eager, _ = gradients(model, Recompute.none)
    compiled, _ = gradients(model, Recompute.selective, compile_mode="default")
    for name, grad in eager.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(compiled[name], grad) for name, grad in eager.items()), "it was compiled"


def test_deterministic_mode_is_in_force_and_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*TINY, "optim.max_steps=2", "model.dropout=0.1", "recompute=full", "deterministic=true")
    run("gpt.train", *words, f"run_dir={folder.path}", cwd=tmp_path)
    told = json.loads(folder.environment(1).read_bytes())["reproducibility"]
    assert told["PYTHONHASHSEED"] == "1337" and told["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert told["deterministic_algorithms"]


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*TINY, "optim.max_steps=6", "checkpoint.interval=3", "optim.warmup_steps=0", "optim.lr=1e35")
    text = run("gpt.train", *words, f"run_dir={folder.path}", cwd=tmp_path, status=1)
    assert "FloatingPointError: the loss of step 2 is" in text and "gradient norm nan" in text
    assert not folder.checkpoints.exists()
    assert read_records(folder.metrics(0))[-1]["step"] == 1
