"""A run that is killed with all its processes goes on from its checkpoint and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.checkpoint import folders
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, descendants, kill_all, ranks_of, run, start_fork, wait_for

MORE = 6
"""Steps after the checkpoint that a killed run goes on from: over the next checkpoint, to one at the end."""
WORDS = [
    *(*TINY, "checkpoint.interval=5", "eval.interval=4", "model.dropout=0.1"),
    "optim.warmup_steps=1000",  # a learning rate that is each step's own, however many are to come
]
NO_REPORT = "launch.report_files=[]"


# Four ranks of DDP are the hard case: torch regroups the gradients after the first step of a process.
@pytest.mark.parametrize(("strategy", "nodes", "ranks"), [("ddp", 2, 2), ("fsdp", 1, 2)])
def test_kill_9_and_another_start_end_in_the_same_weights(
    strategy: str, nodes: int, ranks: int, tmp_path: Path
) -> None:
    words = [f"nodes={nodes}", f"ranks_per_node={ranks}", f"parallel={strategy}", *WORDS, NO_REPORT]
    killed = RunFolder(tmp_path / "killed")
    # More steps than it could make before it is killed, however late this process gets to do so.
    without_end = [*words, "optim.max_steps=1000", f"run_dir={killed.path}"]
    process = start_fork("launch", *without_end, cwd=tmp_path, log=tmp_path / "log")

    def is_beyond_a_checkpoint() -> bool:
        saved = folders.steps(killed.checkpoints)
        return bool(saved) and any(r["step"] >= saved[0] + 2 for r in read_records(killed.metrics(0)))

    wait_for(lambda: is_beyond_a_checkpoint() or process.poll() is not None, "two steps after a checkpoint")
    assert process.poll() is None, (tmp_path / "log").read_text()
    assert set(ranks_of(descendants(process.pid))) == set(range(nodes * ranks))
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
    samples = [
        s
        for rank in killed.metric_ranks()
        for r in read_records(killed.metrics(rank))
        for s in range(r["samples"][0], r["samples"][1] + 1)
    ]
    assert sorted(samples) == list(range(8 * steps))


def test_a_run_goes_on_with_another_number_of_ranks_and_another_strategy(tmp_path: Path) -> None:
    words = [*TINY, "eval.interval=0", "checkpoint.interval=4", "optim.max_steps=12"]
    run("gpt.train", *words, f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    moved = RunFolder(tmp_path / "moved")
    process = start_fork("gpt.train", *words, f"run_dir={moved.path}", cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: (moved.checkpoints / "step_00000004").is_dir() or process.poll() is not None, "a checkpoint")
    kill_all(process)
    assert len(read_records(moved.metrics(0))) < 12, "the kill must fall into the run"
    run("launch", "nodes=2", "parallel=fsdp", *words, NO_REPORT, f"run_dir={moved.path}", cwd=tmp_path)
    last = [read_records(RunFolder(tmp_path / name).metrics(0))[-1] for name in ("whole", "moved")]
    assert last[1]["step"] == 12
    assert last[1]["loss"] == pytest.approx(last[0]["loss"], rel=1e-4)
