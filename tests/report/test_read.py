"""Step records of ranks as columns of numbers, against plain JSON and plain loops; damaged lines; files read ahead."""

from __future__ import annotations

import csv
import gc
import io
import json
import random
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import launch.report.read as read_ahead
from launch.report import build, show, write
from launch.report import read as columns
from launch.report.page import tiles
from launch.report.points import read_point
from launch.report.read import read_columns, read_environment, read_last
from launch.report.steps import RECORDED, Steps, UnreadLines, read_run_steps, step_times
from launch.report.text import csv_text, json_text, markdown_text
from launch.runs.folder import RunFolder
from launch.runs.records import read_records


class Step(NamedTuple):
    """One step of all ranks; an unknown figure is None."""

    step: int
    attempt: int
    time_s: float
    work: float | None
    mfu_palm: float | None
    recorded_by: int
    phases: dict[str, float] | None


def fill_in_step_times(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete records of one rank, in step order, that name no step time.

    It is the time since the record before, over the steps in between; the first record of an attempt has none, nor has
    one that follows a gap of another attempt.
    """
    filled: list[dict[str, Any]] = []
    for record in records:
        before = filled[-1] if filled else None
        if "step_time_s" not in record and before is not None and before["attempt"] == record["attempt"]:
            steps = record["step"] - before["step"]
            seconds = record.get("time", 0.0) - before.get("time", 0.0)
            record = record | ({"step_time_s": seconds / steps} if seconds > 0 and "time" in before else {})
        filled.append(record)
    return filled


def own_work(record: Mapping[str, Any], unit: str | None) -> float | None:
    """A rank's own number of ``unit`` in a step, None where the record does not tell.

    An image is a sample. The GPT library's ``samples`` are indices, no number.
    """
    names = {"images": ("images", "samples"), None: ()}.get(unit, (unit,))
    for name in (*names, "work"):
        value = record.get(str(name))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def steps_of(found: Steps) -> list[Step]:
    """Take arrays of steps apart, one step after another."""
    names = ("step", "attempt", "time_s", "work", "mfu_palm", "recorded_by")
    columns = [getattr(found, name).tolist() for name in names]
    phases = [
        {phase: float(values[at]) for phase, values in found.phases.items() if not np.isnan(values[at])}
        for at in range(len(found))
    ]
    return [
        Step(*(None if value != value else value for value in values), of if "computation" in of else None)
        for *values, of in zip(*columns, phases, strict=True)
    ]


FIELDS = ("step_time_s", "tokens", "samples", "work", "mfu_palm", "data_wait_s", "time", "loss")


def reference_steps(run: RunFolder, unit: str | None) -> list[Step]:
    """Every record of every rank in dictionaries, as the report read them before it streamed."""
    setups = {number: read_environment(run, number) for number in run.attempts()}
    by_rank = {}
    for rank in run.metric_ranks():
        if records := fill_in_step_times(read_records(run.metrics(rank))):
            by_rank[rank] = {record["step"]: record for record in records}
    recording: dict[int, set[int]] = defaultdict(set)
    for rank, of_rank in by_rank.items():
        for record in of_rank.values():
            recording[record["attempt"]].add(rank)
    steps = []
    wanted = setups[max(record["attempt"] for record in by_rank[min(by_rank)].values())]
    assert wanted is not None
    for number in sorted({step for records in by_rank.values() for step in records}):
        records = [of_rank[number] for of_rank in by_rank.values() if number in of_rank]
        attempt = max(record["attempt"] for record in records)
        records = [record for record in records if record["attempt"] == attempt]
        setup = setups[attempt]
        assert setup is not None
        if setup.setup() != wanted.setup():
            continue
        expected = setup.world_size if setup.workload == "gpt" else len(recording[attempt])
        if len(records) != expected or not all("step_time_s" in record for record in records):
            continue
        time_s = max(record["step_time_s"] for record in records)
        own = [work for record in records if (work := own_work(record, unit)) is not None]
        mfu = [record["mfu_palm"] for record in records if record.get("mfu_palm") is not None]
        per_s = records[0].get(f"{unit}_per_s")
        work = sum(own) if len(own) == setup.world_size else setup.work_per_step
        if work is None and own and len(own) == len(records):
            work = sum(own)
        if work is None and per_s is not None:
            work = per_s * time_s
        mean = sum(mfu) / len(mfu) if mfu else None
        steps.append(Step(number, attempt, time_s, work, mean, len(records), reference_phases(records)))
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
    if len(records) > 1 and "communication" in phases:
        phases["stragglers"] = works[critical] - sum(works) / len(works)
    return phases | {"computation": time_s - sum(phases.values())}


def assert_same_steps(steps: Steps, expected: Sequence[Step]) -> None:
    """The same figures to the last digit; phases are differences of sums, whose order is free."""
    found = steps_of(steps)
    assert [step[:-1] for step in found] == [step[:-1] for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.phases is None) == (other.phases is None)
        assert one.phases is None or one.phases == pytest.approx(other.phases, abs=1e-12)


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


def assert_same_as_json(path: Path) -> None:
    found, expected = read_columns(path, FIELDS), read_records(path)
    assert found.steps.tolist() == [record["step"] for record in expected]
    assert found.attempts.tolist() == [record["attempt"] for record in expected]
    assert read_last(path, found) == (expected[-1] if expected else {})
    for name in FIELDS:
        numbers = [
            value if isinstance(value := record.get(name), int | float) and not isinstance(value, bool) else None
            for record in expected
        ]
        expected_numbers = [np.nan if number is None else number for number in numbers]
        assert found.values[name].tolist() == pytest.approx(expected_numbers, rel=0, abs=0, nan_ok=True), name


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


LINE = '{"step": 2, "attempt": 1, "step_time_s": 0.5, "tokens": 8, "layers": {"tokens": 3}, "time": 1.0}'


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(LINE[:60], id="torn"),
        pytest.param(LINE[: LINE.index("}") + 1], id="torn behind a mapping inside"),
        pytest.param(LINE[:30] + LINE, id="two writers in one line"),
        pytest.param(LINE[:50] + "\x00" * 30, id="a block that never reached the disk"),
        pytest.param(LINE.replace("0.5", "0.5.1"), id="no number"),
        pytest.param(LINE.replace('"step": 2', '"step": 2.0'), id="no step"),
        pytest.param(LINE.replace("8", "123456789012345678901234567890.25"), id="more digits than a double has"),
        pytest.param(LINE.replace('"tokens": 8, ', ""), id="known in a mapping only"),
        pytest.param(LINE.replace("0.5", "NaN").replace('"step_time_s"', '"mfu_palm"'), id="another key"),
        pytest.param(LINE.replace("layers", 'a\\"b'), id="a quote in a key"),
        pytest.param(LINE.replace("{", "{ "), id="another hand"),
        pytest.param(LINE.replace("1.0}", "1.0, }"), id="a comma too many"),
        pytest.param("[1, 2]", id="no record"),
        pytest.param("", id="an empty line"),
        pytest.param(LINE.replace("0.5", "1_0"), id="an underscore"),
    ],
)
def test_a_line_among_others_is_read_as_json_reads_it(tmp_path: Path, line: str) -> None:
    others = [LINE.replace('"step": 2', f'"step": {step}').replace("0.5", f"{step / 7}") for step in (1, 3, 4, 10)]
    lines = [others[0], line, *others[1:], b'{"step": 11, "att']
    assert_same_as_json(write_lines(tmp_path / "rank_00000.jsonl", lines))


def test_blocks_end_between_lines_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [LINE.replace('"step": 2', f'"step": {step}') for step in range(1, 40)]
    path = write_lines(tmp_path / "rank_00000.jsonl", [*lines, lines[0].replace('"attempt": 1', '"attempt": 2')])
    for size in (7, 97, 98, 512, 4096):
        monkeypatch.setattr(columns, "BLOCK", size)
        assert_same_as_json(path)


def restarted_run(folder: Path, make_run: Any, seed: int, ranks: int = 5) -> RunFolder:
    """A run of three attempts that lost steps, ended in torn lines, and did not write the same on all ranks."""
    chance = random.Random(seed)
    builder = make_run(folder, ranks, ranks, global_batch=ranks * 2)
    first = 1
    for attempt in (1, 2, 3):
        builder.attempt(attempt)
        last = first + chance.randint(8, 14)
        for rank in range(ranks):
            lines: list[str | bytes] = []
            for step in range(first, last - chance.randint(0, 2)):
                record: dict[str, Any] = {"step": step, "attempt": attempt, "loss": chance.random(), "tokens": 7 + rank}
                record |= {"samples": [step, step + 1], "step_time_s": chance.uniform(0.3, 2)}
                record |= {"layer_grad_norms": {"tokens": 1.5, "x": chance.random()}} if step % 3 == 0 else {}
                if seed % 2 or rank:  # in half of the runs one rank tells no phases
                    record |= {"comm_s": chance.uniform(0, 0.1), "data_wait_s": chance.uniform(0, 0.1)}
                record |= {"mfu_palm": chance.random(), "time": 1e9 + step}
                lines.append(json.dumps(record))
            text = "".join(f"{line}\n" for line in lines).encode() + (b'{"step": 99, "at\n' if rank % 2 else b"")
            path = builder.run.metrics(rank)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((path.read_bytes() if path.exists() else b"") + text)
        first = last - chance.randint(2, 7)
    return builder.run


@pytest.mark.parametrize("seed", range(6))
def test_steps_of_a_restarted_run_are_those_of_plain_loops(tmp_path: Path, make_run: Any, seed: int) -> None:
    run = restarted_run(tmp_path, make_run, seed)
    setups = {number: setup for number in run.attempts() if (setup := read_environment(run, number)) is not None}
    reading, expected = read_run_steps(run, setups), reference_steps(run, "tokens")
    assert len(expected) > 10
    assert {step.attempt for step in expected} == {1, 2, 3}
    assert_same_steps(reading.steps, expected)
    first = read_records(run.metrics(0))
    assert (reading.last_step, reading.loss) == (first[-1]["step"], first[-1]["loss"])


@pytest.mark.parametrize("fields", [{"images": 3, "work": 2}, {"samples_per_s": 50.0}, {"samples": 4}, {}])
def test_steps_of_a_script_are_those_of_plain_loops(tmp_path: Path, make_run: Any, fields: dict[str, Any]) -> None:
    builder = make_run(tmp_path, 3, script={"unit": "samples" if "samples" in str(fields) else None}).attempt()
    builder.records([0.5, 0.25, 1.0, 0.75, 0.125, 2.0], ranks=2, **fields)
    setup = read_environment(builder.run, 1)
    assert setup is not None
    reading = read_run_steps(builder.run, {1: setup})
    assert reading.unit == next((unit for unit in ("samples", "images") if unit in str(fields)), None)
    assert_same_steps(reading.steps, reference_steps(builder.run, reading.unit))
    assert len(reading.steps) == 5  # the first has no step before it


def test_memory_does_not_grow_with_the_number_of_ranks(tmp_path: Path, make_run: Any) -> None:
    def peak(ranks: int) -> int:
        builder = make_run(tmp_path / str(ranks), ranks, global_batch=ranks).attempt()
        text = "".join(LINE.replace('"step": 2', f'"step": {step}') + "\n" for step in range(1, 2001))
        for rank in range(ranks):
            write_lines(builder.run.metrics(rank), [text.encode()])
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
    # A reading that keeps what it read would hold 16 times as much; files read at once are a matter of chance.
    few, many = peak(4), peak(64)
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


# Lines of the step records that cannot be read: counted by rank and attempt, as Python's json sees them, and told.


GARBLE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[:40],
    "without its beginning": lambda line: line[40:],
    "zeros": lambda line: b"\x00" * len(line),
    "zeros at its end": lambda line: line[:-30] + b"\x00" * 30,
    "two in one": lambda line: line[:25] + line,
    "no text": lambda line: line[:30] + b"\xff\xfe" + line[32:],
    "another number": lambda line: line.replace(b'"step": ', b'"step": 0.'),
    "a step without end": lambda line: line.replace(b'"step": ', b'"step": ' + b"9" * 400),
    "no record": lambda line: b"[1, 2]",
    "another key": lambda line: line.replace(b'"attempt"', b'"atempt"'),
}


def is_record(line: bytes) -> bool:
    """Tell what a line is to Python's parser: a record has a step and an attempt that are numbers of a run."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and all(
        isinstance(value.get(name), int) and value[name] < 1e300 for name in ("step", "attempt")
    )


