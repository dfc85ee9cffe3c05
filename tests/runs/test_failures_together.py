"""Ranks that fail together: one traceback for a node, and the first failure found among its echoes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runs.events import first_failure, record_failure
from launch.runs.folder import RunFolder
from launch.runs.process import ENVIRONMENT


def fail(folder: RunFolder, rank: int, error: Exception, elsewhere: bool = False) -> None:
    """Let a rank fail, at one of two lines."""
    try:
        if elsewhere:
            raise error
        raise error
    except type(error) as raised:
        record_failure(folder, 1, rank, raised, step=3)


def test_a_node_writes_each_traceback_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = RunFolder(tmp_path / "run"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(scratch))
    for rank in range(4):  # of errors about a lost peer, which differ in their words and types
        fail(folder, rank, RuntimeError(f"[Rank {rank}] Connection closed by peer"))
    fail(folder, 4, ConnectionError("[gloo/transport/tcp/pair.h:311] Connect timeout [none]"))  # one not yet talked to
    for rank in (5, 6):
        fail(folder, rank, ValueError(f"bad sample {rank}"))
    fail(folder, 7, ValueError("bad sample"), elsewhere=True)
    events = folder.read_events()
    full = [e["rank"] for e in events if "Traceback (most recent call last)" in e["traceback"]]
    assert full == [0, 5, 7]
    assert [e.get("same_as") for e in events] == [None, 0, 0, 0, 0, None, 5, None]
    assert (
        events[6]["traceback"].startswith("as rank 5 of this host") and events[6]["cause"] == "ValueError: bad sample 6"
    )
    assert all(len(str(e)) < 500 for e in events if "same_as" in e), "4,096 of them are read by every agent"
    # Another attempt has another folder; without an agent each rank speaks for itself.
    monkeypatch.delenv(ENVIRONMENT)
    fail(folder, 1, RuntimeError("Connection closed by peer"))
    assert "Traceback" in folder.read_events()[-1]["traceback"]


def test_the_failure_that_is_shown_has_its_traceback(tmp_path: Path) -> None:
    """The rank that writes the traceback may come after one that refers to it."""
    told = {"event": "rank_failed", "attempt": 1, "host": "h", "cause": "ValueError: x", "echo": False}
    short = {**told, "rank": 1, "time": 1.0, "traceback": "as rank 0 of this host", "same_as": 0}
    full = {**told, "rank": 0, "time": 2.0, "traceback": "Traceback"}
    assert first_failure([short, full], 1) == full
    assert first_failure([short, {**full, "host": "other"}], 1) == short
    assert first_failure([short], 1) == short
