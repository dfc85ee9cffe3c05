"""What holds for every test: one thread a process, as ranks have it, and nothing outlives the test that started it.

And the order of the files, which the workers take from the front.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from tests.support.commands import STARTED, kill_all

# Before torch is imported. With two threads the last bits differed in 1 of 19 runs, and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


WAITS = ("slurm",)
"""Folders whose tests are long, but mostly wait: for Slurm to notice something, to schedule, to give up."""
QUICK = ("accounting", "interchange", "model", "report")
"""Folders whose tests take moments each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that wait beside files that compute, and quick ones last, so that no core is idle before the end."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [path for path in files if path.parent.name in WAITS]
    others = sorted((path for path in files if path not in waiting), key=lambda path: path.parent.name in QUICK)
    order = chain.from_iterable(zip_longest(waiting, others))
    items[:] = [item for path in order if path is not None for item in files[path]]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Kill what the test has started and not waited for: a run without an end would slow all tests after it."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            kill_all(process)
