"""Batches of a rank: reading of samples from token files, and a thread that reads the next batches in advance."""

from __future__ import annotations

import math
import mmap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.config import NEXT_DOCUMENT
from gpt.data.corpus import num_windows
from gpt.data.order import PassedOver, Stream, max_samples, sample_position, sample_source, samples_per_source
from gpt.data.prepared import KIND_BIT, Segment, Tokens
from gpt.data.prepared import Split as SplitFiles
from gpt.topology import Batch
from launch.errors import ConfigError

# Samples of a rank in a step, and their tensors, read from token files.
#
# A batch depends only on (seed, step, rank). So no state is saved, and a restart or another number of ranks repeats and
# skips nothing.
#
# Shapes: B sequences of a batch, T tokens of a sequence.


Split = Literal["train", "val"]
Indices = npt.NDArray[np.int64]

MOST_OPEN = 128
"""Largest number of files of a split that a rank has mapped into memory."""
SOURCE_SEED_STEP = 0x5851F42D4C957F2D  # odd (Knuth's MMIX multiplier), so that sources of one size differ in order


def train_indices(number: int, rank: int, batch: Batch) -> Indices:
    """Return the indices of the samples of one data-parallel rank in one global batch, (per_rank,).

    Batch b has the samples from ``(b - 1) * global_batch`` up to, but not including, ``b * global_batch``. Each rank
    gets a contiguous part of them. Indices of samples are counted from 0.

    Args:
        number: number of the global batch, from 1. It is the number of the step, unless batches were skipped.
        rank: data-parallel rank, from 0.
        batch: sizes of the global batch and of the part of a rank.
    """
    assert number >= 1 and 0 <= rank < batch.ranks, f"batch {number}, rank {rank} of {batch.ranks}"
    first = (number - 1) * batch.global_batch + rank * batch.per_rank
    return np.arange(first, first + batch.per_rank, dtype=np.int64)


class Windows:
    """Samples of one split of one source: windows of ``block_size`` tokens that do not overlap, each inside one file.

    Tokens at the end of a file that fill no window are unused. A file is mapped into memory when a window of it is
    read. Only the last ``MOST_OPEN`` files that were read stay mapped, because a corpus may have thousands of files.
    The ranks of a node share the pages in the kernel's cache.

    Raises:
        ConfigError: the first file is missing or truncated on this machine.
    """

    def __init__(self, split: SplitFiles, block_size: int) -> None:
        self.block_size = block_size
        self._segments = split.segments
        self._first = np.cumsum([0, *(num_windows(segment.tokens, block_size) for segment in split.segments)])
        self._open = lru_cache(maxsize=MOST_OPEN)(map_segment)
        for segment in split.segments[:1]:  # refuse at the start a folder that this node cannot see
            refuse_cut_file(segment)

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, position: int) -> Indices:
        """Return the ids of the window with the index ``position``, and the id after it, (T + 1,) int64.

        Raises:
            ConfigError: the file of the window is missing or truncated on this machine.
        """
        segment, start = self._find(position)
        return np.asarray(self._open(segment)[1][start : start + self.block_size + 1], dtype=np.int64)

    def announce(self, position: int) -> None:
        """Make the kernel read the window with the index ``position`` from the disk, without waiting
        (MADV_WILLNEED)."""
        segment, start = self._find(position)
        mapped, tokens = self._open(segment)
        first = segment.offset + start * tokens.itemsize
        page = first - first % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, first + (self.block_size + 1) * tokens.itemsize - page)

    def _find(self, position: int) -> tuple[Segment, int]:
        """Return the segment that has the window with the index ``position``, and the index of the window's first token
        in this segment."""
        number = int(np.searchsorted(self._first, position, side="right")) - 1
        return self._segments[number], (position - int(self._first[number])) * self.block_size


def map_segment(segment: Segment) -> tuple[mmap.mmap, npt.NDArray[np.integer[Any]]]:
    """Map the file of a segment into memory. Return the mapping, and the tokens of the segment as an array over it,
    (tokens,).

    Raises:
        ConfigError: the file is missing or truncated on this machine.
    """
    refuse_cut_file(segment)
    with segment.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    dtype = np.dtype(segment.dtype).newbyteorder("<")
    return mapped, np.frombuffer(mapped, dtype, segment.tokens, segment.offset)


def refuse_cut_file(segment: Segment) -> None:
    """Raise ConfigError if the file of a segment is missing or truncated on this machine."""
    if not segment.is_whole():
        raise ConfigError(
            f"{segment.path} is missing or cut short on this machine",
            f"{segment.file_bytes} bytes, visible from every node",
            "data.cache_dir=FOLDER on a filesystem that all nodes share",
        )


