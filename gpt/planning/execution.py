"""Resolution of ``precision=auto``, ``tf32=null`` and ``compile=auto`` for the devices of a run. Imports no torch.

A run keeps its first precision.
"""

from __future__ import annotations

from dataclasses import replace

from gpt.accounting.hardware import find
from gpt.config import CompileMode, Float8, Precision, Strategy, TrainConfig
from gpt.config.train import check_tf32
from gpt.topology.deepspeed_config import casts_weights
from gpt.topology.dims import parallel_dims, split_batch
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.runs.folder import RunFolder

WITH_CUDA_GRAPHS = (CompileMode["reduce-overhead"], CompileMode["max-autotune"])


def choose_precision(config: TrainConfig, folder: RunFolder, on_cpus: bool, gpu: str | None) -> Precision:
    """Choose the precision of a run: the typed one, otherwise that of its first attempt. Otherwise bf16 on GPUs that
    compute in it, and fp16 on GPUs whose matrix units support only fp16.

    Args:
        config: config of the run.
        folder: folder of the run, which may not exist yet.
        on_cpus: True if its ranks compute on CPUs. They get fp32, because few CPUs are faster in bf16.
        gpu: name of the ranks' GPU; None if unknown.

    Returns:
        ``auto`` if only the ranks can decide.
    """
    if config.precision is not Precision.auto:
        return config.precision
    before = read_config(folder, TrainConfig).precision if folder.config.is_file() else Precision.auto
    if before is not Precision.auto:
        return before
    known = None if gpu is None else find(gpu)
    if on_cpus:
        return Precision.fp32
    if known is None:
        return Precision.auto
    return known.half


def assume_precision(config: TrainConfig, chosen: Precision) -> TrainConfig:
    """Return the config with the planned precision: bf16 if only the ranks can decide.

    Every GPU for data centers since 2020 supports bf16.
    """
    return replace(config, precision=Precision.bf16 if chosen is Precision.auto else chosen)


def choose_tf32(config: TrainConfig, on_cpus: bool) -> bool:
    """Return True if fp32 products of a run are rounded to TF32: the typed value, otherwise on GPUs unless
    deterministic.

    Raises:
        ConfigError: TF32 is requested on CPUs.
    """
    if on_cpus and config.tf32:
        raise ConfigError("tf32=true on CPUs", "GPUs, whose matrix units compute in it", "device=cuda, or tf32=null")
    if on_cpus or config.precision is not Precision.fp32:
        return False
    return not config.deterministic if config.tf32 is None else config.tf32


def refuse_tf32(config: TrainConfig, gpu: str | None) -> None:
    """Raise ConfigError if TF32 is requested, and ``precision=auto`` resolved to 16 bits, or the GPU lacks TF32.

    Args:
        config: config of the run, with a resolved precision.
        gpu: name of the ranks' GPU; None if unknown.
    """
    check_tf32(config)
    known = None if gpu is None else find(gpu)
    if config.tf32 and known is not None and known.tf32 is None:
        raise tf32_refusal(str(gpu))


def tf32_refusal(gpu: str) -> ConfigError:
    """Return the error for ``tf32`` on a GPU without it."""
    return ConfigError(
        f"tf32=true on {gpu}, which has no TF32",
        "GPUs of compute capability 8.0 or more on all ranks",
        "tf32=null precision=auto, or tf32=null",
    )


def refuse_float8(config: TrainConfig, on_cpus: bool, gpu: str | None) -> None:
    """Raise ConfigError if ``float8`` is requested on a device that is known to lack it.

    Args:
        config: config of the run.
        on_cpus: True if its ranks compute on CPUs.
        gpu: name of the ranks' GPU; None if unknown.
    """
    known = None if gpu is None else find(gpu)
    if config.float8 is Float8.none or config.float8_emulate or not (on_cpus or (known and not known.has_float8)):
        return
    raise float8_refusal(config, "CPUs" if on_cpus else str(gpu))


def float8_refusal(config: TrainConfig, where: str) -> ConfigError:
    """Return the error for ``float8`` on devices that do not compute in it."""
    return ConfigError(
        f"float8={config.float8.name} on {where}",
        "GPUs whose matrix units compute in it, of compute capability 8.9 or more",
        "float8=none, or float8_emulate=true for its losses without its speed",
    )


def choose_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Choose the compilation of a run: the typed one, otherwise ``default`` on GPUs if the parallelism allows it.

    On CPUs the compiler takes longer than most runs.

    Raises:
        ConfigError: whole graphs or asynchronous tensor parallelism are requested without compilation; the latter is
            requested on CPUs; or CUDA graphs would overwrite gradients.
    """
    chosen = config.compile if config.compile is not CompileMode["auto"] else best_compile(config, world_size, on_cpus)
    refuse_async_tp(config, chosen, on_cpus)
    if chosen in WITH_CUDA_GRAPHS and not on_cpus:
        refuse_cuda_graphs(config, world_size)
    if config.compile_fullgraph and chosen is CompileMode["none"]:
        raise ConfigError(
            f"compile_fullgraph=true with compile={config.compile.name}, by which nothing is compiled here",
            "a compilation mode, since only the compiler makes graphs",
            "compile=default, or compile_fullgraph=false",
        )
    return chosen


def refuse_async_tp(config: TrainConfig, chosen: CompileMode, on_cpus: bool) -> None:
    """Raise ConfigError if ``parallel.async_tp`` is requested without GPUs, or without the compiler."""
    if not config.parallel.async_tp or not (on_cpus or chosen is CompileMode["none"]):
        return
    compiled = f"compile={config.compile.name}" + ("" if chosen is config.compile else f", here {chosen.name}")
    raise ConfigError(
        f"parallel.async_tp=true {'on CPUs' if on_cpus else f'with {compiled}'}",
        "GPUs, which reach each other's memory, and torch.compile, which puts the pieces in",
        f"parallel.async_tp=false, or {'device=cuda' if on_cpus else 'compile=default'}",
    )


def refuse_cuda_graphs(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError if a step has several micro-batches whose gradients are added in place."""
    dims = parallel_dims(config.parallel, world_size)
    batch = split_batch(config.optim, dims.data_ranks)
    if batch.accumulation == 1 or not adds_in_place(config):
        return
    fix = "compile=default"
    if dims.pp == 1:  # a pipeline needs several micro-batches
        fix += f", or optim.max_micro_batch={batch.per_rank}"
    raise ConfigError(
        f"compile={config.compile.name} with {batch.accumulation} micro-batches a step",
        "one micro-batch a step: CUDA graphs write the gradients of the next one where those of the former lie",
        fix,
    )


def adds_in_place(config: TrainConfig) -> bool:
    """Return True if the gradients of a micro-batch stay in the memory of the backward pass until the next ones are
    added. They do unless they are reduced or cast before."""
    parallel = config.parallel
    if parallel.strategy is Strategy.deepspeed:
        return (parallel.zero_stage or 0) < 2 and not casts_weights(config)
    if parallel.strategy is Strategy.fsdp:
        return not (config.precision.is_half or parallel.reduce_each_micro_batch)
    return True


def best_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Return the compilation that ``auto`` resolves to."""
    compiled = replace(config, compile=CompileMode["default"])
    if on_cpus:
        return CompileMode["none"]
    try:
        check_parallel_dims(compiled, world_size)
    except ConfigError:
        return CompileMode["none"]
    return compiled.compile
