"""A watched report follows its runs, and ends with them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.report.__main__ import main

PATIENCE_S = 120
PARTS = ["found", "expected", "type next"]


def until(what: str, true: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)  # between two looks


def test_a_report_follows_its_runs_until_they_end(tmp_path: Path, make_run: Any) -> None:
    built = [make_run(tmp_path / "s" / f"nodes={n}", n, n, (f"nodes={n}",)).attempt() for n in (1, 2)]
    for run in built:
        run.steps(1, [1.0 / run.ranks] * 12)
    page, table = tmp_path / "s" / "scaling.html", tmp_path / "s" / "scaling.csv"
    words = [sys.executable, "-m", "launch.report", str(tmp_path / "s"), "--watch", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        until("the page", page.exists)
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        built[0].steps(13, [1.0] * 8)
        until("the new steps", lambda: ",15," in table.read_text().splitlines()[1])
        assert process.poll() is None
        for run in built:
            run.event("finished", attempt=1)
        text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "running" in text and "again in 0.2 s" in text and text.count("finished") >= 2
    assert "refresh" not in page.read_text()


@pytest.mark.parametrize("event", ["cancelled", "budget_reached"])
def test_a_run_that_was_called_off_has_ended(
    tmp_path: Path, make_run: Any, event: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a [red] sweep"
    run = make_run(folder, 1, 1, ()).attempt()
    run.steps(1, [1.0] * 12)
    run.event(event)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for a run that has ended"))
    assert main([str(folder), "--watch", "0.2", "--files", "md"]) == 0
    assert f"wrote summary.md in {folder}" in " ".join(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("typed", ["0", "-1", "soon", "inf"])
def test_an_interval_that_is_none_is_refused(tmp_path: Path, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), f"--watch={typed}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert f"'{typed}', and not seconds above 0" in told[0] and [line.split(":")[0] for line in told] == PARTS
