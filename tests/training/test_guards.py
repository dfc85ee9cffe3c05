"""Health of a run: early stop, slow ranks, and replicas that have drifted apart."""

from __future__ import annotations

import json
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt.parallel.modules import ReplicaCheck, find_odd, local_tensor
from gpt.train import train
from gpt.training import guards
from gpt.training.guards import EarlyStop, StragglerJudge
from gpt.training.run import Run
from gpt.training.step import queue_step
from launch.runs.events import straggling_ranks
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.runs.records import read_records
from launch.slurm.status import find_run_status
from launch.status import as_dict, status_notes
from launch.worker import Run as Rank
from tests.support.commands import TINY, run
from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, start
from tests.support.learning import TINY as LEARNING
from tests.support.small_models import optim


def judge(**changes: float) -> EarlyStop:
    return EarlyStop(optim(max_steps=9, **changes))


def over_at(losses: list[float], **changes: float) -> int | None:
    """Return the step that ends a run, which is resumed after each evaluation; the same step without a restart."""
    ends: list[int | None] = []
    for resumes in (False, True):
        stop, end = judge(**changes), None
        for step, loss in enumerate(losses, 1):
            stop.add(10 * step, loss)
            if stop.reason() is not None:
                end = 10 * step
                break
            if resumes:
                state, stop = json.loads(json.dumps(stop.state())), judge(**changes)
                stop.load(state)
        ends.append(end)
    assert ends[0] == ends[1]
    return ends[0]


def test_the_losses_that_end_a_run_whether_or_not_it_is_resumed() -> None:
    falling = [3.0, 2.0, 1.6, 1.55, 1.5]
    assert over_at(falling) is None
    assert over_at(falling, target_val_loss=1.55) == 40, "at most, not below"
    assert over_at(falling, patience=1) is None
    waiting = [3.0, 3.1, 2.9, 2.9, 3.0, 2.95, 2.8]
    assert over_at(waiting, patience=3) == 60, "an equal loss is none that is lower"
    assert over_at(waiting, patience=4) is None


def test_the_reason_names_the_loss_per_byte_of_text() -> None:
    stop = judge(target_val_loss=2.5)
    stop.add(10, 3.0, 1.0)
    assert stop.reason() is None
    stop.add(20, 2.0, 0.72)  # a bit is 0.69 nats
    reason = stop.reason()
    assert reason == "val_loss 2.0000 at step 20 (0.4991 nats per byte) reached optim.target_val_loss=2.5"
    resumed = judge(target_val_loss=2.5)
    resumed.load(json.loads(json.dumps(stop.state())))
    assert resumed.reason() == reason


