"""Saves: their outcomes, in the background, on other numbers of ranks, and when the next one is due."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gpt import checkpoint as folders
from gpt.checkpoint import VALIDATION_LOSS, FailedSave, Retention, Saved, part
from gpt.checkpoint.manager import OutdatedAttemptError, room_error
from gpt.checkpoint.messages import CheckpointError
from gpt.checkpoint.part import SharedMemory
from gpt.checkpoint.writer import ProcessWriter
from gpt.config.optim import CheckpointConfig, Interval
from gpt.planning.memory import staging_bytes
from gpt.train import build, train
from gpt.training.checkpoints import FIRST_S, LEAST_S, PRIOR_S, auto_interval_s, between_failures_s
from gpt.workload.plan import checkpoint_text
from launch.errors import ConfigError
from launch.runs.events import best_interval_s, skipped_text, unsaved_text
from launch.runs.folder import RunFolder
from launch.status import status_notes
from launch.worker import Run as Rank
from tests.support.checkpoints import Checkpoints, Trained, state
from tests.support.commands import TINY
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import compose, world_of
from tests.support.planning import refused


def refuse_writes(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def fail_in_many_ways(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    run = Trained("fsdp", seed=1)
    store = Checkpoints(folder, Retention(2, 0))
    store.save(1, run.state(), {}, {})
    found: dict[str, Any] = {}

    def attempt(name: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"step": 2, "state": run.state(), "rank_state": {}, "meta": {}} | changes
        with pytest.raises((CheckpointError, ConfigError)) as failure:
            store.save(**arguments)
        found[name] = (type(failure.value), str(failure.value).splitlines()[0])

    with mock.patch.object(FileSystem, "create_stream", refuse_writes if rank == 1 else FileSystem.create_stream):
        attempt("full disk on one rank")
    attempt("state that could not be read back", rank_state={"f": Path()} if rank == 1 else {})
    attempt("meta that is no JSON", meta={"f": {1}})
    attempt("outdated", may_commit=lambda: False)
    attempt("fence that fails", may_commit=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    dist.barrier()  # rank 0 has cleaned up before it gets here
    found["left"] = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    if rank == 0:
        (folder / "step_00000002").mkdir()  # without its manifest it is no checkpoint, and makes room for one

    asked: list[tuple[int, list[str]]] = []

    def may_commit() -> bool:
        written = next(path for path in folder.iterdir() if path.name.startswith(".saving"))
        asked.append((rank, sorted(path.name for path in written.iterdir())))
        return True

    assert store.save(2, run.state(), {}, {}, may_commit) == folder / "step_00000002"
    found["asked"] = asked
    return found


def test_a_failure_on_one_rank_is_raised_on_all_and_commits_nothing(tmp_path: Path) -> None:
    by_rank = run_distributed(fail_in_many_ways, 2, tmp_path)
    for found in by_rank:
        assert found["full disk on one rank"][0] is ConfigError
        assert found["full disk on one rank"][1].endswith("No space left on device")
        assert found["state that could not be read back"][1].startswith("rank 1: ")
        assert "not JSON serializable" in found["meta that is no JSON"][1]
        assert found["outdated"][0] is OutdatedAttemptError
        assert "ZeroDivisionError" in found["fence that fails"][1]
        assert found["left"] == ["step_00000001"]
    ((rank, names),) = by_rank[0]["asked"] + by_rank[1]["asked"]
    assert rank == 0 and "manifest.json" in names, "asked once, when nothing but the rename is left to do"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001",
        "step_00000002",
        "step_00000002.corrupt",
    ]


LOSSES = [3.0, 1.5, None, 2.5, 2.0, float("nan"), 2.0, None]
KEPT = {
    Retention(1): [8],
    Retention(3): [6, 7, 8],
    Retention(None): [1, 2, 3, 4, 5, 6, 7, 8],
    Retention(1, best=2): [2, 7, 8],  # of equal losses the newer
}


def save_many(rank: int, world_size: int, root: Path) -> list[list[int]]:
    found = []
    for number, keeps in enumerate(KEPT):
        folder = root / str(number)
        store = Checkpoints(folder, keeps, dist.new_group(backend="gloo"))
        assert store.is_new()
        for step, loss in enumerate(LOSSES, start=1):
            store.save(step, {"model": {"w": torch.ones(3)}}, {}, {} if loss is None else {VALIDATION_LOSS: loss})
        assert not store.is_new()
        assert {path.name for path in folder.iterdir()} == {f"step_{step:08d}" for step in store.steps()}
        found.append(store.steps())
    return found


def test_retention(tmp_path: Path) -> None:
    (found,) = run_distributed(save_many, 1, tmp_path)
    assert found == [*KEPT.values()]


# Who writes what into a checkpoint is planned once, and again when it has to be.


SHAPES: dict[str, tuple[int, ...]] = {"a": (5, 3), "b": (4,), "c": (2, 2)}
PLAN = default_planner.create_default_global_save_plan


def sharded(step: int, *names: str) -> dict[str, Any]:
    """A state sharded over the ranks, with a number beside it, that tells the step it was made for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {n: distribute_tensor(torch.full(SHAPES[n], step + 0.5), mesh, [Shard(0)]) for n in names}
    return {"model": model, "optimizer": {"lr": float(step)}}


