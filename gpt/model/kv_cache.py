"""Key-value cache of attention, so that generation computes the keys and values of each token once.

    cache = Cache(config.block_size)
    logits_BTV = model(prompt_BT, cache)                # fills it
    logits_BTV = model(next_B1, cache)                  # goes on from there; one new token or many

B batch, T new tokens, S tokens seen with the new ones, K key-value heads, C head width. For inference: training passes
no cache and does nothing differently. Must not know how a token is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in memory that is allocated once.

    It is allocated at the first call, in the shape, dtype and device of the keys that come, so a layer that holds only
    some of the heads, or computes in bf16, caches just that.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Tokens seen so far."""
        self._k_BKSC: Tensor | None = None
        self._v_BKSC: Tensor | None = None

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, (B, K, T, C); returns those of all tokens so far, (B, K, S, C) each."""
        if self._k_BKSC is None or self._v_BKSC is None:
            batch, heads, _, width = k_BKTC.shape
            self._k_BKSC = k_BKTC.new_empty(batch, heads, self.capacity, width)
            self._v_BKSC = v_BKTC.new_empty(batch, heads, self.capacity, width)
        start, end = self.length, self.length + k_BKTC.size(2)
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        assert k_BKTC.size(0) == self._k_BKSC.size(0), "a cache belongs to one batch of sequences"
        with torch.no_grad():
            self._k_BKSC[:, :, start:end] = k_BKTC
            self._v_BKSC[:, :, start:end] = v_BKTC
        self.length = end
        return self._k_BKSC[:, :, :end], self._v_BKSC[:, :, :end]


class Cache:
    """Caches of all layers, for one batch of sequences of equal length.

    ``capacity`` is the largest number of tokens; more than the model's ``block_size`` is of no use. Memory per token
    and sequence: 2 x n_layer x kv_heads x head_dim numbers.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: list[LayerCache] = []

    @property
    def length(self) -> int:
        """Number of tokens seen so far, which is the position of the next one."""
        return self._layers[0].length if self._layers else 0

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer, made at its first use."""
        while len(self._layers) <= index:
            self._layers.append(LayerCache(self.capacity))
        return self._layers[index]