def test_a_run_ends_at_its_target_stays_ended_and_goes_on_for_a_lower_one(tmp_path: Path) -> None:
    words = [*TINY, "device=cpu", "optim.max_steps=6", "eval.interval=2", "checkpoint.interval=0", "run_dir=run"]
    words += ["logging.tensorboard=false"]
    text = run("gpt.train", *words, "optim.target_val_loss=100", cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert "finished early: val_loss" in text and "reached optim.target_val_loss=100" in text
    (end,) = (event for event in folder.read_events() if event["event"] == "finished")
    assert end["step"] == 2 and "at step 2 (" in end["early"] and " nats per byte) reached" in end["early"]
    assert [path.name for path in folder.checkpoints.glob("step_*")] == ["step_00000002"], "saved as a last step is"
    assert "finished early: val_loss" in run("launch.status", "run", cwd=tmp_path)
    assert "is over at step 2" in run("gpt.train", *words, "optim.target_val_loss=100", cwd=tmp_path)
    text = run("gpt.train", *words, "optim.target_val_loss=0.1", cwd=tmp_path)
    assert "from step 2 of 6" in text and (folder.checkpoints / "step_00000006").is_dir()


# Slow ranks that are named while a run goes on: the judgement, and a real run whose last rank sleeps.


LATE_S = 0.4
"""Far above what a step of this model takes on a busy machine."""
WINDOW = 3


def test_a_rank_is_slow_against_the_median_of_the_others_over_the_window() -> None:
    """Of random times, against the definition; a rank that is slow is told once, and once when it is no more."""
    chance = np.random.default_rng(7)
    times = chance.uniform(0.8, 1.2, (300, 5))
    times[60:160, 3] *= 1.5
    times[200:, 0] *= 1.7
    judge, slow, told = StragglerJudge(1.3, 10), set(), []
    for step, of_step in enumerate(times):
        found = judge.add(of_step.tolist())
        told += [(one.rank, one.is_slow) for one in found]
        slow = slow | {one.rank for one in found if one.is_slow} - {one.rank for one in found if not one.is_slow}
        slow -= {one.rank for one in found if not one.is_slow}
        if step < 9:
            assert not found
            continue
        means = times[step - 9 : step + 1].mean(0).tolist()
        for rank, mean in enumerate(means):
            ratio = mean / statistics.median(means[:rank] + means[rank + 1 :])
            assert rank in slow if ratio > 1.3 else True
            assert rank not in slow if ratio < 1.15 else True
    assert told == [(3, True), (3, False), (0, True)]


@pytest.mark.parametrize("ranks", [2, 3, 1024])
def test_one_slow_rank_of_any_number_is_found(ranks: int) -> None:
    judge = StragglerJudge(1.2, 3)
    times = [1.0] * ranks
    times[ranks // 2] = 1.21
    found = [judge.add(times) for _ in range(5)]
    assert [[one.rank for one in of_step] for of_step in found] == [[], [], [ranks // 2], [], []]
    assert found[2][0].own_s == pytest.approx(1.21) and found[2][0].median_s == 1.0


def run_with_a_slow_rank(rank: int, size: int, folder: Path) -> None:
    guards.STRAGGLER_WINDOW = WINDOW
    words = [*LEARNING, "parallel=ddp", "optim.max_micro_batch=8", "optim.max_steps=14", "checkpoint.interval=0"]
    run = start(rank, size, folder, *words, "logging.tensorboard=true")
    run.worker = Rank(rank, rank, size)
    run.worker.open_folder(run.folder.path, run.attempt)
    run.hosts = ("first-host", socket.gethostname())
    if rank == size - 1:
        run.engine.module.register_forward_pre_hook(lambda *_: time.sleep(LATE_S))
    train(run)
    run.world.gather(None)


def test_a_rank_that_sleeps_is_named_while_the_run_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # the ranks need none

    run_distributed(run_with_a_slow_rank, 2, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    events = folder.read_events()
    event = next(e for e in events if e["event"] == "straggler" and e["rank"] == 1)
    assert (event["rank"], event["host"], event["steps"]) == (1, socket.gethostname(), WINDOW)
    assert event["own_s"] >= LATE_S and event["own_s"] > 1.2 * event["median_s"]
    assert events.index(event) < [e["event"] for e in events].index("finished")
    records = read_records(folder.metrics(0))
    assert any(r["slowest_rank"] == 1 for r in records if "slowest_rank" in r)
    assert all(r["own_max_s"] >= LATE_S and r["own_min_s"] <= r["own_max_s"] for r in records if "own_max_s" in r)
    assert "own_max_s" in records[-1] and not any("own_max_s" in r for r in read_records(folder.metrics(1)))
    board = EventAccumulator(str(folder.tensorboard), size_guidance={"tensors": 0}).Reload()
    told = {text.step: str(text.tensor_proto.string_val[0]) for text in board.Tensors("stragglers")}
    assert f"rank 1 on {socket.gethostname()} is slow" in told[event["step"]]


def test_status_names_the_slow_ranks_of_the_attempt_that_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "sweep" / "nodes=2")
    folder.create_attempt()
    told: dict[str, Any] = {"attempt": 1, "step": 40, "own_s": 0.13, "median_s": 0.1, "steps": 20}
    folder.record_event("started", attempt=1)
    folder.record_event("straggler", rank=17, host="node-3", **told)
    folder.record_event("straggler", rank=2, host="node-1", **told)
    folder.record_event("straggler_ended", rank=2, host="node-1", **told)
    lines = status_notes(as_dict(find_run_status(folder)))
    expected = "rank 17 on node-3 is slow: 130.0 ms of its own a step, and the median 100.0 ms (over 20 steps up to 40)"
    assert any(line.endswith(expected) for line in lines) and not any("rank 2" in line for line in lines)
    folder.record_event("started", attempt=2)
    assert straggling_ranks(folder.read_events()) == []


# Replicas of parameters that differ: found whatever the parallelism, with the odd one named where a majority tells.


ONE_LAYER = "model.n_layer=1"
"""Of engines that have no pipeline, whose stages want a layer each."""


def test_the_majority_tells_which_replica_is_odd() -> None:
    groups = [(0, 2, 4), (1, 3, 5)]
    same = [[7, 0], [0, 9], [7, 0], [0, 9], [7, 0], [0, 9]]
    assert find_odd(groups, same) is None
    odd = [[7, 0], [0, 9], [8, 0], [0, 9], [7, 0], [0, 9]]
    found = [find_odd(groups, odd), find_odd([(0, 1)], [[1], [2]])]
    assert [(drift.ranks, drift.is_certain) for drift in found] == [((2,), True), ((0, 1), False)]


def flip(run: Run, name: str) -> None:
    """Flip the lowest bit of one element of a parameter that this rank holds."""
    parameter = next(p for n, p in run.engine.module.named_parameters() if n.endswith(name))
    bits = local_tensor(parameter.detach()).view(torch.int32)
    bits.view(-1)[3:4] ^= 1


def compare_replicas(rank: int, size: int, folder: Path) -> dict[str, list[Any]]:
    found = {}
    for number, (words, (odd, _)) in enumerate(REPLICAS.items()):
        layers = [] if "pp" in words else [ONE_LAYER]
        run = start(rank, size, folder / str(number), *f"parallel={words}".split(), "optim.max_micro_batch=4", *layers)
        queue_step(run, None, Phase.training)
        check = ReplicaCheck(run.engine.module, run.world)
        quiet = check.find_drift()
        if rank == odd:
            flip(run, "norm.weight")
        drift = check.find_drift()
        found[words] = [quiet, None if drift is None else (drift.ranks, drift.is_certain)]
    return found


REPLICAS = {
    "ddp": (2, ((2,), True)),
    "hsdp parallel.dp_shard=2": (3, ((1, 3), False)),
    "tp parallel.tp=2": (1, ((1,), True)),
    "pp parallel.pp=2": (1, ((0, 1), False)),
    "zero2": (2, ((2,), True)),
}
"""By engine: the rank with a flipped bit; the ranks that are named for it, and whether that is certain."""


def test_a_flipped_bit_in_one_replica_is_found_whatever_the_parallelism(tmp_path: Path) -> None:
    expected = {words: [None, drift] for words, (_, drift) in REPLICAS.items()}
    found = run_distributed(compare_replicas, 4, tmp_path / "runs", timeout_s=300, imports=DEEPSPEED)
    assert found == [expected] * 4


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
    return str(caught.value), run.folder.read_events(), run.checkpoints.steps()


def test_replicas_that_drift_apart_end_the_attempt_with_rank_and_host_named(tmp_path: Path) -> None:
    for text, events, saved in run_distributed(drift_apart, 3, tmp_path / "run"):
        (event,) = [e for e in events if e["event"] == "replicas_differ"]
        assert (event["ranks"], event["certain"], event["step"]) == ([1], True, 5)
        assert f"after step 5 the parameters of rank 1 on {event['hosts'][0]} differ" in text
        assert saved == [2, 4], "the last good checkpoint"
