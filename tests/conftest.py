"""What holds for every test: no process outlives the test that started it, however it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands import STARTED, kill_all


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Kill what the test has started and not waited for: a run without an end would slow all tests after it."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            kill_all(process)
