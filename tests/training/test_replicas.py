"""Replicas of parameters that differ: found whatever the parallelism, with the odd one named where a majority tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt.parallel.dtensor import ReplicaCheck, find_odd, local_tensor
from gpt.train import train
from gpt.training.run import Run
from gpt.training.step import queue_step
from launch.runs.heartbeat import Phase
from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, start

ONE_LAYER = "model.n_layer=1"
"""Of engines that have no pipeline, whose stages want a layer each."""


def test_the_majority_tells_which_replica_is_odd() -> None:
    groups = [(0, 2, 4), (1, 3, 5)]
    same = [[7, 0], [0, 9], [7, 0], [0, 9], [7, 0], [0, 9]]
    assert find_odd(groups, same) is None
    odd = [[7, 0], [0, 9], [8, 0], [0, 9], [7, 0], [0, 9]]
    assert find_odd(groups, odd) == (find := find_odd(groups, odd)) and find is not None
    assert (find.ranks, find.is_certain) == ((2,), True)
    two = find_odd([(0, 1)], [[1], [2]])
    assert two is not None and (two.ranks, two.is_certain) == ((0, 1), False)


def flip(run: Run, name: str) -> None:
    """Flip the lowest bit of one element of a parameter that this rank holds."""
    parameter = next(p for n, p in run.engine.module.named_parameters() if n.endswith(name))
    bits = local_tensor(parameter.detach()).view(torch.int32)
    bits.view(-1)[3:4] ^= 1


def compare_replicas(rank: int, size: int, folder: Path) -> dict[str, list[Any]]:
    found = {}
    for number, (words, odd) in enumerate(REPLICAS.items()):
        layers = [] if "pp" in words else [ONE_LAYER]
        run = start(rank, size, folder / str(number), *f"parallel={words}".split(), "optim.max_micro_batch=4", *layers)
        queue_step(run, None, Phase.training)
        check = ReplicaCheck(run.engine.module, run.world)
        quiet = check.find_drift()
        if rank == odd:
            flip(run, "norm.weight")
        drift = check.find_drift()
        found[words] = [check.compares, quiet, None if drift is None else (drift.ranks, drift.is_certain)]
    return found


REPLICAS = {
    "ddp": 2,
    "hsdp parallel.dp_shard=2": 3,
    "tp parallel.tp=2": 1,
    "pp parallel.pp=2": 1,
    "zero2": 2,
}
EXPECTED = {
    "ddp": ((2,), True),
    "hsdp parallel.dp_shard=2": ((1, 3), False),
    "tp parallel.tp=2": ((1,), True),
    "pp parallel.pp=2": ((0, 1), False),
    "zero2": ((2,), True),
}


def test_a_flipped_bit_in_one_replica_is_found_whatever_the_parallelism(tmp_path: Path) -> None:
    for rank, told in enumerate(
        run_distributed(compare_replicas, 4, tmp_path / "runs", timeout_s=300, imports=DEEPSPEED)
    ):
        for words, (compares, quiet, drift) in told.items():
            assert compares and quiet is None, f"{words}, rank {rank}: {quiet}"
            assert drift == EXPECTED[words], f"{words}, rank {rank}"


def drift_apart(rank: int, size: int, folder: Path) -> tuple[str, list[dict[str, Any]], list[int]]:
    """Train, and flip a bit of one rank after step 4."""
    words = ["parallel=ddp", "divergence.replica_check_interval=1", "checkpoint.interval=2", ONE_LAYER]
    run = start(rank, size, folder, *words, "optim.max_steps=9", "optim.global_batch=18", "eval.interval=0")
    run.worker.rank = rank
    run.worker.open_folder(run.folder.path, 1)
    backward = run.engine.backward

    def spoiled(*args: Any) -> Tensor:
        if run.step == 4 and rank == 1:
            flip(run, "norm.weight")
        return backward(*args)

    run.engine.backward = spoiled  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        train(run)
    return str(caught.value), run.folder.read_events(), run.store.steps()


def test_replicas_that_drift_apart_end_the_attempt_with_rank_and_host_named(tmp_path: Path) -> None:
    for text, events, saved in run_distributed(drift_apart, 3, tmp_path / "run"):
        (event,) = [e for e in events if e["event"] == "replicas_differ"]
        assert (event["ranks"], event["certain"], event["step"]) == ([1], True, 5)
        assert f"after step 5 the parameters of rank 1 on {event['hosts'][0]} differ" in text
        assert saved == [2, 4], "the last good checkpoint"
