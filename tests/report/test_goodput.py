"""Time of runs by part, and what interruptions cost, against numbers worked out by hand from a known clock."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpt.training.loop import train
from launch.agent.policy import Cause
from launch.fleet.__main__ import FAMILIES, Fleet, main, rate_interval
from launch.plan.budget import heartbeat_file
from launch.report import build, write
from launch.report.goodput import CAUSES, Goodput, measure_goodput
from launch.report.text import markdown_text, parts_csv_text
from launch.runs.folder import ReportFile, RunFolder, append_lines
from launch.runs.records import read_records
from launch.worker import run_of_environment
from tests.support.commands import ROOT, run
from tests.support.distributed import run_distributed
from tests.support.learning import start
from tests.support.run_folders import RunBuilder, notes_with
from tests.support.runs import png_shape

T0 = 1.7e9
GPUS, PRICE = 8, 2.0


class Clock:
    """Writes a run as its clock goes on. All times are whole seconds, which doubles add up without error."""

    def __init__(self, path: Path, gpus: int | None = GPUS) -> None:
        self.builder = RunBuilder(path, 2, 2, (path.name,), machines=2)
        self.now = T0
        self.job = 0
        self.gpus = gpus

    def event(self, event: str, **details: Any) -> Clock:
        self.builder.event(event, time=self.now, **details)
        return self

    def spend(self, seconds: float) -> Clock:
        self.now += seconds
        return self

    def allocation(self) -> Clock:
        self.job += 1
        begun = {"job": f"slurm-{self.job}", "nodes": 2, "limit_s": 36000.0, "price_per_gpu_hour": PRICE}
        gpus = {"gpus": self.gpus} if self.gpus else {}
        return self.event("agent_started", **begun, **gpus, allocated_at=self.now)

    def released(self) -> Clock:
        return self.event("agent_ended", job=f"slurm-{self.job}", ended_at=self.now)

    def started(self, attempt: int) -> Clock:
        self.builder.attempt(attempt)
        return self.event("started", attempt=attempt, world_size=2)

    def steps(self, attempt: int, first: int, last: int, **first_one: float) -> Clock:
        """Steps of a second each; the first one of them takes as much longer as it tells to have compiled."""
        records = []
        for step in range(first, last + 1):
            known = first_one if step == first else {}
            took = 1.0 + known.get("compile_s", 0.0)
            self.spend(took)
            record = {"step": step, "attempt": attempt, "tokens": 1024, "loss": 1.0, "step_time_s": took}
            records.append({**record, **known, "time": self.now})
        for rank in (0, 1):
            append_lines(self.builder.run.metrics(rank), records)
        return self

    def saved(self, attempt: int, step: int, seconds: float) -> Clock:
        return self.spend(seconds).event("saved", attempt=attempt, step=step, seconds=seconds)

    def up_to_a_checkpoint(self) -> Clock:
        """An allocation, 16 s of start, four steps of the first attempt, and 2 s of saving them."""
        return self.allocation().spend(16).started(1).steps(1, 1, 4).saved(1, 4, 2.0)

    def ended(self, attempt: int | None, cause: str, action: str = "restart") -> Clock:
        self.event("attempt_ended", attempt=attempt, cause=cause, step=None, job=f"slurm-{self.job}")
        return self.event("decided", attempt=attempt, action=action, cause=cause, reason="")

    def rolled_back(self, attempt: int, to: int, last: int) -> Clock:
        return self.event("rolled_back", attempt=attempt, step=to, first=last, last=last, cause="loss not finite")


def stormy(path: Path, gpus: int | None = GPUS) -> Clock:
    """Crash, in place; preemption, through the queue; a roll-back."""
    run = Clock(path, gpus).event("submitted", cluster="slurm", job_id="1", nodes=2, candidate=0)
    run.spend(256).allocation().spend(64).started(1).steps(1, 1, 8, compile_s=4.0).saved(1, 8, 2.0)
    run.steps(1, 9, 10)  # lost
    run.spend(3).ended(1, "crashed").spend(5 + 2).started(2)
    run.steps(2, 9, 12, compile_s=2.0, restore_s=2.0).saved(2, 12, 2.0)
    run.spend(1).ended(2, "preempted", "requeue").spend(4).released()
    run.spend(128).allocation().spend(40 + 8).started(3).steps(3, 13, 16, compile_s=2.0, restore_s=8.0)
    run.rolled_back(3, 14, 16)  # 15 and 16 are lost
    run.spend(6 + 3).steps(3, 15, 20, restore_s=3.0).spend(1)
    return run.event("attempt_ended", attempt=3, cause="finished", step=20, job="slurm-2").released()


PARTS = {
    "waiting": 256.0 + 128.0,
    "start": 64.0,
    "compile": 4.0 + 2.0 + 2.0,
    "restore": 2.0 + 8.0 + 3.0,
    "steps": 20.0,
    "lost": 2.0 + 2.0,
    "saves": 4.0,
    "restarts": (3.0 + 5.0) + 40.0 + 6.0,
    "shutdown": (1.0 + 4.0) + 1.0,
}
LOST = {
    "crashed": 2.0 + (3.0 + 5.0) + 2.0 + 2.0,  # done again, end and start, restore, compile
    "preempted": (1.0 + 4.0) + 40.0 + 8.0 + 2.0,  # shutdown, start, restore, compile
    "diverged": 2.0 + 6.0 + 3.0,
}


def goodput_of(run: Clock) -> Goodput:
    found = measure_goodput(run.builder.run, run.builder.run.read_events())
    assert found is not None
    return found


def test_parts_and_losses_of_a_stormy_run_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    run = stormy(tmp_path / "nodes=2")
    found = goodput_of(run)
    assert found.seconds == PARTS and sum(found.seconds.values()) == run.now - T0, "to the last digit"
    assert found.lost_s == LOST and found.interruptions == dict.fromkeys(LOST, 1)
    assert sum(LOST.values()) == (
        # The parts that are loss: all of two, and of others what came after an interruption.
        PARTS["lost"] + PARTS["restarts"] + PARTS["restore"] + (PARTS["compile"] - 4.0) + (PARTS["shutdown"] - 1.0)
    )
    assert found.lost_h == pytest.approx({c: s * GPUS / 3600 for c, s in LOST.items()}, rel=1e-12)
    (row,) = (table := build(run.builder.path)).rows
    assert row.parts_s == PARTS
    assert (row.interruptions, row.hours_of) == (3, "GPU")
    assert row.causes_h == found.lost_h
    allocated_h = (run.now - T0 - PARTS["waiting"]) / 3600
    assert row.goodput == pytest.approx(20.0 / (3600 * allocated_h))
    assert (row.gpu_hours, row.cost) == pytest.approx((allocated_h * GPUS, allocated_h * GPUS * PRICE))
    assert row.cost_per_billion == pytest.approx(allocated_h * GPUS * PRICE / (20 * 2 * 1024 / 1e9)), "of two ranks"
    text = markdown_text(table)
    cells = text[text.index("## Where the time went") :].splitlines()[4]
    shares = [float(cell.rpartition("(")[2].partition(" %")[0]) for cell in cells.split("|") if "(" in cell]
    assert shares == pytest.approx([100 * seconds / (run.now - T0) for seconds in PARTS.values()], abs=0.05)
    line = text[text.index("## What interruptions cost") :].splitlines()[4]
    told = [float(cell.strip().removesuffix(" GPU-h")) for cell in line.split("|")[2:6]]
    hours = found.lost_h
    expected = [*(hours[cause] for cause in ("crashed", "diverged", "preempted")), sum(hours.values())]
    assert told == pytest.approx(expected, rel=5e-3)
    cost = f"cost {sum(hours.values()):.3g} GPU-hours"
    assert len(notes_with(table, "3 interruptions of", cost, "preempted")) == 1
    assert ",interruptions,preempted," in parts_csv_text(table)
    picture = next(path for path in write(table, files={ReportFile.png}) if path.suffix == ".png")
    assert png_shape(picture.read_bytes())[1] > 615, "the bar is below the other panels"


def test_a_run_without_gpus_loses_hours_of_nodes(tmp_path: Path) -> None:
    (row,) = build(stormy(tmp_path / "nodes=2", gpus=None).builder.path).rows
    assert row.hours_of == "node" and row.gpu_hours is None
    assert row.causes_h["crashed"] == pytest.approx(LOST["crashed"] * 2 / 3600, rel=1e-12)


def untimed(run: Clock) -> None:
    """A script that does not time its first step records what was before it."""
    run.allocation().spend(32 + 8 + 4).started(1)
    told = {"step": 1, "attempt": 1, "restore_s": 8.0, "compile_s": 4.0, "time": run.now}
    append_lines(run.builder.run.metrics(0), [told])
    run.steps(1, 2, 5)


def evaluated(run: Clock) -> None:
    run.allocation().steps(1, 1, 2).spend(0.5).steps(1, 3, 3).steps(1, 4, 4, val_loss=1.0, val_compile_s=3.0).spend(5)
    run.steps(1, 5, 5, val_loss=1.0, val_compile_s=1.0).spend(2)


def failed_start(run: Clock) -> None:
    """A start is needed anyway; the second one, and what the first took from its begin, were lost to the hang."""
    run.allocation().spend(16).started(1).spend(100).ended(1, "hung").spend(12).started(2).steps(2, 1, 4)


def interrupted_twice(run: Clock) -> None:
    run.up_to_a_checkpoint().spend(1).ended(1, "crashed").spend(10).started(2)
    run.spend(50).ended(2, "hung").spend(10).started(3).steps(3, 5, 8)


def ends_before_steps_are_done_again(run: Clock) -> None:
    run.up_to_a_checkpoint().steps(1, 5, 100).spend(1).ended(1, "hung").spend(10).started(2).steps(2, 5, 12)
    run.rolled_back(2, 6, 12).spend(3).steps(2, 7, 8)


def sick_node(run: Clock) -> None:
    """A node is sick before the first attempt."""
    run.allocation().spend(8).event("node_sick", attempt=None, node=1, host="n2", cause="an ECC error")
    run.ended(None, "node_failed", "requeue").spend(2).released()
    run.spend(64).allocation().spend(30).started(1).steps(1, 1, 4)


def without_records(run: Clock) -> None:
    """A program that records no steps is interrupted only by what it came back from."""
    run.allocation().spend(4).started(1).spend(60).ended(1, "finished", "stop")


def without_records_again(run: Clock) -> None:
    run.allocation().spend(4).started(1).spend(30).ended(1, "crashed").spend(2).started(2)
    run.spend(60).ended(2, "finished", "stop")


def on_fewer_nodes(run: Clock) -> None:
    run.allocation().spend(10).started(1).steps(1, 1, 10).ended(1, "node_failed").event("fewer_nodes", attempt=2)
    run.spend(20).started(2).steps(2, 9, 20)


def on_this_machine(run: Clock) -> None:
    run.event("submitted", cluster="local", job_id="1", nodes=2, candidate=0)
    run.spend(300).up_to_a_checkpoint()  # Another point of the sweep runs before: that is no wait for nodes.


@pytest.mark.parametrize(
    ("scenario", "seconds", "lost_s"),
    [
        (untimed, {"start": 32.0, "restore": 8.0, "compile": 4.0, "steps": 4.0}, {}),
        (evaluated, {"steps": 5.0, "compile": 4.0, "evaluations": 2.0, "shutdown": 1.0, "other": 0.5}, {}),
        (failed_start, {"start": 16.0, "restarts": 112.0, "steps": 4.0}, {"hung": 112.0}),
        (
            interrupted_twice,
            {"start": 16.0, "steps": 8.0, "saves": 2.0, "restarts": 71.0},
            {"crashed": 11.0, "hung": 60.0},
        ),
        (
            ends_before_steps_are_done_again,
            {"start": 16.0, "steps": 4.0 + 2.0 + 2.0, "saves": 2.0, "lost": 96.0 + 6.0, "restarts": 11.0 + 3.0},
            {"hung": 96.0 + 11.0, "diverged": 6.0 + 3.0},
        ),
        (sick_node, {"waiting": 64.0, "start": 8.0, "restarts": 32.0, "steps": 4.0}, {"node_sick": 32.0}),
        (without_records, {"start": 64.0}, {}),
        (without_records_again, {"start": 4.0 + 60.0, "restarts": 32.0}, {"crashed": 32.0}),
        (
            on_fewer_nodes,
            {"start": 10.0, "steps": 8.0, "lost": 2.0, "restarts": 20.0, "fewer": 12.0},
            {"node_failed": 22.0},
        ),
        (on_this_machine, {"start": 16.0, "steps": 4.0, "saves": 2.0}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_time_and_losses_are_those_worked_out_by_hand(
    tmp_path: Path, scenario: Any, seconds: dict[str, float], lost_s: dict[str, float]
) -> None:
    run = Clock(tmp_path / "run")
    scenario(run)
    found = goodput_of(run.released())
    assert found.seconds == seconds and found.lost_s == lost_s
    assert found.interruptions == dict.fromkeys(lost_s, 1)
    allocated_s = sum(seconds.values()) - seconds.get("waiting", 0.0)
    assert found.goodput == pytest.approx((seconds.get("steps", 0.0) + seconds.get("fewer", 0.0)) / allocated_s)


def test_every_cause_of_the_restart_limits_has_a_name() -> None:
    assert {str(cause) for cause in Cause} - {"finished"} < CAUSES.keys()


def test_a_cancelled_run_that_a_command_takes_back_was_interrupted_once(tmp_path: Path) -> None:
    run = Clock(tmp_path / "run").up_to_a_checkpoint()
    run.steps(1, 5, 8).ended(1, "cancelled", "stop").released()
    folder = run.builder.run
    lines = folder.metrics(0).read_text().splitlines(keepends=True)
    aside = folder.aside / "0001" / "metrics" / folder.metrics(0).name
    aside.parent.mkdir(parents=True)
    aside.write_text("".join(lines[4:]))
    folder.metrics(0).write_text("".join(lines[:4]))
    run.allocation().spend(16).started(2).steps(2, 5, 8).released()
    found = goodput_of(run)
    assert found.interruptions == {"cancelled": 1} and found.lost_s == {"continued": 4.0, "cancelled": 16.0}


# Runs without an agent, and steps that are recorded twice.


def test_without_an_agent_nothing_is_said_of_time_and_cost(tmp_path: Path) -> None:
    RunBuilder(tmp_path, 1).attempt().steps(1, [1.0] * 12).finished()
    table = build(tmp_path)
    assert table.rows[0].goodput is table.rows[0].cost is None
    assert "Where the time went" not in markdown_text(table)


def test_a_step_that_is_recorded_before_and_after_its_save_is_one_step(tmp_path: Path) -> None:
    built = RunBuilder(tmp_path, 1, 1, ("nodes=1",)).attempt()
    begun = {"job": "1", "nodes": 1, "gpus": 1, "price_per_gpu_hour": PRICE, "limit_s": 3600.0}
    built.event("agent_started", time=T0 + 1, node=0, allocated_at=T0, **begun)
    built.event("started", attempt=1, time=T0 + 2, world_size=1)
    records = [{"step": s, "attempt": 1, "step_time_s": 1.0, "time": T0 + 10 + s} for s in range(1, 9)]
    saved = {**records[3], "checkpoint_s": 0.0}
    append_lines(built.run.metrics(0), [*records[:4], saved, *records[4:]])
    built.finished(1, time=T0 + 18)
    built.event("agent_ended", node=0, job="1", time=T0 + 20, ended_at=T0 + 20)
    [row] = build(tmp_path).rows
    assert row.parts_s == {"start": 10.0, "steps": 8.0, "shutdown": 2.0}


# Compilation in a report: a run whose blocks are compiled tells it in the steps in which it happened, once.


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
        run.worker = run_of_environment({**os.environ, "LAUNCH_RUN_DIR": str(folder)})
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


# All runs together: launch.fleet.


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0.0, 2.996), (3, 0.818, 7.754), (10, 5.425, 16.962)])
def test_the_interval_of_a_rate_is_the_tabulated_one(count: int, low: float, high: float) -> None:
    """Garwood, Fiducial limits for the Poisson distribution, Biometrika 28 (1936): 90 % limits of the mean."""
    assert rate_interval(count, 1.0) == pytest.approx((low, high), abs=1e-3)
    assert rate_interval(count, 100.0) == pytest.approx((low / 100, high / 100), abs=1e-5)


def test_hosts_are_suspect_where_chance_is_no_explanation() -> None:
    fleet = Fleet(host_hours=defaultdict(float, {f"n{index}": 100.0 for index in range(10)}))
    fleet.host_failures |= {"n3": 6, "n5": 1}
    expected = 10 * (7 * 0.1**6 * 0.9 + 0.1**7)  # six or seven of seven failures on one of ten hosts
    assert fleet.suspects() == {"n3": pytest.approx(expected)}
    fleet.host_failures["n5"] = 6
    fleet.host_hours["n3"] = fleet.host_hours["n5"] = 100_000.0
    assert fleet.suspects() == {}, "they fail more because they work more"


def test_the_fleet_is_the_sum_of_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [stormy(tmp_path / name) for name in ("a", "b")]
    for clock, model in zip(runs, ("small", "large"), strict=True):
        clock.builder.run.config.parent.mkdir(exist_ok=True)
        clock.builder.run.config.write_text(f"model: {{name: {model}}}\n")
    (tmp_path / "torn" / "attempts" / "0001").mkdir(parents=True)
    RunFolder(tmp_path / "torn").record_event("agent_started", job="slurm-9")
    assert main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    one = measure_goodput(runs[0].builder.run, runs[0].builder.run.read_events())
    assert one is not None and (told["runs"], told["unknown"]) == (2, 1)
    allocated = sum(seconds for part, seconds in one.seconds.items() if part != "waiting")
    assert told["node_hours"] == pytest.approx(2 * 2 * allocated / 3600)
    assert told["gpu_hours"] == pytest.approx(2 * (one.gpu_hours or 0)) and told["goodput"] == pytest.approx(
        one.goodput
    )
    assert {cause: row["interruptions"] for cause, row in told["causes"].items()} == {
        cause: 2 * count for cause, count in one.interruptions.items()
    }
    crashed_h = 2 * 2 * one.lost_s["crashed"] / 3600
    assert told["causes"]["crashed"]["lost_node_hours"] == pytest.approx(crashed_h)
    shown = run("launch.fleet a b --by model.name", cwd=tmp_path)
    assert re.search(r"crashed +2 ", shown) and re.search(r"large +1 .*%", shown) and "preempted" in shown
    assert main([str(tmp_path / "a"), "--by", "model.nam"]) != 0
    assert "found: --by model.nam, which " in capsys.readouterr().err


SAMPLE = re.compile(r'(?P<name>[a-z_]+)\{(?P<labels>(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+)\} (?P<value>\S+)')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\.)*)"')


def read_openmetrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels, after the rules of OpenMetrics 1.0 on order, types, units and the end."""
    *lines, end, nothing = text.split("\n")
    assert (end, nothing) == ("# EOF", "")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    family = kind = ""
    seen = set()
    for line in lines:
        if line.startswith("#"):
            _, what, name, told = line.split(" ", 3)
            if what == "TYPE":
                assert name not in seen and not name.endswith("_total"), "a family is in one piece"
                seen.add(name)
                family, kind = name, told
            assert name == family and (what != "UNIT" or name.endswith(f"_{told}"))
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample is not None, line
        assert sample["name"] == family + ("_total" if kind == "counter" else "")
        labels = [(name, re.sub(r"\\(.)", r"\1", value)) for name, value in LABEL.findall(sample["labels"])]
        key = (sample["name"], frozenset(labels))
        assert key not in found
        found[key] = float(sample["value"])
    return found