def counted(run: RunFolder) -> dict[int, int]:
    """Lines of each rank's file, blank ones aside, that are no records."""
    found = {
        rank: sum(bool(line.strip()) and not is_record(line) for line in run.metrics(rank).read_bytes().split(b"\n"))
        for rank in run.metric_ranks()
    }
    return {rank: lines for rank, lines in found.items() if lines}


def garble(path: Path, at: int, how: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[at] = how(lines[at])
    path.write_bytes(b"\n".join(lines))


def test_many_lines_of_many_ranks_are_counted_as_json_sees_them(
    tmp_path: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, ranks = random.Random(5), 12
    run = make_run(tmp_path, ranks, global_batch=ranks).attempt().steps(1, [1.0] * 60).event("finished", attempt=1).run
    for rank in chance.sample(range(ranks), 7):
        for at in chance.sample(range(60), chance.randint(1, 40)):
            garble(run.metrics(rank), at, chance.choice(list(GARBLE.values())))
    run.metrics(3).write_bytes(b"\x00" * 100 + b"\n" + b"\x00" * 300)
    monkeypatch.setattr(columns, "BLOCK", 997)
    found = Counter[int]()
    for one in read_point(tmp_path).unread:
        found[one.rank] += one.lines
    assert found == counted(run) and found[3] == 2 and len(found) >= 7


def restarted(folder: Path, make_run: Any) -> RunFolder:
    """A run of 2 ranks whose attempts 1 and 2 were cut in the middle of a line, and which lost a block of attempt 3."""
    builder = make_run(folder, 2).attempt(1).steps(1, [1.0] * 20)
    path = builder.run.metrics(1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 21, "att\n')  # as the next writer closes it
    builder.attempt(2)
    with path.open("ab") as file:  # of the first line that attempt 2 wrote
        file.write(b'{"step": 16, "attempt": 2, "loss": 1.\n')
    builder.attempt(3).steps(16, [1.0] * 15, attempt=3)
    garble(path, 30, lambda line: b"\x00" * len(line))
    garble(path, 31, lambda line: b"\x00" * len(line))
    return builder.run


def test_lines_belong_to_the_attempt_that_they_tell_or_that_came_before(tmp_path: Path, make_run: Any) -> None:
    run = restarted(tmp_path, make_run)
    run.record_event("finished", attempt=3)
    assert read_point(tmp_path).unread == (UnreadLines(1, 1, 1), UnreadLines(1, 2, 1), UnreadLines(1, 3, 2))
    garble(run.metrics(0), 0, lambda line: line[:5])
    assert read_point(tmp_path).unread[0] == UnreadLines(0, 1, 1), "before the first record: as that one"
    run.metrics(0).write_bytes(b"\x00" * 50)
    assert read_point(tmp_path).unread[0] == UnreadLines(0, None, 1)


def test_half_a_line_at_the_end_of_a_file_is_told_only_when_nobody_writes_it_any_more(
    tmp_path: Path, make_run: Any
) -> None:
    builder = make_run(tmp_path, 2).attempt().steps(1, [1.0] * 20)
    path = builder.run.metrics(1)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for written in range(len(last) + 1):
        path.write_bytes(whole + last[:written])
        assert read_point(tmp_path).unread == (), "a run that goes on"
    path.write_bytes(whole.replace(last, last[:50] + b"\n") + last[:50])
    assert read_point(tmp_path).unread == (UnreadLines(1, 1, 1),), "what is in the middle is told at once"
    builder.event("rank_failed", attempt=1, rank=1)
    assert read_point(tmp_path).unread == (UnreadLines(1, 1, 2),)
    builder.attempt(2)
    assert read_point(tmp_path).unread == (UnreadLines(1, 1, 1),), "its ranks are at work again"
    path.write_bytes(whole + last[:-1])
    builder.event("finished", attempt=2)
    assert read_point(tmp_path).unread == (), "a whole record without its newline is one"


def texts(folder: Path) -> dict[str, str]:
    """Texts of a report of a folder, by the way in which it says them."""
    table, shown = build(folder), io.StringIO()
    show(table, Console(file=shown, width=250))
    page = next(path for path in write(table) if path.suffix == ".html")
    return {
        "console": shown.getvalue(),
        "markdown": markdown_text(table),
        "csv": csv_text(table),
        "json": json_text(table),
        "page": page.read_text(),
    }


def test_every_form_of_the_report_tells_the_lines_and_a_clean_one_none(tmp_path: Path, make_run: Any) -> None:
    for ranks in (1, 2):
        builder = make_run(tmp_path / f"nodes={ranks}", ranks, ranks, (f"nodes={ranks}",)).attempt()
        builder.steps(1, [1.0] * 30).event("finished", attempt=1)
    clean = texts(tmp_path)
    assert json.loads(clean["json"])["unread"] == [[], []]
    assert [row["unread_lines"] for row in csv.DictReader(io.StringIO(clean["csv"]))] == ["0", "0"]
    run = RunFolder(tmp_path / "nodes=2")
    for rank, at in ((1, 7), (1, 9), (0, 20)):
        garble(run.metrics(rank), at, GARBLE["zeros"])
    told = texts(tmp_path)
    note = (
        "3 lines among the step records of nodes=2 could not be read, as a crash, a full disk or a power cut "
        "leaves them: 2 of rank 1 in attempt 1; 1 of rank 0 in attempt 1. Unless their steps were made again, the "
        f"figures lack them, and the comparison of ranks may lack these ranks; see {run.metrics(1)}."
    )
    for form in ("console", "markdown", "page"):
        assert note in told[form] and "could not be read" not in clean[form].lower()
    content = json.loads(told["json"])
    expected = [{"rank": 0, "attempt": 1, "lines": 1}, {"rank": 1, "attempt": 1, "lines": 2}]
    assert content["unread"] == [[], expected] and note == content["notes"][0]
    assert [row["unread_lines"] for row in content["rows"]] == [0, sum(counted(run).values())]
    assert [row["unread_lines"] for row in csv.DictReader(io.StringIO(told["csv"]))] == ["0", "3"]
    table = build(tmp_path)
    (row,) = [row for row in table.rows if row.ranks == 2]
    assert row.steps_measured == 30 - 5 - 3
    warning = tiles(table)[0]
    assert (warning.name, warning.value) == ("Could not be read", "3 lines") and "nodes=2" in warning.text


def test_of_many_ranks_the_note_names_those_with_most_lines(tmp_path: Path, make_run: Any) -> None:
    run = make_run(tmp_path, 6, global_batch=6).attempt().steps(1, [1.0] * 20).event("finished", attempt=1).run
    for rank in range(6):
        for at in range(rank + 1):
            garble(run.metrics(rank), 2 * at + 1, GARBLE["cut"])
    first = build(tmp_path).notes[0]
    told = "6 of rank 5 in attempt 1; 5 of rank 4 in attempt 1; 4 of rank 3 in attempt 1; and 3 more"
    assert first.startswith("21 lines") and told in first and str(run.metrics(5)) in first


# Files read ahead by forked processes: in order, with the same figures as without them, and where they are taken.


READ = """
import sys
from pathlib import Path
import launch.report.read as read_ahead
from launch.report import build
from launch.report.text import json_text

found = []
for read_ahead.MUCH in (0, 1 << 60):
    pools = []
    of = read_ahead.ProcessPoolExecutor
    read_ahead.ProcessPoolExecutor = lambda count, **known: pools.append(count) or of(count, **known)
    found.append(build(Path(sys.argv[1])))
    read_ahead.ProcessPoolExecutor = of
    print("processes" if pools else "one process")
assert json_text(found[0]) == json_text(found[1])
(detail,), ((unread,),) = found[0].details, found[0].unread
assert len(detail.step_times_s) == 7 and detail.rank_times is not None and (unread.rank, unread.lines) == (5, 1)
"""


def test_processes_read_the_same_figures_as_one(tmp_path: Path, make_run: Any) -> None:
    built = make_run(tmp_path, 6, 3).attempt()
    built.steps(1, [0.1 + 0.01 * step for step in range(12)], rank_delay=0.003, data_wait_s=0.01)
    with built.run.metrics(5).open("a") as file:
        file.write('{"step": 13, "att\n')
    several = "import os; os.sched_getaffinity = lambda pid: {0, 1}\n"  # also on a machine with one core
    run = subprocess.run([sys.executable, "-c", several + READ, str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["processes", "one", "process"]), run.stderr


@pytest.mark.parametrize(
    ("size", "cores", "threads", "expected"),
    [
        (read_ahead.MUCH, 2, 1, 2),
        (read_ahead.MUCH, 64, 1, read_ahead.MOST_PROCESSES),
        (read_ahead.MUCH - 1, 64, 1, 0),
        (read_ahead.MUCH, 1, 1, 0),
        (read_ahead.MUCH, 2, 2, 0),
    ],
    ids=["two cores", "many cores", "little to read", "one core", "other threads"],
)
def test_processes_are_forked_where_it_pays_and_is_safe(
    monkeypatch: pytest.MonkeyPatch, size: int, cores: int, threads: int, expected: int
) -> None:
    monkeypatch.setattr(read_ahead.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    assert read_ahead.processes_for(size) == expected
