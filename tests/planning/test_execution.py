"""Precision and compilation that a config leaves to the devices: what is chosen, and that a run keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.config import CompileMode, Precision
from gpt.planning.execution import choose_compile, choose_precision
from launch.runs.compose import write_config
from launch.runs.folder import RunFolder
from tests.support.composing import config_from

H100, V100 = "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-32GB"


@pytest.mark.parametrize(
    ("words", "on_cpus", "gpu", "chosen"),
    [
        ([], False, H100, "bf16"),
        ([], False, V100, "fp32"),
        ([], False, None, "auto"),
        ([], False, "NVIDIA GeForce RTX 9999", "auto"),
        ([], True, None, "fp32"),
        (["precision=fp32"], False, H100, "fp32"),
        (["precision=bf16"], True, None, "bf16"),
    ],
)
def test_precision(words: list[str], on_cpus: bool, gpu: str | None, chosen: str, tmp_path: Path) -> None:
    assert choose_precision(config_from(words), RunFolder(tmp_path), on_cpus, gpu) is Precision[chosen]


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_run_keeps_the_precision_it_began_with(began: str, tmp_path: Path) -> None:
    from gpt.config.compose import compose_train

    write_config(RunFolder(tmp_path), compose_train([f"precision={began}"]), [])
    for on_cpus, gpu in ((True, None), (False, H100), (False, V100), (False, None)):
        assert choose_precision(config_from([]), RunFolder(tmp_path), on_cpus, gpu) is Precision[began]


@pytest.mark.parametrize(
    ("words", "ranks", "on_cpus", "chosen"),
    [
        ([], 1, False, "default"),
        ([], 1, True, "none"),
        (["compile=max-autotune"], 1, True, "max-autotune"),
        (["compile=none"], 1, False, "none"),
        (["parallel=pp", "parallel.schedule=dualpipev", "model.n_layer=4"], 2, False, "none"),
        (["parallel=cp", "recompute=selective"], 2, False, "none"),
    ],
)
def test_compilation(words: list[str], ranks: int, on_cpus: bool, chosen: str) -> None:
    assert choose_compile(config_from(words), ranks, on_cpus) is CompileMode[chosen]
