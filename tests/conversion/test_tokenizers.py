"""The files written for ``AutoTokenizer`` give the ids of the run's own tokenizer; the tokenizers library judges."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import TokenizerKind
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, from_payload, save_tokenizer
from gpt.export import tokenizer_content, write_tokenizer
from launch.runs.folder import RunFolder


def library(content: dict[str, object]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


BYTES = library(tokenizer_content(ByteTokenizer()))


@given(st.text())
def test_bytes(text: str) -> None:
    ids = BYTES.encode(text).ids
    assert ids == ByteTokenizer().encode(text).tolist()
    assert BYTES.decode(ids) == text


@given(st.text(min_size=1))
def test_characters(text: str) -> None:
    ours = CharTokenizer(sorted(set(text)))
    theirs = library(tokenizer_content(ours))
    ids = theirs.encode(text).ids
    assert ids == ours.encode(text).tolist()
    assert theirs.decode(ids) == text


def write(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    run, out = RunFolder(tmp_path / "run"), tmp_path / "out"
    run.tokenizer.mkdir(parents=True)
    out.mkdir()
    save_tokenizer(tokenizer, run.tokenizer)
    write_tokenizer(tokenizer, run, out, 32)
    return out


def test_a_trained_one_is_copied_with_its_end_of_text(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.train_from_iterator(["to be or not to be, that is the question"] * 5, trainer)
    ours = from_payload(TokenizerKind.hf, trained.to_str().encode())
    out = write(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("to be that").ids == ours.encode("to be that").tolist()
    told = json.loads((out / "tokenizer_config.json").read_text())
    assert told["eos_token"] == "<|endoftext|>" and theirs.token_to_id(told["eos_token"]) == ours.eot
