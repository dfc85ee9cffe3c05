"""Work of rank 0 for all: every rank gets the result, or the failure, and none is left waiting."""

import threading
from pathlib import Path

import torch
import torch.distributed as dist

from gpt.parallel.distributed import World
from launch.errors import ConfigError
from launch.runs.events import first_failure, record_failure
from launch.runs.folder import RunFolder
from tests.support.distributed import run_distributed


def refuse() -> str:
    raise ConfigError("a", "b", "c")


def fail() -> str:
    raise OSError("no space left")


def fail_unpicklably() -> str:
    raise ValueError("what no pickle can hold", threading.Lock())


def leave() -> str:
    raise SystemExit("no Exception, as CheckpointException of torch is none")


def return_what_cannot_be_sent() -> object:
    return threading.Lock()


def outcomes(rank: int, world_size: int, folder: str) -> list[str]:
    """For each action of rank 0: what this rank got, or raised."""
    world = World(rank, world_size, rank, world_size, 0, torch.device("cpu"), dist.new_group(backend="gloo"))
    seen = []
    actions = (lambda: "done", refuse, fail, fail_unpicklably, leave, return_what_cannot_be_sent)
    for action in actions:
        try:
            seen.append(world.on_first(action))
        except BaseException as error:
            seen.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if action is fail:
                dist.barrier()
                if rank == 1:  # the echo is noted first
                    record_failure(RunFolder(folder), 1, rank, error, None)
                dist.barrier()
                if rank == 0:
                    record_failure(RunFolder(folder), 1, rank, error, None)
    dist.barrier()
    return seen


def test_every_rank_hears_of_the_failure_of_the_first(tmp_path: Path) -> None:
    first, *others = run_distributed(outcomes, 3, str(tmp_path), timeout_s=120)
    refused = f"ConfigError: {str(ConfigError('a', 'b', 'c')).splitlines()[0]}"
    assert first[:3] == ["done", refused, "OSError: no space left"] and first[3].startswith("ValueError: ")
    assert first[4].startswith("SystemExit: ") and first[5].startswith("TypeError: _thread.lock cannot be sent")
    for seen in others:
        assert seen[:3] == ["done", refused, "FirstRankError: rank 0 failed: OSError: no space left"]
        assert seen[3].startswith("FirstRankError: rank 0 failed: ValueError: ")
        assert seen[4].startswith("FirstRankError: rank 0 failed: SystemExit: ")
        assert seen[5] == f"FirstRankError: rank 0 failed: {first[5]}"
    failure = first_failure(RunFolder(tmp_path).read_events(), 1)
    assert failure is not None and (failure["rank"], failure["cause"]) == (0, "OSError: no space left")
