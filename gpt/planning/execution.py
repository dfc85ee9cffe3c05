"""``precision=auto``, ``tf32=null`` and ``compile=auto``: what the devices of a run are best used with.

A run keeps the precision it began with. Torch-free.
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
    """Choose the precision of a run: as typed, else as the run began, else bf16 on GPUs that compute in it, fp16 on
    those with matrix units for that only.

    Args:
        config: of the run.
        folder: of the run, where there may be one already.
        on_cpus: whether its ranks compute on CPUs, which get fp32: few of them are faster in bf16.
        gpu: name of the ranks' GPU; None where it is not known.

    Returns:
        ``auto`` where only the ranks can tell.
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
    """Return the config with the precision that a plan counts with: bf16 where only the ranks can tell.

    Every GPU for data centers since 2020 has it.
    """
    return replace(config, precision=Precision.bf16 if chosen is Precision.auto else chosen)


def choose_tf32(config: TrainConfig, on_cpus: bool) -> bool:
    """Tell whether fp32 products of a run are rounded to TF32: as typed, else on GPUs unless it is deterministic.

    Raises:
        ConfigError: TF32 is asked for on CPUs.
    """
    if on_cpus and config.tf32:
        raise ConfigError("tf32=true on CPUs", "GPUs, whose matrix units compute in it", "device=cuda, or tf32=null")
    if on_cpus or config.precision is not Precision.fp32:
        return False
    return not config.deterministic if config.tf32 is None else config.tf32


def refuse_tf32(config: TrainConfig, gpu: str | None) -> None:
    """Raise ConfigError where TF32 is asked for, and ``precision=auto`` has become 16 bits, or the GPU has none.

    Args:
        config: of the run, its precision settled.
        gpu: name of the ranks' GPU; None where it is not known.
    """
    check_tf32(config)
    known = None if gpu is None else find(gpu)
    if config.tf32 and known is not None and known.tf32 is None:
        raise tf32_refusal(str(gpu))


def tf32_refusal(gpu: str) -> ConfigError:
    """Make the refusal of ``tf32`` on a GPU without it."""
    return ConfigError(
        f"tf32=true on {gpu}, which has no TF32",
        "GPUs of compute capability 8.0 or more on all ranks",
        "tf32=null precision=auto, or tf32=null",
    )


def refuse_float8(config: TrainConfig, on_cpus: bool, gpu: str | None) -> None:
    """Raise ConfigError where ``float8`` is asked for on a device that is known to have none.

    Args:
        config: of the run.
        on_cpus: whether its ranks compute on CPUs.
        gpu: name of the ranks' GPU; None where it is not known.
    """
    known = None if gpu is None else find(gpu)
    if config.float8 is Float8.none or config.float8_emulate or not (on_cpus or (known and not known.has_float8)):
        return
    raise float8_refusal(config, "CPUs" if on_cpus else str(gpu))


def float8_refusal(config: TrainConfig, where: str) -> ConfigError:
    """Make the refusal of ``float8`` on devices that do not compute in it."""
    return ConfigError(
        f"float8={config.float8.name} on {where}",
        "GPUs whose matrix units compute in it, of compute capability 8.9 or more",
        "float8=none, or float8_emulate=true for its losses without its speed",
    )


def choose_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Choose the compilation of a run: as typed, else ``default`` on GPUs where the parallelism allows it.

    On CPUs the compiler takes longer than most runs there.

    Raises:
        ConfigError: whole graphs or asynchronous tensor parallelism are asked for, and nothing is compiled; or the
            latter on CPUs; or CUDA graphs would overwrite gradients.
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
    """Raise ConfigError where ``parallel.async_tp`` is asked for without GPUs, or without the compiler."""
    if not config.parallel.async_tp or not (on_cpus or chosen is CompileMode["none"]):
        return
    compiled = f"compile={config.compile.name}" + ("" if chosen is config.compile else f", here {chosen.name}")
    raise ConfigError(
        f"parallel.async_tp=true {'on CPUs' if on_cpus else f'with {compiled}'}",
        "GPUs, which reach each other's memory, and torch.compile, which puts the pieces in",
        f"parallel.async_tp=false, or {'device=cuda' if on_cpus else 'compile=default'}",
    )


def refuse_cuda_graphs(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError where a step has several micro-batches, and their gradients are added up in place."""
    dims = parallel_dims(config.parallel, world_size)
    batch = split_batch(config.optim, dims.data_ranks)
    if batch.accumulation == 1 or not adds_in_place(config):
        return
    fix = "compile=default"
    if dims.pp == 1:  # a pipeline needs several
        fix += f", or optim.max_micro_batch={batch.per_rank}"
    raise ConfigError(
        f"compile={config.compile.name} with {batch.accumulation} micro-batches a step",
        "one micro-batch a step: CUDA graphs write the gradients of the next one where those of the former lie",
        fix,
    )


def adds_in_place(config: TrainConfig) -> bool:
    """Tell whether the gradients of a micro-batch stay where the backward pass wrote them until the next one's are
    added: they do unless they are reduced, or cast, before that."""
    parallel = config.parallel
    if parallel.strategy is Strategy.deepspeed:
        return (parallel.zero_stage or 0) < 2 and not casts_weights(config)
    if parallel.strategy is Strategy.fsdp:
        return not (config.precision.is_half or parallel.reduce_each_micro_batch)
    return True


def best_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Return the compilation that ``auto`` stands for."""
    compiled = replace(config, compile=CompileMode["default"])
    if on_cpus:
        return CompileMode["none"]
    try:
        check_parallel_dims(compiled, world_size)
    except ConfigError:
        return CompileMode["none"]
    return compiled.compile
