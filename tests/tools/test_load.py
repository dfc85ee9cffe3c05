"""A sharded checkpoint in one process, against torch's own converter; and what is said where there is none."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt.conversion.source import find_source
from gpt.conversion.state_dict import load_model, open_run
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.checkpoints import read_weights
from tests.support.commands import run
from tests.support.planning import refused


@pytest.mark.parametrize(("asked", "step"), [(None, 12), (8, 8)])
def test_the_weights_are_those_that_were_saved(trained: Path, tmp_path: Path, asked: int | None, step: int) -> None:
    config, model = load_model(trained, asked)
    saved = read_weights(trained, step, tmp_path)
    state = model.state_dict()
    assert {f"/model/{name}" for name in state} == {name for name in saved if name.startswith("/model/")}
    assert all(torch.equal(saved[f"/model/{name}"], value) for name, value in state.items())
    assert config.model.n_embd == 64 and not model.training


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shard = next((run / "checkpoints" / "step_00000012").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        _, model = load_model(run)
    assert "step_00000012 is damaged" in caplog.text
    older = read_weights(trained, 8, tmp_path)
    assert torch.equal(model.state_dict()["norm.weight"], older["/model/norm.weight"])
    assert (run / "checkpoints" / "step_00000012").is_dir()
    with pytest.raises(ConfigError, match=r"damaged: step_00000012 \(.* has a wrong checksum"):
        load_model(run, 12)


def test_what_is_not_a_run_with_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    refused(load_model, tmp_path, said="no run in")
    with pytest.raises(ConfigError, match=f"the folder of a sweep(.|\n)*type next: {trained}"):
        load_model(trained.parent)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5 .*\nexpected: one of 8, 12\ntype next: --step 12"):
        load_model(trained, 5)
    shutil.copytree(trained / ".hydra", tmp_path / "new" / ".hydra")
    refused(load_model, tmp_path / "new", said="no checkpoint in")


def test_the_run_of_another_program_is_no_damaged_run_of_ours(tmp_path: Path) -> None:
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("workload: {_target_: launch.script.ScriptWorkload}\nscript: {path: train.py}\n")
    refusal = refused(load_model, tmp_path / "run")
    assert refusal.found == f"{tmp_path / 'run'}, a run of another program (ScriptWorkload)"
    assert refusal.fix.startswith(f"python -m launch.logs {tmp_path / 'run'}")
    refused(find_source, str(tmp_path / "run"), said="a run of another program")
    config.write_text("workload: {_target_: gpt.workload.GptWorkload}\nmodel: {}\n")
    refused(load_model, tmp_path / "run", said="config.yaml")


def test_a_label_is_as_good_as_a_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point, typed in (("cut-1", "seed=1"), ("cut-2", "seed=2")):
        shutil.copytree(trained / ".hydra", tmp_path / "outputs" / "s" / point / ".hydra")
        RunFolder(tmp_path / "outputs" / "s" / point).create_attempt()
        (tmp_path / "outputs" / "s" / point / ".hydra" / "overrides.yaml").write_text(f"[{typed}]")
    monkeypatch.chdir(tmp_path)
    assert open_run("seed=2")[0].path == tmp_path / "outputs" / "s" / "cut-2"
    assert open_run("outputs/s/seed=1")[0].path == tmp_path / "outputs" / "s" / "cut-1"


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
    found = json.loads(run(f"gpt.evaluate {trained} --json", cwd=trained.parent))
    assert found["sequences"] == sequences and found["step"] == 12
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5), "a byte is a token"


def test_the_sequences_of_training_give_the_loss_that_training_recorded(trained: Path) -> None:
    recorded = read_records(RunFolder(trained).metrics(0))[-1]["val_loss"]
    text = run(f"gpt.evaluate {trained} --sequences 6", cwd=trained.parent)
    assert f"loss {recorded:.4f} nats per token" in text
    assert "evaluate: 100%" in text, "minutes of a large split are not spent in silence"
    # Three batches of two: what is counted is done, so that the first one tells how long the others take.
    first = next(part for part in re.split("[\r\n]", text) if part.lstrip().startswith("evaluate:"))
    assert "0/3 [" in first and " 3/3 [" in text
    assert plain_loss(trained, 6)[0] == pytest.approx(recorded, rel=1e-5)
    assert "--sequences 624" in run(f"gpt.evaluate {trained} --sequences 999", cwd=trained, status=2)
