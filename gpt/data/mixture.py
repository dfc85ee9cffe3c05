"""Which source of a weighted mixture a sample comes from: a pure function of its running number.

Owns the proportions. Torch-free. Must not know what a source is. Of the first n samples of a stream, the first source,
with share a/b, gets floor(n a / b); what it leaves is a stream of its own, which the other sources share likewise.
So every window has the right proportions to within a few samples, nothing has to be counted or stored, and within a
source the running numbers come one after another: no sample is taken twice in an epoch of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def draw(index: Integers, weights: Sequence[int]) -> tuple[Integers, Integers]:
    """Source of each sample and its running number within that source.

    Args:
        index: running numbers of the mixture, from 0, (N,).
        weights: whole weights of the sources, below 2^31 in all.

    Returns:
        source and running number, both (N,). Within a source the running numbers of 0, 1, 2, ... are 0, 1, 2, ...
    """
    source = np.full(len(index), len(weights) - 1, dtype=np.int64)
    left = np.asarray(index, dtype=np.int64).copy()
    open_ = np.arange(len(index))
    for number, weight in enumerate(weights[:-1]):
        total = sum(weights[number:])
        before, after = _share(left[open_], weight, total), _share(left[open_] + 1, weight, total)
        taken = after > before
        source[open_[taken]] = number
        left[open_[taken]] = before[taken]
        left[open_[~taken]] -= before[~taken]
        open_ = open_[~taken]
    return source, left


def counts(samples: int, weights: Sequence[int]) -> list[int]:
    """How many of the first ``samples`` come from each source."""
    found, left = [], samples
    for number, weight in enumerate(weights[:-1]):
        found.append(int(_share(np.array([left], dtype=np.int64), weight, sum(weights[number:]))[0]))
        left -= found[-1]
    return [*found, left]


def largest(available: Sequence[int], weights: Sequence[int]) -> int:
    """The most samples that need no more of any source than is ``available``."""
    low, high = 0, sum(available)
    while low < high:
        middle = (low + high + 1) // 2
        if all(c <= a for c, a in zip(counts(middle, weights), available, strict=True)):
            low = middle
        else:
            high = middle - 1
    return low


def _share(n: Integers, weight: int, total: int) -> Integers:
    """floor(n * weight / total) without overflow."""
    whole, rest = np.divmod(n, total)
    return np.asarray(whole * weight + rest * weight // total)
