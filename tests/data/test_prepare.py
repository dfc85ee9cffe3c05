"""Preparing corpora: against plain loops, killed and gone on with, in every layout, by any number of processes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.config import DataConfig, Source, SyntheticConfig, TokenFileFormat, TokenizerKind
from gpt.data import preparation, shards, spec
from gpt.data.corpus import describe_corpus, ensure_tokens
from gpt.data.preparation import prepare_folder
from gpt.data.prepared import TokenSource, open_folder, open_tokens, read_corpus_manifest
from gpt.data.shards import Chain, chain_of, is_validation, list_shards, read_shard, walk
from gpt.data.spec import SHAKESPEARE_SHA256, PreprocessingSpec, build_spec
from gpt.data.tokenizers import load_tokenizer
from gpt.prepare import main
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import kill_all, run, start, wait_for
from tests.support.composing import config_from
from tests.support.planning import refused

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(20 + i % 7)) + " é🎉" for i in range(300)]


def made(config: DataConfig, folder: Path) -> TokenSource:
    config.validate()
    return prepare_folder(build_spec(config, folder.parent), folder)


def ids_of(source: TokenSource, split: str) -> list[int]:
    """All tokens of a split, read with numpy."""
    segments = source.train.segments if split == "train" else source.val.segments
    parts = [np.fromfile(s.path, dtype=np.dtype(s.dtype), count=s.tokens, offset=s.offset) for s in segments]
    return np.concatenate(parts).tolist()


def write_jsonl(folder: Path, suffix: str = "jsonl") -> str:
    """The first 200 texts in two files, packed where the suffix says so, and an empty file."""
    folder.mkdir()
    for i in range(2):
        with (gzip.open if suffix.endswith("gz") else open)(folder / f"{i}.{suffix}", "wt") as file:
            lines = (json.dumps({"id": n, "text": t}) for n, t in enumerate(TEXTS[i * 100 : i * 100 + 100]))
            file.write("\n".join(lines) + "\n" + "\n" * i)
    (folder / f"empty.{suffix}").touch()
    return f"{folder}/*.{suffix}"


def joined(texts: Iterable[str]) -> bytes:
    """Documents as a corpus of bytes has them."""
    return "".join(f"{text}\n" for text in texts).encode()


def dealt_out(val_fraction: float, *shards: list[str]) -> dict[str, list[str]]:
    """The documents of each split."""
    documents = [(is_validation(i, n, val_fraction), t) for i, texts in enumerate(shards) for n, t in enumerate(texts)]
    return {split: [t for is_val, t in documents if is_val == (split == "val")] for split in ("train", "val")}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_parquet(folder: Path) -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for i in range(2):
        table = pyarrow.table({"n": list(range(100)), "text": TEXTS[i * 100 : i * 100 + 100]})
        parquet.write_table(table, folder / f"{i}.parquet", row_group_size=30)
    return f"{folder}/*.parquet"


@pytest.mark.parametrize(
    "write", [write_jsonl, write_parquet, partial(write_jsonl, suffix="jsonl.gz")], ids=["jsonl", "parquet", "gz"]
)
def test_documents_by_pattern_against_a_plain_loop(tmp_path: Path, write: Callable[[Path], str]) -> None:
    config = DataConfig(source=Source.files, path=write(tmp_path / "in"), val_fraction=0.2)
    source = made(config, tmp_path / "out")
    expected = dealt_out(0.2, TEXTS[:200])  # small files: all of them are one shard
    assert 20 < len(expected["val"]) < 60
    for split, texts in expected.items():
        assert bytes(ids_of(source, split)) == joined(texts)
    assert [source.train.documents, source.val.documents] == [len(texts) for texts in expected.values()]
    assert source.val.num_bytes == len(joined(expected["val"]))


def test_every_tokenizer_decodes_to_the_text(tmp_path: Path) -> None:
    from tests.data.test_corpus import byte_level_bpe, same_for_tiktoken

    (tmp_path / "tokenizer.json").write_text(byte_level_bpe())
    (tmp_path / "ranks.json").write_bytes(same_for_tiktoken())
    text = "\n".join(TEXTS)
    (tmp_path / "text").write_text(text)
    paths = {TokenizerKind.hf: "tokenizer.json", TokenizerKind.tiktoken: "ranks.json"}
    for kind in TokenizerKind:
        config = DataConfig(source=Source.text, path=str(tmp_path / "text"), tokenizer=kind, tokenizer_vocab_size=300)
        config.tokenizer_path = str(tmp_path / paths[kind]) if kind in paths else None
        source = made(config, tmp_path / kind.name)
        tokenizer = load_tokenizer(tmp_path / kind.name / "tokenizer")
        assert source.tokenizer is not None and source.tokenizer["kind"] == kind.name
        assert "".join(tokenizer.decode(ids_of(source, s)) for s in ("train", "val")) == text, kind
        assert source.val.num_bytes == pytest.approx(len(text.encode()) / 10, abs=4)
        for split in ("train", "val"):
            ids = ids_of(source, split)
            assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids


def test_documents_end_with_the_tokenizers_sign(tmp_path: Path) -> None:
    from tests.data.test_corpus import same_for_tiktoken

    (tmp_path / "ranks.json").write_bytes(same_for_tiktoken())
    config = DataConfig(source=Source.files, path=write_jsonl(tmp_path / "in"), tokenizer=TokenizerKind.tiktoken)
    config.tokenizer_path = str(tmp_path / "ranks.json")
    source = made(config, tmp_path / "out")
    ids = ids_of(source, "train")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert ids.count(0) == source.train.documents and ids[-1] == 0
    train = dealt_out(0.1, TEXTS[:200])["train"]
    assert ids[: ids.index(0)] == tokenizer.encode(train[0]).tolist()
    assert source.train.num_bytes == sum(len(t.encode()) for t in train), "the sign stands for no byte"


def test_text_files_follow_one_another_and_validation_is_the_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text("".join(TEXTS[i * 100 : i * 100 + 100]))
    config = DataConfig(source=Source.files, path=f"{tmp_path}/in/*", val_fraction=0.25)
    source = made(config, tmp_path / "bytes")
    whole = "".join(TEXTS).encode()
    assert bytes(ids_of(source, "train") + ids_of(source, "val")) == whole
    assert len(ids_of(source, "val")) == len(whole) // 4


def test_every_layout_holds_the_same_tokens_and_is_read_as_token_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in")
    found = {}
    for layout in TokenFileFormat:
        out = tmp_path / layout.name
        source = made(DataConfig(source=Source.files, path=path, layout=layout), out)
        found[layout] = [ids_of(source, split) for split in ("train", "val")]
        again = open_tokens(DataConfig(source=Source.tokens, path=str(out)))
        assert again.sources == (source,) and again.sha256 == source.sha256
        for part in json.loads((out / "manifest.json").read_text())["splits"].values():
            for file in part["files"]:
                assert hashlib.sha256((out / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    assert found[TokenFileFormat.nanogpt] == found[TokenFileFormat.llmc] == found[TokenFileFormat.megatron]
    assert (tmp_path / "nanogpt" / "meta.pkl").is_file()
    train = [len(joined([text])) for text in dealt_out(0.1, TEXTS[:200])["train"]]
    index = (tmp_path / "megatron" / "train.idx").read_bytes()
    assert np.frombuffer(index, dtype="<i4", count=len(train), offset=34).tolist() == train


def test_any_cut_reads_every_line_and_character_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_jsonl(tmp_path / "in")
    (tmp_path / "text").write_text("".join(TEXTS[:40]) + "\n".join(TEXTS[40:60]))
    for size in (1, 7, 100, 10**6):
        monkeypatch.setattr(shards, "SHARD_BYTES", size)
        monkeypatch.setattr(shards, "PIECE_BYTES", max(size, 3))
        spec = build_spec(DataConfig(source=Source.files, path=pattern), tmp_path)
        if size >= 100:
            lines = [piece.data.decode() for shard in list_shards(spec) for piece in read_shard(spec, shard)]
            assert lines == TEXTS[:200]
        for kind in (TokenizerKind.byte, TokenizerKind.char):
            config = DataConfig(source=Source.text, path=str(tmp_path / "text"), tokenizer=kind, val_fraction=0.3)
            spec = build_spec(config, tmp_path)
            pieces = [piece for shard in list_shards(spec) for piece in read_shard(spec, shard)]
            assert b"".join(piece.data for piece in pieces) == (tmp_path / "text").read_bytes()
            assert [piece.split for piece in pieces] == sorted(piece.split for piece in pieces)
            if kind is TokenizerKind.char:
                assert "".join(piece.data.decode() for piece in pieces)  # no piece cuts a character


@pytest.mark.parametrize("limit", [1, 5000])
def test_max_bytes_takes_whole_documents_from_the_front(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    config = DataConfig(source=Source.files, path=write_jsonl(tmp_path / "in"), max_bytes=limit, val_fraction=0.3)
    spec = build_spec(config, tmp_path)
    texts, total = [], 0
    for shard in list_shards(spec):
        for piece in read_shard(spec, shard):
            if total < limit:
                texts.append((piece.split, piece.data + b"\n"))
                total += len(piece.data) + 1
    if {split for split, _ in texts} != {0, 1}:
        with pytest.raises(ConfigError, match="no text to validate on"):
            made(config, tmp_path / "out")
        return
    source = made(config, tmp_path / "out")
    for number, split in enumerate(("train", "val")):
        assert bytes(ids_of(source, split)) == b"".join(data for s, data in texts if s == number)


def test_a_text_cut_at_max_bytes_ends_with_a_whole_character(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é" * 50)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), max_bytes=51, tokenizer=TokenizerKind.char)
    source = made(config, tmp_path / "out")
    assert source.train.tokens + source.val.tokens == 25


def kill_in_time(words: list[str], folder: Path) -> Path | None:
    """Kill a preparation after its first shards; its parts, or None where it was done before it could be killed."""
    process = start("gpt.prepare", *words, "--output", str(folder), cwd=folder.parent, log=folder.with_suffix(".log"))
    parts = folder.with_name(f".{folder.name}.parts")
    wait_for(lambda: len([*parts.glob("0*.rows")]) >= 2 or process.poll() is not None, "two shards")
    family = kill_all(process)
    if folder.exists() or not parts.is_dir():
        return None
    assert len(family) >= 3, "two processes were at work"
    return parts


def test_kill_9_of_two_processes_and_the_same_command_end_in_the_files_of_one(tmp_path: Path) -> None:
    """Of a dataset with a trained tokenizer, streamed from files in place of the hub."""
    pytest.importorskip("datasets", reason="Hugging Face's datasets (the extra 'data') is not installed")
    (tmp_path / "in").mkdir()
    for shard in range(6):
        lines = (json.dumps({"text": f"{shard}.{n} " + TEXTS[n % 300]}) + "\n" for n in range(1000))
        (tmp_path / "in" / f"train-{shard:02d}.jsonl").write_text("".join(lines))
    words = ["data=tinystories", f"data.dataset={tmp_path / 'in'}", "data.val_split=null", "data.val_fraction=0.1"]
    words += ["data.tokenizer_vocab_size=300", "--workers"]
    assert main([*words, "1", "--output", str(tmp_path / "whole")]) == 0
    for folder in (tmp_path / f"killed{i}" for i in range(5)):
        parts = kill_in_time([*words, "2"], folder)
        if parts is not None:
            break
    assert parts is not None, "the kill must fall into the preparation"
    told = run("gpt.prepare", *words, "2", "--output", str(folder), cwd=tmp_path)
    assert "train: " in told and not parts.exists()
    assert content(tmp_path / "whole") == content(folder)
    manifest = read_corpus_manifest(folder)
    assert manifest is not None and manifest["tokenizer"]["kind"] == "sentencepiece"
    assert sum(manifest["splits"][s]["documents"] for s in ("train", "val")) == 6000


def test_finished_shards_are_kept_and_only_those_that_max_bytes_needs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    config = DataConfig(source=Source.files, path=write_jsonl(tmp_path / "in"))
    made(config, tmp_path / "whole")
    done: list[int] = []
    real = shards.read_shard

    def watched(spec: PreprocessingSpec, shard: shards.Shard) -> object:
        done.append(shard.number)
        if len(done) == 4:
            raise KeyboardInterrupt
        return real(spec, shard)

    monkeypatch.setattr(preparation, "read_shard", watched)
    with pytest.raises(KeyboardInterrupt):
        made(config, tmp_path / "again")
    parts = tmp_path / ".again.parts"
    (parts / "000001.rows").unlink()
    made(config, tmp_path / "again")
    assert done[:7] == [0, 1, 2, 3, 1, 3, 4]
    assert content(tmp_path / "whole") == content(tmp_path / "again") and not parts.exists()
    del done[:]
    config.max_bytes, config.val_fraction = 3000, 0.5
    made(config, tmp_path / "cut")
    assert done == [0, 1]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("some text\n" * 100)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    words = ["data=text", f"data.path={tmp_path}/text"]
    assert main([*words, "--output", str(tmp_path / "mine")]) == 2
    assert "no prepared corpus" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    before = content(tmp_path / "out")
    assert main([*words, "data.val_fraction=0.2", "--output", str(tmp_path / "out")]) == 2
    assert "a corpus of other data.* keys" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "train.bin").write_bytes(bytes(len(before["train.bin"])))
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "train.bin in" in (told := capsys.readouterr().err) and "checksum differs" in told
    (tmp_path / "out" / "train.bin").unlink()
    assert open_folder(tmp_path / "out") is None
    assert main([*words, "--output", str(tmp_path / "out")]) == 0 and content(tmp_path / "out") == before


def test_shakespeare_is_the_pinned_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = os.environ.get("GPT_TEST_TEXT")
    if not text:
        pytest.skip("GPT_TEST_TEXT names no text file")
    content = Path(text).read_bytes()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        pytest.skip("GPT_TEST_TEXT is not tinyshakespeare")
    config = DataConfig(source=Source.shakespeare, path=text, tokenizer=TokenizerKind.char)
    source = made(config, tmp_path / "out")
    assert source.vocab_size == 65 and source.train.tokens + source.val.tokens == 1_115_394
    # nanoGPT's shakespeare_char: the sorted characters are numbered.
    ids = {c: i for i, c in enumerate(sorted(set(content.decode())))}
    assert ids_of(source, "val") == [ids[c] for c in content.decode()[-len(ids_of(source, "val")) :]]
    # A download, without a network: urllib reads files, too.
    spec.download_shakespeare(tmp_path / "cache", Path(text).as_uri())
    assert (tmp_path / "cache" / spec.SHAKESPEARE_FILE).read_bytes() == content
    assert build_spec(DataConfig(source=Source.shakespeare), tmp_path / "cache") is not None
    assert build_spec(DataConfig(source=Source.shakespeare), tmp_path / "empty") is None


def test_another_text_is_no_shakespeare(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("To be")
    with pytest.raises(ConfigError, match="is not tinyshakespeare"):
        build_spec(DataConfig(source=Source.shakespeare, path=str(tmp_path / "text")), tmp_path)
    for name, found in (("text", "is not tinyshakespeare"), ("nothing", "cannot be fetched")):
        with pytest.raises(ConfigError, match=found):
            spec.download_shakespeare(tmp_path, (tmp_path / name).as_uri())


def test_patterns_and_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    pattern = write_jsonl(tmp_path / "in")

    def refusal(**changes: object) -> ConfigError:
        config = DataConfig(source=Source.files, **{"path": pattern, **changes})  # type: ignore[arg-type]
        return refused(made, config, tmp_path / "out")

    assert "matches no file" in refusal(path=f"{tmp_path}/*.json").found
    assert "id, text" in refusal(text_key="body").expected
    (tmp_path / "in" / "a.txt").write_text("text")
    assert "several kinds (jsonl, text)" in refusal(path=f"{tmp_path}/in/*").found
    (tmp_path / "in" / "2.jsonl.zst").write_text("text")
    assert "is packed" in refusal(path=f"{tmp_path}/in/*.zst").found
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff\xfe" * 100)
    assert "not UTF-8" in refusal(path=f"{tmp_path}/in/*.txt", tokenizer=TokenizerKind.char).found
    (tmp_path / "in" / "0.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert "0.jsonl, line 2: " in refusal().found
    (tmp_path / "in" / "bad.parquet").write_text("no parquet")
    assert "cannot be read" in refusal(path=f"{tmp_path}/in/*.parquet").found


def test_a_dataset_is_streamed_by_shards(tmp_path: Path) -> None:
    """The road of tinystories, openwebtext and slimpajama, with local files in place of the hub."""
    pytest.importorskip("datasets", reason="Hugging Face's datasets (the extra 'data') is not installed")
    write_parquet(tmp_path / "in")
    for i in range(2):
        (tmp_path / "in" / f"{i}.parquet").rename(tmp_path / "in" / f"train-{i}.parquet")
    config = DataConfig(source=Source.dataset, dataset=str(tmp_path / "in"), val_fraction=0.2)
    source = made(config, tmp_path / "out")
    for split, texts in dealt_out(0.2, TEXTS[:100], TEXTS[100:200]).items():
        assert bytes(ids_of(source, split)) == joined(texts)
    (tmp_path / "in" / "train-1.parquet").rename(tmp_path / "in" / "validation-0.parquet")
    with pytest.raises(ConfigError, match="cannot be read"):
        made(config, tmp_path / "broken")
    (tmp_path / "in").rename(tmp_path / "pair")
    config = DataConfig(source=Source.dataset, dataset=str(tmp_path / "pair"), val_split="validation", max_bytes=4000)
    source = made(config, tmp_path / "limited")
    for split, texts, limit in (("train", TEXTS[:100], 3600), ("val", TEXTS[100:200], 400)):
        found = bytes(ids_of(source, split))
        assert limit <= len(found) < limit + 300 and joined(texts).startswith(found)
    with pytest.raises(ConfigError, match=r"the split train of the dataset .* cannot be read"):
        made(DataConfig(source=Source.dataset, dataset=str(tmp_path / "nothing")), tmp_path / "refused")


@pytest.mark.parametrize("tokenizer", [TokenizerKind.byte, TokenizerKind.char])
def test_a_text_validates_on_a_text_of_its_own(tmp_path: Path, tokenizer: TokenizerKind) -> None:
    (tmp_path / "train.txt").write_text("all of it is trained on é\n" * 40)
    (tmp_path / "val.txt").write_text("and ß only here\n" * 9)  # characters that training has not
    config = DataConfig(source=Source.text, path=f"{tmp_path}/train.txt", val_path=f"{tmp_path}/val.txt")
    config.tokenizer = tokenizer
    source = made(config, tmp_path / "out")
    decode = load_tokenizer(tmp_path / "out" / "tokenizer").decode
    assert decode(ids_of(source, "train")) == "all of it is trained on é\n" * 40
    assert decode(ids_of(source, "val")) == "and ß only here\n" * 9
    spec = build_spec(config, tmp_path)
    assert spec.known_tokens() in (None, (source.train.tokens, source.val.tokens))
    (tmp_path / "val.txt").write_text("another text\n" * 9)
    assert build_spec(config, tmp_path).key != spec.key, "another text to validate on is another corpus"


def test_files_validate_on_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents of the one pattern are trained on, up to max_bytes, and all of the other are not."""
    write_jsonl(tmp_path / "in")
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    config = DataConfig(source=Source.files, path=f"{tmp_path}/in/0.jsonl", val_path=f"{tmp_path}/in/1.jsonl")
    source = made(config, tmp_path / "out")
    for split, texts in (("train", TEXTS[:100]), ("val", TEXTS[100:200])):
        assert bytes(ids_of(source, split)) == joined(texts)
    config.max_bytes = 3000
    cut = made(config, tmp_path / "cut")
    assert cut.val.documents == 100 and 0 < (cut.train.num_bytes or 0) < 3000 + 300


