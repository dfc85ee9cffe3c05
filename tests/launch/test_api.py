"""``import launch``: programs and functions from Python, their results, refusals, and runs of other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import launch
from tests.support.commands import ROOT
from tests.support.planning import refused


def rank_and_product(factor: float, times: int = 2) -> tuple[str, float]:
    """Return the rank, and a product."""
    if factor < 0:
        raise ValueError(f"factor {factor}")
    return os.environ["RANK"], factor * times


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def test_every_rank_calls_the_function_and_its_results_outlive_this_process(tmp_path: Path) -> None:
    job = launch.submit(rank_and_product, factor=1.5, nodes=2, cluster="local")
    assert job.status in ("pending", "running")
    called = []
    job.add_done_callback(called.append)
    assert job.result(300) == ("0", 3.0) and job.result(ranks=True) == [("0", 3.0), ("1", 3.0)]
    assert job.done() and job.exception() is None and job.events()[0]["event"] == "submitted"
    (found,) = launch.jobs(tmp_path / "outputs")
    assert found.run_dir == job.run_dir and found.result() == ("0", 3.0)
    again = launch.submit(rank_and_product, factor=1.5, nodes=2, cluster="local")
    assert again.run_dir == job.run_dir and again.status == "finished"


def test_the_exception_of_a_function_is_raised_with_the_traceback_of_its_rank() -> None:
    job = launch.submit(rank_and_product, factor=-1.0, cluster="local")
    with pytest.raises(ValueError, match="factor -1") as raised:
        job.result(300)
    assert any("on rank 0 of" in note and "rank_and_product" in note for note in raised.value.__notes__)
    assert job.status == "failed" and "ValueError: factor -1.0" in job.logs()


def test_a_sweep_of_a_script_has_a_table_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
            import argparse, time
            from launch import worker
            parser = argparse.ArgumentParser()
            parser.add_argument("--lr", type=float)
            lr = parser.parse_args().lr
            run = worker.attach()
            for step in range(1, 13):
                time.sleep(0.01)
                run.record(step, loss=lr / step, samples=8)
        """)
    )
    found = launch.sweep("train.py", lr=[0.5, 0.25], nodes=1, cluster="local", script={"max_steps": 12})
    assert found.wait(300) == ["finished", "finished"] and len(found) == 2
    rows = found.table()
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert [float(row["loss"]) for row in rows] == pytest.approx([0.5 / 12, 0.25 / 12])
    assert found.report().read_text().startswith("<!doctype html>")


def test_a_dry_run_returns_the_plan_and_the_batch_script_and_writes_nothing(tmp_path: Path) -> None:
    planned = launch.submit(rank_and_product, factor=2, nodes=4, cluster="slurm", partition="gpu", dry_run=True)
    assert "#SBATCH --partition=gpu" in str(planned) and "#SBATCH --nodes=4" in planned.text
    assert "rank_and_product(factor=2)" in planned.text and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("keys", "found", "fix"),
    [
        ({"factor": 1, "nodess": 2}, "unexpected keyword argument 'nodess'", "nodes=VALUE"),
        ({}, "missing a required argument: 'factor'", "factor=VALUE"),
        ({"factor": 1, "nodes": "two"}, "nodes=two", "nodes=NUMBER"),
        ({"factor": sys.stdout}, "cannot be pickled", "open files"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, keys: dict[str, object], found: str, fix: str
) -> None:
    refused(partial(launch.submit, rank_and_product, cluster="local", **keys), found=found, fix=fix)
    assert not [*tmp_path.iterdir()]


def test_a_name_that_means_two_things_is_refused() -> None:
    def train(nodes: int) -> int:
        return nodes

    refused(partial(launch.submit, train, nodes=2), found="an argument of train and the key nodes")


class Counter:
    """A task with submitit's ``checkpoint``: it counts on after each requeue."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __call__(self) -> int:
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.count

    def checkpoint(self) -> object:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Counter(self.count + 1))


def test_a_task_with_a_checkpoint_of_submitit_goes_on_from_it() -> None:
    job = launch.submit(Counter(), cluster="local")
    assert job.result(300) == 1 and [e["attempt"] for e in job.events() if e["event"] == "started"] == [1, 2]


def test_a_run_goes_on_when_the_process_that_submitted_it_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import launch

        def slow():
            import time
            while not os.path.exists({str(tmp_path / "go")!r}):
                time.sleep(0.05)
            return 7

        launch.submit(slow, cluster="local")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    (tmp_path / "submit.py").write_text(program)
    process = subprocess.run([sys.executable, "submit.py"], check=False, cwd=tmp_path, timeout=120)
    assert process.returncode == -signal.SIGKILL
    (job,) = launch.jobs()
    assert not job.done()
    (tmp_path / "go").touch()
    assert job.result(300) == 7


def test_a_cancelled_run_raises_the_error_of_concurrent_futures(tmp_path: Path) -> None:
    def forever() -> None:
        import time

        (tmp_path / "begun").touch()
        while True:
            time.sleep(0.05)

    job = launch.submit(forever, cluster="local")
    while not (tmp_path / "begun").exists():
        assert not job.done()
    assert job.cancel(now=True) and job.cancelled()
    with pytest.raises(CancelledError):
        job.result()


def test_the_notebook_of_the_page_runs_cell_by_cell(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "python.ipynb", as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    printed = [
        output.get("text") or output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") != "stderr"
    ]
    text = "\n".join(printed)
    assert "#SBATCH --nodes=2" in text and "{'rank': 1, 'loss': " in text
    assert "'state': 'finished'" in text and "type next: nodes=NUMBER" in text
