"""Messages between ranks: values come back as they were, and what somebody else sends runs nothing."""

from __future__ import annotations

import base64
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.checkpoint.folders import FileSum, Manifest
from gpt.checkpoint.messages import decode, encode
from gpt.config import ParallelConfig, Strategy
from launch.errors import ConfigError

SENT = [
    None,
    [True, 1, -0.5, 2**80, "é\n"],
    (1, (2, [3]), ()),
    {"a", "b"},
    {1: {"tuple": 2}, "dict": []},
    {"path": Path("a b/c")},
    Strategy.fsdp,
    Manifest(3, 2, 1.5, {"meta": None}, {"x": FileSum(1, "ff")}),
    ParallelConfig(strategy=Strategy.zero1, tp=2),
]


@pytest.mark.parametrize("value", SENT, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    found = decode(encode(value))
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, set)


def test_numbers_tensors_and_refusals_come_back() -> None:
    tensors = [torch.arange(6.0).view(2, 3).bfloat16().T, torch.tensor(True), torch.empty(0, 3, dtype=torch.int32)]
    found = decode(encode({"nan": math.nan, "tensors": tensors, "no": ConfigError("a", "b", "c")}))
    assert math.isnan(found["nan"])
    for sent, received in zip(tensors, found["tensors"], strict=True):
        assert received.dtype == sent.dtype and torch.equal(received, sent)
    assert (found["no"].found, found["no"].expected, found["no"].fix) == ("a", "b", "c")


@pytest.mark.parametrize("value", [object(), lambda: None, b"bytes", ValueError("x"), [{"a": object()}]])
def test_what_cannot_be_sent_is_refused_by_the_sender(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        encode(value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


FORGED = [
    pickle.dumps(Harmful()),
    base64.b64encode(pickle.dumps(Harmful())),
    *(
        json.dumps(plain).encode()
        for plain in (
            {"dataclass": ["subprocess:Popen", {"args": ["touch", "harmed"]}]},
            {"dataclass": ["os:system", {"command": "touch harmed"}]},
            {"dataclass": ["gpt.checkpoint.folders:sum_file", {"path": {"path": "/etc/passwd"}}]},
            {"dataclass": ["gpt.checkpoint.folders:Path", {}]},
            {"enum": ["gpt.checkpoint.folders:FileSum", "size"]},
            {"tensor": ["load", [1], ""]},
            {"eval": "1"},
            {"path": "a", "tuple": []},
        )
    ),
]


@pytest.mark.parametrize("message", FORGED)
def test_a_forged_message_runs_nothing(message: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        decode(message)
    assert list(tmp_path.iterdir()) == []
