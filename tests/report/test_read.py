"""Step records of ranks as columns of numbers, against plain JSON and plain loops; damaged lines; files read ahead."""

from __future__ import annotations

import csv
import gc
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.report import build, page
from launch.report import read as columns
from launch.report.points import read_point
from launch.report.read import read_columns, read_environment
from launch.report.steps import RECORDED, read_run_steps, step_times
from launch.report.text import csv_text, markdown_text
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import python
from tests.support.run_folders import RunBuilder, shown

FIELDS = ("step_time_s", "tokens", "samples", "work", "mfu_palm", "data_wait_s", "time", "loss")


def reference_steps(run: RunFolder) -> list[dict[str, Any]]:
    """The steps that all ranks of a GPT recorded, from every record of every rank in dictionaries."""
    world = len(json.loads(run.environment(1).read_text())["ranks"])
    by_rank = [{record["step"]: record for record in read_records(run.metrics(rank))} for rank in range(world)]
    steps = []
    for number in sorted({step for records in by_rank for step in records}):
        records = [of_rank[number] for of_rank in by_rank if number in of_rank]
        attempt = max(record["attempt"] for record in records)
        records = [record for record in records if record["attempt"] == attempt]
        if len(records) == world:
            time_s = max(record["step_time_s"] for record in records)
            work = sum(record["tokens"] for record in records)
            mfu = sum(record["mfu_palm"] for record in records) / world
            found = {"step": number, "attempt": attempt, "time_s": time_s, "work": work, "mfu_palm": mfu}
            steps.append(found | {"phases": reference_phases(records)})
    return steps


def reference_phases(records: list[dict[str, Any]]) -> dict[str, float] | None:
    """The time of one step divided, rank by rank."""
    told = [{name for name in RECORDED.values() if name in record} for record in records]
    if any(names != told[0] for names in told):
        return None
    time_s = max(record["step_time_s"] for record in records)
    works = [record["step_time_s"] - sum(record[name] for name in told[0]) for record in records]
    own = [record["step_time_s"] - record.get("comm_s", 0.0) for record in records]
    critical = max(range(len(records)), key=lambda index: own[index])
    phases = {phase: records[critical][name] for phase, name in RECORDED.items() if name in told[0]}
    if "communication" in phases:
        phases["communication"] = time_s - own[critical]
        phases["stragglers"] = works[critical] - sum(works) / len(works)
    return phases | {"computation": time_s - sum(phases.values())}


def assert_same_as_json(path: Path) -> None:
    found, expected = read_columns(path, FIELDS), read_records(path)
    assert found.steps.tolist() == [record["step"] for record in expected]
    assert found.attempts.tolist() == [record["attempt"] for record in expected]
    for name in FIELDS:
        numbers = [
            value if isinstance(value := record.get(name), int | float) and not isinstance(value, bool) else np.nan
            for record in expected
        ]
        assert found.values[name].tolist() == pytest.approx(numbers, rel=0, abs=0, nan_ok=True), name


number = st.floats(allow_nan=False) | st.integers(-(2**52), 2**52)
figure = number | st.none() | st.booleans() | st.lists(number, max_size=2) | st.text(max_size=5)
mapping = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), number, max_size=3)
record = st.fixed_dictionaries(
    {"step": st.integers(1, 12), "attempt": st.integers(1, 3)},
    optional=dict.fromkeys((*FIELDS, "lr", "layers"), figure | mapping),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(record, max_size=25), st.integers(0, 200), st.sampled_from([(", ", ": "), (",", ":")]))
def test_any_records_are_read_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], cut: int, separators: tuple[str, str]
) -> None:
    text = "".join(json.dumps(value, separators=separators) + "\n" for value in records).encode()
    path = tmp_path_factory.mktemp("records") / "rank_00000.jsonl"
    path.write_bytes(text[: max(0, len(text) - cut)])
    assert_same_as_json(path)


LINE = b'{"step": 2, "attempt": 1, "step_time_s": 0.5, "tokens": 8, "layers": {"tokens": 3}, "time": 1.0}'
CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "a number with more digits than a double": lambda line: line.replace(b"8", b"123456789012345678901234567890.25"),
    "a field in a mapping only": lambda line: line.replace(b'"tokens": 8, ', b""),
    "NaN": lambda line: line.replace(b'"step_time_s": 0.5', b'"mfu_palm": NaN'),
    "a quote in a key": lambda line: line.replace(b"layers", b'a\\"b'),
    "another hand": lambda line: line.replace(b"{", b"{ "),
    "an empty line": lambda line: b"",
}
"""What is still a record, or nothing."""
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[:40],
    "cut behind a mapping inside": lambda line: line[: line.index(b"}") + 1],
    "without its beginning": lambda line: line[40:],
    "zeros": lambda line: b"\x00" * len(line),
    "zeros at its end": lambda line: line[:-30] + b"\x00" * 30,
    "two in one": lambda line: line[:25] + line,
    "no text": lambda line: line[:30] + b"\xff\xfe" + line[32:],
    "no number": lambda line: line.replace(b"0.5", b"0.5.1"),
    "an underscore": lambda line: line.replace(b"0.5", b"1_0"),
    "no step": lambda line: line.replace(b'"step": ', b'"step": 0.'),
    "a step without end": lambda line: line.replace(b'"step": ', b'"step": ' + b"9" * 400),
    "a comma too many": lambda line: line.replace(b"1.0}", b"1.0, }"),
    "no record": lambda line: b"[1, 2]",
    "another key": lambda line: line.replace(b'"attempt"', b'"atempt"'),
}