class Samples:
    """Samples of a run, read from token files. A sample has T tokens, and as targets the tokens one place later.

    Training samples are shuffled anew in every epoch of their source. Validation samples have the order of the text.
    Several sources are mixed by their weights, in both splits.

    Args:
        tokens: the sources to read.
        block_size: tokens of a sample, T.
        seed: seed of the order.
        vocab_size: the largest allowed id plus 1; None allows every id. Ids of conversations are not checked.
        document_end: id of the token that ends a document. ``NEXT_DOCUMENT`` replaces the target at such a token. None
            if documents are not packed.

    Raises:
        ConfigError: the first file of a split is missing or truncated on this machine.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        seed: int,
        vocab_size: int | None = None,
        document_end: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.document_end = document_end
        self.seed = seed
        self._has_kinds = tokens.are_conversations
        self._vocab_size = None if self._has_kinds else vocab_size  # our own files, whose vocabulary is known
        self._sources = tokens.sources
        self._weights = tuple(source.weight for source in tokens.sources)
        self._train = [Windows(source.train, block_size) for source in tokens.sources]
        self._val = [Windows(source.val, block_size) for source in tokens.sources]
        self.stream: Stream | None = None
        """Source of the training samples with ``data.stream``; None for token files."""
        assert all(map(len, self._val)), "check_fit is asked before"
        self.num_train = sum(map(len, self._train))
        self.num_val = max_samples([len(windows) for windows in self._val], self._weights)

    def batch(self, split: Split, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and targets, both (B, T) int64 on the CPU, of the samples with these indices, (B,).

        Raises:
            ConfigError: as in ``read``.
        """
        return self.split_ids(self.read(split, indices))

    def split_ids(self, ids_BT1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and targets, both (B, T), from ids (B, T + 1), on the same device.

        The loss ignores negative targets. Two cases have such targets. In conversations, every target that is no token
        of an answer becomes -k, where k is its kind (``KIND_BIT``). With packed documents, the target at a token that
        ends a document becomes ``NEXT_DOCUMENT``.
        """
        tokens_BT, targets_BT = ids_BT1[:, :-1].clone(), ids_BT1[:, 1:].clone()  # parts of one row would share memory
        if self._has_kinds:
            tokens_BT &= (1 << KIND_BIT) - 1
            kinds_BT = targets_BT >> KIND_BIT
            targets_BT = torch.where(kinds_BT > 0, -kinds_BT, targets_BT)
        if self.document_end is not None:
            targets_BT.masked_fill_(tokens_BT == self.document_end, NEXT_DOCUMENT)
        return tokens_BT, targets_BT

    def read(self, split: Split, indices: Indices) -> torch.Tensor:
        """Return the ids of the samples with these indices, (B,): their tokens and the last target, (B, T + 1) int64 on
        the CPU.

        Indices of training samples count through all epochs. Those of validation samples are below ``num_val``.

        Raises:
            ConfigError: an id is not below ``vocab_size``, or a file is missing or truncated on this machine.
        """
        if split == "train" and self.stream is not None:
            return torch.from_numpy(np.stack([self.stream.read(index) for index in indices.tolist()]))
        source, running = sample_source(indices, self._weights)
        windows = self._train if split == "train" else self._val
        if split == "train":
            for number, mine in enumerate(self._train):
                seed = (self.seed + number * SOURCE_SEED_STEP) % 2**63
                own = source == number
                running[own] = sample_position(running[own], len(mine), seed)[1]
        else:
            assert indices.min() >= 0 and indices.max() < self.num_val, "validation repeats no sample"
        places = [(windows[number], place) for number, place in zip(source.tolist(), running.tolist(), strict=True)]
        for found, position in places:  # the disk reads all of them at the same time
            found.announce(position)
        ids = np.stack([found.read(position) for found, position in places])
        largest = int(ids.max())
        # Token files made by other programs may not state their vocabulary, and on a GPU a wrong id fails a device
        # assertion.
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ConfigError(
                f"the token id {largest} in {self._sources[0].name}, with model.vocab_size={self._vocab_size}",
                "ids that the model has room for",
                f"model.vocab_size={largest + 1}, or the vocabulary of the tokenizer these files were made with",
            )
        return torch.from_numpy(ids)

    def val_bytes(self, sequences: int) -> float | None:
        """Return an estimate of the bytes of text in the first ``sequences`` validation samples; None if unknown.

        The estimate uses the mean bytes per token of the validation split of each source.
        """
        total = 0.0
        for count, source in zip(samples_per_source(sequences, self._weights), self._sources, strict=True):
            if count and source.val.num_bytes is None:
                return None
            total += count * self.block_size * (source.val.num_bytes or 0) / source.val.tokens
        return total

    def val_bits_per_byte(self, loss: float, sequences: int) -> float | None:
        """Convert ``loss``, the mean loss of the first ``sequences`` validation samples, from nats per token to bits
        per byte of text. Return None if the size of the text is unknown.

        Bits per byte can be compared between tokenizers (The Pile, arXiv 2101.00027, section 3.1).
        """
        num_bytes = self.val_bytes(sequences)
        return loss / math.log(2) * sequences * self.block_size / num_bytes if num_bytes else None


# Prefetching of training batches: while the device computes a step, a thread reads the next batches.
#
# A batch depends only on its step and on the skipped batches, so prefetching has no state to save or to undo.
#
# Shapes: B sequences of one rank in a step, T tokens of a sequence.


TOGETHER = 64
"""Largest number of samples in a group: the batches of one rank that ``BatchPrefetcher`` reads together. A group of one
batch may have more."""
AHEAD_BYTES = 2**22
"""Largest size of such a group in memory, in bytes. A group of one batch may be larger."""


@dataclass(frozen=True)
class StepBatch:
    """Batch of one rank in one step."""

    tokens: Tensor
    """Input tokens, (B, T) int64, on the device."""
    targets: Tensor
    """Next token of each position, (B, T) int64, on the device."""
    first: int
    """Index of this rank's first sample of the step, counted through the whole run."""
    last: int
    """Index of this rank's last sample of the step."""
    waited_s: float
    """Seconds for which training waited until the batch was read."""


class BatchPrefetcher:
    """Reads the training batches of one rank in a thread, during earlier steps.

    Small batches are read in groups, because waking the thread and computing the order take longer than reading a
    small batch. While the batches of one group are used, the next group is read.

    Args:
        samples: source of the batches.
        batch: sizes of the global batch, and of the part of it that each rank gets.
        data_rank: index of this rank's part of each batch, from 0.
        last_step: last step of the run.
        device: device of the training. For a GPU the batches are in pinned memory, and are copied asynchronously.
    """

    def __init__(self, samples: Samples, batch: Batch, data_rank: int, last_step: int, device: torch.device) -> None:
        self._samples, self._batch, self._data_rank = samples, batch, data_rank
        self._last_step, self._device = last_step, device
        batch_bytes = batch.per_rank * (samples.block_size + 1) * 8
        self._group = max(1, min(TOGETHER // batch.per_rank, AHEAD_BYTES // batch_bytes))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._read: dict[int, Tensor] = {}
        """Number of a batch -> token ids of this rank's samples in it, (B, T + 1). It has the batches of the group in
        use, without those that a step has used."""
        self._ahead: tuple[int, Future[dict[int, Tensor]]] | None = None
        """Number of the first batch of the next group, and the future result of reading this group. The result has the
        form of ``_read``. None if no group follows."""
        self.passed_over = PassedOver()
        """Batches that no step uses. When a run goes back to a checkpoint because it has diverged, it replaces this
        object between two steps, to skip the batches that did harm."""

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step, counted from 1, and start to read the next group if necessary.

        Raises:
            ConfigError: a token file is truncated, or contains an id beyond the model's vocabulary.
        """
        started = time.perf_counter()
        number = self.passed_over.batch_of(step)
        if number not in self._read:
            if self._ahead is None or self._ahead[0] != number:  # another step than the one that was expected
                self._ahead = self._submit(step)
            self._read, following = self._ahead[1].result(), step + self._group
            self._ahead = self._submit(following) if following <= self._last_step else None
        # torch reuses pinned memory only after the copy out of it is done.
        ids_BT1 = self._read.pop(number)
        waited_s = time.perf_counter() - started
        ids_BT1 = ids_BT1.to(self._device, non_blocking=True)
        indices = train_indices(number, self._data_rank, self._batch)
        tokens_BT, targets_BT = self._samples.split_ids(ids_BT1)
        return StepBatch(tokens_BT, targets_BT, int(indices[0]), int(indices[-1]), waited_s)

    def close(self) -> None:
        """End the thread, without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, step: int) -> tuple[int, Future[dict[int, Tensor]]]:
        last = max(step, min(step + self._group - 1, self._last_step))
        numbers = [self.passed_over.batch_of(each) for each in range(step, last + 1)]
        if self._ahead is not None:
            self._ahead[1].cancel()
        return numbers[0], self._thread.submit(self._read_group, numbers)

    def _read_group(self, numbers: list[int]) -> dict[int, Tensor]:
        indices = [train_indices(number, self._data_rank, self._batch) for number in numbers]
        ids = self._samples.read("train", np.concatenate(indices))
        if self._device.type == "cuda":
            ids = ids.pin_memory()
        return dict(zip(numbers, ids.split(self._batch.per_rank), strict=True))
