"""Options that were renamed: the old spelling works for one release, and says the new one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt import compare, export, generate, prepare
from launch.errors import ConfigError

CASES = [
    (prepare.parser().parse_args, ["data=text"], ["--to"], "--output", "a"),
    (compare.parser().parse_args, ["RUN"], ["--out"], "--output", "a"),
    (generate.parser().parse_args, ["RUN", "-p", "x"], ["--tokens"], "--max-new-tokens", "7"),
    (export.parse, ["RUN", "--format", "hf"], [], "--output", "a"),
]


@pytest.mark.parametrize(
    ("parse", "words", "old", "new", "value"), CASES, ids=["prepare", "compare", "generate", "export"]
)
def test_the_old_and_the_new_spelling_mean_the_same(
    parse: Callable[[list[str]], argparse.Namespace],
    words: list[str],
    old: list[str],
    new: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = parse([*words, new, value])
    assert not capsys.readouterr().err, "the new spelling says nothing"
    assert parse([*words, *old, value]) == expected
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and f"is {new} now" in printed[0]


def test_the_output_of_an_export_may_stand_anywhere_and_is_required() -> None:
    for words in (["RUN", "OUT", "--step", "3"], ["--format", "torch", "RUN", "OUT"], ["RUN", "--overwrite", "OUT"]):
        args = export.parse(words)
        assert (args.run, args.output) == ("RUN", Path("OUT"))
    with pytest.raises(ConfigError, match="required: --output"):
        export.parse(["RUN"])


def test_help_shows_the_new_spelling_only(capsys: pytest.CaptureFixture[str]) -> None:
    shown = prepare.parser().format_help() + compare.parser().format_help() + generate.parser().format_help()
    with pytest.raises(SystemExit):
        export.parse(["--help"])
    shown += capsys.readouterr().out
    assert shown.count("--output") >= 3 and "--max-new-tokens" in shown
    assert not {"--to", "--out", "--tokens", "out"} & set(shown.replace("[", " ").replace("]", " ").split())
