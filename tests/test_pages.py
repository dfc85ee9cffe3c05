"""Pages of benchmarks whose rows are measured one by one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.page import keep, merged

TITLES = ("way", "seconds")


def test_a_row_that_was_measured_again_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    about = "First line.\n\n    commands\n\nWhat is measured.\n"
    keep(script, "Saves", about, merged(script, TITLES, [["waited for", "4"], ["late", "2"]]) + "\n\nA note.")
    again = merged(script, TITLES, [["late", "1"], ["beside", "0.3"]])
    assert again.splitlines() == [
        "| way | seconds |",
        "| --- | --- |",
        "| waited for | 4 |",
        "| late | 1 |",
        "| beside | 0.3 |",
    ]
    assert merged(script, ("way", "minutes"), [["late", "1"]]).splitlines()[2:] == ["| late | 1 |"]