def save_again_and_again(rank: int, size: int, root: Path) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """For each save the global plans made for it and the items that this rank sent; and what was loaded after it."""
    planned, sent, found, loaded = [], [], [], []
    gather = dist.gather_object

    def count(plans: Any, *args: Any) -> Any:
        planned.append(len(plans))
        return PLAN(plans, *args)

    def watch(obj: Any, **kwargs: Any) -> Any:
        if isinstance(obj, SavePlan):  # a load has plans as well
            sent.append(len(obj.items))
        return gather(obj, **kwargs)

    first, second = (Checkpoints(root / name, Retention(9, 0)) for name in "xy")

    def save(store: Checkpoints, step: int, *names: str) -> None:
        planned.clear()
        sent.clear()
        state = sharded(step, *names)
        store.save(step, state, {}, {})
        blank = sharded(0, *names)
        store.load(blank)
        assert all(torch.equal(t.full_tensor(), state["model"][n].full_tensor()) for n, t in blank["model"].items())
        found.append((len(planned), sum(sent)))
        loaded.append({**{n: t.full_tensor()[0] for n, t in blank["model"].items()}, "lr": blank["optimizer"]["lr"]})

    with (
        mock.patch.object(default_planner, "create_default_global_save_plan", count),
        mock.patch.object(dist, "gather_object", watch),
    ):
        save(first, 1, "a", "b")
        save(first, 2, "a", "b")
        save(second, 3, "c")
        save(first, 4, "a", "b")
        save(first, 5, "a", "b", "c")
        full = mock.patch.object(FileSystem, "create_stream", refuse_writes if rank else FileSystem.create_stream)
        with full, pytest.raises(ConfigError):
            save(first, 6, "a", "b", "c")
        save(first, 7, "a", "b", "c")
        save(first, 8, "a", "b", "c")
    return found, loaded


def test_unchanged_states_are_planned_once_and_every_save_holds_its_own_values(tmp_path: Path) -> None:
    (first, loaded), (other, also) = run_distributed(save_again_and_again, 2, tmp_path)
    # The tensors, and the number beside them; nothing where the plan stands. It does after a write that failed.
    assert first == [(1, 3), (0, 0), (1, 2), (0, 0), (1, 4), (0, 0), (0, 0)]
    assert other == [(0, items) for _, items in first], "rank 0 plans for all"
    for of_rank in (loaded, also):
        for step, values in zip((1, 2, 3, 4, 5, 7, 8), of_rank, strict=True):
            assert values.pop("lr") == step
            assert all(tensor.unique().tolist() == [step + 0.5] for tensor in values.values())


