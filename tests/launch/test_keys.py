"""Keys: every key says what it means, docs/keys.md is the list of the schema, and a number has a range."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import keys
from launch.config import Config
from launch.config.compose import compose_launch, typed_config
from launch.schema import check_ranges, key
from launch.script import ScriptOptions
from tests.support.commands import ROOT, run
from tests.support.planning import refused


def test_the_page_of_keys_is_the_list_of_the_schema() -> None:
    assert (ROOT / "docs" / "keys.md").read_text() == keys.keys_page(), (
        "python -m launch.keys --markdown > docs/keys.md"
    )


@pytest.mark.parametrize("workload", ["gpt", "script"])
def test_every_key_has_a_meaning(workload: str) -> None:
    found = keys.keys_of_workload(workload)
    assert [one.name for one in found if not one.meaning] == []
    assert len({one.name for one in found}) == len(found)


def test_keys_are_found_by_a_word(tmp_path: Path) -> None:
    printed = run("launch.keys", "time limit", cwd=tmp_path)
    assert "cluster.timeout_min=60    (above 0 min)" in printed and "script." not in printed
    printed = run("launch.keys prgress --workload script", cwd=tmp_path, status=2)
    assert "type next: python -m launch.keys progress" in printed


NUMBERS = [
    (f"{prefix}{field.name}", field.metadata)
    for schema, prefix in (
        *((Config, ""), (ScriptOptions, "script.")),
        *((field.default_factory, f"{field.name}.") for field in dataclasses.fields(Config)),
    )
    if isinstance(schema, type) and dataclasses.is_dataclass(schema)
    for field in dataclasses.fields(schema)
    if {field.metadata.get("least"), field.metadata.get("above")} != {None}
]


def test_a_number_below_its_range_is_refused() -> None:
    composed = compose_launch(["workload=script", "script.path=train.py"])
    assert len(NUMBERS) > 20
    for name, metadata in NUMBERS:
        document = copy.deepcopy(composed)
        bound = metadata["above"] if metadata["least"] is None else metadata["least"] - 1
        OmegaConf.update(document, name, int(bound) if bound % 1 == 0 else bound)
        assert refused(typed_config(document).validate, found=name).fix.startswith(f"{name}=")


@dataclasses.dataclass
class Numbers:
    share: float = key(0.5, "A share.", least=0, most=1)
    any_number: float = key(0.0, "A number.")


def test_a_range_is_said() -> None:
    for typed, expected in (
        (Numbers(share=1.5), "0 to 1"),
        (Numbers(share=-0.1), "0 to 1"),
        (Numbers(share=math.nan), "0 to 1"),
        (Numbers(any_number=math.inf), "a finite number"),
    ):
        refusal = refused(check_ranges, typed, "numbers.", found="numbers.")
        assert refusal.expected == expected
    check_ranges(Numbers(share=1, any_number=-3))
