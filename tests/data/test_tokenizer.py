"""Tokenizers: what goes in comes out, the ids are those of the libraries, and a saved one is the same one."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import TokenizerKind
from gpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HfTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    tiktoken_payload,
    tokenizer_checksum,
    train_sentencepiece,
)
from gpt.export import tokenizer_content, write_tokenizer
from launch.errors import ConfigError
from launch.runs.folder import RunFolder

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
TEXT = Path(io.__file__).read_text() + Path(json.__file__).read_text()
# UTF-8 has no surrogates. U+2581 is SentencePiece's own sign for a space and comes out as one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@cache
def byte_level_bpe() -> str:
    """A GPT-2-like tokenizer.json, learned by Hugging Face's library."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model.train_from_iterator([TEXT], trainer)
    return str(model.to_str())


@cache
def same_for_tiktoken() -> bytes:
    """The same merges as a tiktoken encoding; GPT-2's stand-ins for bytes are undone by the library's own decoder."""
    tiktoken = pytest.importorskip("tiktoken")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = json.loads(byte_level_bpe())["model"]["vocab"]
    special = {"<|endoftext|>": vocab.pop("<|endoftext|>")}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's encoder.py: these stand for themselves
    others = [b for b in range(256) if b not in printable]
    stands_for = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    assert set(stands_for) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ranks = {bytes(stands_for[c] for c in token): i for token, i in vocab.items()}
    encoding = tiktoken.Encoding("small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return tiktoken_payload(encoding)


@cache
def made(kind: TokenizerKind) -> Tokenizer:
    """A tokenizer of each kind that knows every text; of characters, those of the first plane's beginning."""
    if kind is TokenizerKind.byte:
        return ByteTokenizer()
    if kind is TokenizerKind.char:
        return CharTokenizer(chr(i) for i in range(0x300))
    if kind is TokenizerKind.sentencepiece:
        pytest.importorskip("sentencepiece")
        return train_sentencepiece(iter(TEXT.splitlines(keepends=True)), 700)
    if kind is TokenizerKind.hf:
        return HfTokenizer(byte_level_bpe().encode())
    return TiktokenTokenizer(same_for_tiktoken())


KINDS = list(TokenizerKind)
SUBWORDS = [TokenizerKind.sentencepiece, TokenizerKind.hf, TokenizerKind.tiktoken]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(text=TEXTS)
def test_decoding_gives_the_text_back(kind: TokenizerKind, text: str) -> None:
    tokenizer = made(kind)
    if kind is TokenizerKind.char:
        text = "".join(c for c in text if ord(c) < 0x300)
    if kind is TokenizerKind.hf:
        text = text.replace("<|endoftext|>", "")
    ids = tokenizer.encode(text)
    assert ids.ndim == 1 and (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_ids_are_those_of_the_libraries() -> None:
    sentencepiece, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=made(TokenizerKind.sentencepiece).payload)
    assert made(TokenizerKind.sentencepiece).encode(TEXT).tolist() == theirs.encode(TEXT)
    hf = tokenizers.Tokenizer.from_str(byte_level_bpe()).encode(TEXT).ids
    assert made(TokenizerKind.hf).encode(TEXT).tolist() == hf
    assert made(TokenizerKind.tiktoken).encode(TEXT).tolist() == hf, "two libraries, the same merges"
    assert made(TokenizerKind.byte).encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert CharTokenizer("aé🎉").encode("🎉a").tolist() == [2, 0]


def test_the_end_of_a_document_is_found_and_never_taken_from_the_text() -> None:
    sp, hf, tiktoken = (made(kind) for kind in SUBWORDS)
    assert (made(TokenizerKind.byte).eot, made(TokenizerKind.char).eot) == (None, None)
    assert (sp.eot, hf.eot, tiktoken.eot) == (2, 0, 0)
    for tokenizer, name in ((sp, "</s>"), (tiktoken, "<|endoftext|>")):
        ids = tokenizer.encode(f"a{name}b").tolist()
        assert tokenizer.eot not in ids and tokenizer.decode(ids) == f"a{name}b"
        assert tokenizer.eot is not None and tokenizer.decode([*ids, tokenizer.eot]) == f"a{name}b"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_saved_tokenizer_is_the_same_one(kind: TokenizerKind, tmp_path: Path) -> None:
    save_tokenizer(made(kind), tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.eot) == (kind, made(kind).vocab_size, made(kind).eot)
    assert tokenizer_checksum(loaded) == tokenizer_checksum(made(kind))
    assert loaded.encode(TEXT).tolist() == made(kind).encode(TEXT).tolist()
    assert len({tokenizer_checksum(made(k)) for k in KINDS}) == len(KINDS)


def test_a_tokenizer_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    save_tokenizer(CharTokenizer("abc"), tmp_path)
    (tmp_path / "characters.json").write_text('"abd"')
    with pytest.raises(ConfigError, match="not the one that was saved"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_read_or_learned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no tokenizer")
    for kind in SUBWORDS:
        with pytest.raises(ConfigError, match="tokenizer"):
            read_tokenizer(kind, tmp_path / "file")
        with pytest.raises(ConfigError, match="tokenizer"):
            read_tokenizer(kind, tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"tokenizer_vocab_size=5000(.|\n)*a value <= 282"):
        train_sentencepiece(iter(["to be\n", "or not to be\n"]), 5000)
    with pytest.raises(ConfigError, match="character 'é'"):
        CharTokenizer("abc").encode("abé")


def test_bytes_cut_in_a_character_are_decoded_with_a_sign_for_it() -> None:
    assert ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"
    tokenizer = made(TokenizerKind.tiktoken)
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("日")[:1])


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


def test_a_tokenizer_json_is_copied_with_its_end_of_text(tmp_path: Path) -> None:
    run, out, ours = RunFolder(tmp_path / "run"), tmp_path / "out", made(TokenizerKind.hf)
    out.mkdir()
    save_tokenizer(ours, run.tokenizer)
    write_tokenizer(ours, run, out, 32)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("to be that").ids == ours.encode("to be that").tolist()
    told = json.loads((out / "tokenizer_config.json").read_text())
    assert told["eos_token"] == "<|endoftext|>" and theirs.token_to_id(told["eos_token"]) == ours.eot