# A checkpoint comes back bit for bit on its own topology, and on every other one and number of ranks.


STRATEGIES = ("ddp", "fsdp")
WORLD_SIZES = (1, 2, 3)


def train_and_save(rank: int, world_size: int, root: Path) -> dict[str, dict[str, str]]:
    digests = {}
    for strategy in STRATEGIES:
        run = Trained(strategy, seed=1, lr=0.02)
        for number in range(3):
            run.step(number)
        own = {"rng": torch.get_rng_state(), "python": (3, (1, 2), None), "rank": rank}
        store = Checkpoints(root / f"{strategy}{world_size}", Retention(1, 0))
        store.save(3, run.state(), own, {"step": 3, "position": 12, "saved_by": strategy})
        digests[f"{strategy}{world_size}"] = run.digests()
    return digests


def load_everything(rank: int, world_size: int, root: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for saved, strategy in itertools.product(sorted(path.name for path in root.iterdir()), STRATEGIES):
        run = Trained(strategy, seed=2)
        before = run.digests()
        state = run.state()
        loaded = Checkpoints(root / saved, Retention(1, 0)).load(state)
        run.take(state)
        found[saved, strategy] = (before, run.digests(), loaded)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    root = tmp_path_factory.mktemp("saved")
    digests: dict[str, dict[str, str]] = {}
    for world_size in WORLD_SIZES:
        digests |= run_distributed(train_and_save, world_size, root)[0]
    return root, digests


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_checkpoint_loads_bit_equal_on_any_topology(
    saved: tuple[Path, dict[str, dict[str, str]]], world_size: int
) -> None:
    root, digests = saved
    results = run_distributed(load_everything, world_size, root)
    for rank, result in enumerate(results):
        assert len(result) == len(STRATEGIES) * len(WORLD_SIZES) * len(STRATEGIES)
        for (name, strategy), (before, after, loaded) in result.items():
            assert after == digests[name], f"{name} on {world_size} x {strategy}"
            changed = {key for key in after if before.get(key) != after[key]}
            assert {"/model/0.weight", "/optim/param_groups/0/lr", "/optim/state/0.weight/exp_avg_sq"} <= changed
            assert (loaded.step, loaded.set_aside) == (3, ())
            assert loaded.meta == {"step": 3, "position": 12, "saved_by": name[:-1]}
            assert loaded.world_size == int(name[-1])
            if loaded.world_size == world_size:
                assert loaded.rank_state["rank"] == rank
                assert loaded.rank_state["python"] == (3, (1, 2), None)
            else:
                assert loaded.rank_state is None


# Saves in the background: of the state as it was, one at a time, tried again where they fail, and kept as asked.


NEVER = 10**9
STEPS, INTERVAL = 6, 2
WORDS = [
    *(f"optim.max_steps={STEPS}", "eval.interval=2", f"checkpoint.interval={INTERVAL}", "checkpoint.keep_last=9"),
    *("model.n_layer=1", "logging.tensorboard=false"),
]


class Held:
    """Writers that wait inside their first write until they are let go, in whatever process they are."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def write_part(self, content: Any, folder: Path) -> None:
        os.read(self._read, 1)
        part.write_part(content, folder)

    def let_go(self, writes: int) -> None:
        os.write(self._write, bytes(writes))


class Letting(Rank):
    """A rank that lets the writer go a step after its first save began, and notes what was saved by then."""

    held: Held | None = None
    calls = 0
    saved_when_let_go: list[int] | None = None

    def save_requested(self) -> bool:
        self.calls += 1
        if self.held is not None and self.calls == INTERVAL + 2:
            self.saved_when_let_go = folders.steps(self.checkpoint_dir)
            self.held.let_go(STEPS)
        return False


def train_held(rank: int, size: int, root: Path) -> dict[str, Any]:
    """Train with saves in the background whose first is held, and with saves that are waited for."""
    found, files = dict[str, Any](), dict[int, list[dict[str, bytes]]]()
    for name in ("asynchronous", "synchronous"):
        beside = str(name == "asynchronous").lower()
        config = compose(*WORDS, f"checkpoint.asynchronous={beside}", f"checkpoint.scrub={beside}")
        config.data.cache_dir = str(root / "cache")
        held = Held()
        writer = None
        if name == "asynchronous":
            with mock.patch("gpt.checkpoint.writer.write_part", held.write_part):
                writer = ProcessWriter()
        worker = Letting(rank, rank, size)
        torch.manual_seed(0)
        run = build(config, RunFolder(root / name), world_of(rank, size), 1, worker, writer)
        worker.open_folder(run.folder.path, 1)
        assert (run.checkpoints.upkeep is not None) is config.checkpoint.scrub
        worker.held = held if writer else None
        assert train(run) == "finished"
        if writer is not None:
            writer.close()
        saved = [event for event in run.folder.read_events() if event["event"] == "saved"]
        found[name] = {
            "early": worker.saved_when_let_go,
            "steps": folders.steps(run.folder.checkpoints),
            "events": [event["step"] for event in saved if "write_s" in event],
        }
    if rank == 0:
        for step in range(INTERVAL, STEPS + 1, INTERVAL):
            both = (folders.final_for(root / name / "checkpoints", step) for name in found)
            paths = [[p for p in sorted(folder.iterdir()) if p.name.startswith(("__", "rank"))] for folder in both]
            files[step] = [{path.name: path.read_bytes() for path in of} for of in paths]
    return found | {"files": files}


def test_steps_go_on_beside_a_save_and_change_nothing_in_it(tmp_path: Path) -> None:
    first, second = run_distributed(train_held, 2, tmp_path)
    saved = [*range(INTERVAL, STEPS + 1, INTERVAL)]
    assert first["asynchronous"]["early"] == [], "a step was done while the writers were held in their first write"
    for name in ("asynchronous", "synchronous"):
        assert first[name]["events"] == first[name]["steps"] == second[name]["steps"] == saved
    for step, (beside, waited_for) in first["files"].items():
        assert len(beside) == 4, "tensors and own state of both ranks"
        assert beside == waited_for, f"step {step} holds the state of another step"


def fail_on_one(rank: int, size: int, root: Path, number: int) -> tuple[list[Any], list[int], list[int], str]:
    """A disk that fails on one rank, is found good again, and then fails for good."""
    broken = root / "broken"

    def write_part(content: Any, folder: Path) -> None:
        if rank == 1 and broken.exists():
            raise OSError(number, os.strerror(number))
        part.write_part(content, folder)

    with mock.patch("gpt.checkpoint.writer.write_part", write_part), mock.patch("gpt.checkpoint.manager.RETRY_S", 0.0):
        writer = ProcessWriter()
        store = Checkpoints(root / "run", Retention(2, 0), writer=writer, give_up_after_s=NEVER)
        for step in (1, 2):
            store.save(step, state(step), {}, {})
        broken.touch()
        store.start(3, state(3), {}, {}, os.getpid)
        found: list[Any] = [store.finish(hurries=False), store.finish(hurries=False)]
        during = store.steps()
        torch.distributed.barrier()
        if rank == 0:
            broken.unlink()
        torch.distributed.barrier()
        while not isinstance(found[-1], Saved):
            found.append(store.finish(hurries=False))
        after = store.steps()
        torch.distributed.barrier()
        broken.touch()
        store.give_up_after_s = 0.0
        store.start(4, state(4), {}, {}, os.getpid)
        told = str(refused(store.finish))
        assert not store.is_pending and store.steps() == after
        writer.close()
        return found, during, after, told


def test_a_disk_that_fails_is_told_counted_and_tried_again(tmp_path: Path) -> None:
    number = errno.ENOSPC
    for other in (errno.EDQUOT, errno.EIO):
        assert room_error(f"rank 0: OSError: [Errno {other}] x\n\n[Errno 1]") == os.strerror(other)
    assert room_error("rank 0: OSError: [Errno 13] x") is None
    for found, during, after, refusal in run_distributed(fail_on_one, 2, tmp_path, number):
        failed, saved = found[:-1], found[-1]
        assert isinstance(saved, Saved) and saved.step == 3 and len(failed) >= 2
        assert all(isinstance(entry, FailedSave) for entry in failed)
        assert [entry.failures for entry in failed] == [*range(1, len(failed) + 1)]
        assert failed[0].cause.startswith(f"rank 1: OSError: [Errno {number}]")
        assert during == [2], "what the third would have replaced made room for it"
        assert after == [2, 3]
        assert f"step 4 cannot be written into {tmp_path / 'run'}: {os.strerror(number)}" in refusal
        assert "continues from step 3" in refusal


@pytest.mark.parametrize("failing", ["cudaHostRegister", "cudaHostUnregister"])
def test_memory_that_cannot_be_pinned_leaves_no_error_to_the_next_kernel(failing: str, monkeypatch: Any) -> None:
    """CUDA keeps the error of a failed call until the next kernel is launched, which raises it."""
    kept: list[str] = []

    def call(name: str, *_: object) -> int:
        kept.extend([name] * (name == failing))
        return len(kept)

    def launch(*_: object, **__: object) -> None:
        if kept:
            raise RuntimeError(f"CUDA error of {kept.pop()}")

    calls = {name: partial(call, name) for name in ("cudaHostRegister", "cudaHostUnregister")}
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(**calls))
    monkeypatch.setattr("torch.empty", lambda *_, device: SimpleNamespace(fill_=launch))
    memory = SharedMemory(64, pin=True)
    assert memory.is_pinned is (failing != "cudaHostRegister")
    launch()
    memory.close()
    launch()


# When a checkpoint is due: the interval as it is typed, and the one that follows from failures and saves.


@pytest.mark.parametrize(
    ("typed", "interval", "text"),
    [
        (20, Interval(steps=20), "every 20 steps"),
        ("20", Interval(steps=20), "every 20 steps"),
        (0, Interval(steps=0), "at the end"),
        ("30min", Interval(minutes=30), "every 30 minutes"),
        ("0.5 min", Interval(minutes=0.5), "every 0.5 minutes"),
        ("auto", Interval(), "as often as failures ask for"),
        *((typed, None, typed) for typed in ("often", "-1", "0min", "10s", "1.5")),
    ],
)
def test_an_interval_is_steps_minutes_or_auto(typed: Any, interval: Interval | None, text: str) -> None:
    config = CheckpointConfig(interval=typed, keep_last=1)
    if interval is None:
        assert text in refused(config.validate, found="checkpoint.interval").found
    else:
        config.validate()
        assert config.every() == interval and str(interval) == text


def test_the_keys_are_composed() -> None:
    config = config_from([*TINY, "checkpoint.interval=30min", "checkpoint.keep_best=2"])
    assert config.checkpoint.every() == Interval(minutes=30)
    assert config.checkpoint.asynchronous and config.checkpoint.give_up_after_min == 60


def lost_share(interval_s: float, save_s: float, mtbf_s: float, generator: random.Random) -> float:
    """Share of the time of a simulated run that saves and failures cost."""
    useful = spent = 0.0
    while spent < 3e4 * mtbf_s:
        left = generator.expovariate(1 / mtbf_s)
        segments = int(left // (interval_s + save_s))
        useful += segments * interval_s
        spent += left
    return 1 - useful / spent


def test_youngs_interval_loses_least() -> None:
    save_s, mtbf_s = 20.0, 10_000.0
    best = best_interval_s(save_s, mtbf_s)
    assert math.isclose(best, 632.5, rel_tol=1e-3)
    lost = {f: lost_share(f * best, save_s, mtbf_s, random.Random(0)) for f in (0.4, 1.0, 2.5)}
    assert lost[1.0] < lost[0.4] and lost[1.0] < lost[2.5]


def test_the_time_between_failures_is_read_from_the_event_log() -> None:
    events: list[dict[str, Any]] = [{"event": "submitted", "time": 0.0}]
    for attempt, cause in enumerate(["crashed", "preempted", "node_failed"], start=1):
        begun = 100_000.0 * attempt
        events.append({"event": "started", "attempt": attempt, "time": begun})
        if cause == "crashed":
            events.append({"event": "rank_failed", "attempt": attempt, "time": begun + 3500})
        events.append({"event": "attempt_ended", "attempt": attempt, "cause": cause, "time": begun + 3600})
    events.append({"event": "started", "attempt": 4, "time": 400_000.0})
    assert between_failures_s(events, 401_200.0) == (3 * 3600 + 1200 + PRIOR_S) / 3
    assert between_failures_s([], 0.0) == PRIOR_S


def test_auto_follows_the_last_save_and_is_never_shorter_than_it_takes() -> None:
    assert auto_interval_s([], 0.0) == FIRST_S
    saved = {"event": "saved", "attempt": 1, "time": 0.0, "step": 1, "seconds": 2.0}
    assert auto_interval_s([saved], 0.0) == best_interval_s(2.0, PRIOR_S)
    assert auto_interval_s([saved | {"write_s": 900.0}], 0.0) == 900.0
    assert auto_interval_s([saved | {"seconds": 0.001}], 0.0) == LEAST_S


def test_status_and_plan_say_that_nothing_can_be_saved() -> None:
    failed = {"event": "save_failed", "time": 0.0, "step": 7, "cause": "rank 1: OSError: [Errno 28] No space left"}
    saved = {"event": "saved", "time": 0.0, "step": 3}
    assert unsaved_text([saved]) is None and unsaved_text([failed, saved]) is None
    told = unsaved_text([saved, failed, failed | {"step": 9}])
    assert told is not None and "(tried 2 times)" in told and told.endswith("No space left")


def test_status_says_that_steps_change_no_weights_or_were_taken_back() -> None:
    def skipped(step: int) -> dict[str, Any]:
        return {"event": "step_skipped", "attempt": 1, "step": step, "cause": "loss not finite"}

    started = {"event": "started", "attempt": 1}
    assert skipped_text([]) is None and skipped_text([started, skipped(2), started]) is None
    assert skipped_text([started, skipped(2)]) == "steps skipped 1 time in this attempt, last step 2: loss not finite"
    back = {"event": "rolled_back", "step": 4, "first": 6, "last": 7, "cause": "2 steps in a row"}
    told = skipped_text([started, skipped(6), skipped(7), back])
    assert told is not None and status_notes({"label": "run", "state": "running", "skipped": told}) == [f"run: {told}"]
    assert told.startswith("steps skipped 2 times") and told.endswith("last to step 4: 2 steps in a row")


def test_the_plan_counts_the_memory_that_checkpoints_are_staged_in() -> None:
    config = config_from(TINY)
    whole = staging_bytes(config, 1)
    assert staging_bytes(config, 4) == -(-whole // 4)
    assert f"{whole / 2**30:.3f} GiB of host memory per rank" in checkpoint_text(config, 1)
    waited_for = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    assert staging_bytes(waited_for, 1) == 0 and "each waited for" in checkpoint_text(waited_for, 1)
    zero = config_from([*TINY, "parallel=zero2"])
    assert staging_bytes(zero, 4) > staging_bytes(config, 4) and "DeepSpeed's own files" in checkpoint_text(zero, 4)