@pytest.mark.parametrize("name", [*CHANGED, *DAMAGED])
def test_a_line_among_others_is_read_as_json_reads_it_and_counted(tmp_path: Path, name: str) -> None:
    path, lines = tmp_path / "rank_00000.jsonl", [LINE.replace(b": 2,", b": %d," % step) for step in (1, 2, 3, 4, 10)]
    lines[1] = (CHANGED | DAMAGED)[name](LINE)
    path.write_bytes(b"\n".join([*lines, b'{"step": 11, "att']))  # the last line is being written
    if name != "a step without end":  # which is a record to JSON, and no number to the report
        assert_same_as_json(path)
    assert read_columns(path, FIELDS).unread == (name in DAMAGED)


def test_blocks_end_between_lines_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [LINE.replace(b": 2,", b": %d," % step) for step in range(1, 40)]
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(b"\n".join([*lines, lines[5][:50], lines[0].replace(b'"attempt": 1', b'"attempt": 2'), b""]))
    for size in (7, 97, 98, 512, 4096):
        monkeypatch.setattr(columns, "BLOCK", size)
        assert_same_as_json(path)
        assert read_columns(path, FIELDS).unread == 1


def restarted_run(folder: Path, seed: int, ranks: int = 5) -> RunFolder:
    """A run of three attempts that lost steps, ended in torn lines, and did not write the same on all ranks."""
    chance = random.Random(seed)
    builder = RunBuilder(folder, ranks, ranks, global_batch=ranks * 2)
    first = 1
    for attempt in (1, 2, 3):
        builder.attempt(attempt)
        last = first + chance.randint(8, 14)
        for rank in range(ranks):
            lines = []
            for step in range(first, last - chance.randint(0, 2)):
                record: dict[str, Any] = {"step": step, "attempt": attempt, "loss": chance.random(), "tokens": 7 + rank}
                record |= {"samples": [step, step + 1], "step_time_s": chance.uniform(0.3, 2)}
                record |= {"layer_grad_norms": {"tokens": 1.5, "x": chance.random()}} if step % 3 == 0 else {}
                if seed % 2 or rank:  # in half of the runs one rank tells no phases
                    record |= {"comm_s": chance.uniform(0, 0.1), "data_wait_s": chance.uniform(0, 0.1)}
                record |= {"mfu_palm": chance.random(), "time": 1e9 + step}
                lines.append(json.dumps(record) + "\n")
            path = builder.run.metrics(rank)
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write("".join([*lines, *(['{"step": 99, "at\n'] if rank % 2 else [])]))
        first = last - chance.randint(2, 7)
    return builder.run


@pytest.mark.parametrize("seed", range(4))
def test_steps_of_a_restarted_run_are_those_of_plain_loops(tmp_path: Path, seed: int) -> None:
    run = restarted_run(tmp_path, seed)
    setups = {number: setup for number in run.attempts() if (setup := read_environment(run, number)) is not None}
    reading, expected = read_run_steps(run, setups), reference_steps(run)
    assert len(expected) > 10 and {step["attempt"] for step in expected} == {1, 2, 3}
    found = reading.steps
    for name in ("step", "attempt", "time_s", "work", "mfu_palm"):
        assert getattr(found, name).tolist() == [step[name] for step in expected], name
    for at, phases in enumerate(step["phases"] for step in expected):
        here = {phase: float(values[at]) for phase, values in found.phases.items() if not np.isnan(values[at])}
        if phases is None:
            assert "computation" not in here
        else:  # differences of sums, whose order is free
            assert here == pytest.approx(phases, abs=1e-12)
    last = read_records(run.metrics(0))[-1]
    assert (reading.last_step, reading.loss) == (last["step"], last["loss"])
    assert reading.unread == {1: 3, 3: 3}


