"""The installation check says what it checked, and fails where something does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt import smoke
from tests.support.commands import run


def test_all_holds_here(tmp_path: Path) -> None:
    lines = run("gpt.smoke", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("ok")] == [
        "ok  training", "ok  saving", "ok  resuming", "ok  writing",
    ]  # fmt: skip
    assert "all holds" in lines[-1] and not any(tmp_path.iterdir()), "nothing is left behind"


def test_its_help_is_shown_and_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        smoke.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "KEY=VALUE" in text and "ok  " not in text


def test_what_does_not_hold_is_said_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        smoke.require(False, "loss 5.5000 to 5.5000")
        return ""

    monkeypatch.setattr(smoke, "checks", lambda overrides, folder: iter([("training", broken), ("saving", broken)]))
    assert smoke.main([]) == 1
    assert capsys.readouterr().out == "FAILED  training: loss 5.5000 to 5.5000\n"
