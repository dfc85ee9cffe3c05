"""Tokens of files and of a stream: read and written as documented, each once, on any ranks."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt.config import (
    DataConfig,
    Source,
    TokenDtype,
    TokenFileFormat,
    TokenizerKind,
    TrainConfig,
    WeightedPath,
    compose_train,
)
from gpt.data import shards
from gpt.data.corpus import check_fit, describe_corpus, ensure_tokens
from gpt.data.loader import Samples
from gpt.data.order import Stream
from gpt.data.preparation import prepare_folder, token_dtype, write_split
from gpt.data.prepared import find_document_end, open_token_files, open_tokens, read_token_file, split_end
from gpt.data.shards import make_tokenizer
from gpt.data.spec import build_spec
from gpt.prepare import prepare_corpus
from launch.errors import ConfigError
from launch.runs.compose import to_schema
from tests.data.test_prepare import ids_of, made, write_jsonl, write_parquet
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import save, start, step
from tests.support.planning import refused

IDS = np.random.default_rng(0).integers(0, 50257, 3000)


def nanogpt(folder: Path, ids: np.ndarray = IDS) -> Path:
    """A folder as nanoGPT's prepare.py leaves it: train.bin and val.bin."""
    folder.mkdir()
    ids[:-500].astype(np.uint16).tofile(folder / "train.bin")
    ids[-500:].astype(np.uint16).tofile(folder / "val.bin")
    return folder


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: type = np.uint16) -> Path:
    """One file as llm.c's write_datafile leaves it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return path


def megatron(prefix: Path, documents: list[np.ndarray], code: int = 8, dtype: type = np.uint16) -> Path:
    """A pair as Megatron's IndexedDatasetBuilder leaves it, field by field."""
    width = np.dtype(dtype).itemsize
    sizes = [len(document) for document in documents]
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(sizes)}q", *(sum(sizes[:i]) * width for i in range(len(sizes))))
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    return prefix


def tokens_config(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source=Source.tokens, path=str(path), **changes)  # type: ignore[arg-type]


def read_back(config: DataConfig, split: str) -> list[int]:
    """All tokens of a split of one file, through the loader, less those that fill no window."""
    samples = Samples(open_tokens(config), 10, seed=0)
    count = samples.num_train if split == "train" else samples.num_val
    windows, targets = samples.batch("val" if split == "val" else "train", np.arange(count))
    if split == "val":
        assert windows.flatten().tolist()[1:] == targets.flatten().tolist()[:-1]
        return windows.flatten().tolist()
    return sorted(tuple(row) for row in windows.tolist())  # type: ignore[return-value]


