"""Files read ahead by forked processes: in order, with the same figures as by threads, and where they are taken."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import launch.report.read as read_ahead

READ = """
import sys
from pathlib import Path
import launch.report.read as read_ahead
from launch.report import build
from launch.report.views.write import json_text

found = []
for read_ahead.MUCH in (0, 1 << 60):
    pools = []
    of = read_ahead.executor
    read_ahead.executor = lambda count: pools.append(count) or of(count)
    found.append(build(Path(sys.argv[1])))
    read_ahead.executor = of
    print("processes" if pools[0] else "threads")
assert json_text(found[0]) == json_text(found[1])
(detail,), ((unread,),) = found[0].details, found[0].unread
assert len(detail.step_times_s) == 7 and detail.rank_times is not None and (unread.rank, unread.lines) == (5, 1)
"""


def test_processes_read_the_same_figures_as_threads(tmp_path: Path, make_run: Any) -> None:
    built = make_run(tmp_path, 6, 3).attempt()
    built.steps(1, [0.1 + 0.01 * step for step in range(12)], rank_delay=0.003, data_wait_s=0.01)
    with built.run.metrics(5).open("a") as file:
        file.write('{"step": 13, "att\n')
    several = "import os; os.sched_getaffinity = lambda pid: {0, 1}\n"  # also on a machine with one core
    run = subprocess.run([sys.executable, "-c", several + READ, str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["processes", "threads"]), run.stderr


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(read_ahead.read_ahead(str, range(20), 0)) == [(at, str(at)) for at in range(20)]
    assert list(read_ahead.read_ahead(str, [], 0)) == []


def test_processes_hand_over_some_results_together_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[tuple[int, ...]] = []

    class Threads(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            groups.append(args[-1])
            return super().submit(*args, **kwargs)

    monkeypatch.setattr(read_ahead, "TOGETHER", 3)
    monkeypatch.setattr(read_ahead, "processes_for", lambda size: 2)
    monkeypatch.setattr(read_ahead, "executor", Threads)
    assert list(read_ahead.read_ahead(str, range(8), 0)) == [(at, str(at)) for at in range(8)]
    assert groups == [(0, 1, 2), (3, 4, 5), (6, 7)]


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
