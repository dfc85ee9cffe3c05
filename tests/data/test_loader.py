"""Batches: right windows of the text, partitioned so that no rank count and no restart repeats or skips a sample."""

from __future__ import annotations

import math
import queue
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig, OptimConfig, Source, TokenizerKind
from gpt.data import loader
from gpt.data.corpus import ensure_tokens
from gpt.data.loader import MOST_OPEN, BatchPrefetcher, Samples, train_indices
from gpt.data.order import PassedOver
from gpt.data.preparation import prepare_folder
from gpt.data.prepared import Tokens, open_tokens
from gpt.data.spec import build_spec
from gpt.topology import Batch, split_batch
from launch.errors import ConfigError


def batch_of(global_batch: int, ranks: int) -> Batch:
    optim = OptimConfig(max_steps=1, global_batch=global_batch, max_micro_batch=4, lr=1e-3, min_lr=1e-4, warmup_steps=0)
    return split_batch(optim, ranks)


@given(
    global_batch=st.integers(1, 64),
    step=st.integers(1, 10**9),
    resizes=st.lists(st.integers(0, 100), min_size=1, max_size=5),
)
def test_any_number_of_ranks_uses_the_same_samples_once(global_batch: int, step: int, resizes: list[int]) -> None:
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    used = []
    for offset, resize in enumerate(resizes):  # the run is restarted with another size at every step
        batch = batch_of(global_batch, divisors[resize % len(divisors)])
        parts = [train_indices(step + offset, rank, batch) for rank in range(batch.ranks)]
        assert {len(part) for part in parts} == {batch.per_rank}
        used.append(np.concatenate(parts))
    first = (step - 1) * global_batch
    assert np.concatenate(used).tolist() == list(range(first, first + len(resizes) * global_batch))


@pytest.fixture
def text(tmp_path: Path) -> tuple[bytes, Tokens]:
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    (tmp_path / "text").write_bytes(content)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), val_fraction=0.2)
    return content, ensure_tokens(config, tmp_path / "cache")


def test_an_epoch_of_training_is_every_window_of_the_training_text_once(text: tuple[bytes, Tokens]) -> None:
    content, file = text
    samples = Samples(file, block_size=16, seed=1)
    assert (samples.num_train, samples.num_val) == (3999 // 16, 999 // 16)
    tokens, targets = samples.batch("train", np.arange(samples.num_train))
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape == (249, 16)
    assert tokens.is_contiguous() and targets.is_contiguous()
    found = sorted((bytes(row.tolist()), bytes(target.tolist())) for row, target in zip(tokens, targets, strict=True))
    assert found == sorted((content[i : i + 16], content[i + 1 : i + 17]) for i in range(0, 249 * 16, 16))
    again, _ = samples.batch("train", np.arange(samples.num_train) + samples.num_train)
    assert not torch.equal(tokens, again), "the next epoch has another order"
    assert torch.equal(tokens.sort(0)[0], again.sort(0)[0])
    other, _ = Samples(file, 16, seed=2).batch("train", np.arange(samples.num_train))
    assert not torch.equal(tokens, other), "another seed has another order"


def test_validation_keeps_the_order_of_the_last_part_of_the_text(text: tuple[bytes, Tokens]) -> None:
    content, file = text
    samples = Samples(file, block_size=16, seed=1)
    tokens, targets = samples.batch("val", np.arange(samples.num_val))
    assert bytes(tokens.flatten().tolist()) == content[4000 : 4000 + samples.num_val * 16]
    assert bytes(targets.flatten().tolist()) == content[4001 : 4001 + samples.num_val * 16]
    with pytest.raises(AssertionError, match="repeats"):
        samples.batch("val", np.array([samples.num_val]))


def test_ranks_together_make_the_global_batch(text: tuple[bytes, Tokens]) -> None:
    samples = Samples(text[1], block_size=16, seed=1)
    whole = samples.batch("train", train_indices(41, 0, batch_of(12, 1)))  # crosses into the second epoch
    for ranks in (2, 3, 4):
        parts = [samples.batch("train", train_indices(41, r, batch_of(12, ranks))) for r in range(ranks)]
        for number in (0, 1):
            assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])


def test_a_file_that_this_machine_does_not_see_whole_is_refused(text: tuple[bytes, Tokens]) -> None:
    tokens = text[1]
    tokens.sources[0].val.segments[0].path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="cut short"):
        Samples(tokens, 16, 1)


def open_files(folder: Path) -> set[str]:
    """Names of the files of a folder that this process has open or mapped."""
    mapped = (line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines())
    return {Path(path[0].strip()).name for path in mapped if path and path[0].strip().startswith(f"{folder}/")}


def test_a_file_is_opened_when_it_is_first_read_and_the_latest_stay_open(tmp_path: Path) -> None:
    """A corpus may have more files than a process may open."""
    count = MOST_OPEN + 20
    for number in range(count):
        np.full(24, number, dtype=np.uint16).tofile(tmp_path / f"{number:03}.bin")
    config = DataConfig(source=Source.tokens, path=str(tmp_path / "*.bin"), val_fraction=0.05)
    windows = Samples(open_tokens(config), block_size=20, seed=1)._train[0]
    assert open_files(tmp_path) == set() and len(windows) > MOST_OPEN
    for _ in range(2):  # in the second round every file is opened again
        assert [windows.read(position)[0] for position in range(len(windows))] == list(range(len(windows)))
        last = {f"{number:03}.bin" for number in range(len(windows) - MOST_OPEN, len(windows))}
        assert open_files(tmp_path) == last
    (tmp_path / "000.bin").write_bytes(b"short")
    windows.announce(len(windows) - 1)
    with pytest.raises(ConfigError, match=r"000\.bin is missing or cut short"):
        windows.read(0)


