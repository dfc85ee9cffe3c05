"""Batches and the order of their samples: no rank count and no restart repeats or skips a sample."""

from __future__ import annotations

import json
import math
import queue
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig, ModelConfig, OptimConfig, Source, TokenizerKind, WeightedPath
from gpt.data import loader
from gpt.data.corpus import check_fit, describe_corpus, ensure_tokens
from gpt.data.loader import MOST_OPEN, BatchPrefetcher, Samples, train_indices
from gpt.data.order import PassedOver, max_samples, sample_position, sample_source, samples_per_source
from gpt.data.preparation import prepare_folder
from gpt.data.prepared import Tokens, open_tokens, whole_weights
from gpt.data.spec import build_spec
from gpt.topology import Batch, split_batch
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import TINY, run


def batch_of(global_batch: int, ranks: int) -> Batch:
    optim = OptimConfig(max_steps=1, global_batch=global_batch, max_micro_batch=4, lr=1e-3, min_lr=1e-4, warmup_steps=0)
    return split_batch(optim, ranks)


@given(
    global_batch=st.integers(1, 64),
    step=st.integers(1, 10**9),
    resizes=st.lists(st.integers(0, 100), min_size=1, max_size=5),
)
def test_any_number_of_ranks_uses_the_same_samples_once(global_batch: int, step: int, resizes: list[int]) -> None:
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    used = []
    for offset, resize in enumerate(resizes):  # the run is restarted with another size at every step
        batch = batch_of(global_batch, divisors[resize % len(divisors)])
        parts = [train_indices(step + offset, rank, batch) for rank in range(batch.ranks)]
        assert {len(part) for part in parts} == {batch.per_rank}
        used.append(np.concatenate(parts))
    first = (step - 1) * global_batch
    assert np.concatenate(used).tolist() == list(range(first, first + len(resizes) * global_batch))


@pytest.fixture
def text(tmp_path: Path) -> tuple[bytes, Tokens]:
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    (tmp_path / "text").write_bytes(content)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), val_fraction=0.2)
    return content, ensure_tokens(config, tmp_path / "cache")


def test_an_epoch_of_training_is_every_window_of_the_training_text_once(text: tuple[bytes, Tokens]) -> None:
    content, file = text
    samples = Samples(file, block_size=16, seed=1)
    assert (samples.num_train, samples.num_val) == (3999 // 16, 999 // 16)
    tokens, targets = samples.batch("train", np.arange(samples.num_train))
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape == (249, 16)
    assert tokens.is_contiguous() and targets.is_contiguous()
    found = sorted((bytes(row.tolist()), bytes(target.tolist())) for row, target in zip(tokens, targets, strict=True))
    assert found == sorted((content[i : i + 16], content[i + 1 : i + 17]) for i in range(0, 249 * 16, 16))
    again, _ = samples.batch("train", np.arange(samples.num_train) + samples.num_train)
    assert not torch.equal(tokens, again), "the next epoch has another order"
    assert torch.equal(tokens.sort(0)[0], again.sort(0)[0])
    other, _ = Samples(file, 16, seed=2).batch("train", np.arange(samples.num_train))
    assert not torch.equal(tokens, other), "another seed has another order"


def test_a_batch_of_one_sequence_is_that_sequence_of_a_larger_batch(text: tuple[bytes, Tokens]) -> None:
    """Its tokens and targets would be parts of one row in memory, if they were not copied."""
    samples = Samples(text[1], block_size=16, seed=1, document_end=text[0][3])
    together = samples.batch("train", np.arange(samples.num_train))
    assert (together[1] == -1).any()
    for index in range(samples.num_train):
        alone = samples.batch("train", np.array([index]))
        assert all(torch.equal(mine[0], many[index]) for mine, many in zip(alone, together, strict=True))


def test_validation_keeps_the_order_of_the_last_part_of_the_text(text: tuple[bytes, Tokens]) -> None:
    content, file = text
    samples = Samples(file, block_size=16, seed=1)
    tokens, targets = samples.batch("val", np.arange(samples.num_val))
    assert bytes(tokens.flatten().tolist()) == content[4000 : 4000 + samples.num_val * 16]
    assert bytes(targets.flatten().tolist()) == content[4001 : 4001 + samples.num_val * 16]
    with pytest.raises(AssertionError, match="repeats"):
        samples.batch("val", np.array([samples.num_val]))


def test_a_file_that_this_machine_does_not_see_whole_is_refused(text: tuple[bytes, Tokens]) -> None:
    tokens = text[1]
    tokens.sources[0].val.segments[0].path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="cut short"):
        Samples(tokens, 16, 1)


