"""Run a function on several real processes joined by gloo, and get every rank's result. For tests of collective code.

Owns the processes: however a test ends, none is left. Must not know what is tested.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
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
    job = Job("tests.support.rank", (folder, str(timeout_s)), str(Path.cwd()), environment, alone=not imports)
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