def test_bits_per_byte_take_the_bytes_per_token_of_the_validation_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 4000 + "aé日🎉" * 1000)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), tokenizer=TokenizerKind.char)
    spec = build_spec(config, tmp_path)
    assert spec is not None
    samples = Samples(Tokens((prepare_folder(spec, tmp_path / "char"),)), 16, 1)
    assert samples.val_bytes(5) == pytest.approx(5 * 16 * 10 / 4), "ten bytes are four characters"
    assert samples.val_bits_per_byte(1.5, 5) == pytest.approx(1.5 / math.log(2) * 4 / 10)


BATCH = Batch(global_batch=8, ranks=2, per_rank=4, micro=2, accumulation=2)
CPU = torch.device("cpu")


@pytest.fixture
def samples(text: Any) -> Samples:
    return Samples(text[1], block_size=16, seed=1)


def batches_of(samples: Samples, last_step: int = 100, device: torch.device = CPU) -> BatchPrefetcher:
    return BatchPrefetcher(samples, BATCH, 1, last_step, device)


@pytest.mark.parametrize("together", [64, 3 * BATCH.per_rank + 1, 1])
def test_batches_are_those_of_the_steps_in_whatever_order_they_are_taken(
    samples: Samples, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOGETHER", together)
    batches = batches_of(samples, last_step=72)
    for step in (1, 2, 3, 70, 71, 2, 72):  # as after a resume, in a second epoch, and after the last step
        taken = batches.take(step)
        indices = train_indices(step, 1, BATCH)
        tokens, targets = samples.batch("train", indices)
        assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)
        assert taken.tokens.is_contiguous() and taken.targets.is_contiguous()
        assert (taken.first, taken.last) == (indices[0], indices[-1])
    batches.passed_over = PassedOver().including(range(3, 6))
    assert [batches.take(step).first for step in (3, 4)] == [train_indices(n, 1, BATCH)[0] for n in (6, 7)]
    batches.close()


@pytest.fixture
def read(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> queue.Queue[list[int]]:
    """The numbers of the batches that are read together, as the thread begins to read them."""
    begun: queue.Queue[list[int]] = queue.Queue()
    real = samples.read

    def watched(split: Any, indices: Any) -> torch.Tensor:
        numbers = [int(i) // BATCH.global_batch + 1 for i in indices[:: BATCH.per_rank]]
        begun.put(numbers)
        if 4 in numbers:
            raise ConfigError("a file that is gone", "a file", "another folder")
        return real(split, indices)

    monkeypatch.setattr(samples, "read", watched)
    return begun


def test_the_next_batches_are_read_while_steps_are_computed_and_none_after_the_last(
    samples: Samples, read: queue.Queue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOGETHER", 2 * BATCH.per_rank)
    batches = batches_of(samples, last_step=9)
    batches.take(6)
    assert [read.get(timeout=60) for _ in range(2)] == [[6, 7], [8, 9]], "nobody has asked for the second group yet"
    for step in (7, 8, 9):
        batches.take(step)
    batches.close()
    assert read.empty(), "each once"


def test_large_batches_are_read_one_ahead_and_a_failure_belongs_to_its_step(
    samples: Samples, read: queue.Queue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 2 * BATCH.per_rank * 17 * 8 - 1)  # one batch, and not quite another
    batches = batches_of(samples)
    batches.take(2)
    batches.take(3)
    with pytest.raises(ConfigError, match="a file that is gone"):
        batches.take(4)
    batches.close()
    assert [read.get(timeout=60) for _ in range(3)] == [[2], [3], [4]]


class OnHost(torch.Tensor):
    """Ids that may be pinned and copied to a GPU that is not there; they tell ``seen`` of both."""

    seen: ClassVar[list[tuple[Any, ...]]] = []

    def pin_memory(self, device: Any = None) -> OnHost:
        self.seen.append(("pinned", threading.current_thread().name))
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        self.seen.append(("copied", *args, options))
        return self.as_subclass(torch.Tensor)


def test_a_batch_for_a_gpu_is_pinned_by_the_thread_and_copied_once_without_waiting(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, targets = samples.batch("train", train_indices(1, 1, BATCH))
    real, gpu = samples.read, torch.device("cuda:1")
    monkeypatch.setattr(samples, "read", lambda split, indices: real(split, indices).as_subclass(OnHost))
    batches = batches_of(samples, 1, gpu)
    taken = batches.take(1)
    batches.close()
    assert OnHost.seen == [("pinned", "batches_0"), ("copied", gpu, {"non_blocking": True})]
    assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)


def test_the_thread_ends_with_the_run(samples: Samples) -> None:
    before = set(threading.enumerate())
    batches = batches_of(samples)
    batches.take(1)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    thread.join(60)
    assert not thread.is_alive()