def open_files(folder: Path) -> set[str]:
    """Names of the files of a folder that this process has open or mapped."""
    mapped = (line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines())
    return {Path(path[0].strip()).name for path in mapped if path and path[0].strip().startswith(f"{folder}/")}


def test_a_file_is_opened_when_it_is_first_read_and_the_latest_stay_open(tmp_path: Path) -> None:
    """A corpus may have more files than a process may open."""
    count = MOST_OPEN + 20
    for number in range(count):
        np.full(24, number, dtype=np.uint16).tofile(tmp_path / f"{number:03}.bin")
    config = DataConfig(source=Source.tokens, path=str(tmp_path / "*.bin"), val_fraction=0.05)
    windows = Samples(open_tokens(config), block_size=20, seed=1)._train[0]
    assert open_files(tmp_path) == set() and len(windows) > MOST_OPEN
    for _ in range(2):  # in the second round every file is opened again
        assert [windows.read(position)[0] for position in range(len(windows))] == list(range(len(windows)))
        last = {f"{number:03}.bin" for number in range(len(windows) - MOST_OPEN, len(windows))}
        assert open_files(tmp_path) == last
    (tmp_path / "000.bin").write_bytes(b"short")
    windows.announce(len(windows) - 1)
    with pytest.raises(ConfigError, match=r"000\.bin is missing or cut short"):
        windows.read(0)


def test_bits_per_byte_take_the_bytes_per_token_of_the_validation_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 4000 + "aé日🎉" * 1000)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), tokenizer=TokenizerKind.char)
    spec = build_spec(config, tmp_path)
    assert spec is not None
    samples = Samples(Tokens((prepare_folder(spec, tmp_path / "char"),)), 16, 1)
    assert samples.val_bytes(5) == pytest.approx(5 * 16 * 10 / 4), "ten bytes are four characters"
    assert samples.val_bits_per_byte(1.5, 5) == pytest.approx(1.5 / math.log(2) * 4 / 10)


BATCH = Batch(global_batch=8, ranks=2, per_rank=4, micro=2, accumulation=2)
CPU = torch.device("cpu")


@pytest.fixture
def samples(text: Any) -> Samples:
    return Samples(text[1], block_size=16, seed=1)


def batches_of(samples: Samples, last_step: int = 100, device: torch.device = CPU) -> BatchPrefetcher:
    return BatchPrefetcher(samples, BATCH, 1, last_step, device)


@pytest.mark.parametrize("together", [64, 3 * BATCH.per_rank + 1, 1])
def test_batches_are_those_of_the_steps_in_whatever_order_they_are_taken(
    samples: Samples, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOGETHER", together)
    batches = batches_of(samples, last_step=72)
    for step in (1, 2, 3, 70, 71, 2, 72):  # as after a resume, in a second epoch, and after the last step
        taken = batches.take(step)
        indices = train_indices(step, 1, BATCH)
        tokens, targets = samples.batch("train", indices)
        assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)
        assert taken.tokens.is_contiguous() and taken.targets.is_contiguous()
        assert (taken.first, taken.last) == (indices[0], indices[-1])
    batches.passed_over = PassedOver().including(range(3, 6))
    assert [batches.take(step).first for step in (3, 4)] == [train_indices(n, 1, BATCH)[0] for n in (6, 7)]
    batches.close()


