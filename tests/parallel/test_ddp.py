"""Collectives of DDP and ZeRO-1: what is sent, when, and how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves

from gpt.accounting import count
from gpt.parallel import ddp, nd
from gpt.parallel.ddp import DDPEngine, GradientReducer, all_gather_rows, row_buckets, split_parameter
from gpt.parallel.modules import local_tensor, split_into_buckets
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, Alive, Operations, start, step

# What DistributedDataParallel does beside averaging gradients.


def last_measured(rank: int, size: int, folder: Path) -> int:
    """Take a hundred steps, and return the last one of which DDP has statistics."""
    engine = start(rank, size, folder, "parallel=ddp", "model.n_layer=1", "optim.max_micro_batch=8").engine
    assert isinstance(engine, DDPEngine)
    for _ in range(100):
        engine.module(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    found = engine.module._get_ddp_logging_data()["iteration"]
    assert isinstance(found, int)
    return found


class Peak(Alive):
    """The most bytes that the storages of operations held at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, sum(storage.nbytes() for storage in self.storages))
        return made


def peaks(rank: int, size: int, folder: Path) -> tuple[int, int]:
    """Bytes at the peak of the passes before the first step, and of the backward pass of a step."""
    run = start(rank, size, folder, "parallel=ddp", "model.vocab_size=8192", "optim.max_micro_batch=8")
    engine, tokens_BT = run.engine, torch.zeros(8, run.config.model.block_size, dtype=torch.long)
    assert isinstance(engine, DDPEngine) and run.batch.accumulation == 1
    with Peak() as warm_up:
        engine._warm_up_buckets()
    with Peak() as training:
        engine.backward(tokens_BT, tokens_BT, lambda: None)
    # The passes also make the buckets, and make them anew after the first one.
    return warm_up.most - 2 * sum(p.nbytes for p in engine.module.parameters()), training.most


def gradient_storages(rank: int, size: int, folder: Path) -> list[set[int]]:
    """Storages of the gradients after the first of two micro-batches, and after the step."""
    run = start(rank, size, folder, "parallel=ddp", "optim.max_micro_batch=2", "optim.global_batch=8")
    assert run.batch.accumulation == 2
    found: list[set[int]] = []

    def look() -> None:
        grads = [p.grad for p in run.engine.module.parameters() if p.grad is not None]
        found.append({grad.untyped_storage().data_ptr() for grad in grads})

    tokens_BT = torch.zeros(4, run.config.model.block_size, dtype=torch.long)
    for _ in range(2):
        run.engine.backward(tokens_BT, tokens_BT, look)
        look()
    return found


def watch(rank: int, size: int, folder: Path) -> tuple[int, tuple[int, int], list[set[int]]]:
    kinds = (last_measured, peaks, gradient_storages)
    measured, most, stored = (kind(rank, size, folder / kind.__name__) for kind in kinds)
    return measured, most, stored


def test_it_stops_measuring_warms_up_in_the_memory_of_a_step_and_keeps_gradients_in_buckets(tmp_path: Path) -> None:
    for measured, (warm_up, training), stored in run_distributed(watch, 2, tmp_path / "runs"):
        assert measured == 10, "by default it measures each hundredth step, and waits for the device there"
        assert 4 * 8 * 16 * 8192 < warm_up <= training, "passes before the first step need no more than a step"
        before, between, after, *again = stored
        assert before == between == after and again == [before] * 3
        assert 1 <= len(after) <= 2, "few buckets hold all gradients"


# zero1 reduces gradients to the rows that a rank steps, and brings the stepped rows together, in few collectives.


PARAMETERS = 219
SHAPES = [(7, 3), (1, 5), (8,), (2, 2, 2), (3,), (16, 4), (4, 0)]
SMALL = 512
"""Bytes of a bucket that holds some of these."""
UNUSED, FROZEN = 5, 8
"""A parameter that no rank but the first uses, and one that is not trained."""


class Collectives(Operations):
    """Counts collectives, and the bytes that each kind sends, those of a whole tensor or of a rank's part of it."""

    def __init__(self) -> None:
        super().__init__(self._count)
        self.bytes: Counter[str] = Counter()

    def _count(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if "c10d" not in name or "wait" in name:
            return False
        self.bytes[name.split(".")[1]] += sum(tensor.nbytes for tensor in tree_leaves(args[0]))
        return True


def parameters_of_all() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(SHAPES[i % len(SHAPES)], generator=generator) for i in range(PARAMETERS)]


def gather(rank: int, size: int) -> tuple[int, int]:
    """Tensors of which each rank has its rows only, brought together; the collectives, at once and in small buckets."""
    whole = parameters_of_all()
    held = [torch.full_like(tensor, -1.0) for tensor in whole]
    for tensor, mine in zip(whole, held, strict=True):
        for theirs, own in list(zip(tensor.chunk(size), mine.chunk(size), strict=True))[rank : rank + 1]:
            own.copy_(theirs)
    made: list[int] = []
    for bucket in (ddp.GATHER_BYTES, SMALL):
        tensors = [tensor.clone() for tensor in held]
        with mock.patch.object(ddp, "GATHER_BYTES", bucket), Collectives() as seen:
            all_gather_rows(tensors, dist.group.WORLD)
        made.append(len(seen.found))
        assert all(map(torch.equal, tensors, whole))
    return made[0], made[1]


