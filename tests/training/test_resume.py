"""Runs that go on: after an interruption, beyond their end, from an earlier step, and on other numbers of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest

from gpt import checkpoint as folders
from gpt.config import TrainConfig
from gpt.config.optim import describe_extended_schedule
from gpt.training.step import queue_step
from launch.batch import job_overrides
from launch.errors import ConfigError
from launch.report.goodput import measure_goodput
from launch.runs.compose import read_document
from launch.runs.events import (
    plan_continuation,
    refuse_alive,
    saves_that_count,
)
from launch.runs.folder import RunFolder, read_json_lines, write_json
from launch.runs.process import Phase
from launch.runs.records import read_records
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, agents_of, descendants, kill_all, ranks_of, run, start_fork, wait_for
from tests.support.distributed import run_distributed
from tests.support.learning import TINY as LEARNING
from tests.support.learning import compose, save, start_composed
from tests.support.small_models import optim

MORE = 6
"""Steps after the checkpoint that a killed run goes on from: over the next checkpoint, to one at the end."""
WORDS = [
    *(*TINY, "checkpoint.interval=5", "eval.interval=4", "model.dropout=0.1"),
    "optim.warmup_steps=1000",  # a learning rate that is each step's own, however many are to come
]
NO_REPORT = "launch.report_files=[]"


# Four ranks of DDP are the hard case: torch regroups the gradients after the first step of a process.
def test_kill_9_and_another_start_end_in_the_same_weights(tmp_path: Path) -> None:
    words = ["nodes=2", "ranks_per_node=2", "parallel=ddp", *WORDS, NO_REPORT]
    killed = RunFolder(tmp_path / "killed")
    # More steps than it could make before it is killed, however late this process gets to do so.
    without_end = [*words, "optim.max_steps=1000", f"run_dir={killed.path}"]
    process = start_fork("launch", *without_end, cwd=tmp_path, log=tmp_path / "log")

    def is_beyond_a_checkpoint() -> bool:
        saved = folders.steps(killed.checkpoints)
        return bool(saved) and any(r["step"] >= saved[0] + 2 for r in read_records(killed.metrics(0)))

    wait_for(lambda: is_beyond_a_checkpoint() or process.poll() is not None, "two steps after a checkpoint")
    assert process.poll() is None, (tmp_path / "log").read_text()
    assert set(ranks_of(descendants(process.pid))) == {0, 1, 2, 3}
    kill_all(process)
    assert read_records(killed.metrics(0))[-1]["step"] < 1000, "the kill must fall into the run"

    saved = folders.steps(killed.checkpoints)[-1]
    made = max(r["step"] for rank in killed.metric_ranks() for r in read_records(killed.metrics(rank)))
    steps = max(saved + MORE, made)  # a run is not to end before what it has made
    words.append(f"optim.max_steps={steps}")
    run("launch", *words, f"run_dir={killed.path}", cwd=tmp_path)
    started = [e for e in killed.read_events() if e["event"] == "started"]
    assert [e["attempt"] for e in started] == [1, 2]
    assert started[1]["from_step"] == saved >= 5 and saved % 5 == 0

    run("launch", *words, f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    whole, resumed = (read_weights(tmp_path / name, steps, tmp_path) for name in ("whole", "killed"))
    assert differing(whole, resumed) == []
    losses = [[r["loss"] for r in read_records(RunFolder(tmp_path / name).metrics(0))] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    records = [r for rank in killed.metric_ranks() for r in read_records(killed.metrics(rank))]
    assert_each_once([r["samples"] for r in records], 8 * steps)


# A finished run goes on where more steps are asked for, and back to an earlier checkpoint, with nothing lost.


SMALL = tuple(word for word in TINY if not word.startswith("data."))
EVEN = (*SMALL, "data=synthetic", "optim.lr=0.001", "optim.min_lr=0.001", "optim.warmup_steps=0")
"""A learning rate that does not depend on the length, so that a run of the whole length is the reference."""
WORDS_OF_EXTEND = (
    *EVEN,
    "checkpoint.interval=4",
    "checkpoint.keep_last=9",
    "eval.interval=0",
    "logging.tensorboard=false",
)


def test_a_run_that_is_extended_and_one_that_goes_back_end_as_one_that_ran_through(tmp_path: Path) -> None:
    words = [*WORDS_OF_EXTEND, "name=n"]
    run("gpt.train", *words, "optim.max_steps=12", f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    whole = read_weights(tmp_path / "whole", 12, tmp_path)

    run("launch", *words, "optim.max_steps=8", "launch.report_files=[csv]", cwd=tmp_path)
    (path,) = (path for path in (tmp_path / "outputs" / "n").iterdir() if (path / "plan.json").exists())
    folder = RunFolder(path)
    longer = [*words, "optim.max_steps=12", "resume_from=last", "launch.report_files=[csv]"]
    said = run("launch", *longer, cwd=tmp_path)
    assert "on to step 12, after it was finished at step 8" in said
    assert [e["from_step"] for e in folder.read_events() if e["event"] == "started"] == [0, 8]
    assert differing(whole, read_weights(path, 12, tmp_path)) == []

    assert "finished already, and not submitted" in run("launch", *longer, cwd=tmp_path)
    assert "has made 12 steps" in run("launch", *words, "optim.max_steps=8", cwd=tmp_path, status=2)
    refused = run("launch", *words, "optim.max_steps=12", "resume_from=5", cwd=tmp_path, status=2)
    assert "4, 8, 12" in refused and "resume_from=4" in refused
    assert len(folder.attempts()) == 2, "nothing was started"

    before = read_records(folder.metrics(0))
    said = run("gpt.train", *words, "optim.max_steps=12", "resume_from=4", cwd=tmp_path)
    assert "back to the checkpoint of step 4; steps 5 to 12 are kept in aside/" in said
    assert differing(whole, read_weights(path, 12, tmp_path)) == []
    steps = [json.loads(line)["step"] for line in folder.metrics(0).read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 13)) and {r["attempt"] for r in read_records(folder.metrics(0))} == {
        1,
        3,
    }
    kept = read_records(folder.aside / "0001" / "metrics" / "rank_00000.jsonl")
    assert kept == before[4:]
    events = folder.read_events()
    assert [save["step"] for save in saves_that_count(events)] == [4, 8, 12]
    assert measure_goodput(folder, events).seconds["lost"] > 0, "time that was used stays used"
    assert folders.steps(folder.aside / "0001" / "checkpoints") == [8, 12] and folders.steps(folder.checkpoints) == [
        4, 8, 12
    ]  # fmt: skip
    assert read_document(folder).resume_from is None, "a start of the job in the queue must not go back again"


def test_a_decay_from_a_checkpoint_equals_one_run_with_this_schedule(tmp_path: Path) -> None:
    words = [*(word for word in WORDS_OF_EXTEND if "lr=" not in word), "optim.lr=0.01", "name=n"]
    decay = ["optim.schedule=wsd", "optim.decay_from=4", "optim.min_lr=0"]
    whole, trunk, branch = (RunFolder(tmp_path / name) for name in ("whole", "trunk", "branch"))
    run("gpt.train", *words, *decay, "optim.max_steps=8", f"run_dir={whole.path}", cwd=tmp_path)
    stable = [*words, "optim.schedule=constant", "optim.min_lr=0"]
    run("gpt.train", *stable, "optim.max_steps=6", f"run_dir={trunk.path}", cwd=tmp_path)
    for part in (".hydra", "checkpoints"):
        shutil.copytree(trunk.path / part, branch.path / part)
    words_of_branch = [*words, *decay, "optim.max_steps=8", f"run_dir={branch.path}", "resume_from=4"]
    run("gpt.train", *words_of_branch, cwd=tmp_path)

    whole_run, branched = (read_records(folder.metrics(0)) for folder in (whole, branch))
    assert [r["lr"] for r in whole_run] == pytest.approx([0.01] * 4 + [0.0075, 0.005, 0.0025, 0])
    assert [(r["step"], r["loss"]) for r in branched] == [(r["step"], r["loss"]) for r in whole_run[4:]]
    assert differing(*(read_weights(folder.path, 8, tmp_path) for folder in (whole, branch))) == []

    # In the place of the constant run the same steps are kept, and no other decay fits them.
    late = [*words, *decay[::2], "optim.max_steps=8", f"run_dir={trunk.path}", "dry_run=true"]
    assert "stable to step 7" in run("launch", *late, cwd=tmp_path)
    refused = run("launch", *late, "optim.decay_from=5", cwd=tmp_path, status=2)
    assert "learning rate 0.00667 at step 6" in refused and "resume_from=5" in refused


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none has no checkpoint"):
        plan_continuation(RunFolder(tmp_path / "none"), "last", 12, [])


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_that_is_worked_on_does_not_go_back(alive: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt = folder.create_attempt()
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    rank = {"rank": 0, "pid": os.getpid(), "machine": machine, "host": socket.gethostname()}
    write_json(folder.environment(attempt), {"time": time.time(), "ranks": [rank]})
    if not alive:
        folder.record_event("stopped", attempt=attempt)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}") if alive else nullcontext():
        refuse_alive(folder)


def test_a_job_that_comes_back_from_the_queue_does_not_go_back_again() -> None:
    typed = ["fresh=false", "resume_from=4", "optim.max_steps=8"]
    assert "resume_from=4" in job_overrides(typed, {"SLURM_JOB_NUM_NODES": "1"})
    assert "resume_from=4" not in job_overrides(typed, {"SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": "1"})


def test_the_schedule_of_an_extended_run_is_said_in_figures() -> None:
    config, before = optim(max_steps=20, lr=3e-4), optim(max_steps=10, lr=3e-4)
    # Half of a cosine of 20 steps is over at step 10; one more is cos(11/20 pi).
    assert describe_extended_schedule(config, before).startswith("learning rate 0 at step 10, 0.000127 at step 11")


# A run goes on with other numbers of ranks: the losses of one process, and every sample once.


SIZES = (4, 2, 3, 1)
STEPS = 2
"""Steps with each number of ranks."""
ALL_STEPS = STEPS * len(SIZES)
BATCH = 12
WORDS_OF_ELASTIC = (
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
            made.append((record.loss, record.grad_norm, *record.samples))
        save(run)
        run.batches.close()
        found[strategy] = made
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """All steps by one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    (found,) = run_distributed(go_on, 1, folder, {"ddp": compose("parallel=ddp", *WORDS_OF_ELASTIC)}, ALL_STEPS)
    return found["ddp"]  # type: ignore[no-any-return]