@pytest.fixture
def read(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> queue.Queue[list[int]]:
    """The numbers of the batches that are read together, as the thread begins to read them."""
    begun: queue.Queue[list[int]] = queue.Queue()
    real = samples.read

    def watched(split: Any, indices: Any) -> torch.Tensor:
        numbers = [int(i) // BATCH.global_batch + 1 for i in indices[:: BATCH.per_rank]]
        begun.put(numbers)
        if 4 in numbers:
            raise ConfigError("a file that is gone", "a file", "another folder")
        return real(split, indices)

    monkeypatch.setattr(samples, "read", watched)
    return begun


def test_the_next_batches_are_read_while_steps_are_computed_and_none_after_the_last(
    samples: Samples, read: queue.Queue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOGETHER", 2 * BATCH.per_rank)
    batches = batches_of(samples, last_step=9)
    batches.take(6)
    assert [read.get(timeout=60) for _ in range(2)] == [[6, 7], [8, 9]], "nobody has asked for the second group yet"
    for step in (7, 8, 9):
        batches.take(step)
    batches.close()
    assert read.empty(), "each once"


def test_large_batches_are_read_one_ahead_and_a_failure_belongs_to_its_step(
    samples: Samples, read: queue.Queue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 2 * BATCH.per_rank * 17 * 8 - 1)  # one batch, and not quite another
    batches = batches_of(samples)
    batches.take(2)
    batches.take(3)
    with pytest.raises(ConfigError, match="a file that is gone"):
        batches.take(4)
    batches.close()
    assert [read.get(timeout=60) for _ in range(3)] == [[2], [3], [4]]


class OnHost(torch.Tensor):
    """Ids that may be pinned and copied to a GPU that is not there; they tell ``seen`` of both."""

    seen: ClassVar[list[tuple[Any, ...]]] = []

    def pin_memory(self, device: Any = None) -> OnHost:
        self.seen.append(("pinned", threading.current_thread().name))
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        self.seen.append(("copied", *args, options))
        return self.as_subclass(torch.Tensor)


def test_a_batch_for_a_gpu_is_pinned_by_the_thread_and_copied_once_without_waiting(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, targets = samples.batch("train", train_indices(1, 1, BATCH))
    real, gpu = samples.read, torch.device("cuda:1")
    monkeypatch.setattr(samples, "read", lambda split, indices: real(split, indices).as_subclass(OnHost))
    batches = batches_of(samples, 1, gpu)
    taken = batches.take(1)
    batches.close()
    assert OnHost.seen == [("pinned", "batches_0"), ("copied", gpu, {"non_blocking": True})]
    assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)


def test_the_thread_ends_with_the_run(samples: Samples) -> None:
    before = set(threading.enumerate())
    batches = batches_of(samples)
    batches.take(1)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    thread.join(60)
    assert not thread.is_alive()


# The order of the samples: a bijection in every epoch, different between epochs and seeds, without visible pattern.


SEEDS = st.integers(0, 2**63 - 1)


@given(num_samples=st.integers(1, 3000), epoch=st.integers(0, 10**6), seed=SEEDS)
def test_an_epoch_has_every_position_once(num_samples: int, epoch: int, seed: int) -> None:
    epochs, positions = sample_position(np.arange(num_samples) + epoch * num_samples, num_samples, seed)
    assert (epochs == epoch).all()
    assert (np.sort(positions) == np.arange(num_samples)).all()


@given(
    num_samples=st.integers(1, 2**40),
    seed=SEEDS,
    indices=st.lists(st.integers(0, 2**60), min_size=1, max_size=20),
)
def test_random_access_is_the_same_as_any_batch(num_samples: int, seed: int, indices: list[int]) -> None:
    epochs, positions = sample_position(np.array(indices), num_samples, seed)
    for number, index in enumerate(indices):
        assert sample_position(index, num_samples, seed) == (epochs[number], positions[number])
        assert epochs[number] == index // num_samples and 0 <= positions[number] < num_samples
    square = np.array(indices * 2).reshape(2, -1)
    assert (sample_position(square, num_samples, seed)[1] == np.stack([positions, positions])).all()


@pytest.mark.parametrize("num_samples", [1000, 1025])
def test_epochs_and_seeds_have_unrelated_orders(num_samples: int) -> None:
    epochs = sample_position(np.arange(20 * num_samples), num_samples, 7)[1].reshape(20, num_samples)
    seeds = np.stack([sample_position(np.arange(num_samples), num_samples, seed)[1] for seed in range(20)])
    for orders in (epochs, seeds):
        for i in range(20):
            for j in range(i):
                # Two random orders agree in one place on average (Poisson); 12 has a probability of 1e-9.
                assert (orders[i] == orders[j]).sum() < 12
                assert abs(np.corrcoef(orders[i], orders[j])[0, 1]) < 6 / np.sqrt(num_samples)


@pytest.mark.parametrize("num_samples", [1024, 65537])
def test_an_order_shows_no_pattern(num_samples: int) -> None:
    order = sample_position(np.arange(num_samples), num_samples, 1337)[1]
    for distance in (1, 2, 3, 16):
        gap = (order[distance:] - order[:-distance]) % num_samples
        for step in (1, num_samples - 1, 2, num_samples - 2):
            assert (gap == step).sum() < 12, "neighbours in the text would be neighbours in the order"
        assert abs(np.corrcoef(order[distance:], order[:-distance])[0, 1]) < 6 / np.sqrt(num_samples)
    # Every sixteenth of the epoch draws evenly from every sixteenth of the text: chi-squared, 225 degrees of freedom.
    sixteenth = np.arange(num_samples) * 16 // num_samples
    counts = np.zeros((16, 16))
    np.add.at(counts, (sixteenth, sixteenth[order]), 1)
    expected = num_samples / 256
    assert ((counts - expected) ** 2 / expected).sum() < 225 + 6 * np.sqrt(2 * 225)


@pytest.mark.parametrize("num_samples", [3, 6])
def test_small_corpora_take_every_order_evenly(num_samples: int) -> None:
    epochs = 20000
    orders = sample_position(np.arange(epochs * num_samples), num_samples, 3)[1].reshape(epochs, num_samples)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    possible = int(np.prod(np.arange(1, num_samples + 1)))
    assert len(counts) == possible
    expected, freedom = epochs / possible, possible - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_a_trillion_samples_take_constant_memory() -> None:
    tracemalloc.start()
    _, positions = sample_position(np.arange(10**12 - 512, 10**12 + 512), 10**12, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(positions[:512])) == len(np.unique(positions[512:])) == 512
    assert positions.max() > 10**11 and peak < 1 << 20


def test_the_order_never_changes_between_releases() -> None:
    """A run under way continues with the order it began with; these numbers are that promise."""
    epochs, positions = sample_position(np.arange(20), 10, 1337)
    assert epochs.tolist() == [0] * 10 + [1] * 10
    assert positions.tolist() == [3, 6, 9, 8, 4, 1, 0, 5, 2, 7, 6, 5, 9, 2, 0, 7, 4, 8, 3, 1]
    assert sample_position([0, 10**12 - 1], 10**12, 7)[1].tolist() == [363608399622, 161822255768]


WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=st.integers(0, 10**13), length=st.integers(1, 3000))
def test_every_window_has_the_proportions_and_no_number_twice(weights: list[int], start: int, length: int) -> None:
    source, running = sample_source(np.arange(start, start + length), weights)
    before, after = samples_per_source(start, weights), samples_per_source(start + length, weights)
    assert sum(before) == start and sum(after) == start + length
    for number, weight in enumerate(weights):
        mine = running[source == number]
        assert mine.tolist() == list(range(before[number], after[number])), "one after another"
        share = length * weight / sum(weights)
        assert abs(len(mine) - share) < len(weights) + 1
        assert abs(after[number] - (start + length) * weight / sum(weights)) < len(weights)


@given(weights=WEIGHTS, indices=st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_random_access_to_a_mixture_is_the_same_as_any_batch(weights: list[int], indices: list[int]) -> None:
    source, running = sample_source(np.array(indices), weights)
    for number, index in enumerate(indices):
        alone = sample_source(np.array([index]), weights)
        assert (alone[0][0], alone[1][0]) == (source[number], running[number])


@given(weights=WEIGHTS, available=st.lists(st.integers(0, 500), min_size=6, max_size=6))
def test_the_largest_number_of_samples_that_repeats_none(weights: list[int], available: list[int]) -> None:
    available = available[: len(weights)]
    found = max_samples(available, weights)
    assert all(c <= a for c, a in zip(samples_per_source(found, weights), available, strict=True))
    assert any(c > a for c, a in zip(samples_per_source(found + 1, weights), available, strict=True))


def test_weights_are_taken_as_they_are_written() -> None:
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert whole_weights([5.0]) == (1,) and whole_weights([2, 4]) == (1, 2)
    rounded = whole_weights([1e-12, 1 / 3])
    assert rounded[0] == 1 and sum(rounded) <= 1 << 30


@pytest.fixture
def two(tmp_path: Path) -> DataConfig:
    """Two sources whose tokens tell their window: 80 and 30 training windows of 4 tokens, 12 and 10 for validation."""
    for name, first, train, val in (("a", 0, 80, 12), ("b", 1000, 30, 10)):
        (tmp_path / name).mkdir()
        ids = first + np.append(np.repeat(np.arange(train + val), 4), 0)
        ids[: train * 4 + 1].astype("<u2").tofile(tmp_path / name / "train.bin")
        ids[train * 4 :].astype("<u2").tofile(tmp_path / name / "val.bin")
    sources = [WeightedPath(str(tmp_path / "a"), 0.75), WeightedPath(str(tmp_path / "b"), 0.25)]
    return DataConfig(source=Source.tokens, sources=sources)


def test_samples_are_drawn_from_the_sources_by_weight(two: DataConfig) -> None:
    samples = Samples(open_tokens(two), 4, seed=3)
    drawn = samples.batch("train", np.arange(480))[0][:, 0].numpy()
    for window in range(0, 480, 40):
        assert (drawn[window : window + 40] < 1000).sum() == 30, "three quarters of every forty"
    a, b = drawn[drawn < 1000], drawn[drawn >= 1000]
    for source, size in ((a, 80), (b, 30)):
        for epoch in range(len(source) // size):
            assert len(set(source[epoch * size : (epoch + 1) * size])) == size, "an epoch repeats nothing"
    assert not np.array_equal(a[:80], a[80:160]), "the next epoch has another order"
    parts = [samples.batch("train", np.arange(i, 480, 4))[0][:, 0].numpy() for i in range(4)]
    assert np.stack(parts, axis=1).ravel().tolist() == drawn.tolist(), "whoever asks"


def test_validation_has_the_proportions_too(two: DataConfig) -> None:
    samples = Samples(open_tokens(two), 4, seed=3)
    assert samples.num_val == max_samples([12, 10], [3, 1]) == 17
    drawn = samples.batch("val", np.arange(17))[0][:, 0].tolist()
    assert sorted(drawn) == [*range(80, 92), *range(1030, 1035)]
    corpus = describe_corpus(two, Path("nowhere"))
    model = ModelConfig(block_size=4, vocab_size=2000)
    check_fit(corpus, model, eval_sequences=17)
    with pytest.raises(ConfigError, match=r"eval\.sequences=18"):
        check_fit(corpus, model, eval_sequences=18)


def test_a_mixture_is_trained_on_and_recorded(two: DataConfig, tmp_path: Path) -> None:
    words = [w for w in TINY if not w.startswith(("data.", "model.block_size", "eval."))]
    mixed = ", ".join(f"{{path: {s.path}, weight: {s.weight}}}" for s in two.sources)
    words += ["model.block_size=4", "model.vocab_size=2000", "optim.max_steps=2", "eval.sequences=5", "data=tokens"]
    folder = RunFolder(tmp_path / "run")
    run("gpt.train", f"run_dir={folder.path}", *words, f"data.sources=[{mixed}]", cwd=tmp_path)
    records = read_records(folder.metrics(0))
    assert len(records) == 2 and "val_bits_per_byte" not in records[-1], "nobody knows the text"
    told = json.loads(folder.environment(1).read_text())["data_sources"]
    assert Counter({t["name"]: t["weight"] for t in told}) == {"a": 3, "b": 1}
    assert not folder.tokenizer.exists()