@pytest.mark.parametrize(
    ("source", "path", "val_path", "found"),
    [
        (Source.text, "a.txt", "b.txt", "b.txt cannot be read"),
        (Source.text, "a.txt", "empty.txt", "data.val_path=.*empty.txt, which is no file with text"),
        (Source.text, "a.txt", "../{0}/a.txt", "a.txt is in data.path=.* and in data.val_path="),
        (Source.files, "*.txt", "a.t*", "a.txt is in data.path=.* and in data.val_path="),
        (Source.files, "*.txt", "*.jsonl", "with files of jsonl, and data.path=.* of text"),
        (Source.files, "*.txt", "b*", "data.val_path=.* matches no file"),
        (Source.stdlib, None, "a.txt", "data.val_path=.* with data=stdlib"),
        (Source.dataset, None, "a.txt", "data.val_path=.* with data=dataset"),
        (Source.tokens, "a.bin", "a.*n", "a.bin is in data.path=.* and in data.val_path="),
        (Source.tokens, "a.bin", "b.bin", "data.val_path=.*b.bin, but there are no tokens"),
        (Source.tokens, "", "a.bin", "with the folder data.path="),
    ],
)
def test_validation_files_that_cannot_be_are_refused(
    tmp_path: Path, source: Source, path: str | None, val_path: str, found: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.bin").write_bytes(bytes(8))
    (tmp_path / "a.jsonl").write_text('{"text": "text"}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "train.bin").write_bytes(bytes(8))
    config = DataConfig(source=source, val_path=f"{tmp_path}/{val_path.format(tmp_path.name)}", dataset="any")
    config.path = None if path is None else f"{tmp_path}/{path}"
    with pytest.raises(ConfigError, match=found):
        config.validate()
        describe_corpus(config, tmp_path)


def test_a_dataset_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets (the extra 'data') is not installed")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **keys: asked.append((a, keys["revision"], keys["name"])))
    for name in ("tinystories", "openwebtext", "slimpajama_6b"):
        config = config_from([f"data={name}"]).data
        shards.open_dataset(config, "train")
        assert config.revision is not None and asked[-1] == ((config.dataset,), config.revision, None)
        assert build_spec(config, tmp_path).identity["revision"] == config.revision
    subset = config_from(["data=tinystories", "data.dataset=NAME:SUBSET"]).data
    shards.open_dataset(subset, "train")
    assert (
        asked[-1] == (("NAME",), subset.revision, "SUBSET")
        and build_spec(subset, tmp_path).identity["subset"] == "SUBSET"
    )
    with pytest.raises(ConfigError, match=r"data\.revision=v1 with data=stdlib"):
        DataConfig(source=Source.stdlib, revision="v1").validate()


def test_two_states_have_the_entropy_of_the_textbook() -> None:
    """Cover and Thomas, example 4.1.1: rates alpha and beta of changing state."""
    alpha, beta = 0.3, 0.1
    chain = Chain(np.array([[0, 1], [0, 1]]), np.array([[1 - alpha, alpha], [beta, 1 - beta]]))
    assert chain.stationary() == pytest.approx([beta / (alpha + beta), alpha / (alpha + beta)])

    def binary(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = (beta * binary(alpha) + alpha * binary(beta)) / (alpha + beta)
    assert chain.entropy() == pytest.approx(expected)


@pytest.mark.parametrize("vocab_size", [64, 8])
def test_the_entropy_is_that_of_the_walk(vocab_size: int) -> None:
    successors, config = 8, SyntheticConfig(vocab_size=vocab_size, tokens=400_000)
    chain, states = chain_of(config), walk(config, 0)
    matrix = chain.transition()
    assert matrix.sum(axis=1) == pytest.approx(1.0) and ((matrix > 0).sum(axis=1) == successors).all()
    # The left eigenvector of the eigenvalue 1, found by another road.
    values, vectors = np.linalg.eig(matrix.T)
    vector = np.real(vectors[:, np.argmin(abs(values - 1))])
    assert chain.stationary() == pytest.approx(vector / vector.sum(), abs=1e-9)
    surprise = -np.log(matrix[states[:-1], states[1:]])  # infinite where the walk did what the chain forbids
    error = surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - chain.entropy()) < 6 * error + 1e-9
    # Counting pairs without knowing the chain: the plug-in estimate, whose bias is about parameters / (2 n).
    pairs = np.zeros_like(matrix)
    np.add.at(pairs, (states[:-1], states[1:]), 1)
    rows = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    plug_in = -(pairs[pairs > 0] * np.log(rows[pairs > 0])).sum() / pairs.sum()
    bias = vocab_size * successors / (2 * len(states))
    assert abs(plug_in + bias - chain.entropy()) < 6 * error + bias


def test_walks_are_those_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WALK_TOKENS", 1000)
    config = SyntheticConfig(tokens=2500)
    walks = [walk(config, i) for i in range(3)]
    assert [len(w) for w in walks] == [1000, 1000, 500]
    assert walks[0].tolist() == walk(config, 0).tolist() != walks[1].tolist()


def test_the_corpus_never_changes_between_releases() -> None:
    """Results on it stay comparable; these numbers are that promise."""
    config = SyntheticConfig(tokens=1000)
    assert chain_of(config).entropy() == pytest.approx(1.7224732, abs=1e-6)
    digest = hashlib.sha256(walk(config, 0).astype("<u4").tobytes()).hexdigest()
    assert digest.startswith("f9bf2c0d4bd94529")


def test_it_is_prepared_and_described(tmp_path: Path) -> None:
    config = DataConfig(source=Source.synthetic, val_fraction=0.25, synthetic=SyntheticConfig(tokens=4000))
    before = describe_corpus(config, tmp_path)
    (source,) = ensure_tokens(config, tmp_path).sources
    assert describe_corpus(config, tmp_path) == before
    assert (before.train_tokens, before.val_tokens, before.vocab_size) == (3000, 1000, 64)
    assert source.entropy == before.entropy == chain_of(config.synthetic).entropy()
    assert ids_of(source, "train") + ids_of(source, "val") == walk(config.synthetic, 0).tolist()
    assert source.tokenizer is None and source.val.num_bytes is None


def test_a_model_comes_within_two_percent_of_the_entropy(tmp_path: Path) -> None:
    told = run("gpt.train", "+experiment=synthetic", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    entropy = json.loads(folder.environment(1).read_text())["data_sources"][0]["entropy"]
    assert f"entropy {entropy:.4f} nats" in told
    loss = read_records(folder.metrics(0))[-1]["val_loss"]
    assert entropy * 0.995 < loss < entropy * 1.02
