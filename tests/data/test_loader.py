"""Batches: right windows of the text, partitioned so that no rank count and no restart repeats or skips a sample."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_a_shard_is_opened_when_it_is_first_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    config = DataConfig(source=Source.tokens, path=str(tmp_path / "*.bin"), val_fraction=0.1)
    samples = Samples(open_tokens(config), block_size=100, seed=1)
    assert open_files(tmp_path) == set()
    windows = samples._train[0]
    assert windows.read(10).tolist() == list(range(100, 201)), "the second window of the second file"
    assert open_files(tmp_path) == {"b.bin"}
    windows.announce(0)
    assert open_files(tmp_path) == {"a.bin", "b.bin"}
    (tmp_path / "c.bin").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"c\.bin is missing or cut short"):
        windows.read(20)


def test_a_corpus_of_more_files_than_descriptors_is_read(tmp_path: Path) -> None:
    count = MOST_OPEN + 20
    for number in range(count):
        np.full(24, number, dtype=np.uint16).tofile(tmp_path / f"{number:03}.bin")
    config = DataConfig(source=Source.tokens, path=str(tmp_path / "*.bin"), val_fraction=0.05)
    windows = Samples(open_tokens(config), block_size=20, seed=1)._train[0]
    assert len(windows) > MOST_OPEN
    for _ in range(2):  # in the second round every file is opened again
        assert [windows.read(position)[0] for position in range(len(windows))] == list(range(len(windows)))
        last = {f"{number:03}.bin" for number in range(len(windows) - MOST_OPEN, len(windows))}
        assert open_files(tmp_path) == last
    windows.read(len(windows) - MOST_OPEN)
    windows.read(0)  # in the place of the one that was not read for longest
    assert f"{len(windows) - MOST_OPEN:03}.bin" in open_files(tmp_path)
    assert f"{len(windows) - MOST_OPEN + 1:03}.bin" not in open_files(tmp_path)


def test_bits_per_byte_count_the_bytes_of_the_targets(tmp_path: Path) -> None:
    """Of characters of one to four bytes: exact, not by the average."""
    content = "a" * 4000 + "aé日🎉" * 1000
    (tmp_path / "text").write_text(content)
    config = DataConfig(source=Source.text, path=str(tmp_path / "text"), tokenizer=TokenizerKind.char)
    spec = build_spec(config, tmp_path)
    assert spec is not None
    source = prepare_folder(spec, tmp_path / "char")
    samples = Samples(Tokens((source,)), 16, 1)
    val = content[source.train.tokens :]
    for sequences in (1, 5, samples.num_val):
        predicted = len(val[1 : 1 + sequences * 16].encode())
        assert samples.val_bytes(sequences) == predicted
        bits = samples.val_bits_per_byte(1.5, sequences)
        assert bits == pytest.approx(1.5 * sequences * 16 / predicted / math.log(2))
    (tmp_path / "char" / "token_bytes.bin").unlink()  # as with a tokenizer.json, whose tokens do not tell
    samples = Samples(Tokens((source,)), 16, 1)
    average = source.val.num_bytes / source.val.tokens  # type: ignore[operator]
    assert samples.val_bytes(5) == pytest.approx(5 * 16 * average)


BATCH = Batch(global_batch=8, ranks=2, per_rank=4, micro=2, accumulation=2)
CPU = torch.device("cpu")


@pytest.fixture
def samples(text: Any) -> Samples:
    return Samples(text[1], block_size=16, seed=1)


def batches_of(samples: Any, last_step: int = 100) -> BatchPrefetcher:
    return BatchPrefetcher(samples, BATCH, 1, last_step, CPU)


def test_batches_are_those_of_the_steps_in_whatever_order_they_are_taken(samples: Samples) -> None:
    batches = batches_of(samples)
    for step in (1, 2, 3, 70, 71, 2):  # as after a resume, and in a second epoch
        taken = batches.take(step)
        indices = train_indices(step, 1, BATCH)
        tokens, targets = samples.batch("train", indices)
        assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)
        assert taken.tokens.is_contiguous() and taken.targets.is_contiguous()
        assert (taken.first, taken.last) == (indices[0], indices[-1])
    batches.close()


def read_by(build: Callable[[int], None]) -> Any:
    """Samples that call ``build`` with the step whose batch is read, in the thread that reads it."""

    def read_at(places: Any) -> torch.Tensor:
        build(int(places[0]) // BATCH.global_batch + 1)
        return torch.from_numpy(places)[:, None].repeat(1, 3)

    return SimpleNamespace(locate=lambda split, indices: indices, read_at=read_at, announce=lambda places: None)


def test_places_of_samples_are_found_once_and_those_of_some_batches_together(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOGETHER", 3 * BATCH.per_rank + 1)
    found = []
    locate = samples.locate
    monkeypatch.setattr(samples, "locate", lambda split, indices: found.append([*indices]) or locate(split, indices))
    batches = batches_of(samples, last_step=7)
    for step in range(1, 8):
        batches.take(step)
    batches.close()
    each = [[*train_indices(step, 1, BATCH)] for step in range(1, 10)]
    assert found == [each[0] + each[1] + each[2], each[3] + each[4] + each[5], each[6] + each[7] + each[8]]


def test_batches_that_are_passed_over_are_not_read(samples: Samples) -> None:
    batches = batches_of(samples)
    batches.take(1)
    batches.passed_over = PassedOver().including(range(2, 5))
    taken = [batches.take(step) for step in (2, 3)]
    batches.close()
    assert [batch.first for batch in taken] == [train_indices(number, 1, BATCH)[0] for number in (5, 6)]
    assert torch.equal(taken[0].tokens, samples.batch("train", train_indices(5, 1, BATCH))[0])


def test_the_next_batch_is_read_while_a_step_is_computed_and_none_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 2 * BATCH.per_rank * 3 * 8 - 1)  # one batch, and not quite another
    read = {step: threading.Event() for step in (1, 2, 3, 4)}
    batches = batches_of(read_by(lambda step: read[step].set()), last_step=3)
    batches.take(1)
    assert read[2].wait(60), "nobody has asked for it yet"
    assert not read[3].is_set(), "one step ahead, not two"
    batches.take(2)
    batches.take(3)
    batches.close()
    assert not read[4].is_set()


def test_small_batches_are_read_some_steps_ahead_and_more_of_them_once_half_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 4 * BATCH.per_rank * 3 * 8)
    read: queue.Queue[int] = queue.Queue()
    batches = batches_of(read_by(read.put), last_step=7)
    numbers = []
    for step, more in ((1, 5), (2, 0), (3, 2), (4, 0), (5, 0), (6, 0), (7, 0)):
        batches.take(step)
        numbers += [read.get(timeout=60) for _ in range(more)]
        assert read.empty(), "four ahead, read by twos"
    batches.close()
    assert numbers == [1, 2, 3, 4, 5, 6, 7], "each once"


class OnHost(torch.Tensor):
    """Ids that may be pinned and copied to a GPU that is not there; they tell ``seen`` of both."""

    seen: list[tuple[Any, ...]]

    def pin_memory(self, device: Any = None) -> OnHost:
        self.seen.append(("pinned", threading.current_thread().name))
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        self.seen.append(("copied", *args, options))
        return self.as_subclass(torch.Tensor)


def test_a_batch_for_a_gpu_is_pinned_by_the_thread_and_copied_once_without_waiting(samples: Samples) -> None:
    seen: list[tuple[Any, ...]] = []

    def read_at(places: Any) -> OnHost:
        ids_BT1 = samples.read_at(places).as_subclass(OnHost)
        ids_BT1.seen = seen
        return ids_BT1

    gpu = torch.device("cuda:1")
    there: Any = SimpleNamespace(locate=samples.locate, announce=samples.announce, read_at=read_at)
    batches = BatchPrefetcher(there, BATCH, 1, 1, gpu)
    taken = batches.take(1)
    batches.close()
    assert seen == [("pinned", "batches_0"), ("copied", gpu, {"non_blocking": True})]
    tokens, targets = samples.batch("train", train_indices(1, 1, BATCH))
    assert torch.equal(taken.tokens, tokens) and torch.equal(taken.targets, targets)


def test_what_was_read_ahead_for_other_steps_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 4 * BATCH.per_rank * 3 * 8)
    read: list[int] = []
    begun, asked = threading.Event(), threading.Event()

    def hold_2(step: int) -> None:
        read.append(step)
        if step == 2:
            begun.set()
            assert asked.wait(60)

    def batch_of(step: int) -> int:
        if step == 10:  # what follows the batch that is asked for in the end
            asked.set()
        return step

    batches: Any = batches_of(read_by(hold_2), last_step=12)
    batches.passed_over = SimpleNamespace(batch_of=batch_of)
    batches.take(1)
    assert begun.wait(60)
    batches.take(9)
    batches.close()
    assert read[:3] == [1, 2, 9], "batches 3 to 5 were waiting for the thread"


def test_a_failure_to_read_fails_the_step_that_it_belongs_to() -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise ConfigError("a file that is gone", "a file", "another folder")

    batches = batches_of(read_by(fail))
    batches.take(1)
    batches.take(2)
    with pytest.raises(ConfigError, match="a file that is gone"):
        batches.take(3)
    batches.close()


def test_the_thread_ends_with_the_run(samples: Samples) -> None:
    before = set(threading.enumerate())
    batches = batches_of(samples)
    batches.take(1)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    thread.join(60)
    assert not thread.is_alive()
