"""Run folders and checkpoints that are not as they were written: each command names the file; verify sees all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from shlex import quote

import pytest
from omegaconf import DictConfig

from gpt.checkpoint.target import checkpoint_at
from gpt.compare import read_metrics
from launch import cancel, logs, move, status
from launch.agent.node import start_time
from launch.config import ClusterKind
from launch.config.compose import compose_launch, read_point
from launch.errors import refusing
from launch.report import build
from launch.runner import run_sweep
from launch.runs.compose import write_config
from launch.runs.folder import RunFolder, append_lines, write_json
from launch.slurm import follow
from launch.slurm.client import JobState
from launch.slurm.jobs import SlurmJob
from launch.slurm.status import explain_end, find_run_status, update
from tests.support.commands import TINY, run
from tests.support.commands import call as output_of
from tests.support.planning import plan, refused
from tests.support.runs import recorded

WORDS = [*TINY, "optim.max_steps=9", "seed=3"]
NEEDED = {
    "config.yaml": {"launch", "compare"},
    "plan.json": {"move"},
    "overrides.yaml": {"report"},
    "sweep.json": {"report"},
    "events.jsonl": {"status", "logs", "agent", "cancel", "move", "launch", "report", "compare"},
    "environment.json": set(),
    "rank_00000.jsonl": {"report", "compare"},
    "waiting": set(),
}
"""Name of a file -> the commands that may refuse it."""
SLOWLY_READ = ("config.yaml", "plan.json", "events.jsonl", "environment.json")
"""Files that the two commands read which compose or check a whole config."""
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "another value": lambda path: path.write_text("[1, {}]\n"),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of one rank that made two steps, and a sweep of that one run."""
    outputs = tmp_path_factory.mktemp("whole")
    made = plan(*WORDS, f"run_dir={outputs / 'run'}", kind=ClusterKind.local, write=True)
    folder = RunFolder(made.run_dir)
    write_json(folder.path.parent / "sweep.json", {"points": [folder.point]})
    folder.create_attempt()
    folder.log(1, 0).write_text("step 1\n")
    write_json(folder.environment(1), {"ranks": [{"rank": 0, "node": 0, "host": "h", "device_name": "cpu"}]})
    known = {"attempt": 1, "loss": 2.5, "tokens": 32, "samples": [0, 3], "step_time_s": 0.1}
    append_lines(folder.metrics(0), [{"step": step, "time": float(step), **known} for step in (1, 2)])
    (folder.path / ".launch").mkdir()
    (folder.path / ".launch" / "waiting").write_text("elsewhere 1 1 0")
    return folder


