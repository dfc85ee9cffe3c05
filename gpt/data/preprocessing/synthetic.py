"""Corpus of known entropy: a seeded Markov chain, whose entropy is a floor for the loss. Imports no torch.

The next token depends only on the last one. So one token of context suffices, and the cross-entropy of the best model
is the chain's entropy rate (Shannon 1948, "A Mathematical Theory of Communication", section 7):

    H = sum_i pi_i sum_j -p_ij ln p_ij        with pi P = pi
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gpt.config.data import SyntheticConfig

WALK_TOKENS = 1 << 20
"""Number of tokens of one walk through the chain. The corpus consists of independent walks, so that processes can share
the work. One token in a million does not depend on its predecessor."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """A Markov chain of V states with S successors each."""

    successors: npt.NDArray[np.int64]
    """States that can follow each state, (V, S), all different."""
    probabilities: Floats
    """Probabilities of the successors, (V, S); rows sum to one."""

    def transition(self) -> Floats:
        """Return the transition matrix p_ij, (V, V)."""
        matrix = np.zeros((len(self.successors), len(self.successors)))
        np.put_along_axis(matrix, self.successors, self.probabilities, axis=1)
        return matrix

    def stationary(self) -> Floats:
        """Return the stationary distribution of the states, (V,): the solution of pi P = pi that sums to one."""
        states = len(self.successors)
        equations = np.vstack([self.transition().T - np.eye(states), np.ones(states)])
        return np.asarray(np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0])

    def entropy(self) -> float:
        """Return the entropy rate, in nats per token."""
        surprise = -np.log(self.probabilities)
        return float(self.stationary() @ (self.probabilities * surprise).sum(axis=1))


@lru_cache(maxsize=4)
def _chain(vocab_size: int, successors: int, seed: int) -> Chain:
    key = _uniform(seed, 0, vocab_size * vocab_size).reshape(vocab_size, vocab_size)
    # One successor of a state is the next state, so that every state is reachable from every other.
    key[np.arange(vocab_size), (np.arange(vocab_size) + 1) % vocab_size] = -1.0
    chosen = np.argsort(key, axis=1, kind="stable")[:, :successors]
    # Exponential variates, normalized, are uniform on the simplex (Devroye 1986, chapter XI.4).
    # The thousandth keeps every probability above zero, whose logarithm the entropy takes.
    weight = -np.log1p(-_uniform(seed, 1, vocab_size * successors)).reshape(vocab_size, successors) + 1e-3
    return Chain(chosen, weight / weight.sum(axis=1, keepdims=True))


def chain_of(config: SyntheticConfig) -> Chain:
    """Build the chain of a configuration. It does not depend on the length of the corpus."""
    return _chain(config.vocab_size, config.successors, config.seed)


def num_walks(tokens: int) -> int:
    """Return the number of walks in a corpus of ``tokens`` tokens. The last walk is shorter."""
    return -(-tokens // WALK_TOKENS)


def walk(config: SyntheticConfig, number: int) -> npt.NDArray[np.uint32]:
    """Generate walk ``number`` of the corpus, counted from 0, (tokens,)."""
    tokens = min(WALK_TOKENS, config.tokens - number * WALK_TOKENS)
    chain = chain_of(config)
    cumulative = [row[:-1].tolist() for row in np.cumsum(chain.probabilities, axis=1)]
    successors = chain.successors.tolist()
    chances = _uniform(config.seed, 2 + number, tokens).tolist()
    state = min(int(np.searchsorted(np.cumsum(chain.stationary()), chances[0], side="right")), config.vocab_size - 1)
    states = np.empty(tokens, dtype=np.uint32)
    states[0] = state
    for t in range(1, tokens):
        state = successors[state][bisect_right(cumulative[state], chances[t])]
        states[t] = state
    return states


def _uniform(seed: int, stream: int, count: int) -> Floats:
    """Return ``count`` numbers in [0, 1), which are the same in every numpy release.

    numpy guarantees stable bit generators, but not stable variates. ``stream`` numbers the independent sequences of one
    seed.
    """
    raw = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(count)
    return np.asarray((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