def reduce(rank: int, size: int) -> None:
    """Gradients of three micro-batches, against the chunks of what torch's all-reduce makes of all of them."""
    mesh = init_device_mesh("cpu", (size,))
    tensors = [nn.Parameter(tensor) for tensor in parameters_of_all()]
    tensors[FROZEN].requires_grad_(False)
    pairs = [split_parameter(tensor, mesh) for tensor in tensors]
    with mock.patch.object(ddp, "BUCKET_BYTES", SMALL):
        reducer = GradientReducer(row_buckets(pairs, mesh))
    expected = [torch.zeros_like(tensor) for tensor in tensors]
    used = [i for i in range(PARAMETERS) if i != FROZEN and (i != UNUSED or rank == 0)]

    def run_backward(factor: float) -> None:
        # The last parameters get their gradients last, so that the first bucket is the last to be filled.
        total = torch.zeros(())
        for i in used:
            total = total + (factor * (i + 1) * tensors[i] ** 2).sum()
            expected[i] += 2 * factor * (i + 1) * tensors[i].detach()
        total.backward()

    with Collectives() as seen:
        run_backward(rank + 0.5)
        run_backward(rank + 1.0)
        assert not seen.found, "nothing is sent before the last micro-batch"
        reducer.begin_last()
        run_backward(rank + 2.0)
        reducer.finish()
    assert 10 < len(seen.found) < PARAMETERS and set(seen.bytes) == {"reduce_scatter_tensor"}
    assert all(tensor.grad is None for tensor in tensors if tensor.numel()), "whole gradients are given up"
    for i, (tensor, shard) in enumerate(pairs):
        dist.all_reduce(expected[i])
        if i == FROZEN or not tensor.numel():
            assert shard.grad is None and shard.requires_grad == (i != FROZEN)
            continue
        own = dict(enumerate(expected[i].chunk(size))).get(rank, expected[i][:0])
        torch.testing.assert_close(local_tensor(shard.grad), own)


def reduce_and_gather(rank: int, size: int) -> tuple[int, int]:
    reduce(rank, size)
    return gather(rank, size)


def test_every_row_is_reduced_to_one_rank_and_every_parameter_comes_together_in_one_collective() -> None:
    for at_once, in_buckets in run_distributed(reduce_and_gather, 3):
        assert at_once == 1
        assert 10 < in_buckets < PARAMETERS


def test_a_bucket_holds_one_dtype_and_no_more_than_its_size_unless_a_tensor_is_larger() -> None:
    sizes = [(3, torch.float32), (2, torch.float32), (9, torch.float32), (1, torch.float32), (2, torch.bfloat16)]
    tensors = [torch.empty(length, dtype=dtype) for length, dtype in sizes]
    assert split_into_buckets(tensors, 20) == [[0, 1], [2], [3], [4]]
    assert split_into_buckets([], 20) == []


def count_bytes(rank: int, size: int, folder: Path) -> dict[str, Counter[str]]:
    """Bytes of the collectives of a step, by strategy; the first step has made what is made once."""
    found = {}
    for strategy in ("ddp", "zero1"):
        run = start(rank, size, folder / strategy, *TINY, f"parallel={strategy}", "optim.max_micro_batch=4")
        assert run.batch.accumulation > 1
        step(run)
        with Collectives() as seen:
            step(run)
        found[strategy] = seen.bytes | {"parameters": 4 * count(run.config.model).total}
    return found


def test_a_step_reduces_each_gradient_once_and_gathers_each_parameter_once(tmp_path: Path) -> None:
    """As many bytes as the all-reduce of ddp, which is a reduce-scatter and an all-gather; no more of it is left."""
    found = run_distributed(count_bytes, 2, tmp_path / "runs")[0]
    size = found["zero1"].pop("parameters")
    figures = 64  # bytes of squares, loss, and what ranks tell each other
    assert found["zero1"].keys() == {"reduce_scatter_tensor", "all_gather_into_tensor", "allreduce_"}
    assert size <= found["zero1"]["reduce_scatter_tensor"] <= math.ceil(1.01 * size)
    # Of a gather a rank sends its part.
    assert found["zero1"]["all_gather_into_tensor"] * 2 == found["zero1"]["reduce_scatter_tensor"]
    assert found["zero1"]["allreduce_"] <= figures
    assert found["ddp"].keys() == {"allreduce_", "parameters"} and found["ddp"]["allreduce_"] >= size


# Replicas of engines with other dimensions reduce their gradients while the backward pass computes others.


def sent_before_the_end(rank: int, size: int, folder: Path) -> dict[str, tuple[int, int, Counter[str], int]]:
    """Buckets, those that were left after the backward passes, bytes of collectives and of parameters, by layout."""
    found = {}
    for name, settings in LAYOUTS.items():
        with mock.patch.object(nd, "BUCKET_BYTES", SMALL):
            run = start(rank, size, folder / name, *TINY, *settings, "parallel.strategy=ddp", "optim.max_micro_batch=2")
        assert isinstance(run.engine, nd.NDEngine) and run.batch.accumulation > 1
        reducer, left = run.engine._reducer, []
        run.engine.reduce_gradients = lambda r=reducer, f=reducer.finish, n=left: (n.append(len(r._to_send)), f())  # type: ignore
        tokens_BT = torch.zeros(run.batch.per_rank, run.config.model.block_size, dtype=torch.long)
        with Collectives() as seen:
            run.engine.backward(tokens_BT, tokens_BT, lambda: None)
        found[name] = len(reducer._buckets), left[0], seen.bytes, 4 * sum(p.numel() for p in reducer._bucket_of)
    return found


LAYOUTS = {"cp": ["parallel.cp=2"], "ep": ["parallel.ep=2", "model.ffn=moe", "model.n_expert=4"]}


def test_replicas_with_cp_and_ep_reduce_each_bucket_before_the_backward_pass_ends(tmp_path: Path) -> None:
    for found in run_distributed(sent_before_the_end, 2, tmp_path / "runs"):
        for buckets, left, sent, size in found.values():
            assert buckets > 10 and left == 0
            assert sent["allreduce_"] == size, "each gradient once, after the last micro-batch"
