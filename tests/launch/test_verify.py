"""``launch.verify`` on the checkpoints of a real run: whatever is done to a file is seen, and nothing is changed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.checkpoint.target import checkpoint_at
from launch.config.compose import compose_launch
from launch.runs.compose import write_config
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run

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
