"""Precision and compilation that a config leaves to the devices: what is chosen, and that a run keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.config import CompileMode, Precision
from gpt.planning.auto import choose_compile, choose_precision, choose_tf32
from launch.errors import ConfigError
from launch.runs.compose import write_config
from launch.runs.folder import RunFolder
from tests.support.composing import config_from

H100, V100 = "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-32GB"


@pytest.mark.parametrize(
    ("words", "on_cpus", "gpu", "chosen"),
    [
        ([], False, H100, "bf16"),
        ([], False, V100, "fp16"),
        ([], False, "Tesla T4", "fp16"),
        ([], False, None, "auto"),
        ([], False, "NVIDIA GeForce RTX 9999", "auto"),
        ([], True, None, "fp32"),
        (["precision=fp32"], False, H100, "fp32"),
        (["precision=bf16"], True, None, "bf16"),
    ],
)
def test_precision(words: list[str], on_cpus: bool, gpu: str | None, chosen: str, tmp_path: Path) -> None:
    assert choose_precision(config_from(words), RunFolder(tmp_path), on_cpus, gpu) is Precision[chosen]


@pytest.mark.parametrize("began", ["fp32", "bf16", "fp16"])
def test_a_run_keeps_the_precision_it_began_with(began: str, tmp_path: Path) -> None:
    from gpt.config.train import compose_train

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


@pytest.mark.parametrize(("words", "on_cpus"), [([], True), (["compile=none"], False), (["compile=none"], True)])
def test_whole_graphs_where_nothing_is_compiled_are_refused(words: list[str], on_cpus: bool) -> None:
    with pytest.raises(ConfigError, match="compile_fullgraph=true with compile="):
        choose_compile(config_from([*words, "compile_fullgraph=true"]), 1, on_cpus)
    compiled = config_from(["compile=default", "compile_fullgraph=true"])
    assert choose_compile(compiled, 1, on_cpus) is CompileMode["default"]


SPLIT = ["precision=bf16", "optim.global_batch=32", "optim.max_micro_batch=4"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ([], 1),
        (["parallel=ddp"], 2),
        (["parallel=zero1"], 2),
        (["parallel=tp"], 2),
        (["parallel=ds_zero0"], 2),
        (["parallel=ds_zero1", "precision=fp32"], 2),
        (["parallel=pp"], 2),
    ],
)
def test_cuda_graphs_that_would_overwrite_gradients_are_refused(words: list[str], ranks: int, mode: str) -> None:
    words = [*SPLIT, *words, f"compile={mode}"]
    with pytest.raises(ConfigError) as refusal:
        choose_compile(config_from(words), ranks, on_cpus=False)
    micro_batches = 4 if ranks == 2 and words[3] not in ("parallel=tp", "parallel=pp") else 8
    assert refusal.value.found == f"compile={mode} with {micro_batches} micro-batches a step"
    fixes = refusal.value.fix.split(", or ")
    assert len(fixes) == (1 if "parallel=pp" in words else 2), "a pipeline is made of micro-batches"
    for fix in fixes:
        choose_compile(config_from([*words, fix]), ranks, on_cpus=False)
    assert choose_compile(config_from(words), ranks, on_cpus=True) is CompileMode[mode]


@pytest.mark.parametrize(
    "words",
    [
        ["parallel=fsdp"],
        ["parallel=hsdp", "parallel.dp_shard=2"],
        ["parallel=fsdp", "parallel.reshard_after_forward=false"],
    ],
)
def test_cuda_graphs_of_parameters_that_fsdp_moves_are_refused(words: list[str]) -> None:
    words = [*words, "compile=reduce-overhead", "precision=bf16"]
    with pytest.raises(ConfigError) as refusal:
        choose_compile(config_from(words), 2, on_cpus=False)
    assert refusal.value.found == "compile=reduce-overhead with parallel.strategy=fsdp"
    for fix in refusal.value.fix.split(", or "):
        choose_compile(config_from(["optim.max_micro_batch=8", "compile=reduce-overhead", fix]), 2, on_cpus=False)


@pytest.mark.parametrize("words", [["parallel=zero2"], ["parallel=zero3"]])
def test_cuda_graphs_whose_gradients_are_taken_away_at_once_are_not(words: list[str]) -> None:
    config = config_from([*SPLIT, *words, "compile=reduce-overhead"])
    assert choose_compile(config, 2, on_cpus=False) is CompileMode["reduce-overhead"]


@pytest.mark.parametrize(
    ("words", "on_cpus", "allowed"),
    [
        (["precision=fp32"], False, True),
        (["precision=fp32"], True, False),
        (["precision=fp32", "deterministic=true"], False, False),
        (["precision=fp32", "deterministic=true", "tf32=true"], False, True),
        (["precision=fp32", "tf32=false"], False, False),
        (["precision=bf16"], False, False),
        (["precision=fp16"], False, False),
    ],
)
def test_tf32(words: list[str], on_cpus: bool, allowed: bool) -> None:
    assert choose_tf32(config_from(words), on_cpus) is allowed


def test_tf32_where_it_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="tf32=true on CPUs"):
        choose_tf32(config_from(["precision=fp32", "tf32=true"]), on_cpus=True)
