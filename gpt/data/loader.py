"""From a token file to batches: which samples a rank trains on in a step, and the tensors of these samples.

Owns the windows and who gets which. There is no state: a batch follows from (seed, step, rank), so nothing has to be
saved, and a restart or another number of ranks repeats nothing and skips nothing. Must not know the model, the device
or the loop.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from gpt.batch import Batch
from gpt.data.corpus import num_windows, split_tokens
from gpt.data.order import sample_position
from gpt.data.token_file import TokenFile
from gpt.errors import ConfigError

Split = Literal["train", "val"]
Indices = npt.NDArray[np.int64]


def train_indices(step: int, rank: int, batch: Batch) -> Indices:
    """Sample indices of one data-parallel rank in one optimizer step, (per_rank,).

    Steps are counted from 1, samples and ranks from 0: step s uses samples ``(s - 1) * global_batch`` up to, but not
    including, ``s * global_batch``, dealt out to the ranks as contiguous slices. Micro-batches cut a slice further.
    """
    assert step >= 1 and 0 <= rank < batch.ranks, f"step {step}, rank {rank} of {batch.ranks}"
    first = (step - 1) * batch.global_batch + rank * batch.per_rank
    return np.arange(first, first + batch.per_rank, dtype=np.int64)


class Samples:
    """The samples of a token file: windows of T tokens that do not overlap, read from the mapped file when asked.

    The targets are the same window one token later. Training samples are shuffled anew in every epoch; validation
    samples keep the order of the text. Tokens at the end of a split that fill no window are not used.

    Raises:
        ConfigError: the file cannot be seen whole from this machine.
    """

    def __init__(self, file: TokenFile, block_size: int, val_fraction: float, seed: int) -> None:
        if not file.is_whole():
            raise ConfigError(
                f"{file.path} is missing or cut short on this machine",
                f"{file.num_bytes} bytes, visible from every node",
                "data.cache_dir=FOLDER on a filesystem that all nodes share",
            )
        self.block_size = block_size
        self.seed = seed
        self._tokens = np.memmap(file.path, dtype=np.dtype(file.dtype).newbyteorder("<"), mode="r")
        self._val_start, val_tokens = split_tokens(file.tokens, val_fraction)
        self.num_train = num_windows(self._val_start, block_size)
        self.num_val = num_windows(val_tokens, block_size)
        assert self.num_train and self.num_val, "check_size is asked before"

    def batch(self, split: Split, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, both (B, T) int64 on the CPU, of the samples with these indices (B,).

        Training indices count on through the epochs; validation indices are below ``num_val``.
        """
        starts = self._starts(split, indices)
        windows = np.stack([self._tokens[start : start + self.block_size + 1] for start in starts])
        both = torch.from_numpy(windows.astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _starts(self, split: Split, indices: Indices) -> Indices:
        """Offset in the file of each sample's first token."""
        if split == "train":
            return sample_position(indices, self.num_train, self.seed)[1] * self.block_size
        assert indices.min() >= 0 and indices.max() < self.num_val, "validation repeats no sample"
        return self._val_start + indices * self.block_size
