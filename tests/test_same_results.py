"""benchmarks/same_results.py can fail: faults planted in a second checkout, and in a table, are found and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import same_results
from benchmarks.same_results_cases import REFUSALS
from tests.support.commands import ROOT

HIDES_A_KEY = """import sys

class Printed:
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(text.replace("model.n_layr", "a key"))

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stderr = Printed(sys.stderr)
"""
"""Python runs it before everything else where it is the ``sitecustomize`` of a checkout."""


def faulty_checkout(folder: Path) -> Path:
    """Make a checkout with two faults: a time limit of 61 minutes, and a refusal that hides the key that was typed."""
    folder.mkdir()
    for name in ("launch", "gpt", "gpt_launch", "hydra_plugins"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "configs").rglob("*"):
        if path.suffix in (".py", ".yaml"):
            copy = folder / "configs" / path.relative_to(ROOT / "configs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text().replace("timeout_min: 60", "timeout_min: 61"))
    (folder / "sitecustomize.py").write_text(HIDES_A_KEY)
    return folder


def test_a_changed_sbatch_line_and_a_key_that_is_not_named_are_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    after = faulty_checkout(tmp_path / "after")
    words = ["--only", "plans,refusals", "--match", "^nodes without GPUs$|n_layr|precision=fp23"]
    assert same_results.main([str(ROOT), str(after), *words]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines if not line.startswith("    ")] == [
        "plan: nodes without GPUs: DIFFERS",
        "refusal: launch model.n_layr=3: DIFFERS",
        "refusal: launch precision=fp23: the same",
        next(line for line in lines if line.startswith("-- plans and refusals")),
        "3 comparisons, 2 differ",
    ]
    assert "    -#SBATCH --time=60" in lines and "    +#SBATCH --time=61" in lines
    assert "    after: it does not name model.n_layr" in lines


def test_one_digit_of_a_figure_is_found_and_named_and_a_column_that_is_gone_is_listed() -> None:
    before = "point,speedup,mfu\nnodes=1,1.0,0.4100000000000001\n"
    after = "mfu,point,more\n0.4100000000000002,nodes=1,7\n"
    found = same_results.compare_values("scaling.csv", before, after)
    assert found.differences == ['[0].mfu: "0.4100000000000001", and now "0.4100000000000002"']
    assert found.notes == ["gone: speedup", "new: more"]
    strict = same_results.compare_values("scaling.csv", before, after, strict=True)
    assert "gone: speedup" in strict.differences
    one, other = '{"rows": [{"mfu": 0.1}], "notes": []}', '{"notes": [], "rows": [{"mfu": 0.10}]}'
    assert same_results.compare_values("scaling.json", one, one).differences == []
    assert same_results.compare_values("scaling.json", one, other).differences == ['rows[0].mfu: "0.1", and now "0.10"']
    assert same_results.compare_values("scaling.json", one, "").differences


def test_a_refusal_has_to_keep_its_status_and_to_name_the_value_as_a_word_of_its_own() -> None:
    case = next(case for case in REFUSALS if case.line == "launch nodes=-2")
    text = "found: nodes=-2\nexpected: a number\ntype next: nodes=1\nexit status 2\n"
    assert not same_results.unnamed(case, text)
    assert same_results.unnamed(case, text.replace("nodes=-2", "nodes=-25")) == ["it does not name -2"]
    assert same_results.unnamed(case, text.replace("type next", "fix")) == ["it has no line 'type next: '"]
    (golden,) = same_results.compare_refusals([case], [text], [text.replace("status 2", "status 1")])
    assert golden.differences[0] == "before: exit status 2, after: exit status 1"
