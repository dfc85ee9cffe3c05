"""Training on text that is tokenized while it is read: the tokens of the prepared corpus, each once, on any ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt.config import DataConfig, Source, TokenizerKind
from gpt.data import shards
from gpt.data.corpus import describe_corpus, ensure_tokens
from gpt.data.preparation import make_tokenizer, prepare_folder
from gpt.data.prepared import find_document_end
from gpt.data.spec import build_spec
from gpt.data.stream import Stream
from gpt.prepare import prepare_corpus
from launch.errors import ConfigError
from tests.data.test_prepare import ids_of, made, write_jsonl, write_parquet
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import save, start, step

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
    monkeypatch.setattr("gpt.data.stream.read_shard", lambda spec, shard: read.append(1) or real(spec, shard))
    again = stream_of(config)
    again.restore(stream.state(1111))
    again.read(1111)
    assert len(read) <= 2, "nothing before the buffer is read"
    assert again.read(1490).tolist() == expected[1490], "batches that are left out"


def test_ends_of_documents_are_those_of_the_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    from tests.data.test_tokenizer import same_for_tiktoken

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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("data=synthetic", "data=synthetic"),
        ("data=tokens data.path=x", "data=tokens"),
        ("data=text data.path=x data.tokenizer=char", "data.tokenizer=char"),
        ("data=tinystories", "data.tokenizer=sentencepiece"),
        ("data=files data.path=x data.max_bytes=9", "data.max_bytes=9"),
        ("data=openwebtext data.revision=null", "without data.revision"),
        ("data=text data.path=x data.shuffle_buffer=0", "data.shuffle_buffer=0"),
    ],
)
def test_what_cannot_be_streamed_is_refused(words: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        config_from([*words.split(), "data.stream=true"]).validate()


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
