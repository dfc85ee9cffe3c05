"""Step records and the objective of a sweep; what a run used of its request; ranks that fail together."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from hydra_plugins.launch_plugin import job_return, refuse_other_tasks, refuse_without_values
from launch.errors import ConfigError
from launch.runner import PointResult, SweepFailedError
from launch.runs import measured, records
from launch.runs.events import first_failure, record_failure
from launch.runs.folder import RunFolder, append_json_lines, append_lines, append_whole, open_to_append
from launch.runs.measured import UsageMeter, usage_file, usage_text
from launch.runs.process import ENVIRONMENT
from launch.runs.records import (
    FIRST_S,
    LONGEST_S,
    ObjectiveOf,
    RecordWriter,
    objective_value,
    read_records,
    refuse_absent,
    refuse_unknown_figure,
    step_figures,
)
from tests.support.commands import TINY, run
from tests.support.planning import refused
from tests.support.runs import recorded

STEPS = 1000


def line(step: int) -> dict[str, Any]:
    return {"step": step, "attempt": 1, "step_time_s": 0.5}


def test_a_filesystem_that_hangs_holds_up_nobody_and_takes_records_by_the_handful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    opened: list[Path] = []
    hanging, goes_on, written = threading.Event(), threading.Event(), threading.Semaphore(0)

    def open_once(path: Path) -> int:
        opened.append(path)
        return open_to_append(path)

    def append(descriptor: int, data: bytes) -> None:
        hanging.set()
        assert goes_on.wait(60)
        append_whole(descriptor, data)
        written.release()

    monkeypatch.setattr(fcntl, "lockf", lambda *args: pytest.fail("one writer needs no lock"))
    monkeypatch.setattr(records, "open_to_append", open_once)
    monkeypatch.setattr(records, "append_whole", append)
    monkeypatch.setattr(records, "time", SimpleNamespace(sleep=waits.append))
    path = tmp_path / "rank_00001.jsonl"
    writer = RecordWriter(path, LONGEST_S)
    writer.put(line(1))
    assert hanging.wait(60)
    for step in range(2, STEPS + 1):
        writer.put(line(step))  # would never return if it waited for the thread
    goes_on.set()
    writer.flush()
    for step in range(STEPS + 1, STEPS + 9):
        while written.acquire(blocking=False):
            pass
        writer.put(line(step))
        assert written.acquire(timeout=60), "the thread wakes up for the first record after a write"
    assert opened == [path] and waits[0] == FIRST_S and max(waits) == LONGEST_S <= 10
    assert len(waits) <= 10, "a thousand records were two writes at most"
    assert [record["step"] for record in read_records(path)] == list(range(1, STEPS + 9))


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP", "EIO"])
def test_a_filesystem_without_locks_takes_lines_and_another_failure_is_raised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(getattr(errno, name), "no")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    path = tmp_path / "lines"
    with pytest.raises(OSError, match="no") if name == "EIO" else nullcontext():
        append_json_lines(path, [{"a": 1}])
    assert name == "EIO" or path.read_text() == '{"a": 1}\n'


# The objective of a run.


OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


def test_the_objective_is_a_figure_of_the_records_that_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [(1, 1, 3.0), (2, 1, 0.5), (2, 2, 2.0), (3, 2, float("nan")), (4, 2, 2.5), (5, 2, None)]
    lines_of = [{"step": s, "attempt": a, **({} if v is None else {"val_loss": v})} for s, a, v in lines]
    append_lines(folder.metrics(0), lines_of)
    found = {of.name: objective_value(folder, "val_loss", of) for of in ObjectiveOf}
    assert found == {"minimum": 2.0, "maximum": 3.0, "last": 2.5}, "step 2 of attempt 1 was done again"
    assert objective_value(folder, "accuracy", ObjectiveOf.last) is None


def test_an_objective_that_no_step_records_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    text = run("launch objective=val_los cluster=local", cwd=tmp_path, status=2)
    assert "found: objective=val_los, which no step record has" in text and "type next: objective=val_loss" in text
    assert list(tmp_path.iterdir()) == []
    for name in (None, *step_figures()):
        refuse_unknown_figure(name, step_figures())
    assert {"loss", "val_loss", "tokens_per_s", "step_time_s"} < set(step_figures())
    assert not {"layer_grad_norms", "samples"} & set(step_figures())
    refuse_unknown_figure("accuracy", None)  # a script's own


def test_a_figure_that_a_script_did_not_record_is_answered_with_those_that_it_did(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_lines(folder.metrics(0), [{"step": 1, "attempt": 1, "accuracy": 0.5, "loss": float("nan")}])
    assert refuse_absent(folder, "acuracy").expected.endswith("recorded: accuracy")
    assert refuse_absent(RunFolder(tmp_path / "empty"), "loss").expected.endswith("recorded: none")


def test_a_point_without_a_value_is_a_job_that_failed() -> None:
    good = job_return(["nodes=1"], PointResult("run", "val_loss", 1.5))
    assert (good.status, good.return_value) == (JobStatus.COMPLETED, 1.5)
    crashed = job_return(["nodes=1"], PointResult("run", "val_loss", None, "out of memory"))
    with pytest.raises(SweepFailedError, match="out of memory"):
        _ = crashed.return_value
    with pytest.raises(ValueError, match="finite val_loss"):
        _ = job_return(["nodes=1"], PointResult("run", "val_loss", None)).return_value
    assert job_return(["nodes=1"], PointResult("run", None, None)).return_value is None


def test_a_search_that_would_get_no_value_is_refused() -> None:
    known = {"objective": "val_loss", "dry_run": False, "launch": {"detach": False}}
    for given, found in (
        ({"objective": None}, "objective=null"),
        ({"dry_run": True}, "dry_run=true"),
        ({"launch": {"detach": True}}, "launch.detach=true"),
    ):
        refused(refuse_without_values, OmegaConf.create(known | given), OPTUNA, said=found)
        own = "hydra_plugins.launch_plugin.PerPointSweeper"
        refuse_without_values(OmegaConf.create(known | given), own)


@pytest.mark.parametrize(
    ("launcher", "given", "tasks"),
    [
        (f"{SUBMITIT}.SlurmLauncher", {"nodes": 2, "tasks_per_node": 3}, 6),
        (f"{SUBMITIT}.LocalLauncher", {"nodes": 1, "tasks_per_node": 4}, 4),
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", {}, 1),
        ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", {}, None),
    ],
)
def test_a_stock_launcher_has_to_start_an_agent_for_each_node(
    launcher: str, given: dict[str, int], tasks: int | None
) -> None:
    keys = {"launcher": {"_target_": launcher, **given}}
    points = [OmegaConf.create({"nodes": n, "spare_nodes": 1, "hydra": keys}) for n in (3, 5)]
    if tasks is None:
        refuse_other_tasks(points, "ray")
        return
    refused = 4 if tasks != 4 else 6
    with pytest.raises(ConfigError, match=f"a point with nodes={refused} .*starts {tasks} task"):
        refuse_other_tasks(points, "joblib")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="hydra-optuna-sweeper is not installed")
def test_optuna_searches_by_the_validation_loss(tmp_path: Path) -> None:
    """Of two learning rates, one of which changes nothing, Optuna names the one that learns."""
    small = [*(word for word in TINY if not word.startswith("data.")), "data=synthetic", "logging.tensorboard=false"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    grid = ["hydra/sweeper/sampler=grid", "optim.lr=choice(1e-9,3e-3)"]
    small += ["optim.min_lr=0", "optim.warmup_steps=0", "optim.max_steps=6"]
    words = [*search, *grid, "objective=val_loss", "eval.interval=6", "launch.report_files=[csv]", "name=n", *small]
    run("launch -m", *words, cwd=tmp_path)
    (file,) = (tmp_path / "outputs").rglob("optimization_results.yaml")
    assert yaml.safe_load(file.read_text())["best_params"] == {"optim.lr": 3e-3}


# What a run used of its request, from the files that its ranks and agents have written.


ENDED = (
    {"event": "submitted", "cluster": "slurm", "job_id": "7"},
    {"event": "agent_started", "job": "slurm-7-0-0", "allocated_at": 0.0, "limit_s": 3600.0},
    {"event": "finished", "attempt": 1},
    {"event": "agent_ended", "job": "slurm-7-0-0", "ended_at": 3000.0},
)


BUSY = "import os; sum(range(3 * 10**7)); print(sum(os.times()[:2]), flush=True); input()"


def test_busy_cpus_are_those_up_to_the_last_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measured, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = UsageMeter()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        spent_s = float(rank.stdout.readline())  # as the rank itself counts
        for now[0] in (1.0, 4.0):
            meter.poll([rank.pid])
        now[0] = 9.0  # the run ends 5 s after the last sample
        rank.communicate(b"\n")
    meter.write(tmp_path / "usage.json")
    assert 4.0 * json.loads((tmp_path / "usage.json").read_text())["cpus"] == pytest.approx(spent_s, abs=0.1)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_fullest_gpu_counts_and_proposes_no_request(has_gpu: bool, tmp_path: Path) -> None:
    """Rank 1 peaks above rank 0, whose allocator has reserved more; without a GPU the same figures are of RAM."""
    folder = recorded(RunFolder(tmp_path), *ENDED)
    folder.create_attempt()
    usage_file(folder, 1, 0).parent.mkdir()
    usage_file(folder, 1, 0).write_text('{"memory_gib": 3, "memory_given_gib": 4, "cpus": 3, "cpus_given": 4}')
    ranks = [{"rank": rank, **({"memory_gib": 80.0} if has_gpu else {})} for rank in (0, 1)]
    folder.environment(1).write_text(json.dumps({"ranks": ranks}))
    for rank, peak in ((0, 20.0), (1, 30.5)):
        record = {"step": 1, "attempt": 1, "memory_peak_gib": peak, "memory_reserved_gib": 24.0 if has_gpu else None}
        writer = RecordWriter(folder.metrics(rank))
        writer.put(record)
        writer.flush()
    gpu = "30.5 of 80 GiB of memory on the fullest GPU, " if has_gpu else ""
    assert usage_text(folder) == f"used 3 of 4 GiB of memory on a node, 3 of 4 CPUs on average, {gpu}50 of 60 min"


# Ranks that fail together: one traceback for a node, and the first failure found among its echoes.


def fail(folder: RunFolder, rank: int, error: Exception, elsewhere: bool = False) -> None:
    """Let a rank fail, at one of two lines."""
    try:
        if elsewhere:
            raise error
        raise error
    except type(error) as raised:
        record_failure(folder, 1, rank, raised, step=3)


def test_a_node_writes_each_traceback_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = RunFolder(tmp_path / "run"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(scratch))
    for rank in range(4):  # of errors about a lost peer, which differ in their words and types
        fail(folder, rank, RuntimeError(f"[Rank {rank}] Connection closed by peer"))
    fail(folder, 4, ConnectionError("[gloo/transport/tcp/pair.h:311] Connect timeout [none]"))  # one not yet talked to
    for rank in (5, 6):
        fail(folder, rank, ValueError(f"bad sample {rank}"))
    fail(folder, 7, ValueError("bad sample"), elsewhere=True)
    events = folder.read_events()
    full = [e["rank"] for e in events if "Traceback (most recent call last)" in e["traceback"]]
    assert full == [0, 5, 7]
    assert [e.get("same_as") for e in events] == [None, 0, 0, 0, 0, None, 5, None]
    assert (
        events[6]["traceback"].startswith("as rank 5 of this host") and events[6]["cause"] == "ValueError: bad sample 6"
    )
    assert all(len(str(e)) < 500 for e in events if "same_as" in e), "4,096 of them are read by every agent"
    # Another attempt has another folder; without an agent each rank speaks for itself.
    monkeypatch.delenv(ENVIRONMENT)
    fail(folder, 1, RuntimeError("Connection closed by peer"))
    assert "Traceback" in folder.read_events()[-1]["traceback"]


def test_the_failure_that_is_shown_has_its_traceback(tmp_path: Path) -> None:
    """The rank that writes the traceback may come after one that refers to it."""
    told = {"event": "rank_failed", "attempt": 1, "host": "h", "cause": "ValueError: x", "echo": False}
    short = {**told, "rank": 1, "time": 1.0, "traceback": "as rank 0 of this host", "same_as": 0}
    full = {**told, "rank": 0, "time": 2.0, "traceback": "Traceback"}
    assert first_failure([short, full], 1) == full
    assert first_failure([short, {**full, "host": "other"}], 1) == short
    assert first_failure([short], 1) == short
