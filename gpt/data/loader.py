"""Batches of a rank: the samples of a step from token files, and a thread that reads the next batches ahead."""

from __future__ import annotations

import math
import mmap
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.data.corpus import num_windows
from gpt.data.order import PassedOver, max_samples, sample_position, sample_source
from gpt.data.prepared import TOKEN_BYTES, Tokens, TokenSource
from gpt.data.prepared import Split as SplitFiles
from gpt.data.token_file import Segment
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
"""Number of files of a split that a rank keeps open. The kernel also caches the pages of closed files."""
SOURCE_SEED_STEP = 0x5851F42D4C957F2D  # odd (Knuth's MMIX multiplier), so that sources of one size differ in order


def train_indices(number: int, rank: int, batch: Batch) -> Indices:
    """Return the sample indices of one data-parallel rank in one global batch, (per_rank,).

    Batches are counted from 1, samples and ranks from 0. Batch b has samples ``(b - 1) * global_batch`` up to, but not
    including, ``b * global_batch``. Each rank gets a contiguous slice, and micro-batches split a slice further. Batch b
    belongs to step b, unless batches were skipped.
    """
    assert number >= 1 and 0 <= rank < batch.ranks, f"batch {number}, rank {rank} of {batch.ranks}"
    first = (number - 1) * batch.global_batch + rank * batch.per_rank
    return np.arange(first, first + batch.per_rank, dtype=np.int64)


class Windows:
    """Samples of one split of one source: windows of T tokens that do not overlap. Each window is inside one file.

    Tokens at the end of a file that fill no window are unused. A file is opened when a window of it is read, and the
    ``MOST_OPEN`` most recently read files stay open, because a corpus may have thousands of files.

    Raises:
        ConfigError: the first file is missing or truncated on this machine.
    """

    def __init__(self, split: SplitFiles, block_size: int) -> None:
        self.block_size = block_size
        self._segments = split.segments
        self._files: dict[int, TokenFile] = {}
        self._first = np.cumsum([0, *(num_windows(segment.tokens, block_size) for segment in split.segments)])
        for segment in split.segments[:1]:  # refuse at the start a folder that this node cannot see
            refuse_cut_file(segment)

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, position: int) -> Indices:
        """Read the window at ``position``, (T + 1,) int64, including the last target.

        Raises:
            ConfigError: its file is missing or truncated on this machine.
        """
        file, start = self._find(position)
        return np.asarray(file.tokens[start : start + self.block_size + 1], dtype=np.int64)

    def announce(self, position: int) -> None:
        """Ask the kernel to read the window at ``position`` from the disk, without waiting."""
        file, start = self._find(position)
        file.announce(start, self.block_size + 1)

    def _find(self, position: int) -> tuple[TokenFile, int]:
        """Return the file of a window, and the index of the window's first token in it."""
        number = int(np.searchsorted(self._first, position, side="right")) - 1
        file = self._files.pop(number, None) or TokenFile(self._segments[number])
        self._files[number] = file  # the most recently read file is the last entry
        if len(self._files) > MOST_OPEN:
            del self._files[next(iter(self._files))]
        return file, (position - int(self._first[number])) * self.block_size


Place = tuple[Windows, int]
"""Location of a sample: the windows of its source, and the number of its window among them."""


class TokenFile:
    """Part of a token file, mapped into memory. The kernel keeps the used pages once for all ranks of a node.

    Raises:
        ConfigError: the file is missing or truncated on this machine.
    """

    def __init__(self, segment: Segment) -> None:
        refuse_cut_file(segment)
        dtype = np.dtype(segment.dtype).newbyteorder("<")
        with segment.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = np.frombuffer(self._map, dtype, segment.tokens, segment.offset)
        self._offset, self._width = segment.offset, dtype.itemsize

    def announce(self, start: int, tokens: int) -> None:
        """Ask the kernel to read ``tokens`` tokens from index ``start`` on, without waiting (MADV_WILLNEED)."""
        first = self._offset + start * self._width
        page = first - first % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, first + tokens * self._width - page)


def refuse_cut_file(segment: Segment) -> None:
    """Raise ConfigError if a file is missing or truncated on this machine."""
    if not segment.is_whole():
        raise ConfigError(
            f"{segment.path} is missing or cut short on this machine",
            f"{segment.file_bytes} bytes, visible from every node",
            "data.cache_dir=FOLDER on a filesystem that all nodes share",
        )


