"""What holds for every test: one thread a process, as ranks have it, and nothing outlives the test that started it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.commands import STARTED, kill_all

# Before torch is imported. With two threads the last bits differed in 1 of 19 runs, and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Kill what the test has started and not waited for: a run without an end would slow all tests after it."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            kill_all(process)
