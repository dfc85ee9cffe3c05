"""Training batches read ahead: while the device computes a step, a thread builds the batch of the next one, or of some.

Owns the thread, and the one copy of a step to the device. A batch is a pure function of its step and of the batches
that are passed over, so reading ahead leaves nothing to save and nothing to give back. Must not know what is computed
with a batch.

Shapes: B sequences of one rank in a step, T tokens of a sequence.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.data.loader import Place, Samples, train_indices
from gpt.data.order import PassedOver
from gpt.topology.batch import Batch

TOGETHER = 64
"""Samples whose places are found together, and which are read ahead, where a rank's batches are smaller."""
AHEAD_BYTES = 2**22
"""Of batches that are read ahead, beyond the first."""


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one rank in one step."""

    tokens: Tensor
    """(B, T) int64, on the device."""
    targets: Tensor
    """(B, T): the tokens after them."""
    first: int
    """Index of the first sample."""
    last: int
    """Index of the last sample."""
    waited_s: float
    """Seconds that the training waited for the batch to be read."""


class BatchPrefetcher:
    """The batches of one rank, each built by a thread while a step before it is computed.

    Small ones are read some steps ahead, in turns: waking the thread takes a short step longer than the reading does.

    Args:
        samples: where they are read.
        batch: the split of the global batch.
        data_rank: the part of each batch that this rank takes.
        last_step: step after which nothing is read ahead.
        device: where the batches are computed with. For a GPU they lie in pinned memory, and are copied without
            waiting.
    """

    def __init__(self, samples: Samples, batch: Batch, data_rank: int, last_step: int, device: torch.device) -> None:
        self._samples, self._batch, self._data_rank = samples, batch, data_rank
        self._last_step, self._device = last_step, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[int, Future[Tensor]]] = deque()
        """Numbers of the batches that are read ahead, in the order of their steps, and their ids."""
        self._places: dict[int, list[Place]] = {}
        """Places of the samples of the next batches, by their numbers; the thread's own."""
        self.passed_over = PassedOver()
        """Batches that no step uses; may be replaced between two steps."""

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step, counted from 1, and see to those of the next ones.

        Raises:
            ConfigError: a token file is not whole, or holds an id that the model has no room for.
        """
        started = time.perf_counter()
        number = self.passed_over.batch_of(step)
        if not self._ahead or self._ahead[0][0] != number:
            self._drop_ahead()
            self._ahead.append(self._submit(step))
        ids_BT1 = self._ahead.popleft()[1].result()
        waited_s = time.perf_counter() - started
        self._read_ahead(step, ids_BT1.nbytes)
        # torch frees pinned memory for the next batch only when the copy out of it is done.
        ids_BT1 = ids_BT1.to(self._device, non_blocking=True)
        indices = train_indices(number, self._data_rank, self._batch)
        tokens_BT, targets_BT = ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous()
        return StepBatch(tokens_BT, targets_BT, int(indices[0]), int(indices[-1]), waited_s)

    def close(self) -> None:
        """End the thread, without waiting for what it reads."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self, step: int, batch_bytes: int) -> None:
        """Have the batches of the steps after ``step`` read, once half of what is read ahead is used up."""
        most = max(1, min(TOGETHER // self._batch.per_rank, AHEAD_BYTES // batch_bytes))
        if len(self._ahead) <= most // 2:
            first, last = step + 1 + len(self._ahead), min(step + most, self._last_step)
            self._ahead.extend(self._submit(later) for later in range(first, last + 1))

    def _drop_ahead(self) -> None:
        """Drop what was read ahead for other steps."""
        while self._ahead:
            self._ahead.pop()[1].cancel()

    def _submit(self, step: int) -> tuple[int, Future[Tensor]]:
        number = self.passed_over.batch_of(step)
        following = self.passed_over.batch_of(step + 1) if step < self._last_step else None
        return number, self._thread.submit(self._build, number, following)

    def _build(self, number: int, following: int | None) -> Tensor:
        """Read the ids of a batch, (B, T + 1), and have the kernel fetch those of the ``following`` one meanwhile."""
        places = self._locate(number)
        if following is not None:
            self._samples.announce(self._locate(following))
        ids_BT1 = self._samples.read_at(places)
        return ids_BT1.pin_memory() if self._device.type == "cuda" else ids_BT1

    def _locate(self, number: int) -> list[Place]:
        """Find the places of a batch's samples, together with those of the batches after it."""
        if number not in self._places:
            # The order of the samples is most of the thread's work, during which the training waits for Python's lock;
            # it takes hardly longer for many samples than for a few.
            numbers = range(number, number + max(1, TOGETHER // self._batch.per_rank))
            indices = [train_indices(each, self._data_rank, self._batch) for each in numbers]
            places = self._samples.locate("train", np.concatenate(indices))
            starts = range(0, len(places), self._batch.per_rank)
            self._places = {n: places[i : i + self._batch.per_rank] for n, i in zip(numbers, starts, strict=True)}
        return self._places[number]
