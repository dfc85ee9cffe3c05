"""Copies of checkpoints elsewhere: verified when they are made and fetched, tried again, kept as told, gone on from."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gpt.checkpoint import NAME, DamagedError, Manifest, Retention, sum_file, upkeep, write_manifest
from gpt.checkpoint.messages import CheckpointError
from gpt.checkpoint.target import Target, check_target
from gpt.checkpoint.upkeep import LAST_TRIES, Upkeep, UpkeepPlan, fetch_newest
from gpt.config.optim import CheckpointConfig
from launch.runs.events import uncopied_text
from launch.runs.folder import RunFolder
from tests.support.checkpoints import Checkpoints, differing, read_weights, state
from tests.support.commands import TINY, run
from tests.support.distributed import run_distributed
from tests.support.planning import refused

SMALL = (*(word for word in TINY if not word.startswith("data.")), "data=synthetic", "logging.tensorboard=false")


def make_checkpoint(folder: Path, step: int, content: bytes = b"content", **meta: float) -> Path:
    path = folder / f"step_{step:08d}"
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "part[1].bin").write_bytes(content * 1000)
    (path / "empty").touch()
    files = {name: sum_file(path / name) for name in ("inside/part[1].bin", "empty")}
    write_manifest(path, Manifest(step, 1, 0.0, dict(meta), files))
    return path


def files_in(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    url = f"file://{tmp_path}/far" if request.param == "file" else f"memory://{tmp_path.name}"
    return Target(url, "name/lr=[1, 2]")  # a list in a point's name is no pattern


def yes() -> bool:
    return True


def test_a_copy_comes_back_as_it_was_last_made(target: Target, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    assert target.steps() == [] and fetch_newest(tmp_path, target).path is None
    sent = target.put(path, yes)
    assert sent == 7000 and target.steps() == [3] and target.put(path, yes) == 0
    before = files_in(path)
    shutil.rmtree(path)
    fetched = fetch_newest(tmp_path, target)
    assert fetched.path == path and files_in(path) == before and target.find_damage(3, lambda size: None) == ()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    again = make_checkpoint(tmp_path / "again", 3, b"another")
    target.put(again, yes)
    found = fetch_newest(tmp_path / "back", target).path
    assert found is not None and files_in(found) == files_in(again), "a step that was made again has another copy"


def test_a_damaged_copy_is_passed_over_for_an_older_one(target: Target, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        target.put(make_checkpoint(tmp_path / "near", step), yes)
    target.fs.pipe_file(f"{target.root}/step_00000003/inside/part[1].bin", b"Content" + b"content" * 999)
    target.fs.pipe_file(f"{target.root}/step_00000002/{NAME}", b"{}")
    fetched = fetch_newest(tmp_path / "back", target)
    assert fetched.path == tmp_path / "back" / "step_00000001"
    assert [line.split(":")[0] for line in fetched.damaged] == ["the copy of step 3", "the copy of step 2"]
    assert "wrong checksum" in fetched.damaged[0] and target.find_damage(1, lambda size: None) == ()
    assert "wrong checksum" in str(target.find_damage(3, lambda size: None))
    assert target.find_damage(7, lambda size: None) is None
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["step_00000001"], "nothing half fetched is left"


def test_a_copy_counts_only_when_all_of_it_is_there_and_right(target: Target, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    with pytest.raises(PermissionError):
        target.put(path, lambda: False)  # of an attempt that no longer owns the run
    assert target.steps() == []
    info = target.fs.info

    def cut_short(place: str, **options: Any) -> dict[str, Any]:
        found = info(place, **options)
        return found | {"size": found["size"] - 1}

    with mock.patch.object(target.fs, "info", cut_short), pytest.raises(OSError, match="6999 bytes there instead"):
        target.put(path, yes)
    (path / "inside" / "part[1].bin").write_bytes(b"Content" + b"content" * 999)
    with pytest.raises(DamagedError, match="wrong checksum"):
        target.put(path, yes)
    assert target.steps() == []


def test_a_manifest_that_names_files_outside_is_damage(target: Target, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "near", 3)
    write_manifest(path, Manifest(3, 1, 0.0, {}, {"../../x": sum_file(path / "empty")}))
    target.fs.makedirs(f"{target.root}/step_00000003", exist_ok=True)
    target.fs.pipe_file(f"{target.root}/step_00000003/{NAME}", (path / NAME).read_bytes())
    fetched = fetch_newest(tmp_path / "back", target)
    assert fetched.path is None and "outside" in fetched.damaged[0]


def test_a_checkpoint_is_not_deleted_while_it_is_copied(target: Target, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path, put = make_checkpoint(folder.checkpoints, 1), target.put
    has_begun, may_go_on = threading.Event(), threading.Event()

    def put_slowly(*args: Any) -> int | None:
        has_begun.set()
        assert may_go_on.wait(60)
        return put(*args)

    with mock.patch.object(upkeep, "target_of", lambda url, run: target), mock.patch.object(target, "put", put_slowly):
        tending = Upkeep(plan_of(folder, keeps=1))
        tending.add(1, None)
        assert has_begun.wait(60)
        make_checkpoint(folder.checkpoints, 2)
        tending.add(2, None)  # which retires all others
        may_go_on.set()
        assert tending.close(60)
    copied = [event["step"] for event in folder.read_events() if event["event"] == "copied"]
    assert copied == [1, 2] and not path.exists(), "deleted after it was copied"
    assert target.steps() == [2], "copies of the steps that the run folder keeps"
    assert put(path, yes) is None, "gone before it was begun"


def plan_of(folder: RunFolder, keeps: int = 9) -> UpkeepPlan:
    return UpkeepPlan(folder, 1, Retention(keeps), False, "there")


def test_copies_that_are_not_kept_or_were_never_finished_are_deleted(target: Target, tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (25, 2.0), (30, 4.0), (40, 5.0)):
        target.put(make_checkpoint(tmp_path, step, val_loss=loss), yes)
    target.fs.rm_file(f"{target.root}/step_00000025/{NAME}")  # as after an upload that was cut off
    target.retire(Retention(1, best=1))
    assert target.steps() == target._begun() == [20, 40]
    target.discard_after(20)
    assert target.steps() == [20]


def tend(folder: RunFolder, target: Target, *requests: tuple[int | None, int | None]) -> list[dict[str, Any]]:
    """Serve the requests one after another, each to its end; return the events."""
    with mock.patch.object(upkeep, "target_of", lambda url, run: target):
        for request in requests:
            tending = Upkeep(plan_of(folder))
            tending.add(*request)
            assert tending.close(60)
    return [e for e in folder.read_events() if e["event"] in ("copied", "copy_failed")]


def test_failures_are_told_and_tried_again_until_the_end(target: Target, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        make_checkpoint(folder.checkpoints, step)
    failing = [TimeoutError("slow"), ConnectionError("no route\nto host")]
    put = target.put

    def fail_at_first(*args: Any) -> int | None:
        if failing:
            raise failing.pop()
        return put(*args)

    with mock.patch.object(target, "put", fail_at_first), mock.patch.object(upkeep, "FIRST_RETRY_S", 0.0):
        events = tend(folder, target, (2, None), (3, None))
        assert [(e["event"], e["step"], e["failures"]) for e in events] == [
            ("copy_failed", 2, 1), ("copy_failed", 2, 2), ("copied", 2, 2), ("copied", 3, 0)
        ]  # fmt: skip
        assert events[0]["cause"] == "ConnectionError: no route" and events[2]["bytes"] == 7000
        assert uncopied_text(events) is None
        assert "tried 2 times): TimeoutError: slow" in str(uncopied_text(events[:2]))
        failing += [ConnectionError("no route")] * 9
        assert len(tend(folder, target, (1, None))) == len(events) + LAST_TRIES
    assert target.steps() == [2, 3]
    tend(folder, target, (None, 1), (1, 1))
    assert target.steps() == [1], "copies of later steps are deleted where the run goes back"
    folder.create_attempt(), folder.create_attempt()
    tend(folder, target, (3, None))
    assert target.steps() == [1], "a later attempt makes copies of its own"


def test_a_damaged_checkpoint_is_not_copied_again_and_again(target: Target, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (make_checkpoint(folder.checkpoints, 1) / "empty").write_bytes(b"x")
    (event,) = tend(folder, target, (1, None))
    assert event["event"] == "copy_failed" and "empty has 1 bytes instead of 0" in event["cause"]


def load_from_copies(rank: int, size: int, root: Path) -> list[Any]:
    folder, url = root / "run" / "checkpoints", f"file://{root}/far"
    target = Target(url, "n/p")
    store = Checkpoints(folder, Retention(9, 0))
    store.connect = lambda: Target(url, "n/p")
    found: list[Any] = [store.load(state(0))]
    for step in (1, 2):
        path = store.save(step, state(step), {}, {})
        if rank == 0:
            target.put(path, yes)
    blank = state(0)
    if rank == 0:
        shutil.rmtree(folder)
    lost = store.load(blank)
    found += [lost.step, lost.fetched_for, float(blank["model"]["w"][0]), store.steps()]
    if rank == 0:
        next(folder.glob("step_00000002/__*")).write_bytes(b"")
    damaged = store.load(state(0))
    return [*found, damaged.step, damaged.fetched_for, damaged.set_aside]


def test_a_start_fetches_a_copy_where_no_checkpoint_is_left_or_whole(tmp_path: Path) -> None:
    for found in run_distributed(load_from_copies, 2, tmp_path):
        assert found[:5] == [None, 2, "none on the disk", 2.0, [2]]
        assert found[5:7] == [2, "1 on the disk, all damaged"] and "0 bytes" in found[7][0]


def load_without_a_good_copy(rank: int, size: int, root: Path) -> list[str]:
    def never() -> Target:
        raise ConnectionError("no route")

    said = []
    store = Checkpoints(root / "run", Retention(1))
    store.connect = never
    with pytest.raises(CheckpointError) as unreachable:
        store.load(state(0))
    said.append(str(unreachable.value))
    target = Target(f"file://{root}/far", "n/p")
    target.put(make_checkpoint(root / "near", 4), yes)
    target.fs.pipe_file(f"{target.root}/step_00000004/empty", b"x")
    store.connect = lambda: target
    return [*said, str(refused(store.load, state(0)))]


def test_a_start_does_not_begin_anew_where_it_cannot_know_that_there_are_no_copies(tmp_path: Path) -> None:
    ((unreachable, damaged),) = run_distributed(load_without_a_good_copy, 1, tmp_path)
    assert "the copies cannot be read (ConnectionError: no route)" in unreachable
    assert "checkpoint.copy_to=null" in unreachable
    assert "no copy of a checkpoint is whole" in damaged and "empty has 1 bytes instead of 0" in damaged


def test_a_run_whose_folder_is_gone_goes_on_from_its_copies(tmp_path: Path) -> None:
    words = [*SMALL, "checkpoint.interval=2", f"checkpoint.copy_to=file://{tmp_path}/far", f"run_dir={tmp_path}/n/p"]
    words += ["optim.max_steps=4", "eval.interval=0"]
    folder = RunFolder(tmp_path / "n" / "p")
    run("gpt.train", *words, cwd=tmp_path)
    # That of step 2 only where its copy had begun before step 4 was saved: the newest goes first.
    copied = [event["step"] for event in folder.read_events() if event["event"] == "copied"]
    assert copied in ([2, 4], [4])
    before = read_weights(folder.path, 4, tmp_path)
    shutil.rmtree(folder.path)
    run("gpt.train", *words, cwd=tmp_path)
    events = {event["event"]: event for event in folder.read_events()}
    assert events["loaded_from_copy"]["step"] == 4 and events["loaded_from_copy"]["cause"] == "none on the disk"
    assert differing(before, read_weights(folder.path, 4, tmp_path)) == []
    said = run("launch.verify", "--copies", str(folder.path), cwd=tmp_path)
    assert all(f"p step_{step:08d}: whole" in said for step in copied)
    next((tmp_path / "far" / "n" / "p" / "step_00000004").glob("__*")).write_bytes(b"")
    said = run("launch.verify", "--copies", str(folder.path), cwd=tmp_path, status=1)
    assert "has 0 bytes instead of" in said and f"{len(copied) - 1} whole, 1 damaged" in said
    shutil.rmtree(folder.path)
    said = run("gpt.train", *words, "optim.lr=0.5", cwd=tmp_path, status=2)
    assert "of a run with optim.lr=" in said and "now optim.lr=0.5" in said


@pytest.mark.parametrize(
    ("url", "found", "fix"),
    [
        ("far", "copy_to=far", "file:///FOLDER"),
        ("s3://KEY:SECRET@bucket/x", "copy_to=s3://... with @", "AWS_ACCESS_KEY_ID"),
        ("memory://x", "copy_to=memory://x", "s3://BUCKET"),
        ("nofs://x/y", "Protocol not known: nofs", "copy_to=null"),
        ("gs://bucket/x", "cannot be written (ImportError", "pip install gcsfs"),
        ("file:///dev/null/x", "cannot be written (NotADirectoryError", "copy_to=null"),
    ],
)
def test_places_that_take_no_copies_are_refused(url: str, found: str, fix: str, tmp_path: Path) -> None:
    config = CheckpointConfig(interval=1, keep_last=1, copy_to=url)

    def check() -> None:
        config.validate()
        check_target(url, tmp_path)

    assert "SECRET" not in str(refused(check, fix=fix, said=found))


def test_the_probe_of_a_place_for_copies_leaves_nothing(tmp_path: Path) -> None:
    check_target(f"file://{tmp_path}/far", tmp_path / "n" / "p")
    assert not [path for path in (tmp_path / "far").rglob("*") if path.is_file()], "the probe is deleted again"
