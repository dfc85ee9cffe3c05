"""The order of the samples: a bijection in every epoch, different between epochs and seeds, without visible pattern."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig, ModelConfig, Source, WeightedPath
from gpt.data.corpus import check_fit, describe_corpus
from gpt.data.loader import Samples
from gpt.data.order import max_samples, sample_position, sample_source, samples_per_source
from gpt.data.prepared import open_tokens, whole_weights
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import TINY, run

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
