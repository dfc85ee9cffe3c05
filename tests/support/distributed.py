"""Run a function on several real processes joined by gloo, and get every rank's result.

However a test ends, no process is left. ``python -m tests.support.distributed FOLDER TIMEOUT`` is one rank.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.commands import fork_server, kill_all
from tests.support.forking import ForkedProcess, Job

NEWS_S = 2.0
DATA_FOLDER = "TESTS_DATA_FOLDER"
"""Variable of the ranks: folder in which a corpus is prepared once for all groups of this process."""


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer; carries the number of the rank and what is known about it."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"rank {rank}: {what}")
        self.rank = rank


class _Answer(NamedTuple):
    """Outcome of the function on one rank; ``time`` puts failures of several ranks in order."""

    time: float
    value: Any
    error: str | None


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120, imports: Sequence[str] = ()
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` processes of one gloo group; results by rank.

    The function, its arguments and its results are pickled, so it is a function of a module. RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set, the default group is there, and torch uses one thread. Ranks are forked
    from a process that has imported all they need and run nothing (``forking``), and ``imports``: what takes long and
    not every test needs.

    Raises:
        RankFailedError: the rank that raised or died first, with its traceback; or one that did not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="gloo_") as folder:
        (Path(folder) / "work").write_bytes(pickle.dumps((function, args)))
        ranks: list[ForkedProcess] = []
        try:
            for rank in range(world_size):
                ranks.append(_start(rank, world_size, folder, timeout_s, imports))
            return _collect(ranks, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.poll() is None:
                    kill_all(process)


@cache
def _data_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gloo_data_")


def _start(rank: int, world_size: int, folder: str, timeout_s: float, imports: Sequence[str]) -> ForkedProcess:
    environment = dict(os.environ) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        DATA_FOLDER: _data_folder().name,
    }
    # What some ranks import, they also start: DeepSpeed converts its checkpoints in a process of its own.
    job = Job("tests.support.distributed", (folder, str(timeout_s)), str(Path.cwd()), environment, alone=not imports)
    return fork_server(*imports).start(job)


def _collect(ranks: list[ForkedProcess], folder: Path, deadline: float) -> list[Any]:
    """Wait for the end of every rank: one that fails leaves at once, one that has answered when all others have."""
    answers: dict[int, _Answer] = {}
    dead: list[int] = []
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for sentinel in ready:
            assert isinstance(sentinel, int)
            rank = waiting.pop(sentinel)
            ranks[rank].wait()
            answer = folder / f"answer_{rank}"
            if answer.exists():
                answers[rank] = _Answer(*pickle.loads(answer.read_bytes()))
            else:
                dead.append(rank)
        if dead or any(answer.error for answer in answers.values()):
            # Peers notice a killed process as soon as we do: let the news of the death arrive.
            deadline = min(deadline, time.monotonic() + NEWS_S)
    _raise_first_failure(ranks, answers, dead)
    if waiting:
        raise RankFailedError(min(waiting.values()), f"no answer in time, as from ranks {sorted(waiting.values())}")
    return [answers[rank].value for rank in range(len(ranks))]


def _raise_first_failure(ranks: list[ForkedProcess], answers: dict[int, _Answer], dead: list[int]) -> None:
    """Raise the cause among several failures: a death comes before the errors it makes in others, then the earliest."""
    for rank in dead:
        code = ranks[rank].wait()
        raise RankFailedError(rank, f"died of {signal.Signals(-code).name if code < 0 else f'exit status {code}'}")
    errors = {rank: answer for rank, answer in answers.items() if answer.error}
    if errors:
        rank = min(errors, key=lambda r: errors[r].time)
        raise RankFailedError(rank, errors[rank].error or "")


def main(folder: Path, timeout_s: float) -> None:
    """Be a rank: join the group, call the function, and leave after all ranks have answered.

    ``folder/work`` has the function; ``folder/answer_RANK`` gets the time, the result and the error.
    """
    import numpy
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(0.9 * timeout_s)
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    try:
        # A file to meet at: no port that another process could take.
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        function, args = pickle.loads((folder / "work").read_bytes())
        value, error = function(rank, world_size, *args), None
    except BaseException:  # torch's CheckpointException is not an Exception
        value, error = None, traceback.format_exc()
    # Plain pickle copies tensors; that of multiprocessing would share them with a process that is about to end.
    (folder / f"answer_{rank}.tmp").write_bytes(pickle.dumps((time.monotonic(), value, error)))
    (folder / f"answer_{rank}.tmp").rename(folder / f"answer_{rank}")
    faulthandler.cancel_dump_traceback_later()
    if error is None and dist.is_initialized():
        # Rank 0 closing the group early would fail a rank that still works; one that leaves this first fails nobody.
        with suppress(RuntimeError):
            dist.barrier()
    os._exit(0)  # Python's end takes as long as some tests


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
