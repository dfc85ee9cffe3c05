"""The helper itself: results, the first failure, deaths and hangs, and that no process is left behind."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import distributed
from tests.support.commands import is_alive, wait_for
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.forking import ForkedProcess


def all_reduce(rank: int, world_size: int, start: int) -> tuple[int, float, str]:
    total = torch.tensor(float(start + rank))
    dist.all_reduce(total)
    return os.getpid(), total.item(), os.environ["RANK"]


def misbehave(rank: int, world_size: int, how: str) -> Any:
    if rank == 1:
        if how == "raise":
            raise ValueError("the cause")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    dist.barrier()


def test_results_come_by_rank_from_processes_of_their_own() -> None:
    results = run_distributed(all_reduce, 2, 10)
    assert [r[1:] for r in results] == [(21.0, "0"), (21.0, "1")]
    assert len({os.getpid(), *(r[0] for r in results)}) == 3


@pytest.mark.parametrize(
    ("how", "timeout_s", "message"),
    [("raise", 60, "ValueError: the cause"), ("die", 60, "died of SIGKILL"), ("hang", 3, "no answer in time")],
)
def test_the_rank_that_failed_is_named_and_none_is_left(
    how: str, timeout_s: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ForkedProcess] = []
    start = distributed._start
    monkeypatch.setattr(distributed, "_start", lambda *args: started.append(start(*args)) or started[-1])
    with pytest.raises(RankFailedError, match=message) as failure:
        run_distributed(misbehave, 2, how, timeout_s=timeout_s)
    assert failure.value.rank == (1 if how != "hang" else failure.value.rank)
    assert len({process.pid for process in started}) == 2
    wait_for(lambda: not any(is_alive(process.pid) for process in started), "the end of all ranks")


def stay_imported(rank: int, world_size: int) -> bool:
    return "wave" in sys.modules


def test_what_a_test_imports_for_its_ranks_is_there_and_for_no_others() -> None:
    assert run_distributed(stay_imported, 2, imports=("wave",)) == [True, True]
    assert run_distributed(stay_imported, 1) == [False]
