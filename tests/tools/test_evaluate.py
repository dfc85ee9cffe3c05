"""Evaluation of a trained run against a plain loop over the bytes of its corpus."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt.conversion.state_dict import load_model
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import run


def plain_loss(folder: Path, sequences: int | None) -> tuple[float, int]:
    """Mean loss, one sequence at a time, over the validation file; and the number of sequences."""
    config, model = load_model(folder)
    (cached,) = (folder.parent / "outputs" / ".cache").glob("*/val.bin")
    text = np.fromfile(cached, dtype=np.uint16)
    size = config.model.block_size
    starts = range(0, len(text) - size, size)[:sequences]
    losses = []
    for start in starts:
        window = torch.tensor(text[start : start + size + 1], dtype=torch.long)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:]).item())
    return sum(losses) / len(losses), len(losses)


def test_the_whole_split_against_a_plain_loop(trained: Path) -> None:
    expected, sequences = plain_loss(trained, None)
    found = json.loads(run("gpt.evaluate", str(trained), "--json", cwd=trained.parent))
    assert found["sequences"] == sequences and found["step"] == 12
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5), "a byte is a token"


def test_the_sequences_of_training_give_the_loss_that_training_recorded(trained: Path) -> None:
    recorded = read_records(RunFolder(trained).metrics(0))[-1]["val_loss"]
    text = run("gpt.evaluate", str(trained), "--sequences", "6", cwd=trained.parent)
    assert f"loss {recorded:.4f} nats per token" in text
    assert "evaluate: 100%" in text, "minutes of a large split are not spent in silence"
    # Three batches of two: what is counted is done, so that the first one tells how long the others take.
    first = next(part for part in re.split("[\r\n]", text) if part.lstrip().startswith("evaluate:"))
    assert "0/3 [" in first and " 3/3 [" in text
    assert plain_loss(trained, 6)[0] == pytest.approx(recorded, rel=1e-5)
    assert "--sequences 624" in run("gpt.evaluate", str(trained), "--sequences", "999", cwd=trained, status=2)
