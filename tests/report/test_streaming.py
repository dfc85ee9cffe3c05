"""Step records read as columns and reduced rank by rank, against the same figures from plain JSON and plain loops."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.report import read as columns
from launch.report.read import read_columns, read_environment, read_last
from launch.report.steps import RECORDED, Steps, read_steps, step_times
from launch.runs.folder import RunFolder
from launch.runs.records import fill_in_step_times, own_work, read_records


class Step(NamedTuple):
    """One step of all ranks; an unknown figure is None."""

    step: int
    attempt: int
    time_s: float
    work: float | None
    mfu_palm: float | None
    recorded_by: int
    phases: dict[str, float] | None


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
    for number in sorted({step for records in by_rank.values() for step in records}):
        records = [of_rank[number] for of_rank in by_rank.values() if number in of_rank]
        attempt = max(record["attempt"] for record in records)
        records = [record for record in records if record["attempt"] == attempt]
        setup = setups[attempt]
        assert setup is not None
        if not setup.same_setup(wanted):
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


def write(path: Path, lines: list[str | bytes]) -> Path:
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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
def test_every_double_is_read_to_its_last_digit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    lines = [
        json.dumps({"step": at, "attempt": 1, "loss": value, "step_time_s": -value, "time": at + value})
        for at, value in enumerate(values, start=1)
    ]
    assert_same_as_json(write(tmp_path_factory.mktemp("doubles") / "rank_00000.jsonl", list(lines)))


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
    assert_same_as_json(write(tmp_path / "rank_00000.jsonl", [others[0], line, *others[1:], b'{"step": 11, "att']))


def test_lines_of_json_are_decoded_together_and_others_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(block: bytes, names: tuple[str, ...]) -> Any:
        judged.append(block)
        return read_lines(block, names)

    judged: list[bytes] = []
    read_lines = columns._decode_lines
    monkeypatch.setattr(columns, "_decode_lines", judge)
    spaced, null = LINE.replace("{", "{ "), LINE.replace("0.5", "null")
    assert_same_as_json(write(tmp_path / "plain.jsonl", [LINE, spaced, null]))
    assert not judged
    no_text = LINE.replace("layers", "caf?").replace('"step": 2', '"step": 3').encode().replace(b"?", b"\xe9") + b"\n"
    assert_same_as_json(write(tmp_path / "latin.jsonl", [LINE, no_text]))
    assert len(judged) == 1


def test_blocks_end_between_lines_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [LINE.replace('"step": 2', f'"step": {step}') for step in range(1, 40)]
    path = write(tmp_path / "rank_00000.jsonl", [*lines, lines[0].replace('"attempt": 1', '"attempt": 2')])
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
    reading, expected = read_steps(run, setups), reference_steps(run, "tokens")
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
    reading = read_steps(builder.run, {1: setup})
    assert reading.unit == next((unit for unit in ("samples", "images") if unit in str(fields)), None)
    assert_same_steps(reading.steps, reference_steps(builder.run, reading.unit))
    assert len(reading.steps) == 5  # the first has no step before it


def test_memory_does_not_grow_with_the_number_of_ranks(tmp_path: Path, make_run: Any) -> None:
    def peak(ranks: int) -> int:
        builder = make_run(tmp_path / str(ranks), ranks, global_batch=ranks).attempt()
        text = "".join(LINE.replace('"step": 2', f'"step": {step}') + "\n" for step in range(1, 2001))
        for rank in range(ranks):
            write(builder.run.metrics(rank), [text.encode()])
        setup = read_environment(builder.run, 1)
        assert setup is not None
        gc.collect()  # what earlier tests left is not freed, nor counted, in between
        tracemalloc.start()
        reading = read_steps(builder.run, {1: setup})
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
