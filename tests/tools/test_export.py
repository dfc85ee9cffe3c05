"""``python -m gpt.export`` and ``init_from``, from a run saved in shards to transformers and to another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt import export
from gpt.config import TrainConfig
from gpt.config.train import RESUMABLE, compose_train
from gpt.conversion.state_dict import load_model
from gpt.data.corpus import ensure_tokens
from gpt.data.loader import Samples
from launch.runs.compose import refuse_other_run, to_schema
from launch.runs.folder import RunFolder, read_json
from launch.runs.records import read_records
from tests.support.checkpoints import read_weights
from tests.support.commands import TINY, run
from tests.support.planning import refused


def write(*words: str | Path) -> int:
    return export.main([str(word) for word in words])


def test_transformers_loads_a_run(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write(trained, "--format", "hf", "--output", out) == 0
    _, ours = load_model(trained)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens_BT = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_BT).logits, ours(tokens_BT), rtol=1e-5, atol=1e-5)
    git = read_json(RunFolder(trained).environment(1))["git"]
    origin = json.loads((out / "config.json").read_text())["exported_from"]
    assert (origin["step"], origin["run"], origin["commit"]) == (12, str(trained), git["commit"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n\treturn 'naïve — 水'  # \x00\x7f"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 32


def test_one_torch_file_holds_what_was_saved(trained: Path, tmp_path: Path) -> None:
    assert write(trained, "--format", "torch", "--output", tmp_path / "m.pt", "--step", "8") == 0
    file = torch.load(tmp_path / "m.pt", weights_only=True)
    saved = read_weights(trained, 8, tmp_path)
    assert {f"/model/{name}" for name in file["model"]} == {name for name in saved if name.startswith("/model/")}
    assert all(torch.equal(saved[f"/model/{name}"], value) for name, value in file["model"].items())
    assert file["exported_from"]["step"] == 8 and file["model_config"]["n_kv_head"] == 2


def test_an_export_that_is_refused_or_fails_leaves_everything_as_it_was(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):

        def full(folder: Path) -> None:
            raise OSError("disk full")

        patch.setattr(export, "sync_folder", full)
        write(trained, "--output", out)
    assert not any(tmp_path.iterdir())
    (out / "mine").mkdir(parents=True)
    assert write(trained, "--output", out) == 2
    assert "is there already" in capsys.readouterr().err and [path.name for path in out.iterdir()] == ["mine"]


def test_a_run_starts_from_there_and_then_goes_on_without_it(trained: Path, tmp_path: Path) -> None:
    source, new = tmp_path / "source", tmp_path / "new"
    assert write(trained, "--output", source) == 0
    words = [*TINY, "seed=7", "optim.max_steps=1", "eval.interval=0", "init_from=hf:source", f"run_dir={new}"]
    refusal = run("launch", *words, "model.n_layer=3", "model.n_kv_head=4", cwd=tmp_path, status=2)
    assert "type next: model.n_layer=2 model.n_kv_head=2" in refusal and not new.exists()
    run("launch nodes=2 parallel=fsdp launch.report_files=[]", *words, cwd=tmp_path)
    config = to_schema(compose_train(words), TrainConfig)
    samples = Samples(ensure_tokens(config.data, tmp_path), 32, config.seed)
    tokens_BT, targets_BT = samples.batch("train", torch.arange(8).numpy())
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        # Theirs shifts the labels itself, so the last target goes behind the tokens.
        whole = torch.cat([tokens_BT, targets_BT[:, -1:]], dim=1)
        expected = theirs(whole, labels=whole).loss.item()
    (record,) = read_records(RunFolder(new).metrics(0))
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    told = read_json(RunFolder(new).environment(1))["initialised_from"]
    assert told["path"] == str(source) and len(told["sha256"]["model.safetensors"]) == 64
    shutil.rmtree(source)
    assert "already finished" in run("gpt.train", *words, cwd=tmp_path)
    config.init_from = None
    refused(refuse_other_run, RunFolder(new), config, TrainConfig, RESUMABLE, said="holds a run with init_from=")