def test_the_metrics_of_runs_are_those_of_the_report_and_of_the_dashboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "absent"))
    folder = tmp_path / 'a "quoted" \\ name'
    clock = stormy(folder)
    last = {"step": 21, "attempt": 3, "tokens": 1024, "loss": float("nan"), "step_time_s": 1.0, "tokens_per_s": 2048.5}
    append_lines(clock.builder.run.metrics(0), [{**last, "time": clock.now}])
    heartbeat_file(clock.builder.run).parent.mkdir()
    heartbeat_file(clock.builder.run).touch()
    os.utime(heartbeat_file(clock.builder.run), (clock.now, clock.now))
    file = tmp_path / "collector" / "runs.prom"
    assert main([str(tmp_path), "--openmetrics", str(file)]) == 1, "Slurm does not answer, and the file is written"
    assert "states of Slurm jobs are what their event logs say" in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir()] == ["runs.prom"], "no temporary file stays"
    found = read_openmetrics(file.read_text())
    goodput = goodput_of(clock)

    def value(name: str, **labels: str) -> float:
        return found[f"launch_run_{name}", frozenset({"run": str(folder), **labels}.items())]

    assert value("state", state="unknown", job_id="1") == 1 and value("heartbeat_timestamp_seconds") == clock.now
    assert (value("step"), value("tokens_per_second")) == (21, 2048.5) and value("loss") != value("loss")
    assert value("goodput_ratio") == pytest.approx(goodput.goodput)
    assert {cause: value("interruptions_total", cause=cause) for cause in LOST} == dict.fromkeys(LOST, 1)
    allocated_s = sum(goodput.seconds.values()) - goodput.seconds["waiting"]
    assert value("node_seconds_total") == pytest.approx(2 * allocated_s)

    if promtool := shutil.which("promtool"):  # It reads the older format, and wants _total of the family's name, too.
        text = re.sub(r"(# (?:TYPE|HELP) launch_run_(?:interruptions|node_seconds)) ", r"\1_total ", file.read_text())
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    dashboard = (ROOT / "docs" / "grafana.json").read_text()
    panels = json.loads(dashboard)["panels"]
    written = {f"launch_run_{family}" + "_total" * (kind == "counter") for family, (kind, *_) in FAMILIES.items()}
    assert len(panels) <= 6 and set(re.findall(r"launch_run_\w+", dashboard)) <= written


def test_metrics_are_one_form_of_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--json", "--openmetrics", str(tmp_path / "runs.prom")]) != 0
    assert "found: --openmetrics with --by or --json" in capsys.readouterr().err
    assert not (tmp_path / "runs.prom").exists()
