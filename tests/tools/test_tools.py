"""The commands that use finished runs: generate, compare, export, and checkpoints that are loaded by one process."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt import export, smoke
from gpt.compare import curve, interpolate, main
from gpt.config import RESUMABLE, TrainConfig, compose_train
from gpt.conversion.source import find_source
from gpt.conversion.state_dict import load_model, open_run
from gpt.data.corpus import ensure_tokens
from gpt.data.loader import Samples
from gpt.data.tokenizers import ByteTokenizer
from gpt.generate import Text
from gpt.model.gpt import GPT, Sampling, generate_tokens, make_generators, probabilities
from launch.errors import ConfigError
from launch.runs.compose import refuse_other_run, to_schema
from launch.runs.folder import RunFolder, append_json_lines, read_json, write_json
from launch.runs.records import read_records
from tests.model.test_functions import lively
from tests.support.checkpoints import read_weights
from tests.support.commands import ROOT, TINY, call, python, run
from tests.support.planning import refused
from tests.support.small_models import LLAMA, random_tokens, small

WORDS = (*TINY, "optim.max_steps=12", "checkpoint.interval=4", "eval.interval=6", "parallel=fsdp")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with the checkpoints of steps 8 and 12. Tests that write take a copy."""
    folder = tmp_path_factory.mktemp("tools")
    run(f"launch nodes=2 launch.report_files=[] run_dir={folder / 'sharded'}", *WORDS, cwd=folder)
    return folder / "sharded"