def windows_of(ids: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(tuple(ids[i : i + 10].tolist()) for i in range(0, (len(ids) - 1) // 10 * 10, 10))


def test_nanogpts_pair(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "owt")
    for path in (folder, folder / "train.bin"):
        assert read_back(tokens_config(path), "val") == IDS[-500:-10].tolist()
        assert read_back(tokens_config(path), "train") == windows_of(IDS[:-500])
    (folder / "val.bin").rename(folder / "rest")
    config = tokens_config(folder / "train.bin", val_fraction=0.1)
    assert read_back(config, "val") == IDS[2250:2490].tolist(), "without val.bin, the end of train.bin"


def test_llmcs_shards(tmp_path: Path) -> None:
    for i, part in enumerate((IDS[:1000], IDS[1000:2200])):
        llmc(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    llmc(tmp_path / "fineweb_val_000000.bin", IDS[2200:])
    config = tokens_config(tmp_path / "fineweb_train_*.bin", val_path=str(tmp_path / "fineweb_val_*.bin"))
    assert read_back(config, "val") == IDS[2200:2990].tolist()
    # A window lies in one file: 99 of the first one, 119 of the second.
    assert read_back(config, "train") == sorted(windows_of(IDS[:1000]) + windows_of(IDS[1000:2200]))


def test_wide_tokens(tmp_path: Path) -> None:
    wide = IDS + 100_000
    llmc(tmp_path / "llama.bin", wide, 20240801, 7, np.uint32)
    megatron(tmp_path / "mega", [wide[:100], wide[100:]], 4, np.int32)
    (tmp_path / "raw.bin").write_bytes(wide.astype("<u4").tobytes())
    (tmp_path / "bytes.bin").write_bytes((IDS % 251).astype(np.uint8).tobytes())
    for config, ids in (
        (tokens_config(tmp_path / "llama.bin"), wide),
        (tokens_config(tmp_path / "mega"), wide),
        (tokens_config(tmp_path / "raw.bin", token_dtype=TokenDtype.uint32), wide),
        (tokens_config(tmp_path / "bytes.bin", token_dtype=TokenDtype.uint8), IDS % 251),
    ):
        assert read_back(config, "val") == ids[2700:2990].tolist()


def test_megatrons_pair(tmp_path: Path) -> None:
    prefix = megatron(tmp_path / "corpus_text_document", [IDS[:7], IDS[7:2000], IDS[2000:]])
    for path in (prefix, prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")):
        assert read_back(tokens_config(path), "val") == IDS[2700:2990].tolist()


def test_what_is_written_is_what_the_formats_say(tmp_path: Path) -> None:
    lengths = np.array([7, 1993, 1000])
    chunks = [IDS[:13].astype("<u2").tobytes(), IDS[13:].astype("<u2").tobytes()]
    for layout in TokenFileFormat:
        (tmp_path / layout.name).mkdir()
        write_split(layout, tmp_path / layout.name / "train", "uint16", 3000, chunks, lengths)
    (nanogpt_file,) = (tmp_path / "nanogpt").iterdir()
    assert np.fromfile(nanogpt_file, dtype=np.uint16).tolist() == IDS.tolist()
    llmc(tmp_path / "expected", IDS)
    (llmc_file,) = (tmp_path / "llmc").iterdir()
    assert llmc_file.read_bytes() == (tmp_path / "expected").read_bytes()
    megatron(tmp_path / "mega", [IDS[:7], IDS[7:2000], IDS[2000:]])
    for suffix in ("bin", "idx"):
        written = (tmp_path / "megatron" / f"train.{suffix}").read_bytes()
        assert written == (tmp_path / f"mega.{suffix}").read_bytes(), suffix


def test_long_splits_are_cut_where_llmc_cuts_them_and_refused_where_megatron_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.data import preparation as layouts

    monkeypatch.setattr(layouts, "LLMC_SHARD_TOKENS", 1200)
    chunks = [IDS[i : i + 77].astype("<u2").tobytes() for i in range(0, 3000, 77)]
    write_split(TokenFileFormat.llmc, tmp_path / "train", "uint16", 3000, chunks, IDS)
    shards = [open_token_files(str(tmp_path / f"train_{i:06d}.bin"))[0] for i in range(3)]
    assert [shard.tokens for shard in shards] == [1200, 1200, 600]
    read = [np.fromfile(s.path, dtype="<u2", offset=1024) for s in shards]
    assert np.concatenate(read).tolist() == IDS.tolist()
    with pytest.raises(ConfigError, match=r"a document of 2,147,483,648 tokens(.|\n)*data\.layout=llmc"):
        write_split(TokenFileFormat.megatron, tmp_path / "val", "uint16", 3000, chunks, np.array([1 << 31]))


def test_tokens_are_as_wide_as_the_vocabulary_needs() -> None:
    widths = [token_dtype(layout, size) for layout in TokenFileFormat for size in (65, 65536, 65537)]
    assert widths == ["uint16", "uint16", "uint32", "uint16", "uint16", "uint32", "uint16", "uint16", "int32"]


@pytest.mark.parametrize("tokens", [0, 5, 10, 17, 30])
def test_the_end_is_cut_off_across_files(tmp_path: Path, tokens: int) -> None:
    files = [llmc(tmp_path / f"{i}", IDS[i * 10 : i * 10 + 10]) for i in range(3)]
    before, after = split_end(tuple(read_token_file(f) for f in files), tokens)

    def content(segments: tuple) -> list[int]:
        parts = [np.fromfile(s.path, dtype="<u2", count=s.tokens, offset=s.offset).tolist() for s in segments]
        return [i for part in parts for i in part]

    assert (content(before), content(after)) == (IDS[: 30 - tokens].tolist(), IDS[30 - tokens : 30].tolist())


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    llmc(tmp_path / "cut.bin", IDS).write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    llmc(tmp_path / "new.bin", IDS, version=2)
    prefix = megatron(tmp_path / "mega", [IDS])
    megatron(tmp_path / "float", [IDS], code=6)
    megatron(tmp_path / "short", [IDS, IDS])
    (tmp_path / "short.idx").write_bytes((tmp_path / "short.idx").read_bytes()[:-8])
    nanogpt(tmp_path / "half")
    (tmp_path / "half" / "val.bin").unlink()
    for name, found in (
        ("odd.bin", "not whole uint16 tokens"),
        ("cut.bin", "for 3000 uint16 tokens, and 7022 bytes"),
        ("new.bin", "the header of llm.c"),
        ("float", "dtype code 6"),
        ("short", "version 1, dtype code 8, 2 sequences"),
        ("meg", "there are no tokens"),
        ("half", "there are no tokens"),
        ("nothing/*.bin", "there are no tokens"),
    ):
        refused(open_tokens, tokens_config(tmp_path / name), found=found)
    (tmp_path / "mega.idx").write_bytes(b"no index of Megatron's")
    with pytest.raises(ConfigError, match="no whole index of Megatron"):
        open_tokens(tokens_config(prefix))


def test_ids_that_the_model_has_no_room_for_are_refused(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "owt")
    config = to_schema(compose_train(["data=tokens", f"data.path={folder}", "model.vocab_size=256"]), TrainConfig)
    corpus = describe_corpus(config.data, tmp_path)
    with pytest.raises(ConfigError, match=f"type next: model.vocab_size={IDS.max() + 1}"):
        check_fit(corpus, config.model)
    samples = Samples(ensure_tokens(config.data, tmp_path), 16, 0, vocab_size=256)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256"):
        samples.batch("train", np.arange(8))


def test_sources_of_a_mixture_have_one_tokenizer(tmp_path: Path) -> None:
    for name, words in (("a", "to be"), ("b", "or not")):
        (tmp_path / f"{name}.txt").write_text(words * 400)
        from gpt.prepare import main

        kind = "byte" if name == "a" else "char"
        arguments = ["data=text", f"data.path={tmp_path / name}.txt", f"data.tokenizer={kind}", "--output"]
        assert main([*arguments, str(tmp_path / name)]) == 0
    nanogpt(tmp_path / "c")
    mixed = DataConfig(source=Source.tokens, sources=[WeightedPath(str(tmp_path / n)) for n in "ac"])
    assert [s.name for s in open_tokens(mixed).sources] == ["text", "c"]
    mixed.sources[1].path = str(tmp_path / "b")
    with pytest.raises(ConfigError, match="one tokenizer for all sources"):
        open_tokens(mixed)


# Training on text that is tokenized while it is read: the tokens of the prepared corpus, each once, on any ranks.


T = 50


def stream_of(config: DataConfig, seed: int = 1) -> Stream:
    config.validate()
    spec = build_spec(config, Path("nowhere"))
    return Stream(spec, make_tokenizer(spec), T, seed)


def in_order(stream: Stream, windows: int, first: int = 0) -> list[list[int]]:
    return [stream.read(index).tolist() for index in range(first, first + windows)]


def joined(windows: list[list[int]]) -> list[int]:
    """The tokens of consecutive windows; the last target of each is the first token of the next one."""
    assert all(before[-1] == after[0] for before, after in pairwise(windows))
    return [token for window in windows for token in window[:-1]]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(source=Source.files, path=write_jsonl(tmp_path / "in"), stream=True, shuffle_buffer=1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "dataset"])
def test_without_shuffling_the_stream_is_the_prepared_corpus_again_and_again(tmp_path: Path, kind: str) -> None:
    """Windows cross the ends of documents, of files and of the corpus."""
    if kind == "dataset":
        pytest.importorskip("datasets", reason="Hugging Face's datasets (the extra 'data') is not installed")
        write_jsonl(tmp_path / "in")
        (tmp_path / "in" / "1.jsonl").unlink()  # one file, which is one shard
        (tmp_path / "in" / "empty.jsonl").unlink()
        config = DataConfig(source=Source.dataset, dataset=str(tmp_path / "in"))
    elif kind == "text":
        (tmp_path / "text").write_bytes(np.random.default_rng(0).bytes(20_000))
        config = DataConfig(source=Source.text, path=str(tmp_path / "text"))
    else:
        write = write_jsonl if kind == "jsonl" else write_parquet
        config = DataConfig(source=Source.files, path=write(tmp_path / "in"))
    prepared = made(config, tmp_path / "out")
    config.stream, config.shuffle_buffer = True, 1
    expected = ids_of(prepared, "train")
    windows = 3 * len(expected) // T
    found = joined(in_order(stream_of(config), windows))
    assert found == (expected * 3)[: len(found)] and len(found) > 2 * len(expected)
    held = ensure_tokens(config, tmp_path / "cache", 333).sources[0]
    assert ids_of(held, "val") == ids_of(prepared, "val")[:333]
    assert held.val.num_bytes == 333, "bytes are the tokens"


def test_every_epoch_has_each_document_once_in_another_order_of_the_shards(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    prepared = ids_of(made(config, tmp_path / "out"), "train")
    found = joined(in_order(stream_of(config), 2 * len(prepared) // T + 1))
    epochs = [bytes(found[i : i + len(prepared)]) for i in (0, len(prepared))]
    assert epochs[0] != epochs[1] and bytes(prepared) not in epochs
    assert [sorted(epoch.split(b"\n")) for epoch in epochs] == [sorted(bytes(prepared).split(b"\n"))] * 2
    assert in_order(stream_of(config, seed=2), 9) != in_order(stream_of(config), 9)


def test_a_buffer_is_a_shuffle_of_its_windows_and_the_next_epoch_has_another_one(config: DataConfig) -> None:
    plain = in_order(stream_of(config), 90)
    config.shuffle_buffer = 30
    found = in_order(stream_of(config), 90)
    for first in (0, 30, 60):
        assert sorted(found[first : first + 30]) == sorted(plain[first : first + 30])
    orders = [[plain.index(window, first) - first for window in found[first : first + 30]] for first in (0, 30, 60)]
    assert len({tuple(order) for order in [*orders, [*range(30)]]}) == 4


def test_a_stream_continues_anywhere_from_its_state(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    config.shuffle_buffer = 7
    stream = stream_of(config)
    expected = in_order(stream, 1500)  # more than one epoch
    for index in (0, 6, 7, 500, 1111):
        state = json.loads(json.dumps(stream.state(index)))
        again = stream_of(config)
        again.restore(state)
        assert in_order(again, 40, index) == expected[index : index + 40]
        assert in_order(stream, 40, index) == expected[index : index + 40], "back, as after a roll-back"
    read: list[int] = []
    real = shards.read_shard
    monkeypatch.setattr("gpt.data.order.read_shard", lambda spec, shard: read.append(1) or real(spec, shard))
    again = stream_of(config)
    again.restore(stream.state(1111))
    again.read(1111)
    assert len(read) <= 2, "nothing before the buffer is read"
    assert again.read(1490).tolist() == expected[1490], "batches that are left out"


def test_ends_of_documents_are_those_of_the_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    from tests.data.test_corpus import same_for_tiktoken

    (tmp_path / "ranks.json").write_bytes(same_for_tiktoken())
    config.tokenizer, config.tokenizer_path = TokenizerKind.tiktoken, str(tmp_path / "ranks.json")
    prepared = prepare_folder(build_spec(config, tmp_path), tmp_path / "out")
    expected = ids_of(prepared, "train")
    assert joined(in_order(stream_of(config), len(expected) // T)) == expected[: len(expected) // T * T]
    pack = config_from(["data=files", "data.pack=documents"]).data.pack
    config.pack = pack
    tokens = ensure_tokens(config, tmp_path / "cache", 200)
    assert find_document_end(config, tokens) == prepared.tokenizer["eot"]
    assert tokens.sources[0].val.num_bytes == pytest.approx(200 * prepared.val.num_bytes / prepared.val.tokens, rel=0.1)
    assert describe_corpus(config, tmp_path / "cache").vocab_size == prepared.vocab_size


WORDS = ("precision=fp32", "data.stream=true", "data.shuffle_buffer=24", "data.max_bytes=null")


def taken(rank: int, size: int, folder: Path, words: list[str], steps: list[int]) -> list[list[list[int]]]:
    """The global batches of the next steps, from all ranks; a checkpoint is saved before the last step."""
    run, found = start(rank, size, folder, *WORDS, *words, f"optim.max_micro_batch={16 // size}"), []
    assert run.step == steps[0] - 1
    for number in steps:
        if number == steps[-1]:
            save(run)
        batch = run.batches.take(number)
        step(run)
        parts = run.world.gather([batch.first, batch.tokens.tolist()])
        found.append([row for _, rows in sorted(parts) for row in rows])
    return found


def test_any_number_of_ranks_sees_the_same_batches_also_after_a_kill(tmp_path: Path) -> None:
    words = ["data=files", f"data.path={write_jsonl(tmp_path / 'in')}"]
    (whole,) = run_distributed(taken, 1, tmp_path / "whole", words, [*range(1, 10)])
    assert whole[0] != whole[1]
    # The step after the checkpoint is lost in the kill, and made again.
    for size, steps in ((2, [1, 2, 3, 4]), (4, [4, 5, 6, 7]), (1, [7, 8, 9])):
        for found in run_distributed(taken, size, tmp_path / "killed", words, steps):
            assert found == [whole[number - 1] for number in steps], (size, steps)


def test_text_that_is_missing_or_too_short_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.stream=true, which needs no preparation"):
        prepare_corpus(config, tmp_path, None, 1)
    with pytest.raises(ConfigError, match=r"validate on: .* needs 100000"):
        ensure_tokens(config, tmp_path / "cache", 100_000)
    config.text_key = "content"
    with pytest.raises(ConfigError, match=r"data\.text_key=content"):
        describe_corpus(config, tmp_path)
    (tmp_path / "one").write_text("x")  # which validation takes
    stream = stream_of(DataConfig(source=Source.text, path=str(tmp_path / "one"), stream=True))
    with pytest.raises(ConfigError, match="train on"):
        stream.read(0)
