"""Run a function on several real processes joined by gloo, and get every rank's result. For tests of collective code.

Owns the processes: however a test ends, none is left. Must not know what is tested.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# Ranks are forked from a clean server process that has imported all they need and run nothing, so a test pays for the
# imports once and not once for each rank. Environment variables are handed over at each start.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])

NEWS_S = 2.0


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer; carries the number of the rank and what is known about it."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"rank {rank}: {what}")
        self.rank = rank


@dataclass
class _Answer:
    """Outcome of the function on one rank; ``time`` puts failures of several ranks in order."""

    time: float
    value: Any = None
    error: str | None = None


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` processes of one gloo group; results by rank.

    The function, its arguments and its results are pickled, so it is a function of a module. RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set, the default group is there, and torch uses one thread.

    Raises:
        RankFailedError: the rank that raised or died first, with its traceback; or one that did not answer in time.
    """
    # Plain pickle copies tensors; that of multiprocessing would share them with processes that are about to end.
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="gloo_") as meeting:
        ranks = [_start(work, rank, world_size, meeting, timeout_s) for rank in range(world_size)]
        try:
            return _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for process, answers in ranks:
                process.kill()
                process.join()
                answers.close()


def _start(work: bytes, rank: int, world_size: int, meeting: str, timeout_s: float) -> tuple[BaseProcess, Connection]:
    answers, sender = _CONTEXT.Pipe(duplex=False)
    environment = dict(os.environ) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = _CONTEXT.Process(target=_rank_main, args=(sender, environment, work, meeting, timeout_s), daemon=True)
    process.start()
    sender.close()  # so that the death of the process ends the pipe
    return process, answers


def _rank_main(sender: Connection, environment: dict[str, str], work: bytes, meeting: str, timeout_s: float) -> None:
    import numpy
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    faulthandler.dump_traceback_later(0.9 * timeout_s)
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    try:
        # A file to meet at: no port that another process could take.
        store = dist.FileStore(f"{meeting}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        function, args = pickle.loads(work)
        answer = _Answer(time.monotonic(), value=function(rank, world_size, *args))
    except BaseException:  # torch's CheckpointException is not an Exception
        answer = _Answer(time.monotonic(), error=traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    faulthandler.cancel_dump_traceback_later()
    if answer.error is None and dist.is_initialized():
        # Rank 0 closing the group early would fail a rank that still works; one that leaves this first fails nobody.
        with suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


def _collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    answers: dict[int, _Answer] = {}
    dead: list[int] = []
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                answers[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                dead.append(rank)
        if dead or any(answer.error for answer in answers.values()):
            # Peers notice a killed process as soon as we do: let the news of the death arrive.
            deadline = min(deadline, time.monotonic() + NEWS_S)
    _raise_first_failure(ranks, answers, dead)
    if waiting:
        raise RankFailedError(min(waiting.values()), f"no answer in time, as from ranks {sorted(waiting.values())}")
    return [answers[rank].value for rank in range(len(ranks))]


def _raise_first_failure(
    ranks: list[tuple[BaseProcess, Connection]], answers: dict[int, _Answer], dead: list[int]
) -> None:
    """Raise the cause among several failures: a death comes before the errors it makes in others, then the earliest."""
    for rank in dead:
        process = ranks[rank][0]
        process.join()
        code = process.exitcode or 0
        raise RankFailedError(rank, f"died of {signal.Signals(-code).name if code < 0 else f'exit status {code}'}")
    errors = {rank: answer for rank, answer in answers.items() if answer.error}
    if errors:
        rank = min(errors, key=lambda r: errors[r].time)
        raise RankFailedError(rank, errors[rank].error or "")