@pytest.fixture
def folder(whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A copy of it, worked on by what looks like its controller: a process that ends at SIGTERM."""
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    shutil.copytree(whole.path.parent, tmp_path / "sweep")
    folder = RunFolder(tmp_path / "sweep" / "run")
    controller = subprocess.Popen(["sleep", "600"])
    place = {"cluster": "local", "job_id": str(controller.pid), "host": os.uname().nodename, "nodes": 1}
    folder.record_event("submitted", **place, pid_started=start_time(controller.pid))
    folder.record_event("agent_started", job="j", nodes=1, allocated_at=0.0)
    folder.record_event("started", attempt=1, max_steps=9)
    yield folder
    controller.kill()
    controller.wait()


@cache
def composed_once() -> DictConfig:
    """The config of the command that launches the run again, without its place."""
    return compose_launch(["cluster=local", *WORDS, "dry_run=true"])


def commands(folder: RunFolder) -> dict[str, Callable[[], object]]:
    """The commands that read a run folder, without what they would start or draw; cancel last, as it ends the run."""
    path, above = str(folder.path), folder.path.parent

    def launch() -> None:
        composed = deepcopy(composed_once())
        composed.run_dir = path
        run_sweep([(composed, [*WORDS, "dry_run=true"])])

    return {
        "status": lambda: status.main([path]),
        "logs": lambda: logs.main([path]),
        "agent": lambda: logs.agent_of(find_run_status(folder), 0),
        "move": lambda: move.promised(find_run_status(folder)),
        "launch": launch,
        "report": lambda: build(above),
        "compare": lambda: read_metrics(folder, "a"),
        "cancel": lambda: cancel.main([path]),
    }


def answer(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status of a command, and what it printed. Any other exception is a traceback for the user."""

    def main() -> int:
        done = command()
        return done if type(done) is int else 0

    capsys.readouterr()
    return refusing(main)(), "".join(capsys.readouterr())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_file_is_named_or_done_without(
    name: str, damage: str, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (path for path in folder.path.parent.rglob("*") if path.name == name)
    DAMAGES[damage](path)
    present = damage != "missing"
    for command, call in commands(folder).items():
        if command in ("launch", "cancel") and name not in SLOWLY_READ:
            continue
        ended, text = answer(call, capsys)
        if (name, command) == ("config.yaml", "launch") or ((name, command) == ("plan.json", "move") and present):
            assert ended == 2, f"{command} went on without {name}:\n{text}"
        if ended == 2:
            assert command in NEEDED[name], f"{command} does without {name}:\n{text}"
            assert "found: " in text and "expected: " in text and "type next: " in text, f"{command}:\n{text}"
            assert str(path) in text or str(path.relative_to(folder.path)) in text, f"{command}:\n{text}"
        elif command == "cancel" and name != "events.jsonl":
            assert "cancelled" in [e["event"] for e in folder.read_events()], text
    told = name == "plan.json" and present
    assert told == ("plan.json" in answer(lambda: status.main([str(folder.path)]), capsys)[1])


def test_lines_of_the_event_log_that_cannot_be_read_are_counted_and_told(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = folder.events.read_bytes()
    garbled = [b"\x00" * 40, whole.splitlines()[0][:-9], b"[1, 2]", b'{"event": "saved"}']
    events = folder.read_events()
    for lines, number in ((b"", 0), (b"\n  \n", 0), (garbled[0], 0), (b"\n".join(garbled) + b"\n", len(garbled))):
        folder.events.write_bytes(whole + lines)
        assert folder.unread_events() == number and folder.read_events() == events
    told = f"{len(garbled)} lines of {folder.events} could not be read"
    assert told in answer(lambda: status.main([str(folder.path)]), capsys)[1].replace("\n", " ")
    assert [note for note in build(folder.path).notes if told in note]


def test_a_config_that_was_cut_off_is_no_key_to_type(folder: RunFolder) -> None:
    text = folder.config.read_text()
    folder.config.write_text(text[: text.index("n_layer")].rsplit("\n", 1)[0] + "\n")
    refusal = refused(commands(folder)["launch"], found=str(folder.config))
    assert "model.n_layer" in refusal.found and "=VALUE" not in refusal.fix


def test_keys_and_groups_that_only_an_earlier_version_had_are_left_out(folder: RunFolder) -> None:
    config = read_point(folder)
    text = folder.config.read_text()
    folder.config.write_text(
        text.replace("\ncluster:\n", "\ncluster:\n  gone: 1\n  former: {inner: {a: 1, b: [2]}, c: 3}\n")
    )
    assert folder.config.read_text() != text and read_point(folder) == config


def test_a_job_whose_nodes_do_not_see_the_folder_says_so(folder: RunFolder) -> None:
    folder.events.write_text("")
    folder.record_event("submitted", cluster="slurm", job_id="7", nodes=2)
    point = find_run_status(folder)
    update(point, {SlurmJob("7").job_id: JobState("FAILED", "None")})
    assert point.state == "failed"
    text = explain_end(point)
    assert f"run failed (its agents wrote nothing: the nodes may not see {folder.path}" in text
    assert f"srun --nodes=1 ls -ld {quote(str(folder.path))} shows it" in text
    folder.record_event("agent_started", job="slurm-7-0-0", nodes=2, allocated_at=0.0)
    update(point, {})
    assert not point.detail


def test_a_run_whose_ranks_did_not_fail_says_why_it_does_not_start_again(folder: RunFolder) -> None:
    folder.events.write_text("")
    decided = {"attempt": 1, "action": "stop", "cause": "preempted", "reason": "the limit is reached"}
    recorded(
        folder,
        {"event": "submitted", "cluster": "slurm", "job_id": "7", "nodes": 2},
        {"event": "started", "attempt": 1},
        {"event": "attempt_ended", "attempt": 1, "cause": "preempted"},
        {"event": "decided", **decided},
    )
    point = find_run_status(folder)
    update(point, {SlurmJob("7").job_id: JobState("FAILED", "None")})
    assert "\nnot started again: the limit is reached\nwhy: the job was preempted\n" in explain_end(point)


def test_a_submission_without_its_cluster_and_job_leaves_the_state_unknown(tmp_path: Path) -> None:
    folder = recorded(RunFolder(tmp_path / "run"), {"event": "submitted"})
    folder.create_attempt()
    assert "unknown" in output_of(status.main, folder.path)
    assert "nothing to cancel, unknown" in output_of(cancel.main, folder.path, status=1)
    assert "all runs are over" in output_of(move.main, folder.path)
    assert "no log of rank 0" in output_of(logs.main, folder.path, status=2)


# ``launch.verify`` on the checkpoints of a real run: whatever is done to a file is seen, and nothing is changed.


STEPS = (2, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks with two checkpoints."""
    folder = tmp_path_factory.mktemp("verify")
    often = (
        "optim.max_steps=4",
        "checkpoint.interval=2",
        "checkpoint.keep_last=2",
        "eval.interval=0",
        "launch.report_files=[md]",
    )
    run(f"launch ranks_per_node=2 run_dir={folder / 'run'}", *TINY, *often, cwd=folder)
    return folder / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "outputs" / "twice" / "run"))


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, and a checksum of it that is not the one under test."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_a_sound_run_is_whole_and_is_left_as_it_was(copied: Path) -> None:
    before = contents(copied)
    text = run(f"launch.verify {copied}", cwd=copied.parent)
    lines = text.splitlines()
    assert [" ".join(line.split()[:3]) for line in lines[:2]] == [
        f"run step_{step:08d}: whole," for step in reversed(STEPS)
    ]
    assert lines[-1].endswith("2 whole, 0 damaged") and contents(copied) == before
    newest = run("launch.verify --newest outputs", cwd=copied.parents[2])
    assert "step_00000004: whole" in newest and "step_00000002" not in newest


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])


def take_from_the_other_step(folder: Path, name: str) -> None:
    shutil.copy(folder.with_name(f"step_{STEPS[0]:08d}") / name, folder / name)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize("harm", [flip, cut, take_from_the_other_step, remove])
def test_whatever_is_done_to_any_file_is_seen(copied: Path, harm: Callable[[Path, str], None]) -> None:
    newest = checkpoint(copied, STEPS[1])
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) >= 4, "the manifest, a file of each rank's own, and tensors"
    for name in names:
        original = (newest / name).read_bytes()
        harm(newest, name)
        same = (newest / name).exists() and (newest / name).read_bytes() == original
        found = checkpoint_at(newest).find_damage(lambda size: None)
        assert found is not None
        assert bool(found) != same and (same or name in " ".join(found)), name
        (newest / name).write_bytes(original)
    sound = checkpoint_at(newest)
    assert sound.find_damage(lambda size: None) == ()
    shutil.rmtree(newest)
    assert sound.find_damage(lambda size: None) is None, "deleted meanwhile, which is no damage"


def test_two_files_of_ranks_exchanged_and_a_folder_under_another_name(copied: Path) -> None:
    newest = checkpoint(copied, STEPS[1])
    first, second = sorted(path for path in newest.iterdir() if "rank" in path.name and path.suffix == ".pt")[:2]
    kept = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(kept)
    text = run(f"launch.verify {copied}", cwd=copied.parent, status=1)
    assert f"{first.name} has a wrong checksum; {second.name} has a wrong checksum" in text
    assert "1 whole, 1 damaged; a new start passes over what is damaged" in text
    shutil.rmtree(newest)
    checkpoint(copied, STEPS[0]).rename(newest)
    text = run(f"launch.verify {copied}", cwd=copied.parent, status=1)
    assert "step_00000004: damaged: manifest.json is that of step 2" in text
    assert "0 whole, 1 damaged; a new start would be refused" in text


def test_a_program_of_its_own_is_not_judged(tmp_path: Path) -> None:
    words = ["workload=script", "script.command=[echo,done]", f"run_dir={tmp_path / 'run'}"]
    folder = RunFolder(tmp_path / "run")
    write_config(folder, compose_launch(words), words)
    folder.create_attempt()
    assert "its checkpoints are its own program's" in run("launch.verify run", cwd=tmp_path)