# Generation: sampling against transformers, the cache against none, and the command as it is typed.


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.05, 0.95),
)
def test_sampling_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits_BV = torch.randn(3, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected_BV = TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k is not None:
        expected_BV = TopKLogitsWarper(top_k)(None, expected_BV)
    if top_p is not None:
        expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    torch.testing.assert_close(probabilities(logits_BV, Sampling(temperature, top_k, top_p)), expected_BV.softmax(1))


def written(model: GPT, prompt_BT: torch.Tensor, tokens: int, seed: int, use_cache: bool) -> torch.Tensor:
    generators = make_generators(seed, len(prompt_BT))
    return torch.stack(
        list(islice(generate_tokens(model, prompt_BT, 50, Sampling(0.8), generators, use_cache), tokens)), 1
    )


@pytest.mark.parametrize("prompt", [1, 12, 30], ids=lambda n: f"prompt of {n}")
@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_the_cache_changes_nothing_also_where_the_window_slides(parts: dict, prompt: int) -> None:
    model = lively(small(**parts))
    prompt_BT = random_tokens(small(block_size=prompt), 2)
    with_cache = written(model, prompt_BT, 30, seed=5, use_cache=True)
    assert torch.equal(with_cache, written(model, prompt_BT, 30, seed=5, use_cache=False))
    assert not torch.equal(with_cache, written(model, prompt_BT, 30, seed=6, use_cache=True))
    alone = written(model, prompt_BT[:1], 30, seed=5, use_cache=True)
    assert torch.equal(alone, with_cache[:1]), "what is drawn does not depend on the batch"


@torch.no_grad()
def test_greedy_takes_the_likeliest_of_the_last_block() -> None:
    model = lively(small(vocab_size=60))
    prompt_BT = random_tokens(small(block_size=30), 2)
    first = next(generate_tokens(model, prompt_BT, 50, Sampling(0), make_generators(0, 2)))
    assert torch.equal(first, model(prompt_BT[:, -12:])[:, -1, :50].argmax(1)), "ids above the tokenizer's never come"


@given(st.text(max_size=20), st.binary(max_size=4))
def test_a_stream_adds_up_to_the_text(text: str, tail: bytes) -> None:
    shown: list[str] = []
    stream = Text(ByteTokenizer(), shown.append)
    content = text.encode(errors="replace") + tail
    for byte in content:
        stream.add(byte)
    stream.close()
    assert "".join(shown) == content.decode(errors="replace")


def test_the_command_writes_and_refuses(trained: Path) -> None:
    def texts(*words: str, status: int = 0) -> str:
        return run(f"gpt.generate {trained} --max-new-tokens 40", *words, cwd=trained, status=status)

    printed = texts("-p", "import os", "-p", "def", "-p", "for i in", "--seed", "3")
    assert "--- 1\nimport os" in printed and "--- 2\ndef" in printed and "120 tokens in" in printed
    first = printed.split("--- 2")[0].partition("--- 1\n")[2]
    assert first in texts("-p", "import os", "--seed", "3"), "as the tokens come, and the same"
    assert "an empty prompt" in texts("-p", "", status=2)
    assert re.search(r"step \d+: only [\d,]+ tokens of training, 0\.\d+ for each parameter", printed)


# Comparing runs whose records were made by hand, so that every figure is known.


def a_run(path: Path, *, steps: int, batch: int, first: float, data: str = "d1", **model: Any) -> None:
    """A run on sequences of 10 tokens whose loss falls by 0.01 a token-step of 10, evaluated every third step."""
    folder = RunFolder(path)
    folder.config.parent.mkdir(parents=True)
    config = {"model": {"name": path.name, "n_embd": 64, **model}, "optim": {"global_batch": batch}, "seed": 1}
    folder.config.write_text(yaml.safe_dump(config))
    ranks = [{"device_name": "NVIDIA H200"}]
    start = {"global_batch": batch, "block_size": 10, "parameters": 7, "world_size": 1, "ranks": ranks}
    write_json(folder.environment(1), start | {"data_sha256": data})
    for step in range(1, steps + 1):
        loss = first - 0.01 * step * batch
        record: dict[str, Any] = {"step": step, "attempt": 1, "loss": loss, "step_time_s": 0.5, "tokens_per_s": 100.0}
        if step % 3 == 0:
            record |= {"val_loss": loss + 1, "time": 1.0}
        append_json_lines(folder.metrics(0), [record])
    folder.record_event("finished")


def compared(folder: Path) -> tuple[dict[str, dict[str, str]], str]:
    """Rows of the CSV by run, and what was printed."""
    text = call(main, folder, "--output", folder / "out")
    rows = csv.DictReader((folder / "out" / "compare.csv").open())
    return {row["run"]: row for row in rows}, text


def test_losses_at_equal_tokens(tmp_path: Path) -> None:
    a_run(tmp_path / "one", steps=40, batch=1, first=5.0)
    a_run(tmp_path / "two", steps=8, batch=4, first=6.0, n_embd=96, newer=1)
    rows, text = compared(tmp_path)
    assert (rows["one"]["tokens"], rows["two"]["tokens"]) == ("400", "320")
    # At 320 tokens: of the first run the mean of steps 31 and 32, of the second the last step alone.
    assert float(rows["one"]["loss_at_equal_tokens"]) == pytest.approx(5.0 - 0.315)
    assert float(rows["two"]["loss_at_equal_tokens"]) == pytest.approx(6.0 - 0.32)
    # Evaluated at steps 30 and 33: on the line between. The second run's last evaluation is at 240 tokens.
    assert float(rows["one"]["val_loss_at_equal_tokens"]) == pytest.approx(6.0 - 0.32)
    assert rows["two"]["val_loss_at_equal_tokens"] == ""
    assert "* at 320 tokens" in text
    assert (rows["one"]["model.n_embd"], rows["two"]["model.n_embd"]) == ("64", "96")
    assert {"optim.global_batch"} <= rows["one"].keys() and not {"model.name", "model.newer", "seed"} & rows[
        "one"
    ].keys()


def test_runs_are_called_by_their_labels(tmp_path: Path) -> None:
    for group, name, typed in (("s", "cut-1f", "lr=1"), ("s", "cut-2e", "lr=2"), ("t", "default", "cluster=local")):
        a_run(tmp_path / group / name, steps=4, batch=1, first=5.0)
        RunFolder(tmp_path / group / name).overrides.write_text(yaml.safe_dump(["seed=3", typed]))
    rows, text = compared(tmp_path)
    assert [*rows] == ["s/lr=1", "s/lr=2", "t/t"] and "cut-" not in text


def test_what_cannot_be_compared_is_not(tmp_path: Path) -> None:
    a_run(tmp_path / "one", steps=4, batch=1, first=5.0)
    a_run(tmp_path / "two", steps=4, batch=1, first=5.0, data="d2")
    a_run(tmp_path / "new", steps=0, batch=1, first=5.0)
    rows, text = compared(tmp_path)
    assert all(row["loss_at_equal_tokens"] == "" for row in rows.values())
    assert "trained on different data" in text and "architecture: the same" in text
    assert "two or more" in call(main, tmp_path / "one", status=2)


def test_presets_are_compared_without_a_run_as_the_page_shows(tmp_path: Path) -> None:
    text = call(main, "--presets", "model=gpt2_124m", "model=llama_124m", "--output", tmp_path)
    page = (ROOT / "docs" / "training.md").read_text().split("GPT-2 and Llama differ:\n\n```\n")[1].split("```")[0]
    assert [line.rstrip() for line in text.splitlines()[: len(page.splitlines())]] == page.splitlines()
    matrices = 12 * 12 * 768**2 + 50304 * 768
    rows = [*csv.DictReader((tmp_path / "compare.csv").open())]
    assert [float(row["gflop_per_token"]) * 1e9 for row in rows] == [6 * matrices + 12 * 12 * 768 * 1024] * 2
    # Weights, gradients and two moments in fp32, and 16-bit copies of the matrices; the rest are activations.
    assert all(16 < float(row["planned_gib"]) * 2**30 / int(row["parameters"]) < 25 for row in rows)
    assert "model=gpt2_124m\n" in call(main, "--presets", "model=gpt2_124", status=2)


def test_interpolation_stays_within_the_curve() -> None:
    losses = curve([(10, 3.0), (20, 1.0)])
    assert [interpolate(losses, x) for x in (5, 10, 15, 20, 21)] == [None, 3.0, 2.0, 1.0, None]


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    python("import sys, gpt.compare; sys.exit('torch' in sys.modules)", cwd=tmp_path)


def test_all_holds_here(tmp_path: Path) -> None:
    lines = run("gpt.smoke", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("ok")] == [
        "ok  training", "ok  saving", "ok  resuming", "ok  writing",
    ]  # fmt: skip
    first, last, less = (float(number) for number in re.findall(r"\d+\.\d+", lines[0]))
    assert less == pytest.approx(100 * (1 - last / first), abs=0.1) and lines[0].endswith("% less")
    assert "all holds" in lines[-1] and not any(tmp_path.iterdir()), "nothing is left behind"


def test_its_help_is_shown_and_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        smoke.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "KEY=VALUE" in text and "ok  " not in text


def test_what_does_not_hold_is_said_and_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
        yield "training", "fine"
        smoke.require(False, "1 parameters, and 2 planned")

    monkeypatch.setattr(smoke, "checks", broken)
    assert call(smoke.main, status=1) == "ok  training: fine\nFAILED: 1 parameters, and 2 planned\n"


# A sharded checkpoint in one process, against torch's own converter; and what is said where there is none.


@pytest.mark.parametrize(("asked", "step"), [([], 12), (["--step", "8"], 8)])
def test_the_weights_are_those_that_were_saved_also_in_one_torch_file(
    trained: Path, tmp_path: Path, asked: list[str], step: int
) -> None:
    config, model = load_model(trained, step if asked else None)
    assert write(trained, "--format", "torch", "--output", tmp_path / "m.pt", *asked) == 0
    file, saved = torch.load(tmp_path / "m.pt", weights_only=True), read_weights(trained, step, tmp_path)
    for state in (model.state_dict(), file["model"]):
        assert {f"/model/{name}" for name in state} == {name for name in saved if name.startswith("/model/")}
        assert all(torch.equal(saved[f"/model/{name}"], value) for name, value in state.items())
    assert config.model.n_embd == 64 and not model.training
    assert file["exported_from"]["step"] == step and file["model_config"]["n_kv_head"] == 2


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


# ``python -m gpt.export`` and ``init_from``, from a run saved in shards to transformers and to another run.


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
    refused(refuse_other_run, RunFolder(new), config, TrainConfig, RESUMABLE, said="has a run with init_from=")
