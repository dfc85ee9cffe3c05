"""Corpora and tokenizers: what is found, what is refused before a start, and ids that are those of the libraries."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gpt.config import DataConfig, ModelConfig, Source, TokenizerKind, TrainConfig, compose_train
from gpt.data.corpus import check_fit, describe_corpus, ensure_tokens, num_windows
from gpt.data.prepared import TokenSource
from gpt.data.spec import build_spec, prepare_command, stdlib_files
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
from gpt.prepare import main
from launch.errors import ConfigError
from launch.runs.compose import to_schema
from launch.runs.folder import RunFolder
from tests.support.distributed import run_distributed
from tests.support.planning import refused

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
NOWHERE = Path("/nowhere")


def text_config(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source=Source.text, path=str(path), **changes)  # type: ignore[arg-type]


def text_of(source: TokenSource) -> bytes:
    """The bytes of a corpus of bytes."""
    parts = [np.fromfile(source.folder / f"{split}.bin", dtype="<u2") for split in ("train", "val")]
    return bytes(np.concatenate(parts).tolist())


def prepared(config: DataConfig, cache: Path) -> TokenSource:
    (source,) = ensure_tokens(config, cache).sources
    return source


def model_of(block_size: int, vocab_size: int = 256) -> ModelConfig:
    return ModelConfig(block_size=block_size, vocab_size=vocab_size)


def test_stdlib_is_this_pythons_own_source() -> None:
    paths = [file.path for file in stdlib_files()]
    library = Path(os.__file__).parent
    assert library / "argparse.py" in paths and library / "json" / "decoder.py" in paths
    names = [path.relative_to(library).as_posix() for path in paths]
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib"}
    corpus = describe_corpus(DataConfig(source=Source.stdlib), NOWHERE)
    assert corpus.tokens == sum(path.stat().st_size for path in paths) > 5_000_000


def test_stdlib_is_cut_at_max_bytes(tmp_path: Path) -> None:
    config = DataConfig(source=Source.stdlib, max_bytes=100_000)
    text = text_of(prepared(config, tmp_path))
    assert len(text) == 100_000 == describe_corpus(config, NOWHERE).tokens
    whole = b"".join(f.path.read_bytes() for f in stdlib_files()[:20])
    assert text == whole[:100_000]
    ast.parse(stdlib_files()[0].path.read_bytes())


def test_text_file_becomes_tokens_with_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "text.bin").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    config = text_config("text.bin", val_fraction=0.25)
    source = prepared(config, tmp_path / "cache")
    assert text_of(source) == content and (source.train.tokens, source.val.tokens) == (7680, 2560)
    manifest = json.loads((source.folder / "manifest.json").read_text())
    assert manifest["tokenizer"]["kind"] == "byte" and manifest["sha256"] == source.sha256
    assert manifest["splits"]["val"]["tokens"] == manifest["splits"]["val"]["bytes"] == 2560
    corpus = describe_corpus(config, NOWHERE)
    assert (corpus.train_tokens, corpus.val_tokens) == (7680, 2560)
    assert describe_corpus(config, tmp_path / "cache") == corpus, "before and after"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe_corpus(text_config("~/text.bin", val_fraction=0.25), NOWHERE).sources[0].val == (2560,)


def test_tokens_are_made_once_until_the_text_changes(tmp_path: Path) -> None:
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.write_bytes(b"abc" * 1000)
    first = prepared(text_config(text), cache)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    assert prepared(text_config(text), cache) == first
    assert (first.folder / "train.bin").stat().st_mtime_ns == written
    assert text_of(prepared(text_config(text, max_bytes=7), cache)) == b"abcabca"
    text.write_bytes(b"xyz" * 1000)
    os.utime(text, ns=(1, 1))
    assert text_of(prepared(text_config(text), cache)) == b"xyz" * 1000


@pytest.mark.parametrize("harm", ["cut", "gone", "garbage manifest", "other format"])
def test_a_broken_corpus_is_made_again(tmp_path: Path, harm: str) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abc" * 1000)
    source = prepared(text_config(text), tmp_path / "cache")
    manifest, tokens = source.folder / "manifest.json", source.folder / "train.bin"
    if harm == "cut":
        tokens.write_bytes(b"abcd")
    elif harm == "gone":
        tokens.unlink()
    elif harm == "garbage manifest":
        manifest.write_text("[1")
    else:
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    assert prepared(text_config(text), tmp_path / "cache") == source
    assert text_of(source) == b"abc" * 1000


def prepare_at_once(rank: int, world_size: int, text: Path, cache: Path) -> tuple[str, bytes]:
    import torch.distributed as dist

    dist.barrier()
    source = prepared(text_config(text), cache)
    return source.sha256, text_of(source)[:4]


def test_several_processes_at_once_get_the_same_whole_file(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"some" * 500_000)
    results = run_distributed(prepare_at_once, 2, text, tmp_path / "cache")
    assert results == [(results[0][0], b"some")] * 2
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(left) == 2 and left[0] == f".{left[1]}.lock", "the folder and its lock"


def test_preparing_holds_only_a_piece_in_memory(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(30_000_000))
    tracemalloc.start()
    ensure_tokens(text_config(text), tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_paths_that_lead_to_no_text_are_refused_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("To be")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, found in (
        (tmp_path / "nowhere" / "file", "No such file"),
        ("FILE", "No such file"),  # the README's word, typed as it stands there
        (tmp_path, "no file with text"),
        (tmp_path / "text" / "file", "Not a directory"),
        (tmp_path / "pipe", "no file with text"),
        (tmp_path / "empty", "no file with text"),
        ("~no such user/file", "cannot be read"),
    ):
        assert refused(describe_corpus, text_config(path), NOWHERE, found=found).fix == "data.path=FILE"


def test_a_text_without_read_permission_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("text")
    secret.chmod(0)
    # Root may read everything, so ask as another user where that is who runs the tests.
    code = (
        "import os, sys; from gpt.config import DataConfig, Source; from gpt.data.corpus import describe_corpus\n"
        "from pathlib import Path\n"
        "os.geteuid() == 0 and os.seteuid(65534)\n"
        "describe_corpus(DataConfig(source=Source.text, path=sys.argv[1]), Path('.'))"
    )
    result = subprocess.run([sys.executable, "-c", code, secret], capture_output=True, text=True)
    assert result.returncode == 1 and "cannot be read (" in result.stderr and "Permission denied" in result.stderr


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt.data import corpus

    text = tmp_path / "text"
    text.write_bytes(b"abc" * 1000)
    spec = build_spec(text_config(text), tmp_path)
    text.write_bytes(b"abc")
    monkeypatch.setattr(corpus, "build_spec", lambda config, cache: spec)
    with pytest.raises(ConfigError, match="changed while it was read"):
        ensure_tokens(text_config(text), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("text-*"))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    refusal = refused(ensure_tokens, text_config(tmp_path / "text"), tmp_path / "text" / "cache")
    assert refusal.fix == "data.cache_dir=FOLDER"


@given(
    size=st.integers(1, 3000),
    val_fraction=st.floats(0.001, 0.5),
    block_size=st.integers(1, 300),
    eval_sequences=st.integers(1, 20),
)
def test_what_check_fit_accepts_has_the_samples_and_what_it_proposes_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, size: int, val_fraction: float, block_size: int, eval_sequences: int
) -> None:
    text = tmp_path_factory.getbasetemp() / f"{size}"
    text.write_bytes(bytes(size))
    corpus = describe_corpus(text_config(text, val_fraction=val_fraction), NOWHERE)
    assert corpus.train_tokens + corpus.val_tokens == size and corpus.val_tokens >= 1
    try:
        check_fit(corpus, model_of(block_size), eval_sequences)
    except ConfigError as refusal:
        key, _, value = (
            refusal.fix.removeprefix("a longer text, or ").replace(",", " ").partition(" ")[0].partition("=")
        )
        if key == "model.block_size" and min(corpus.train_tokens, corpus.val_tokens) >= 2:
            assert int(value) < block_size
            check_fit(corpus, model_of(int(value)))
        elif key == "eval.sequences":
            check_fit(corpus, model_of(block_size), int(value))
    else:
        assert corpus.train_tokens > block_size
        assert num_windows(corpus.val_tokens, block_size) >= eval_sequences


PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_configs_fit_the_schema(name: str) -> None:
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    if name == "custom":
        assert OmegaConf.missing_keys(merged) == {"source"}
        merged.source = "tests.data.nowhere:documents"
    if name == "chat":
        merged.conversation_tokens = 256  # in place of the model's sequence
    config = OmegaConf.to_object(merged)
    assert isinstance(config, DataConfig) and config.title == ("documents" if name == "custom" else name)
    if name in ("text", "files", "tokens", "chat"):
        with pytest.raises(ConfigError, match=r"data\.path"):
            config.validate()
    else:
        config.validate()
    if name in ("stdlib", "synthetic"):
        check_fit(describe_corpus(config, NOWHERE), model_of(4096), eval_sequences=50)


@pytest.mark.parametrize(
    "words",
    [
        *("data=tinystories", "data=openwebtext", "data=slimpajama", "data=shakespeare"),
        "data=shakespeare data.val_fraction=0.05 data.tokenizer=sentencepiece data.tokenizer_vocab_size=16384",
        "data=tinystories data.tokenizer_vocab_size=4096",
    ],
)
def test_what_has_to_be_prepared_is_refused_with_the_command(words: str, tmp_path: Path) -> None:
    typed = [*words.split(), "data.max_bytes=1000", f"data.cache_dir={tmp_path}"]
    config = to_schema(compose_train(["+experiment=baseline", *typed]), TrainConfig)
    told = refused(describe_corpus, config.data, config.data_cache).fix
    assert told.startswith("python -m gpt.prepare ") and set(told.split()[3:]) == set(typed)


def test_the_command_that_is_proposed_prepares_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "To be, or not to be: that is the question.\n" * 100
    (tmp_path / "a text.txt").write_text(text)
    words = ["data=files", "data.path='a *.txt'", "data.tokenizer=char", "data.val_fraction=0.2"]
    config = to_schema(compose_train(words), TrainConfig)
    command = refused(describe_corpus, config.data, config.data_cache).fix
    assert command == prepare_command(config.data, config.data_cache)
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    corpus = describe_corpus(config.data, config.data_cache)
    assert (corpus.tokenizer, corpus.vocab_size, corpus.tokens) == ("char", len(set(text)), 4300)
    check_fit(corpus, model_of(64, vocab_size=18))
    with pytest.raises(ConfigError, match=r"type next: model\.vocab_size=18"):
        check_fit(corpus, model_of(64, vocab_size=17))


def test_large_texts_are_not_prepared_while_ranks_wait(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ConfigError, match=r"gpt\.prepare data=text data\.path="):
        describe_corpus(text_config(tmp_path / "large"), tmp_path)
    assert describe_corpus(text_config(tmp_path / "large", max_bytes=1000), tmp_path).tokens == 1000


def test_keys_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for config, fix in (
        (text_config(tmp_path, tokenizer=TokenizerKind.hf), "data.tokenizer=hf data.tokenizer_path="),
        (text_config(tmp_path, tokenizer_path="file"), "data.tokenizer=hf"),
        (DataConfig(source=Source.dataset), "data=tinystories"),
        (DataConfig(source=Source.tokens), "data=tokens data.path=FOLDER"),
    ):
        assert refused(config.validate).fix.startswith(fix)
    assert main(["data=tokens", f"data.path={tmp_path}"]) == 2


def test_looking_up_a_corpus_loads_no_torch_and_no_numpy_and_preparing_no_torch() -> None:
    code = "import sys, gpt.data.corpus; assert not {'torch', 'numpy'} & set(sys.modules); "
    code += "import gpt.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Tokenizers: what goes in comes out, the ids are those of the libraries, and a saved one is the same one.


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
    """Payload of a tiktoken encoding with the merges of ``byte_level_bpe``, whose stand-ins for bytes are undone."""
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
