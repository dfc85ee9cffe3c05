"""Work of the first rank for all, the timeline of a step, and shards of sequences."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import PipelineStage

from gpt.config import Device, Schedule
from gpt.parallel import distributed
from gpt.parallel.context import SequenceShard
from gpt.parallel.distributed import BUBBLE, Span, Timeline, recorded, schedule_waits, total, waiting, working
from gpt.parallel.nd import COLLECTIVE
from gpt.training.step import fill_in_phases
from launch.errors import ConfigError
from launch.runs.events import first_failure, record_failure
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord
from tests.parallel.test_nd import orders, play
from tests.support.distributed import run_distributed
from tests.support.learning import world_of


def test_gpus_that_torch_cannot_use_are_refused_with_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "driver_version", lambda: "535.183.01")
    found = "8 GPUs, and driver 535.183.01, and a torch for CUDA 13.0, which needs driver 580 or newer"
    with pytest.raises(ConfigError, match=found):
        distributed.choose_device(Device.auto, 0, 8)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(ConfigError, match="cannot use them"):
        distributed.choose_device(Device.auto, 0, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.choose_device(Device.auto, 3, 8) == torch.device("cuda", 3)


class StubEvent:
    """A CUDA event: its place in a queue, a millisecond after the one before."""

    made = recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        StubEvent.made += 1

    def record(self) -> None:
        StubEvent.recorded += 1
        self.place = StubEvent.recorded

    def elapsed_time(self, later: StubEvent) -> float:
        return float(later.place - self.place)


def test_a_step_takes_the_events_of_a_step_that_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", StubEvent)
    unread: list[Timeline] = []
    for _ in range(5):  # as in training, a step is queued before the one before is read
        timeline = Timeline(torch.device("cuda"))
        with recorded(timeline):
            for _ in range(1000):
                with waiting("fsdp"):
                    pass
        timeline.mark()
        timeline.mark()
        unread.append(timeline)
        if len(unread) == 2:
            read = unread.pop(0)
            record = StepRecord(1, 1, 0.0, 0.0, 0.0, 1, (0, 0), 0.0)
            fill_in_phases(record, read, ("fsdp",))
            assert record.comm_fsdp_s == pytest.approx(1000 * 0.001)
    assert StubEvent.made == 2 * 2003


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
    world = world_of(rank, world_size)
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


# Spans of a step: which belong to whom, and the bubble of pipelines against closed forms and a count by hand.


@pytest.mark.parametrize("schedule", [Schedule.gpipe, Schedule["1f1b"]])
@pytest.mark.parametrize(("stages", "count"), [(2, 2), (4, 8), (3, 7)])
def test_even_stages_idle_as_the_schedules_arithmetic_says(schedule: Schedule, stages: int, count: int) -> None:
    """GPipe and 1F1B: (p - 1) / (m + p - 1) of the step, arXiv 1811.06965 section 2.3 and 2104.04473 section 2.2."""
    times = play(orders(schedule, stages, count, 1), stages, 1)  # a transfer takes no time
    makespan = max(end for _, end in times.values())
    for stage in range(stages):
        waits_for = {"F": stage > 0, "B": stage < stages - 1}
        own = sorted((*times[action], waits_for[action[0]]) for action in times if action[1] == stage)
        works = [Span(BUBBLE if is_fed else "pp", begin, end) for begin, end, is_fed in own]
        found = schedule_waits(0.0, [*works, Span("pp", works[-1].end, works[-1].end)], [])
        found.append(Span(BUBBLE, works[-1].end, makespan))  # the wait for the other stages, in the first collective
        assert total(found, 0, makespan + 1, "pp") == 0
        share = total(found, 0, makespan + 1, BUBBLE) / makespan
        assert share == pytest.approx((stages - 1) / (count + stages - 1), abs=1e-12)


def test_waits_of_other_groups_are_left_out_of_the_bubble() -> None:
    """Against a count of every hundredth of a second of random schedules."""
    for seed in range(50):
        chance = random.Random(seed)
        ticks = sorted(chance.sample(range(1, 1000), 12))
        works = [Span(chance.choice((BUBBLE, "pp")), ticks[i] / 100, ticks[i + 1] / 100) for i in range(0, 12, 4)]
        waits = [Span("fsdp", ticks[i + 2] / 100, ticks[i + 3] / 100) for i in range(0, 12, 4)]
        works.append(Span(chance.choice((BUBBLE, "pp")), 10.0, 10.0))
        expected = {BUBBLE: 0, "pp": 0}
        for tick in range(1000):
            now = (tick + 0.5) / 100
            if any(span.begin < now < span.end for span in (*works, *waits)):
                continue
            following = next(work for work in works if work.begin > now)
            expected[following.name] += 1
        found = schedule_waits(0.0, works, waits)
        for name, count in expected.items():
            assert total(found, 0, 11, name) == pytest.approx(count / 100, abs=1e-9)


def test_a_wait_inside_of_another_belongs_to_the_outer_one() -> None:
    timeline = Timeline(torch.device("cpu"))
    with recorded(timeline):
        with waiting("dp"), waiting("world"):
            pass
        with working(), waiting("tp"):
            pass
    with waiting("cp"):
        pass  # outside of a step
    assert [span.name for span in timeline.spans()] == ["dp", "tp"]


def test_torch_has_the_methods_that_are_watched() -> None:
    """Private parts of torch: without them communication would be missed in silence."""
    assert all(callable(getattr(FSDPParamGroup, name, None)) for name in COLLECTIVE)
    ways = ("get_fwd_recv_ops", "get_bwd_recv_ops", "forward_one_chunk", "backward_one_chunk")
    assert all(callable(getattr(PipelineStage, name, None)) for name in (*ways, "backward_weight_one_chunk"))


# The shards of a sequence that context-parallel ranks have.


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_is_taken_once_and_every_rank_has_the_same_work(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, work = [], []
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        positions_T = SequenceShard(None).part(torch.arange(48))
        tokens += positions_T.tolist()
        work.append(int((positions_T + 1).sum()))  # a token looks at those before it and at itself
    assert sorted(tokens) == list(range(48))
    assert len(set(work)) == 1