class Samples:
    """The samples of a run, read from the mapped files on demand.

    The targets are the same window one token later. Training samples are shuffled again in every epoch of their source.
    Validation samples keep the order of the text. Several sources are mixed by their weights, in both splits.

    Args:
        tokens: the sources to read.
        block_size: tokens of a sample, T.
        seed: seed of the order.
        vocab_size: all ids must be below this number; None checks nothing.

    Raises:
        ConfigError: the first file of a split is missing or truncated on this machine.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, vocab_size: int | None = None) -> None:
        self.block_size = block_size
        self.seed = seed
        self._vocab_size = vocab_size
        self._val_bytes: dict[int, float | None] = {}
        self._sources = tokens.sources
        self._weights = tuple(source.weight for source in tokens.sources)
        self._train = [Windows(source.train, block_size) for source in tokens.sources]
        self._val = [Windows(source.val, block_size) for source in tokens.sources]
        assert all(map(len, self._train)) and all(map(len, self._val)), "check_fit is asked before"
        self.num_train = sum(map(len, self._train))
        self.num_val = max_samples([len(windows) for windows in self._val], self._weights)

    def batch(self, split: Split, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Read tokens and targets, both (B, T) int64 on the CPU, of the samples with these indices (B,).

        Training indices continue through the epochs. Validation indices are below ``num_val``.

        Raises:
            ConfigError: an id is not below ``vocab_size``, or a file is missing or truncated on this machine.
        """
        ids_BT1 = self.read_at(self.locate(split, indices))
        return ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous()

    def read_at(self, places: Iterable[Place]) -> torch.Tensor:
        """Read the ids of samples at places that ``locate`` found, (B, T + 1) int64 on the CPU: tokens and last target.

        Raises:
            ConfigError: as ``batch``.
        """
        ids = np.stack([windows.read(position) for windows, position in places])
        self._check_ids(ids)
        return torch.from_numpy(ids)

    def announce(self, places: Iterable[Place]) -> None:
        """Ask the kernel to read the samples at these places from the disk, without waiting.

        Raises:
            ConfigError: a file is missing or truncated on this machine.
        """
        for windows, position in places:
            windows.announce(position)

    def locate(self, split: Split, indices: Indices) -> list[Place]:
        """Return for each sample of ``indices``, (B,), the windows of its source and the number of its window."""
        if split == "train":
            source, position = self._train_positions(indices)
            windows = self._train
        else:
            assert indices.min() >= 0 and indices.max() < self.num_val, "validation repeats no sample"
            source, position = sample_source(indices, self._weights)
            windows = self._val
        return list(zip((windows[number] for number in source.tolist()), position.tolist(), strict=True))

    def _train_positions(self, indices: Indices) -> tuple[Indices, Indices]:
        """Return the source of each sample and the position of its window there, both (B,)."""
        source, running = sample_source(indices, self._weights)
        position = np.empty_like(running)
        for number, windows in enumerate(self._train):
            mine = source == number
            seed = (self.seed + number * SOURCE_SEED_STEP) % 2**63
            position[mine] = sample_position(running[mine], len(windows), seed)[1]
        return source, position

    def _check_ids(self, ids: Indices) -> None:
        # Token files made by other programs may not state their vocabulary, and on a GPU a wrong id fails a device
        # assertion.
        largest = int(ids.max())
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ConfigError(
                f"the token id {largest} in {self._sources[0].name}, with model.vocab_size={self._vocab_size}",
                "ids that the model has room for",
                f"model.vocab_size={largest + 1}, or the vocabulary of the tokenizer these files were made with",
            )

    def val_bytes(self, sequences: int) -> float | None:
        """Count the bytes of text of the targets of the first ``sequences`` validation samples; None if unknown.

        The number is exact if every id has a known number of bytes. Otherwise it is an estimate from the split's
        average bytes per token.
        """
        if sequences not in self._val_bytes:
            self._val_bytes[sequences] = self._count_bytes(sequences)
        return self._val_bytes[sequences]

    def _count_bytes(self, sequences: int) -> float | None:
        tables = self._byte_tables
        total = 0.0
        source, position = sample_source(np.arange(sequences), self._weights)
        for number, windows in enumerate(self._val):
            places, table = position[source == number].tolist(), tables[number]
            split = self._sources[number].val
            if table is not None:
                total += sum(int(table[windows.read(place)[1:]].sum()) for place in places)
            elif split.num_bytes is not None:
                total += len(places) * self.block_size * split.num_bytes / split.tokens
            elif places:
                return None
        return total

    def val_bits_per_byte(self, loss: float, sequences: int) -> float | None:
        """Convert a loss over the first ``sequences`` validation samples from nats per token to bits per byte of text.

        The result is comparable between tokenizers (The Pile, arXiv 2101.00027, section 3.1). None if the text is
        unknown.
        """
        num_bytes = self.val_bytes(sequences)
        return loss / math.log(2) * sequences * self.block_size / num_bytes if num_bytes else None

    @cached_property
    def _byte_tables(self) -> list[npt.NDArray[np.int64] | None]:
        return [_byte_table(source) for source in self._sources]


