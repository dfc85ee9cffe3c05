"""Choices of a plan for the devices, and its warnings: precision, compilation, epochs and time limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt.config import AttentionBackend, CompileMode, Precision, Recompute, TrainConfig, compose_train
from gpt.planning.auto import (
    choose_compile,
    choose_precision,
    choose_tf32,
    execution_warnings,
    many_time_limits,
    slow_precision,
)
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import Plan, make_plan
from launch.plan.preflight import plan_text
from launch.runs.compose import write_config
from launch.runs.folder import RunFolder
from tests.support.composing import config_from
from tests.support.planning import refused

GPUS = ("cluster=slurm", "cluster.gpus_per_node=8", "cluster.gpu_name=H100", "model=gpt2_124m", "optim=gpt2")


def plan_of(*words: str) -> Plan:
    return make_plan(typed_config(compose_launch(words)), words, ClusterKind.slurm)


def warned(part: str, *words: str) -> list[str]:
    """The warnings of a plan that name ``part``."""
    return [warning for warning in plan_of(*words).warnings if part in warning]


def test_the_first_run_of_a_newcomer_is_warned_of() -> None:
    # 19,000 steps of 512 x 1024 tokens, of a corpus of 8 MiB of which nine tenths are for training.
    plan = plan_of(*GPUS, "precision=fp32", "tf32=false")
    precision, epochs, limits = plan.warnings
    assert "about 15 times higher in bf16: precision=bf16" in precision  # 989 / 67
    assert "9.96 B tokens from a corpus of 7.55 M: 1,319 epochs" in epochs
    assert " h by the estimate of the planner, and cluster.timeout_min=60: " in limits
    assert all(warning in plan_text(plan) for warning in plan.warnings)
    fewer = next(word for word in epochs.split() if word.startswith("optim.max_steps="))
    longer = next(word for word in limits.split() if word.startswith("cluster.timeout_min=") and ":" not in word)
    assert plan_of(*GPUS, fewer, longer).warnings == ()  # precision=auto is bf16 there
    assert Plan.from_dict(plan.as_dict()) == plan


def test_presets_of_real_models_do_not_train_at_the_speed_of_the_disk() -> None:
    disk = "so training waits for the disk; type checkpoint.interval=auto"
    for preset in ("gpt2", "gpt2_owt", "moe"):
        assert not warned(disk, *GPUS[:4], f"optim={preset}"), preset
    (often,) = warned(disk, *GPUS, "checkpoint.interval=2")
    assert often.startswith("checkpoint.interval=2: a checkpoint of 1.39 GiB takes 1.5 s at 1 GB/s, and 2 steps take ")


def test_a_plan_for_gpus_is_a_run_on_gpus() -> None:
    assert plan_of(*GPUS).promised.settled["device"] == "cuda"
    assert "device" not in plan_of("cluster=slurm").promised.settled
    assert "device" not in plan_of(*GPUS, "device=cpu").promised.settled


def test_a_budget_of_tokens_is_as_many_steps_as_it_takes() -> None:
    plan = plan_of(*GPUS, "optim.max_tokens=300e9")
    assert plan.max_steps == 572_205  # 300e9 / (512 x 1024), and the rest of a step
    assert "524,288 a step, 300,000,215,040 in 572205 steps" in plan_text(plan)
    (epochs,) = [warning for warning in plan.warnings if "epochs" in warning]
    assert "optim.max_tokens=754974800 for 100 epochs" in epochs and "max_steps" not in epochs
    # With the batch per rank, more ranks take fewer steps.
    per_rank = ("optim.max_tokens=1e9", "optim.global_batch=16", "optim.weak_scaling=true")
    assert [plan_of(*GPUS, *per_rank, f"nodes={n}").max_steps for n in (1, 2)] == [7630, 3815]
    assert plan_of(*GPUS, "optim.max_tokens=1").max_steps == 1


def test_steps_and_tokens_at_once_are_refused() -> None:
    words = ("optim.max_tokens=1e9", "optim.max_steps=10")
    for ask in (lambda: plan_of(*GPUS, *words), lambda: compose_train(words)):
        with pytest.raises(ConfigError, match=r"optim\.max_steps=10 with optim\.max_tokens=1e") as refusal:
            ask()
        assert "optim.max_steps=10 optim.max_tokens=null" in str(refusal.value)
    assert plan_of(*GPUS, "optim.max_steps=10", "optim.max_tokens=null").max_steps == 10


def test_where_nothing_is_known_nothing_is_said() -> None:
    assert plan_of("nodes=2", "cluster=slurm").warnings == ()
    for part in ("precision", "time limit"):
        assert not warned(part, *GPUS[:2], *GPUS[3:], "precision=fp32")


def test_the_plan_counts_with_tf32_and_names_it() -> None:
    plan = plan_of(*GPUS, "precision=fp32")
    assert "precision=fp32 in TF32 on NVIDIA H100 80GB HBM3" in plan.warnings[0]  # 989 / 494.5
    assert "about 2 times higher in bf16: precision=bf16" in plan.warnings[0]
    assert "fp32 in TF32, compile default" in plan_text(plan)
    assert "fp32, compile default" in plan_text(plan_of(*GPUS, "precision=fp32", "deterministic=true"))
    old = plan_of(*(word.replace("H100", "V100-32GB") for word in GPUS))
    assert "fp16, compile default" in plan_text(old)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("cluster.gpu_name=V100-32GB", "precision=fp32"), "tf32=true on Tesla V100-SXM2-32GB, which has no TF32"),
        (("cluster.gpu_name=V100-32GB",), "tf32=true with precision=fp16"),
        (("cluster.gpu_name=H100",), "tf32=true with precision=bf16"),  # which auto is there
        ((), "tf32=true with precision=bf16"),
    ],
)
def test_tf32_that_would_do_nothing_is_refused_before_the_queue(words: tuple[str, ...], found: str) -> None:
    gpus = [word for word in GPUS if "gpu_name" not in word]
    with pytest.raises(ConfigError, match=f"^found: {found}\n") as refusal:
        plan_of(*gpus, *words, "tf32=true")
    assert "tf32=null" in str(refusal.value)
    assert "in TF32" in plan_text(plan_of(*GPUS, "tf32=true", "precision=fp32", "deterministic=true"))


def test_float8_on_gpus_without_it_is_refused_before_the_queue() -> None:
    pytest.importorskip("torchao")
    words = [word for word in GPUS if "gpu_name" not in word]
    for further, where in ((("cluster.gpu_name=A100-80GB",), "NVIDIA A100-SXM4-80GB"), (("device=cpu",), "CPUs")):
        with pytest.raises(ConfigError, match=f"float8=rowwise on {where}"):
            plan_of(*words, *further, "float8=rowwise")
        plan_of(*words, *further, "float8=rowwise", "float8_emulate=true")
    # Of GPUs that are not known the ranks will tell.
    for further in (["cluster.gpu_name=H100"], ["cluster.gpu_name=H200"], []):
        assert "float8 rowwise" in plan_text(plan_of(*words, *further, "float8=rowwise"))


@pytest.mark.parametrize(("name", "half"), [("H100", "bf16"), ("T4", "fp16")])
def test_too_little_memory_in_fp32_is_answered_with_16_bits_first(name: str, half: str) -> None:
    words = [word.replace("H100", name) for word in GPUS]
    large = (*words, "optim.max_micro_batch=64", "optim.global_batch=1024", "model.n_layer=36")
    assert refused(plan_of, *large, "precision=fp32", said="GiB on a GPU").fix.startswith(f"precision={half}")
    assert "precision" not in refused(plan_of, *large, said="GiB on a GPU").fix, "it is in 16 bits already"


def test_a_run_whose_logits_do_not_fit_is_proposed_a_loss_without_them() -> None:
    words = (*GPUS, "optim.max_micro_batch=448", "optim.global_batch=3584", "recompute=full")
    fix = refused(plan_of, *words, said="GiB on a GPU").fix
    assert fix.startswith("chunked_loss=true, or optim.max_micro_batch=1")
    plan_of(*words, "chunked_loss=true")
    cut = (*words, "parallel=tp", "optim.max_micro_batch=896")
    assert "chunked_loss" not in refused(plan_of, *cut, said="GiB on a GPU").fix


def test_tensor_parallelism_on_gpus_that_is_not_compiled_is_warned_of() -> None:
    words = (*GPUS, "model.n_head=16", "model.n_embd=1024", "parallel=tp")
    (told,) = warned("tp=", *words, "compile=none")
    assert told.startswith("parallel.tp=2 with compile=none: ") and told.endswith(": compile=default")
    for further in ((), ("compile=none", "parallel=fsdp"), ("compile=none", "device=cpu")):
        assert not warned("tp=", *words, *further), further


def test_experts_on_gpus_whose_exchange_waits_for_the_host_are_warned_of() -> None:
    words = (*GPUS[:3], "model=moe_200m", "optim=moe", "parallel=ep", "parallel.ep=2")
    (told,) = warned("ep=", *words)
    assert told.startswith("parallel.ep=2 without a capacity: ") and "model.capacity_factor=1.25" in told
    for further in (("model.capacity_factor=1.25",), ("device=cpu",), ("parallel.ep=1",)):
        assert not warned("ep=", *words, *further), further


@pytest.mark.parametrize(("name", "times"), [("NVIDIA B200", "many"), ("NVIDIA A100-SXM4-40GB", "about 16")])
def test_the_factor_of_bf16_is_that_of_the_peaks(name: str, times: str) -> None:
    assert [times in warning for warning in slow_precision(name, Precision.fp32)] == [True]
    assert [*slow_precision(name, Precision.bf16)] == []


def test_an_older_device_is_proposed_fp16() -> None:
    (told,) = slow_precision("Tesla V100-SXM2-16GB", Precision.fp32, tf32=True)  # of which it has none
    assert told.startswith("precision=fp32 on") and "about 8 times higher in fp16: precision=fp16" in told  # 125 / 15.7


def test_a_device_of_unknown_peak_is_left_alone_until_a_rank_sees_what_it_computes_in() -> None:
    assert [*slow_precision("NVIDIA H20", Precision.fp32)] == []
    config = config_from(["precision=fp32", "tf32=true"])
    (told,) = execution_warnings(config, "NVIDIA H20", Precision.bf16)
    assert told == "precision=fp32 in TF32 on NVIDIA H20, whose peak is many times higher in bf16: precision=bf16"
    for best in (Precision.fp32, None):  # without matrix units, or seen by nobody
        assert [*slow_precision("Quadro", Precision.fp32, best=best)] == []


def test_bf16_on_a_device_that_only_emulates_it_is_warned_of() -> None:
    old = [word.replace("H100", "V100-32GB") for word in GPUS]
    (told,) = warned("precision", *old, "precision=bf16")
    assert told == "precision=bf16 on Tesla V100-SXM2-32GB, which does not compute in it: precision=fp16"
    assert not warned("precision", *old) and not warned("precision", *GPUS, "precision=fp16")


def test_the_limit_that_is_proposed_is_enough() -> None:
    assert [*many_time_limits(3600, 60)] == []
    (told,) = many_time_limits(3601, 60)
    assert "about 60 min" in told and ": 2 time limits" in told and "cluster.timeout_min=70 " in told
    (told,) = many_time_limits(9.3 * 86400, 1440)
    assert "about 9.3 days" in told and ": 10 time limits" in told and "cluster.timeout_min=14740 " in told


SLURM = GPUS[:3]


def plan(folder: Path, *words: str, vocab_size: int = 256) -> tuple[TrainConfig, str]:
    """The config and the text of the plan of a command, on a small made-up corpus of that vocabulary."""
    tokens = np.arange(3_000_000, dtype=np.uint32) % vocab_size
    for name in ("train", "val"):
        tokens.astype(np.uint16).tofile(folder / f"{name}.bin")
    made_up = ["data=tokens", f"data.path={folder}", f"output_dir={folder / 'outputs'}"]
    config = typed_config(compose_launch([*words, *made_up]))
    return config, plan_text(make_plan(config, [*words, *made_up], ClusterKind.slurm))


def test_gpts_vocabulary_is_padded_to_what_gpus_multiply_fast() -> None:
    every = [path.stem for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml")]
    models = {name: config_from([f"model={name}"]).model for name in every}
    padded = {name: model.padded_vocab for name, model in models.items() if model.vocab_size == 50257}
    assert len(padded) >= 6 and set(padded.values()) == {393 * 128}


def test_the_baseline(tmp_path: Path) -> None:
    config, text = plan(tmp_path, "+experiment=baseline", *SLURM, vocab_size=16384)
    model, optim = config.model, config.optim
    assert (model.n_layer, model.n_embd, model.vocab_size, model.tie_embeddings) == (6, 384, 16384, False)
    assert config.precision is Precision.fp32 and model.attention is AttentionBackend.manual
    assert (optim.max_steps, optim.lr, optim.warmup_steps, config.eval.interval) == (3000, 3e-4, 200, 500)
    assert optim.target_val_loss == 1.55 and config.checkpoint.keep_last == 3 and config.tf32 is False
    told = config_from(["+experiment=baseline"]).data
    assert (told.tokenizer.name, told.tokenizer_vocab_size) == ("sentencepiece", 16384)
    assert f"{2 * 16384 * 384 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384:,} parameters" in text


@pytest.mark.parametrize("batch", [4, 8])
def test_optim_moe_fits_one_consumer_gpu(batch: int, tmp_path: Path) -> None:
    words = ["model=moe_200m", "optim=moe", f"optim.global_batch={batch}", "cluster=slurm", "cluster.gpus_per_node=1"]
    config, text = plan(tmp_path, *words, "cluster.gpu_name=RTX-4090", vocab_size=50257)
    assert (config.optim.max_micro_batch, config.optim.lr) == (1, 3e-4)
    assert config.precision is Precision.bf16 and config.recompute is Recompute.full
    assert f"{batch} micro-batches of 1 per rank" in text, "and it is not refused for its memory"
    assert config_from(["model=moe_200m", "optim=moe"]).optim.global_batch == 8
    small = [*words, "cluster.gpu_name=RTX-4060"]
    with pytest.raises(ConfigError, match="type next: parallel=fsdp_offload, or a smaller model"):
        plan(tmp_path, *small, vocab_size=50257)
    plan(tmp_path, *small, "parallel=fsdp_offload", vocab_size=50257)
    assert config_from(["optim=moe", "precision=fp32", "recompute=none"]).precision is Precision.fp32, "what is typed"


EXPERIMENTS: dict[str, tuple[int, list[str]]] = {
    "gpt2_owt": (50257, ["124,475,904 parameters", "global batch 480", "600000 steps", "294,912,000,000"]),
    "llama_1p36b_slimpajama": (
        32000,
        ["1 x 8 = 8 ranks", "1,364,297,728 parameters", "fsdp", "2,097,152 a step"],
    ),
    **{
        f"scaling_117m ranks_per_node={gpus}": (
            50257,
            [f"1 x {gpus} = {gpus} rank", "global batch 480", f"{480 // gpus // 12} micro-batches of 12 per rank"],
        )
        for gpus in (1, 2, 4, 8)
    },
}
"""Experiment -> its vocabulary, and what its plan on a node of 8 GPUs says."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_on_a_node_of_8_gpus(name: str, tmp_path: Path) -> None:
    vocab_size, said = EXPERIMENTS[name]
    _, text = plan(tmp_path, *f"+experiment={name}".split(), *SLURM, vocab_size=vocab_size)
    assert [part for part in said if part not in text] == []


def test_experiments_have_their_corpus() -> None:
    datasets = {"gpt2_owt": "Skylion007/openwebtext", "llama_1p36b_slimpajama": "SlimPajama"}
    for name, dataset in datasets.items():
        assert dataset in str(config_from([f"+experiment={name}"]).data.dataset)


# Precision and compilation that a config leaves to the devices: what is chosen, and that a run keeps it.


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
    from gpt.config import compose_train

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
    refusal = refused(choose_compile, config_from(words), ranks, False)
    micro_batches = 4 if ranks == 2 and words[3] not in ("parallel=tp", "parallel=pp") else 8
    assert refusal.found == f"compile={mode} with {micro_batches} micro-batches a step"
    fixes = refusal.fix.split(", or ")
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
    refusal = refused(choose_compile, config_from(words), 2, False)
    assert refusal.found == "compile=reduce-overhead with parallel.strategy=fsdp"
    for fix in refusal.fix.split(", or "):
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