def test_memory_does_not_grow_with_the_number_of_ranks(tmp_path: Path) -> None:
    def peak(ranks: int) -> int:
        builder = RunBuilder(tmp_path / str(ranks), ranks, global_batch=ranks).attempt()
        text = b"".join(LINE.replace(b": 2,", b": %d," % step) + b"\n" for step in range(1, 2001))
        builder.run.metrics(0).parent.mkdir(parents=True)
        for rank in range(ranks):
            builder.run.metrics(rank).write_bytes(text)
        setup = read_environment(builder.run, 1)
        assert setup is not None
        gc.collect()  # what earlier tests left is not freed, nor counted, in between
        tracemalloc.start()
        reading = read_run_steps(builder.run, {1: setup})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(reading.steps) == 2000
        return found

    peak(2)  # what is imported and cached once
    # A reading that keeps what it read would hold 12 times as much; files read at once are a matter of chance.
    few, many = peak(4), peak(48)
    assert many <= 4 * few, (many, few)


def test_step_times_that_are_not_finite_are_unknown(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    values = ("0.5", "Infinity", "-Infinity", "NaN", "1e999", "null", "0.25")
    path.write_text(
        "".join(f'{{"step": {step}, "attempt": 1, "step_time_s": {value}}}\n' for step, value in enumerate(values))
    )
    found = read_columns(path, ("step_time_s", "time"))
    assert len(found) == len(values)
    assert step_times(found).tolist() == pytest.approx([0.5, *[np.nan] * 5, 0.25], nan_ok=True)


# Lines of the step records that cannot be read: reported in every form of the report.


def damage(path: Path, at: int) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[at] = b"\x00" * len(lines[at])
    path.write_bytes(b"\n".join(lines))


def test_half_a_line_at_the_end_of_a_file_is_being_written(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path, 2).attempt().steps(1, [1.0] * 20)
    path = builder.run.metrics(1)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for written in range(len(last) + 1):
        path.write_bytes(whole + last[:written])
        assert read_point(tmp_path).unread == {}
    path.write_bytes(whole.replace(last, last[:50] + b"\n") + last[:50])
    assert read_point(tmp_path).unread == {1: 1}, "what is in the middle counts at once"


def texts(folder: Path) -> dict[str, str]:
    """Texts of a report of a folder, by the way in which it says them."""
    table = build(folder)
    told = {"console": shown(table, width=250), "markdown": markdown_text(table), "csv": csv_text(table)}
    return told | {"page": page(table)}


def test_every_form_of_the_report_tells_the_lines_and_a_clean_one_none(tmp_path: Path) -> None:
    for ranks in (1, 8):
        builder = RunBuilder.of_nodes(tmp_path, ranks)
        builder.steps(1, [1.0] * 30).finished()
    clean = texts(tmp_path)
    run = RunFolder(tmp_path / "nodes=8")
    for rank in range(5):
        for at in range(rank + 1):
            damage(run.metrics(rank), 2 * at + 7)
    told = texts(tmp_path)
    note = (
        "15 lines among the step records of nodes=8 could not be read, as a crash, a full disk or a power cut leaves "
        "them: 5 of rank 4; 4 of rank 3; 3 of rank 2; and 2 more. Unless their steps were made again, the figures "
        f"lack them; see {run.metrics(4)}."
    )
    for form in ("console", "markdown", "page"):
        assert note in told[form] and "could not be read" not in clean[form].lower()
    for text, lines in ((clean, ["0", "0"]), (told, ["0", "15"])):
        assert [row["unread_lines"] for row in csv.DictReader(io.StringIO(text["csv"]))] == lines
    assert build(tmp_path).rows[1].steps_measured == 30 - 5 - 5


# Files read ahead by forked processes: in order, with the same figures as without them, and never beside threads.


READ = """
import os, sys, threading
from pathlib import Path
import launch.report.read as reading
from launch.report import build
from launch.report.text import json_text

os.sched_getaffinity = lambda pid: {0, 1}  # also on a machine with one core
of = reading.ProcessPoolExecutor
found, ended = [], threading.Event()
for reading.MUCH in (0, 1 << 60, 0):
    pools = []
    reading.ProcessPoolExecutor = lambda count, **known: pools.append(count) or of(count, **known)
    if len(found) == 2:
        threading.Thread(target=ended.wait).start()
    found.append(json_text(build(Path(sys.argv[1]))))
    print("processes" if pools else "one")
ended.set()
assert len(set(found)) == 1 and '"unread_lines": 1' in found[0]
"""


def test_processes_read_the_same_figures_as_one(tmp_path: Path) -> None:
    built = RunBuilder(tmp_path, 6, 3).attempt()
    built.steps(1, [0.1 + 0.01 * step for step in range(12)], rank_delay=0.003, data_wait_s=0.01)
    with built.run.metrics(5).open("a") as file:
        file.write('{"step": 13, "att\n')
    assert python(READ, tmp_path, cwd=tmp_path).split() == ["processes", "one", "one"]