def assert_same_curve(curve: list[tuple[float, float]], alone: Steps) -> None:
    """Losses and gradient norms are those of one process."""
    for (loss, norm), (loss_alone, norm_alone, *_) in zip(curve, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-5, abs=0)
        assert norm == pytest.approx(norm_alone, rel=1e-4)


def assert_each_once(seen: Iterable[Sequence[int]], count: int = BATCH * ALL_STEPS) -> None:
    """First and last samples of ranks and steps hold every sample of the run once."""
    samples = [sample for first, last in seen for sample in range(first, last + 1)]
    assert sorted(samples) == list(range(count))


def test_four_two_three_and_one_rank_learn_through_checkpoints_what_one_process_learns(
    alone: Steps, tmp_path: Path
) -> None:
    configs = {strategy: compose(f"parallel={strategy}", *WORDS_OF_ELASTIC) for strategy in STRATEGIES}
    parts = [run_distributed(go_on, size, tmp_path / "elastic", configs, STEPS) for size in SIZES]
    for strategy in STRATEGIES:
        assert_same_curve([step[:2] for ranks in parts for step in ranks[0][strategy]], alone)
        assert_each_once([step[2:] for ranks in parts for of in ranks for step in of[strategy]])


def test_a_job_that_loses_nodes_twice_learns_what_one_process_learns(alone: Steps, tmp_path: Path) -> None:
    sizes = (4, 2, 1)
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "held.py").write_text(HELD)
    for step in (4, 6):  # each is in the middle between two checkpoints
        (tmp_path / f"hold_{step}").touch()
    words = ["cluster=local", "nodes=4", "ranks_per_node=1", "parallel=fsdp", *LEARNING, *WORDS_OF_ELASTIC]
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
    assert_each_once([r["samples"] for of_rank in records for r in of_rank.values()])
