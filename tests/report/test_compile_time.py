"""Compilation in a report: a run whose blocks are compiled tells it in the steps in which it happened, once."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from gpt.training.loop import train
from launch.report.goodput import measure_goodput
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.worker import make_run
from tests.support.distributed import run_distributed
from tests.support.learning import start

STEPS = 5
EVALUATED_AT = 3
LAYERS = 2


def train_compiled(rank: int, size: int, folder: Path) -> tuple[float, float, int]:
    """Train with compiled blocks; returns the Unix times of begin and end, and the frames torch has compiled."""
    from torch._dynamo.utils import counters

    begun = time.time()
    # Traced as for any backend, and then run as traced: no C++ compiler at work.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        steps = (f"optim.max_steps={STEPS}", f"eval.interval={EVALUATED_AT}", "checkpoint.interval=0")
        run = start(rank, size, folder, "compile=default", "optim.max_micro_batch=16", *steps)
        run.worker = make_run({**os.environ, "LAUNCH_RUN_DIR": str(folder)})
        assert train(run) == "finished"
    return begun, time.time(), counters["stats"]["unique_graphs"]


def test_a_compiled_run_tells_compilation_in_the_steps_that_had_it_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    ((begun, ended, graphs),) = run_distributed(train_compiled, 1, run.path)
    assert graphs > LAYERS, "the blocks and the loss"
    records = {record["step"]: record for record in read_records(run.metrics(0))}
    told = {step: record["compile_s"] for step, record in records.items() if "compile_s" in record}
    evaluated = {step: record["val_compile_s"] for step, record in records.items() if "val_compile_s" in record}
    assert told.keys() == {1} and evaluated.keys() == {EVALUATED_AT}, "again for the other shapes of an evaluation"
    assert 0 < told[1] < records[1]["step_time_s"]

    agent = {"job": "local-1", "nodes": 1, "price_per_gpu_hour": 2.0, "limit_s": 3600.0}
    run.record_event("agent_started", **agent, allocated_at=begun, time=begun)
    run.record_event("agent_ended", job=agent["job"], ended_at=ended, time=ended)
    goodput = measure_goodput(run, run.read_events())
    assert goodput is not None
    assert goodput.seconds["compile"] == pytest.approx(told[1] + evaluated[EVALUATED_AT], rel=1e-9), "each second once"
    steps_s = sum(record["step_time_s"] for record in records.values())
    # A step may be read while the next one is made: what both take counts once.
    assert 0 < goodput.seconds["steps"] <= steps_s - told[1] + 1e-6, "none of it in a step"
    assert sum(goodput.seconds.values()) == pytest.approx(ended - begun, abs=1e-6)
    assert 100 * sum(s / goodput.total_s for s in goodput.seconds.values()) == pytest.approx(100.0, abs=1e-9)
