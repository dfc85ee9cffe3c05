"""The order of the samples: a bijection in every epoch, different between epochs and seeds, without visible pattern."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.order import sample_position

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


@pytest.mark.parametrize("num_samples", [1000, 1025, 4096])
def test_epochs_and_seeds_have_unrelated_orders(num_samples: int) -> None:
    epochs = sample_position(np.arange(20 * num_samples), num_samples, 7)[1].reshape(20, num_samples)
    seeds = np.stack([sample_position(np.arange(num_samples), num_samples, seed)[1] for seed in range(20)])
    for orders in (epochs, seeds):
        for i in range(20):
            for j in range(i):
                # Two random orders agree in one place on average (Poisson); 12 has a probability of 1e-9.
                assert (orders[i] == orders[j]).sum() < 12
                assert abs(np.corrcoef(orders[i], orders[j])[0, 1]) < 6 / np.sqrt(num_samples)


@pytest.mark.parametrize("num_samples", [1000, 1024, 65537])
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


@pytest.mark.parametrize("num_samples", [2, 3, 5, 6])
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
