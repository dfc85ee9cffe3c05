"""Lines of the step records that cannot be read: counted by rank and attempt, as Python's json sees them, and told."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from selenium import webdriver

from launch.report import build, show, write
from launch.report import read as columns
from launch.report.points import read_point
from launch.report.steps import UnreadLines
from launch.report.views.text import csv_text, markdown
from launch.report.views.write import json_text
from launch.runs.folder import RunFolder

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
SPARED: dict[str, Callable[[bytes], bytes]] = {
    "blank": lambda line: line + b"\n",
    "blanks": lambda line: line + b"\n  ",
    "a value that only Python reads": lambda line: line.replace(b'"lr": 0.001', b'"lr": NaN'),
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


@pytest.mark.parametrize("how", GARBLE | SPARED)
def test_one_line_of_any_kind_is_counted_as_json_sees_it(tmp_path: Path, make_run: Any, how: str) -> None:
    run = make_run(tmp_path, 2).attempt().steps(1, [1.0] * 20).event("finished", attempt=1).run
    garble(run.metrics(1), 11, (GARBLE | SPARED)[how])
    assert counted(run) == ({1: 1} if how in GARBLE else {})
    point = read_point(tmp_path)
    assert point.unread == ((UnreadLines(1, 1, 1),) if how in GARBLE else ())
    assert point.steps.step.tolist() == [s for s in range(1, 21) if s != 12 or how in SPARED]


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


def test_what_is_added_to_half_a_line_while_it_is_read_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(b'{"step": 1, "attempt": 1}\n{"step": 2, "at')
    blocks = columns._whole_lines(path)
    read = [next(blocks)]
    with path.open("ab") as file:
        file.write(b'tempt": 1}\n{"step": 3, "attempt": 1}\n')
    assert read + list(blocks) == [b'{"step": 1, "attempt": 1}\n{"step": 2, "at']


def texts(folder: Path) -> dict[str, str]:
    """Texts of a report of a folder, by the way in which it says them."""
    table, shown = build(folder), io.StringIO()
    show(table, Console(file=shown, width=250))
    page = next(path for path in write(table) if path.suffix == ".html")
    return {
        "console": shown.getvalue(),
        "markdown": markdown(table),
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
        "leaves them: 2 of rank 1 in attempt 1, 1 of rank 0 in attempt 1. Unless their steps were made again, the "
        f"figures lack them, and the comparison of ranks may lack these ranks; see {run.metrics(1)}."
    )
    for form in ("console", "markdown", "page"):
        assert note in told[form] and "could not be read" not in clean[form].lower()
    content = json.loads(told["json"])
    expected = [{"rank": 0, "attempt": 1, "lines": 1}, {"rank": 1, "attempt": 1, "lines": 2}]
    assert content["unread"] == [[], expected] and note == content["notes"][0]
    assert [row["unread_lines"] for row in content["rows"]] == [0, sum(counted(run).values())]
    assert [row["unread_lines"] for row in csv.DictReader(io.StringIO(told["csv"]))] == ["0", "3"]
    (row,) = [row for row in build(tmp_path).rows if row.ranks == 2]
    assert row.steps_measured == 30 - 5 - 3


def test_of_many_ranks_the_note_names_those_with_most_lines(tmp_path: Path, make_run: Any) -> None:
    run = make_run(tmp_path, 6, global_batch=6).attempt().steps(1, [1.0] * 20).event("finished", attempt=1).run
    for rank in range(6):
        for at in range(rank + 1):
            garble(run.metrics(rank), 2 * at + 1, GARBLE["cut"])
    first = build(tmp_path).notes[0]
    told = "6 of rank 5 in attempt 1, 5 of rank 4 in attempt 1, 4 of rank 3 in attempt 1, 6 of other ranks or attempts"
    assert first.startswith("21 lines") and told in first and str(run.metrics(5)) in first


@pytest.mark.parametrize("width", [1240, 390])
def test_the_page_warns_before_any_figure(tmp_path: Path, make_run: Any, browser: webdriver.Chrome, width: int) -> None:
    builder = make_run(tmp_path / "nodes=2", 2, 2).attempt().steps(1, [1.0] * 30).event("finished", attempt=1)
    garble(builder.run.metrics(1), 7, GARBLE["zeros"])
    page = next(path for path in write(build(tmp_path / "nodes=2")) if path.suffix == ".html")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    script = """const tile = document.querySelector('.tile'), box = tile.getBoundingClientRect();
    return [tile.innerText, box.bottom, tile.scrollWidth > tile.clientWidth, document.documentElement.scrollWidth]"""
    text, bottom, runs_over, wide = browser.execute_script(script)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert " ".join(text.split()).startswith("Could not be read 1 line of step records at")
    assert bottom < 900 and not runs_over and wide <= width
