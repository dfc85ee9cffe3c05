"""The loop over the steps: what it leaves out of them, and how ranks without an agent agree to save and to stop."""

from __future__ import annotations

import errno
import fcntl
import gc
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt.parallel import engine
from gpt.train import train
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.distributed import run_distributed
from tests.support.learning import Operations, start

STEPS, INTERVAL = 200, 50
SAVE_AT, STOP_AT = 120, 180
CUT_S = 177
WORDS = [
    *(f"optim.max_steps={STEPS}", f"gc_interval={INTERVAL}", "eval.interval=0", "checkpoint.interval=0"),
    *("model.n_layer=1", "optim.max_micro_batch=8", "logging.csv=false", "logging.json=false"),
    f"parallel.step_timeout_s={CUT_S}",
]


class Asked(Rank):
    """A rank under torchrun alone, of which one is asked something in the middle of a step."""

    step = 0

    def save_requested(self) -> bool:
        self.step += 1
        return self.rank == 1 and self.step == SAVE_AT

    def stop_requested(self) -> bool:
        return self.rank == 1 and self.step + 1 >= STOP_AT


def no_locks(*args: Any) -> None:
    """Lock a file as Lustre does where it is mounted without ``flock``."""
    raise OSError(errno.ENOSYS, "Function not implemented")


def groups_of(args: Any) -> list[str]:
    """Names of the process groups among the arguments of a collective."""
    return [
        dist.ProcessGroup.unbox(a).group_name for a in args if "ProcessGroup" in str(getattr(a, "_type", lambda: "")())
    ]


def timeout_of(group: Any) -> float:
    """Timeout of the collectives of a group on CPUs, seconds."""
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout.total_seconds()


def watch(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Train until it is stopped, on a filesystem without locks; collections and messages between processes by step."""
    with mock.patch.object(engine, "get_state_dict", wraps=engine.get_state_dict) as states:
        run = start(rank, size, folder, *WORDS)
    run.worker = Asked(rank, rank, size)
    run.worker.open_folder(run.folder.path, run.attempt)
    collected: list[tuple[int, int]] = []
    messages: list[int] = []
    control = run.world.control.group_name

    def on_collection(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append((run.step, info["generation"]))

    def is_message(name: str, args: Any, kwargs: Any) -> bool:
        if name.startswith("c10d.") and control in groups_of(args):
            messages.append(run.step)
        return False

    gc.callbacks.append(on_collection)
    try:
        with mock.patch.object(fcntl, "lockf", no_locks), Operations(is_message):
            outcome = train(run)
    finally:
        gc.callbacks.remove(on_collection)
    run.world.gather(None)  # rank 0 writes the event log last of all
    return {
        "outcome": outcome,
        "timeouts": [timeout_of(group) for group in (dist.group.WORLD, run.world.control)],
        "states": states.call_count,
        "collected": collected,
        "messages": messages,
        "step": run.step,
        "enabled": gc.isenabled(),
        "saved": run.store.steps(),
        "recorded": [record["step"] for record in read_records(run.folder.metrics(rank))],
        "events": [event["event"] for event in run.folder.read_events()],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(watch, 2, tmp_path_factory.mktemp("loop") / "run")


def test_a_run_that_begins_makes_no_state_to_load_into(ranks: list[dict[str, Any]]) -> None:
    assert [found["states"] for found in ranks] == [0, 0]


def test_collectives_of_training_have_a_cut_timeout_once_steps_were_made(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        of_training, of_control = found["timeouts"]
        assert of_training == CUT_S < of_control


def test_garbage_is_collected_on_the_same_steps_by_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        during = [(step, generation) for step, generation in found["collected"] if 0 < step < SAVE_AT]
        assert during == [(50, 1), (100, 1)]
        assert (0, 2) in found["collected"], "what was left from building, all of it, once"
        assert found["enabled"], "given back to Python"


def test_steps_exchange_no_messages_between_the_processes(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert not [step for step in found["messages"] if step <= 100]
        assert found["messages"], "those of saving are seen"


def test_ranks_without_an_agent_obey_what_one_of_them_is_asked(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["outcome"] == "stopped"
        assert STOP_AT <= found["step"] <= STOP_AT + 2
        assert found["saved"] == [SAVE_AT + 1, found["step"]]
        assert found["recorded"] == list(range(1, found["step"] + 1))
        assert found["events"][-1] == "stopped" and found["events"].count("saved") == 2
