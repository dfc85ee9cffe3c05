"""Names that keys have elsewhere: each leads to a key that there is, and stands in nobody's way."""

from __future__ import annotations

import pytest

from launch.__main__ import schema_named_in
from launch.runs.refusals import ELSEWHERE, MEANT, override_meant
from launch.schema import schema_keys

KEYS = set(schema_keys(schema_named_in([])))


def test_every_name_leads_to_a_key_that_there_is_and_is_none_itself() -> None:
    assert {ours.partition("=")[0] for ours in ELSEWHERE} <= KEYS
    assert len(MEANT) == sum(len(names.split()) for names in ELSEWHERE.values()), "no name is there twice"
    assert not MEANT.keys() & {key.rpartition(".")[2] for key in KEYS}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("training.seq-len", "2048", ("model.block_size", "2048")),
        ("Learning_Rate", "1e-3", ("optim.lr", "1e-3")),
        ("accumulate_grad_batches", "8", ("optim.max_micro_batch", "VALUE")),
        ("fp16", "true", ("precision", "fp16")),
        ("optim.lr", "1e-3", None),
    ],
)
def test_the_value_stays_unless_it_means_something_else(
    name: str, value: str, expected: tuple[str, str] | None
) -> None:
    assert override_meant(name, value, KEYS) == expected


def test_a_schema_without_the_key_is_told_nothing() -> None:
    assert override_meant("learning_rate", "1e-3", {"nodes"}) is None
