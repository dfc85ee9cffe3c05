"""The order of the training samples: a pure function of (index, number of samples, seed), without saved state.

Imports no torch.

Every epoch is a permutation of its own, computed one index at a time in constant memory: a Feistel network (Luby and
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions") over the smallest even number
of bits that covers all samples. The network is applied again until the result is the index of a sample (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"). The domain is less than four times the samples, or 64. So an
index needs under four evaluations on average. Round function and keys use the finalizer of SplitMix64 (Steele, Lea
and Flood 2014, "Fast splittable pseudorandom number generators").

Changing anything here changes the order of runs that are under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SAMPLES = 1 << 62
ROUNDS = 8  # four make a pseudorandom permutation of a large domain; small domains need more
MIN_HALF_BITS = 3  # below 64 values the orders of a few samples are measurably uneven
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
Uint64s = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def sample_position(index: npt.ArrayLike, num_samples: int, seed: int) -> tuple[Integers, Integers]:
    """Return the epoch of each sample, and its position in the corpus.

    Args:
        index: numbers of samples in the order of training, from 0, through all epochs; any shape.
        num_samples: samples in one epoch, 1 to 2^62.
        seed: another seed gives another order in every epoch.

    Returns:
        epoch and position, int64 and shaped like ``index``. Within an epoch every position from 0 to
        ``num_samples - 1`` comes exactly once.
    """
    assert 1 <= num_samples <= MAX_SAMPLES, f"num_samples={num_samples}"
    running = np.asarray(index, dtype=np.int64)
    assert running.size == 0 or running.min() >= 0, "a sample's running number is never negative"
    epoch, offset = np.divmod(running, num_samples)
    position = permute(offset.ravel().astype(np.uint64), num_samples, epoch.ravel().astype(np.uint64), seed)
    return epoch, position.astype(np.int64).reshape(running.shape)


def permute(offset: Uint64s, num_samples: int, epoch: Uint64s, seed: int) -> Uint64s:
    """Permute each offset within its epoch; all arrays (N,), values below ``num_samples``."""
    half_bits = max(MIN_HALF_BITS, -(-(num_samples - 1).bit_length() // 2))
    # Keys of every round, (ROUNDS, N), for each entry's epoch: a batch may reach into the next epoch.
    start = _mix(_mix(np.full_like(epoch, seed) + _GOLDEN) ^ epoch)
    keys = _mix(start + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN)
    position = _feistel(offset, keys, half_bits)
    outside = np.flatnonzero(position >= num_samples)
    while outside.size:
        position[outside] = _feistel(position[outside], keys[:, outside], half_bits)
        outside = outside[position[outside] >= num_samples]
    return position


def _feistel(value: Uint64s, keys: Uint64s, half_bits: int) -> Uint64s:
    """Evaluate the Feistel network, a bijection on 2 * ``half_bits`` bits. ``keys`` is (ROUNDS, N)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(word: Uint64s) -> Uint64s:
    """Apply SplitMix64's finalizer, a bijection on 64 bits. Arithmetic wraps around."""
    for shift, factor in _MIX:
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return word ^ (word >> np.uint64(31))


def sample_source(index: Integers, weights: Sequence[int]) -> tuple[Integers, Integers]:
    """Return the source of each sample of a mixture, and its running number within that source.

    The split is deterministic. Of the first n samples, floor(n * weight / total weight) belong to the first source; the
    other sources share the rest in the same way.

    Args:
        index: running numbers of the mixture, from 0, (N,).
        weights: whole weights of the sources, with a sum below 2^31.

    Returns:
        source and running number, both (N,). Within a source the running numbers are 0, 1, 2, ... without gaps.
    """
    source = np.full(len(index), len(weights) - 1, dtype=np.int64)
    left = np.asarray(index, dtype=np.int64).copy()
    open_ = np.arange(len(index))
    # Split the first source from all later ones, then the second from the rest, and so on.
    for number, weight in enumerate(weights[:-1]):
        total = sum(weights[number:])
        before, after = _share(left[open_], weight, total), _share(left[open_] + 1, weight, total)
        taken = after > before
        source[open_[taken]] = number
        left[open_[taken]] = before[taken]
        left[open_[~taken]] -= before[~taken]
        open_ = open_[~taken]
    return source, left


def samples_per_source(samples: int, weights: Sequence[int]) -> list[int]:
    """Count the samples of each source among the first ``samples`` of a mixture."""
    found, left = [], samples
    for number, weight in enumerate(weights[:-1]):
        found.append(int(_share(np.array([left], dtype=np.int64), weight, sum(weights[number:]))[0]))
        left -= found[-1]
    return [*found, left]


def max_samples(available: Sequence[int], weights: Sequence[int]) -> int:
    """Return the largest number of samples of a mixture that needs at most ``available`` samples of each source."""
    low, high = 0, sum(available)  # bisection works, because the need of each source never falls as the samples grow
    while low < high:
        middle = (low + high + 1) // 2
        if all(c <= a for c, a in zip(samples_per_source(middle, weights), available, strict=True)):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class PassedOver:
    """Batches that a run skips: ranges of their numbers, counted from 1, ascending and with a gap between ranges."""

    ranges: tuple[tuple[int, int], ...] = ()
    """Numbers of the first and the last batch of each range, both skipped."""

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> PassedOver:
        """Build from lists of two numbers, the first and the last skipped batch of a range, as JSON stores them."""
        return cls(tuple((first, last) for first, last in ranges))

    def batch_of(self, step: int) -> int:
        """Return the number of the batch of a step, both counted from 1. Skipped batches are left out."""
        number = step
        for first, last in self.ranges:
            if first > number:
                break
            number += last - first + 1
        return number

    def including(self, batches: Iterable[int]) -> PassedOver:
        """Return an object that skips these batches and the given ``batches``."""
        numbers = sorted({*batches, *(number for first, last in self.ranges for number in range(first, last + 1))})
        ranges: list[tuple[int, int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], number
            else:
                ranges.append((number, number))
        return PassedOver(tuple(ranges))


def _share(n: Integers, weight: int, total: int) -> Integers:
    """Compute floor(n * weight / total) without overflow."""
    whole, rest = np.divmod(n, total)
    return np.asarray(whole * weight + rest * weight // total)
