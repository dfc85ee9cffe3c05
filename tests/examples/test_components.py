"""The example's parts in a run: prepared, trained, resumed, written with, and exported where that goes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from gpt.conversion.state_dict import find_checkpoint, open_run, read_weights
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, TINY, run

EXAMPLE = ROOT / "examples" / "components"
DOCS = (ROOT / "docs" / "components.md").read_text().replace("\\\n", " ")
PREPARE, TRAIN = (
    shlex.split(re.findall(rf"python -m gpt\.{name} (.+?)\n(?:python|```)", DOCS, re.DOTALL)[0])
    for name in ("prepare", "train")
)
"""What the docs have one type."""
SMALL = [*(word for word in TINY if "kv_head" not in word and "max_bytes" not in word), "device=cpu"]


def test_parts_of_ones_own_train_resume_and_write(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "gpt_parts").symlink_to(EXAMPLE / "gpt_parts")  # found where the commands are typed
    monkeypatch.syspath_prepend(str(EXAMPLE))
    words = [*TRAIN, *SMALL, "eval.interval=0", "logging.tensorboard=false"]

    def told(module: str, *arguments: str, status: int = 0) -> str:
        return run(module, *arguments, cwd=empty_folder, status=status)

    assert "sums-" in told("gpt.prepare", *PREPARE, "--workers", "1")
    straight, resumed = ["run_dir=straight", "optim.max_steps=4"], ["run_dir=resumed", "optim.max_steps=4"]
    told("gpt.train", *words, *straight)
    told("gpt.train", *words, *resumed, "checkpoint.interval=2")
    last = find_checkpoint(RunFolder(empty_folder / "resumed"), 4)
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    text = told("gpt.train", *words, *resumed, "checkpoint.interval=2")
    assert "attempt 2, from step 2 of 4" in text
    states = []
    for name in ("straight", "resumed"):
        folder, config = open_run(str(empty_folder / name))
        states.append(read_weights(config, find_checkpoint(folder, 4)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "bit for bit"
    about = json.loads(RunFolder(empty_folder / "resumed").environment(2).read_text())
    built = sum(value.numel() for value in states[0].values())
    assert about["parameters"] == built, "the plan counts what was built"
    assert "6 tokens in" in told("gpt.generate", "resumed", "--prompt", "1+", "--max-new-tokens", "6")
    refused = told("gpt.export", "resumed", "--output", "out", status=2)
    assert "model.norm=gpt_parts.norms:DynamicTanh" in refused and "--format torch" in refused
    assert f"{built:,} parameters" in told("gpt.export", "resumed", "--format", "torch", "--output", "out.pt")