def _byte_table(source: TokenSource) -> npt.NDArray[np.int64] | None:
    """Return the bytes of text of each id of a source, (vocab_size,); None if unknown."""
    if source.characters is not None:
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in source.characters], dtype=np.int64)
    if source.folder is None or not (source.folder / TOKEN_BYTES).is_file():
        return None
    return np.fromfile(source.folder / TOKEN_BYTES, dtype="<u4").astype(np.int64)


# Prefetching of training batches: while the device computes a step, a thread reads the next batches.
#
# A batch depends only on its step and on the skipped batches, so prefetching has no state to save or to undo.
#
# Shapes: B sequences of one rank in a step, T tokens of a sequence.


TOGETHER = 64
"""Number of samples of a rank that are located together and read ahead. A larger batch is located and read alone."""
AHEAD_BYTES = 2**22
"""Largest size in bytes of the batches that are read ahead. One batch is read ahead even if it is larger."""


@dataclass(frozen=True)
class StepBatch:
    """Tokens of one rank in one step."""

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
    """Prefetcher of the training batches of one rank: a thread reads each batch during an earlier step.

    Small batches are read several at a time, because waking the thread takes longer than reading one of them.

    Args:
        samples: source of the batches.
        batch: split of the global batch.
        data_rank: index of this rank's part of each batch.
        last_step: last step for which a batch is read ahead.
        device: device of the training. For a GPU the batches are in pinned memory, and are copied asynchronously.
    """

    def __init__(self, samples: Samples, batch: Batch, data_rank: int, last_step: int, device: torch.device) -> None:
        self._samples, self._batch, self._data_rank = samples, batch, data_rank
        self._last_step, self._device = last_step, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[int, Future[Tensor]]] = deque()
        """Number and future token ids of each batch that is read ahead, in the order of their steps."""
        self._places: dict[int, list[Place]] = {}
        """Number of a coming batch -> locations of its samples. Only the thread uses this mapping."""
        self.passed_over = PassedOver()
        """Batches that no step uses. The attribute may be replaced between two steps."""

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step, counted from 1, and start reading the next ones.

        Raises:
            ConfigError: a token file is truncated, or contains an id beyond the model's vocabulary.
        """
        started = time.perf_counter()
        number = self.passed_over.batch_of(step)
        if not self._ahead or self._ahead[0][0] != number:
            while self._ahead:  # batches that were read ahead for other steps
                self._ahead.pop()[1].cancel()
            self._ahead.append(self._submit(step))
        ids_BT1 = self._ahead.popleft()[1].result()
        waited_s = time.perf_counter() - started
        # Read the batches of the next steps, once half of the batches read ahead are used.
        most = max(1, min(TOGETHER // self._batch.per_rank, AHEAD_BYTES // ids_BT1.nbytes))
        if len(self._ahead) <= most // 2:
            first, last = step + 1 + len(self._ahead), min(step + most, self._last_step)
            self._ahead.extend(self._submit(later) for later in range(first, last + 1))
        # torch reuses pinned memory only after the copy out of it is done.
        ids_BT1 = ids_BT1.to(self._device, non_blocking=True)
        indices = train_indices(number, self._data_rank, self._batch)
        tokens_BT, targets_BT = ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous()
        return StepBatch(tokens_BT, targets_BT, int(indices[0]), int(indices[-1]), waited_s)

    def close(self) -> None:
        """End the thread, without waiting for its current read."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, step: int) -> tuple[int, Future[Tensor]]:
        number = self.passed_over.batch_of(step)
        following = self.passed_over.batch_of(step + 1) if step < self._last_step else None
        return number, self._thread.submit(self._build, number, following)

    def _build(self, number: int, following: int | None) -> Tensor:
        """Read the ids of batch ``number``, (B, T + 1). Meanwhile the kernel reads batch ``following`` from disk."""
        places = self._locate(number)
        if following is not None:
            self._samples.announce(self._locate(following))
        ids_BT1 = self._samples.read_at(places)
        return ids_BT1.pin_memory() if self._device.type == "cuda" else ids_BT1

    def _locate(self, number: int) -> list[Place]:
        """Return the locations of the samples of batch ``number``; those of the next batches are computed, too."""
        if number not in self._places:
            # Computing the order is most of the thread's work, and holds Python's GIL meanwhile. For many samples it
            # takes hardly longer than for a few.
            numbers = range(number, number + max(1, TOGETHER // self._batch.per_rank))
            indices = [train_indices(each, self._data_rank, self._batch) for each in numbers]
            places = self._samples.locate("train", np.concatenate(indices))
            starts = range(0, len(places), self._batch.per_rank)
            self._places = {n: places[i : i + self._batch.per_rank] for n, i in zip(numbers, starts, strict=True)}
        return self._places[number]
