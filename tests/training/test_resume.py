"""A run that is killed with all its processes goes on from its checkpoint and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import TINY, descendants, kill_all, ranks_of, run, start_fork, wait_for
from tests.support.weights import differing, read_weights

STEPS = 40
WORDS = [*TINY, f"optim.max_steps={STEPS}", "checkpoint.interval=5", "eval.interval=20", "model.dropout=0.1"]
NO_REPORT = "launch.report_files=[]"


# Four ranks of DDP are the hard case: torch regroups the gradients after the first step of a process.
@pytest.mark.parametrize(("strategy", "nodes", "ranks"), [("ddp", 2, 2), ("fsdp", 2, 1)])
def test_kill_9_and_the_same_command_end_in_the_same_weights(
    strategy: str, nodes: int, ranks: int, tmp_path: Path
) -> None:
    words = [f"nodes={nodes}", f"ranks_per_node={ranks}", f"parallel={strategy}", *WORDS, NO_REPORT]
    run("launch", *words, f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)

    killed = RunFolder(tmp_path / "killed")
    process = start_fork("launch", *words, f"run_dir={killed.path}", cwd=tmp_path, log=tmp_path / "log")
    wait_for(
        lambda: any(r["step"] >= 7 for r in read_records(killed.metrics(0))) or process.poll() is not None, "step 7"
    )
    assert process.poll() is None, (tmp_path / "log").read_text()
    assert set(ranks_of(descendants(process.pid))) == set(range(nodes * ranks))
    kill_all(process)
    before = read_records(killed.metrics(0))
    assert 7 <= before[-1]["step"] < STEPS, "the kill must fall into the run"

    run("launch", *words, f"run_dir={killed.path}", cwd=tmp_path)
    started = [e for e in killed.read_events() if e["event"] == "started"]
    assert [e["attempt"] for e in started] == [1, 2]
    assert started[1]["from_step"] >= 5 and started[1]["from_step"] % 5 == 0

    whole, resumed = (read_weights(tmp_path / name, STEPS, tmp_path) for name in ("whole", "killed"))
    assert differing(whole, resumed) == []
    losses = [[r["loss"] for r in read_records(RunFolder(tmp_path / name).metrics(0))] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    samples = [
        s
        for rank in killed.metric_ranks()
        for r in read_records(killed.metrics(rank))
        for s in range(r["samples"][0], r["samples"][1] + 1)
    ]
    assert sorted(samples) == list(range(8 * STEPS))


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
