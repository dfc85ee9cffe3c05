"""The worker API in whole runs: a stop is at the same step everywhere, and the example of the docs goes on from it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import ROOT, TINY, descendants, ranks_of, start_fork, wait_for

UNDRAWN = "launch.report_files=[md]"


def test_a_signal_to_one_rank_of_two_nodes_stops_all_at_the_same_step(tmp_path: Path) -> None:
    words = [*TINY, "optim.max_steps=100000", "eval.interval=0", "checkpoint.interval=0", UNDRAWN]
    folder = RunFolder(tmp_path / "run")
    process = start_fork("launch", "nodes=2", *words, f"run_dir={folder.path}", cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: len(read_records(folder.metrics(1))) > 4 or process.poll() is not None, "the fifth step")
    os.kill(ranks_of(descendants(process.pid))[1], signal.SIGTERM)
    assert process.wait(timeout=120) == 1, "a run that was stopped has not finished"
    events = folder.read_events()
    (stopped,) = [e for e in events if e["event"] == "stopped"]
    assert stopped["signal"] == "SIGTERM", "rank 0 tells why, although another rank got it"
    last = {rank: read_records(folder.metrics(rank))[-1]["step"] for rank in range(2)}
    assert set(last.values()) == {stopped["step"]}
    assert (folder.checkpoints / f"step_{stopped['step']:08d}" / "manifest.json").is_file()
    assert not [e for e in events if e["event"] in ("rank_failed", "signalled")]


def example(path: Path, steps: int) -> Path:
    """The example of docs/scripts.md, with another number of steps."""
    text = (ROOT / "docs" / "scripts.md").read_text().split("## The worker API")[1]
    script = text.split("```python\n")[1].split("```")[0]
    assert "STEPS = 1000\n" in script
    path.write_text(script.replace("STEPS = 1000\n", f"STEPS = {steps}\n"))
    return path


def test_the_example_of_the_docs_stops_at_one_step_and_goes_on_from_there(tmp_path: Path) -> None:
    script = example(tmp_path / "train.py", 1_000_000)
    folder = RunFolder(tmp_path / "run")
    words = ["workload=script", f"script.path={script}", "script.resumes=true", "nodes=2", "ranks_per_node=1"]
    words += ["cluster=local", UNDRAWN, f"run_dir={folder.path}"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: len(read_records(folder.metrics(1))) > 4 or process.poll() is not None, "the fifth step")
    assert process.poll() is None, (tmp_path / "log").read_text()
    (folder.path / "STOP").touch()
    assert process.wait(timeout=120) == 1, "a run that was stopped has not finished"
    assert not (folder.path / "STOP").exists()
    events = folder.read_events()
    ends = [e for e in events if e["event"] in ("stopped", "finished", "rank_failed")]
    assert [(e["event"], e["file"]) for e in ends] == [("stopped", "STOP")], events
    step = ends[0]["step"]
    assert {read_records(folder.metrics(rank))[-1]["step"] for rank in range(2)} == {step}
    assert [e["step"] for e in events if e["event"] == "saved"][-1] == step

    example(script, step + 3)
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert [r["attempt"] for r in read_records(folder.metrics(0))[-4:]] == [1, 2, 2, 2]
