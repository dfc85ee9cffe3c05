"""A run goes on with other numbers of ranks: the losses of one process, and every sample once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from gpt.config import TrainConfig
from gpt.training.checkpoints import save
from gpt.training.step import queue_step
from launch.runs.files import read_json_lines
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import Phase
from tests.support.commands import agents_of, descendants, start_fork, wait_for
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, compose, start_composed

SIZES = (4, 2, 3, 1)
STEPS = 2
"""Steps with each number of ranks."""
ALL_STEPS = STEPS * len(SIZES)
BATCH = 12
WORDS = (
    "model.n_layer=1",
    f"optim.global_batch={BATCH}",
    "optim.max_micro_batch=3",
    f"optim.max_steps={ALL_STEPS}",
)
HELD = """
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


class HeldAdamW(torch.optim.AdamW):
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        number = 1 + max((int(state["step"]) for state in self.state.values()), default=0)
        while (FOLDER / f"hold_{number}").exists():
            (FOLDER / f"held_{number}").touch()
            time.sleep(0.02)
        return super().step(closure)
"""
"""AdamW whose step N waits while there is a file ``hold_N`` beside this module, and then makes a file ``held_N``.

By then all ranks have their gradients of that step, and no rank has made it.
"""
STRATEGIES = ("ddp", "fsdp")
Steps = list[tuple[float, float, int, int]]
"""Loss, gradient norm, and the first and the last sample of this rank, step by step."""


def go_on(rank: int, size: int, folder: Path, configs: dict[str, TrainConfig], steps: int) -> dict[str, Steps]:
    """Go on from the newest checkpoint of each strategy, if there is one, and save."""
    found = {}
    for strategy, config in configs.items():
        run = start_composed(rank, size, folder / strategy, config)
        assert run.batch.global_batch == BATCH and run.batch.micro <= 3
        made = []
        for _ in range(steps):
            record, _ = queue_step(run, None, Phase.training).finish(0.0)
            assert record.loss is not None and record.grad_norm is not None
            made.append((record.loss, record.grad_norm, *record.samples))
        save(run)
        run.batches.close()
        found[strategy] = made
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """All steps by one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    (found,) = run_distributed(go_on, 1, folder, {"ddp": compose("parallel=ddp", *WORDS)}, ALL_STEPS)
    return found["ddp"]  # type: ignore[no-any-return]


def assert_same_curve(curve: list[tuple[float, float]], alone: Steps) -> None:
    """Losses and gradient norms are those of one process."""
    for (loss, norm), (loss_alone, norm_alone, *_) in zip(curve, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-5, abs=0)
        assert norm == pytest.approx(norm_alone, rel=1e-4)


def assert_each_once(seen: list[tuple[int, int]]) -> None:
    """First and last samples of ranks and steps hold every sample of the run once."""
    samples = [sample for first, last in seen for sample in range(first, last + 1)]
    assert sorted(samples) == list(range(BATCH * ALL_STEPS))


def test_four_two_three_and_one_rank_learn_through_checkpoints_what_one_process_learns(
    alone: Steps, tmp_path: Path
) -> None:
    configs = {strategy: compose(f"parallel={strategy}", *WORDS) for strategy in STRATEGIES}
    parts = [run_distributed(go_on, size, tmp_path / "elastic", configs, STEPS) for size in SIZES]
    for strategy in STRATEGIES:
        assert_same_curve([step[:2] for ranks in parts for step in ranks[0][strategy]], alone)
        assert_each_once([step[2:] for ranks in parts for of in ranks for step in of[strategy]])


@pytest.mark.parametrize(("strategy", "sizes"), [("ddp", (4, 3, 1)), ("fsdp", (4, 2, 1))])
def test_a_job_that_loses_nodes_twice_learns_what_one_process_learns(
    strategy: str, sizes: tuple[int, ...], alone: Steps, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "held.py").write_text(HELD)
    for step in (4, 6):  # each is in the middle between two checkpoints
        (tmp_path / f"hold_{step}").touch()
    words = ["cluster=local", "nodes=4", "ranks_per_node=1", f"parallel={strategy}", *TINY, *WORDS]
    words += ["optim.optimizer=held:HeldAdamW", "checkpoint.interval=2", "checkpoint.asynchronous=false"]
    words += ["resilience.min_nodes=1", "resilience.node_timeout_s=5", "eval.interval=0", "launch.report_files=[]"]
    process = start_fork("launch", *words, f"run_dir={folder.path}", cwd=tmp_path, log=tmp_path / "log")

    def is_held(step: int) -> bool:
        return (tmp_path / f"held_{step}").exists() or process.poll() is not None

    for step, left in zip((4, 6), sizes[1:], strict=True):
        wait_for(partial(is_held, step), f"step {step}")
        assert process.poll() is None, (folder.read_events(), (tmp_path / "log").read_text())
        agents = agents_of(process.pid)
        for pid in [pid for node in range(left, 4) if node in agents for pid in descendants(agents[node])]:
            with suppress(ProcessLookupError):  # an agent before its ranks, of which it would tell the others
                os.kill(pid, signal.SIGKILL)
        (tmp_path / f"hold_{step}").unlink()
    assert process.wait(300) == 0, (folder.read_events(), (tmp_path / "log").read_text())

    started = [e for e in folder.read_events() if e["event"] == "started"]
    assert [(e["world_size"], e["from_step"]) for e in started] == list(zip(sizes, (0, 2, 4), strict=True))
    assert [e["event"] for e in folder.read_events() if e["event"] in ("submitted", "requeued")] == ["submitted"]
    # The steps of an attempt that count are those that the next one does not make again.
    counts = {e["attempt"]: range(e["from_step"] + 1, e["from_step"] + 3) for e in started[:-1]}
    counts[started[-1]["attempt"]] = range(started[-1]["from_step"] + 1, ALL_STEPS + 1)
    records = [
        # A record is written once more when the save after its step is done.
        {r["step"]: r for r in read_json_lines(folder.metrics(rank)) if r["step"] in counts[r["attempt"]]}
        for rank in folder.metric_ranks()
    ]
    assert len(records) == 4
    assert_same_curve([(r["loss"], r["grad_norm"]) for r in records[0].values()], alone)
    assert_each_once([(r["samples"][0], r["samples"][1]) for of_rank in records for r in of_rank.values()])
