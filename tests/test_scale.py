"""The table of benchmarks/scale.py: no row passes unless it was measured, and README's command is README's."""

from __future__ import annotations

import re

from benchmarks import scale
from benchmarks.scale_launcher import GPUS
from tests.support.commands import ROOT

ELSEWHERE = {10, 16, 17}


def test_every_measure_has_a_row() -> None:
    numbers = {int(name.split()[0].removeprefix("A")) for name in scale.ROWS}
    assert numbers == set(range(1, 20)) - ELSEWHERE


def test_a_row_that_fails_is_not_reached() -> None:
    found, reached = scale.measured("no such row")
    assert found.startswith("not measured: KeyError") and not reached


def test_the_command_for_gpus_stands_in_the_readme() -> None:
    words = " ".join(map(re.escape, GPUS))
    assert re.search(rf"python -m launch -m nodes=\S+ {words}", (ROOT / "README.md").read_text())
