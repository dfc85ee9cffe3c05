"""Choice of layout, precision, TF32 and compilation, if the config leaves them open; and the warnings of a plan.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from gpt.accounting import find
from gpt.config import CompileMode, Float8, ParallelConfig, Precision, Strategy, TrainConfig, check_tf32
from gpt.planning import Machine
from gpt.planning.cost import Estimate, estimate
from gpt.planning.search import Candidate, LayoutSearch, SearchResult, layout_text, with_micro_batch
from gpt.topology import Batch, parallel_dims, split_batch
from gpt.topology.check_dims import casts_weights, check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides, typed_key, typed_value

MICRO_BATCH = "optim.max_micro_batch"

# Choice of the layout with the shortest estimated step, among those that fit in memory.


NO_DIFFERENCE = 1.03
"""Two estimated step times count as equal if their ratio is at most this number. Of layouts with equal times, the one
with the fewest parallel dimensions and the least sharding is preferred (``Candidate.plainness``)."""

TIMEOUTS = ("timeout_s", "step_timeout_s")
"""Keys of ``parallel`` that do not belong to a layout. They may change between the attempts of a run."""

SHOWN = 5
"""Largest number of parallel layouts that a plan shows."""


@dataclass(frozen=True)
class LayoutChoice(Candidate):
    """A parallel layout that fits into memory, with its estimated step time."""

    estimate: Estimate

    def as_dict(self) -> dict[str, object]:
        """Return the layout as plain JSON for ``plan.json``; times in seconds, memory in bytes."""
        found = self.estimate
        return {
            "layout": layout_text(self.parallel, self.dims),
            "micro_batch": self.batch.micro,
            "accumulation": self.batch.accumulation,
            "memory_bytes": self.memory.total,
            "host_bytes": self.memory.host,
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "compute_s": found.compute_s,
            "idle_s": found.bubble_s,
            "communication_s": found.communication_s,
        }


@dataclass(frozen=True)
class ParallelChoice:
    """The chosen parallelism of a run, its alternatives, and the reason for the choice."""

    parallel: ParallelConfig
    micro_batch: int
    """Chosen value of ``optim.max_micro_batch``, in sequences. It is at most the value of the config."""
    choices: tuple[LayoutChoice, ...] = ()
    """Layouts that fit into memory, best first; empty if none was searched."""
    why: str = ""
    """Reason for the choice, as text; empty if ``parallel.strategy`` is not ``auto``."""
    left_out: tuple[str, ...] = ()
    """Lines of text on layouts that do not fit, and on the use of CPU offload."""

    @property
    def best(self) -> tuple[LayoutChoice, ...]:
        """The first ``SHOWN`` of ``choices``."""
        return self.choices[:SHOWN]

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Return the config with the chosen parallelism and size of micro-batches."""
        return replace(with_micro_batch(config, self.micro_batch), parallel=self.parallel)


def rank_layouts(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str] = ()) -> ParallelChoice:
    """Search the layouts of a run, and return the choice of the best one that fits into memory.

    Layouts with CPU offload are tried only if no other layout fits.

    Args:
        config: config of the run, with ``parallel.strategy=auto``.
        world_size: number of ranks.
        machine: hardware of the ranks.
        fixed: keys of ``parallel`` that keep the values of ``config``.

    Raises:
        ConfigError: no layout is valid, or none fits.
    """
    search, tried = LayoutSearch(config, world_size, machine, fixed), list[SearchResult]()
    for found in search.results():
        tried.append(found)
        if found.fitting:
            ranked = sort_layouts([estimated(config, one, machine) for one in found.fitting])
            first, number = ranked[0], len(ranked)
            why = f"1 of {number} layouts that fit, by an estimate that ranks them on {machine}"
            if first.batch.micro != config.optim.max_micro_batch:
                why = f"optim.max_micro_batch={first.batch.micro} instead of {config.optim.max_micro_batch}, and {why}"
            return ParallelChoice(first.parallel, first.batch.micro, ranked, why, tuple(search.explain(tried)))
    if all(not found.too_large for found in tried):
        raise search.no_layout_error()
    raise search.out_of_memory_error(tried)


def estimated(config: TrainConfig, one: Candidate, machine: Machine) -> LayoutChoice:
    """Return the layout ``one`` with its estimated step time on ``machine``. ``config`` is the config of the run."""
    chosen = replace(with_micro_batch(config, one.batch.micro), parallel=one.parallel)
    expected = estimate(chosen, one.dims, one.batch, machine)
    return LayoutChoice(one.parallel, one.dims, one.batch, one.memory, expected)


def sort_layouts(found: Sequence[LayoutChoice]) -> tuple[LayoutChoice, ...]:
    """Return layouts sorted by estimated step time, the fastest first. If ``found`` has a layout with several sizes of
    micro-batches, only the best size is returned.

    The layouts whose step time is at most ``NO_DIFFERENCE`` times the shortest are an exception. They come first, and
    are sorted by ``Candidate.plainness``: few parallel dimensions and little sharding first.
    """
    limit = NO_DIFFERENCE * min(choice.estimate.step_s for choice in found)

    def key(choice: LayoutChoice) -> tuple[object, ...]:
        step_s = choice.estimate.step_s
        return (step_s > limit, *((step_s,) if step_s > limit else ()), choice.plainness, step_s, str(choice))

    ordered = sorted(found, key=key)
    first = {str(choice.parallel): choice for choice in reversed(ordered)}
    return tuple(choice for choice in ordered if first[str(choice.parallel)] is choice)


def choose_parallelism(
    config: TrainConfig,
    overrides: Sequence[str],
    folder: RunFolder,
    world_size: int,
    machine: Callable[[], Machine],
) -> ParallelChoice:
    """Return the parallelism of a run.

    Without ``parallel=auto``, this is the parallelism of its config. With ``parallel=auto``, it is that of an earlier
    attempt. If there is no earlier attempt, or its choice is invalid now, the result of a search is returned.

    Args:
        config: config of the run.
        overrides: overrides of the command line. If they set keys of ``parallel``, a search keeps these values.
        folder: folder of the run, which may not exist yet.
        world_size: number of ranks.
        machine: returns the hardware of the ranks; called only if a layout must be searched.

    Raises:
        ConfigError: no layout is valid, or none fits.
    """
    if config.parallel.strategy is not Strategy.auto:
        return ParallelChoice(config.parallel, config.optim.max_micro_batch)
    fixed = typed_keys(overrides)
    earlier = earlier_choice(config, overrides, fixed, folder, world_size)
    if earlier is not None:
        return earlier
    return rank_layouts(config, world_size, machine(), fixed)


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys of ``parallel`` that ``overrides`` set, without strategy and timeouts."""
    keys = {typed_key(arg) for arg in overrides}
    return {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")} - {"strategy", *TIMEOUTS}


def earlier_choice(
    config: TrainConfig, overrides: Sequence[str], fixed: Collection[str], folder: RunFolder, world_size: int
) -> ParallelChoice | None:
    """Return the parallelism that an earlier attempt of the run in ``folder`` has chosen.

    Return None if there was no earlier attempt, or if its choice is invalid on ``world_size`` ranks. Also return None
    if the command line now sets one of the keys ``fixed`` of ``parallel``, or the size of micro-batches, to another
    value than before.
    """
    if not folder.config.is_file():
        return None
    before = read_config(folder, TrainConfig)
    earlier = replace(before.parallel, **{key: getattr(config.parallel, key) for key in TIMEOUTS})
    if earlier.strategy is Strategy.auto:  # the config was written before the choice, by another launcher
        return None
    if any(getattr(earlier, key) != getattr(config.parallel, key) for key in fixed):
        return None
    if typed_value(overrides, MICRO_BATCH) != typed_value(read_overrides(folder), MICRO_BATCH):
        return None
    choice = ParallelChoice(earlier, before.optim.max_micro_batch, why="as this run began; fresh=true chooses anew")
    chosen = choice.apply(config)
    try:
        split_batch(chosen.optim, check_parallel_dims(chosen, world_size).data_ranks)
    except ConfigError:
        return None
    return choice


# Warnings of a plan about settings that work, but are hardly intended.
#
# Pure functions. Each yields lines of text, or nothing.


MANY_EPOCHS = 100
"""Number of passes over a corpus above which a plan warns."""


def slow_precision(
    device_name: str, precision: Precision, tf32: bool = False, best: Precision | None = None
) -> Iterator[str]:
    """Yield a warning, as text, if another precision is much faster on a device, or if the device does not compute in
    ``precision``.

    Args:
        device_name: name of the device.
        precision: precision of the run.
        tf32: True if fp32 products are rounded to TF32.
        best: fastest precision of a device that is not in the table of accelerators; None if unknown.
    """
    known = find(device_name)
    best = best if known is None else known.half
    if best is None or precision is best:
        return
    if precision is Precision.bf16:
        yield f"precision=bf16 on {device_name}, which does not compute in it: precision={best.name}"
    if precision is not Precision.fp32:
        return
    ours, theirs = (None, None) if known is None else (known.peak(precision, tf32), known.peak(best))
    times = "many" if ours is None or theirs is None else f"about {theirs / ours:.0f}"
    name = "precision=fp32 in TF32" if tf32 and (known is None or known.has_tf32) else "precision=fp32"
    yield f"{name} on {device_name}, whose peak is {times} times higher in {best.name}: precision={best.name}"


def execution_warnings(config: TrainConfig, device_name: str | None, best: Precision | None = None) -> Iterator[str]:
    """Yield warnings, as text, of settings with which GPUs compute slowly.

    Args:
        config: config of the run, with chosen precision, TF32 and compilation.
        device_name: name of the GPU; None if unknown.
        best: fastest precision of a GPU that is not in the table of accelerators; None if unknown.
    """
    if device_name is not None:
        yield from slow_precision(device_name, config.precision, bool(config.tf32), best)
    if config.parallel.tp > 1 and not config.compiles:
        yield (
            f"parallel.tp={config.parallel.tp} with compile={config.compile.name}: without the compiler each operation "
            "on a sharded matrix goes through Python, which takes longer than the GPU computes: compile=default"
        )
    if config.parallel.ep > 1 and config.model.capacity_factor is None:
        yield (
            f"parallel.ep={config.parallel.ep} without a capacity: in each mixture of experts the host waits, "
            "since ranks exchange numbers of rows; model.capacity_factor=1.25 needs no wait, but drops some tokens"
        )


def many_epochs(config: TrainConfig, batch: Batch, corpus_tokens: int) -> Iterator[str]:
    """Yield a warning if a run makes more than ``MANY_EPOCHS`` passes over its training tokens. ``corpus_tokens`` is
    their number; 0 means that it is unknown, and yields no warning."""
    a_step = batch.global_batch * config.model.block_size
    total = a_step * config.optim.max_steps
    if not corpus_tokens or total <= MANY_EPOCHS * corpus_tokens:  # the size of a stream is not known
        return
    epochs, most = total / corpus_tokens, MANY_EPOCHS * corpus_tokens
    fewer = (
        f"optim.max_steps={max(1, most // a_step)}" if config.optim.max_tokens is None else f"optim.max_tokens={most}"
    )
    yield (
        f"{count_text(total)} tokens from a corpus of {count_text(corpus_tokens)}: {epochs:,.0f} epochs; "
        f"a larger corpus (data=), or {fewer} for {MANY_EPOCHS} epochs"
    )


def many_time_limits(run_s: float, timeout_min: int) -> Iterator[str]:
    """Yield a warning if the estimated time of a run, in seconds, exceeds the time limit of its job, in minutes."""
    limits = math.ceil(run_s / (60 * timeout_min))
    if limits < 2:
        return
    enough = 10 * math.ceil(1.1 * run_s / 600)
    takes = f"{run_s / 60:.0f} min"
    for unit, name in ((3600, "h"), (86400, "days")):
        if run_s >= 2 * unit:
            takes = f"{run_s / unit:.3g} {name}"
    yield (
        f"about {takes} by the estimate of the planner, and cluster.timeout_min={timeout_min}: {limits} "
        f"time limits, with a requeue after each; or cluster.timeout_min={enough} where the partition allows it"
    )


def count_text(number: int) -> str:
    """Return a count as text with three digits, such as ``9.96 B`` or ``7.55 M``."""
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


# Resolution of ``precision=auto``, ``tf32=null`` and ``compile=auto`` for the devices of a run. A run keeps its first
# precision.


WITH_CUDA_GRAPHS = (CompileMode["reduce-overhead"], CompileMode["max-autotune"])


def choose_precision(config: TrainConfig, folder: RunFolder, on_cpus: bool, gpu: str | None) -> Precision:
    """Return the precision of a run. If the config has another precision than ``auto``, return that.

    If the config has ``auto``, a later attempt keeps the precision of the first attempt. A first attempt gets fp32 on
    CPUs, because few CPUs are faster in bf16. On GPUs it gets the 16-bit precision in which they compute fastest: bf16
    if they support it, else fp16.

    Args:
        config: config of the run.
        folder: folder of the run, which may not exist yet.
        on_cpus: True if the ranks compute on CPUs.
        gpu: name of the ranks' GPU; None if unknown.

    Returns:
        The precision. It is ``auto`` if the GPU is unknown: then the ranks choose the precision at their start.
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
    """Return the config with the precision ``chosen``, a result of ``choose_precision``. If ``chosen`` is ``auto``, the
    GPU is unknown, and the config gets bf16.

    Every GPU for data centers since 2020 supports bf16.
    """
    return replace(config, precision=Precision.bf16 if chosen is Precision.auto else chosen)


def choose_tf32(config: TrainConfig, on_cpus: bool) -> bool:
    """Return True if the factors of matrix products of a run are rounded to TF32.

    Return False on CPUs, and in another precision than fp32. In fp32 on GPUs return ``tf32``. If ``tf32`` is null,
    return True, unless ``deterministic`` is true.

    Raises:
        ConfigError: ``tf32`` is true and the ranks compute on CPUs.
    """
    if on_cpus and config.tf32:
        raise ConfigError("tf32=true on CPUs", "GPUs, whose matrix units compute in it", "device=cuda, or tf32=null")
    if on_cpus or config.precision is not Precision.fp32:
        return False
    return not config.deterministic if config.tf32 is None else config.tf32


def refuse_tf32(config: TrainConfig, gpu: str | None) -> None:
    """Raise ConfigError if ``tf32`` is true, and the precision has 16 bits or the GPU does not support TF32.

    Args:
        config: config of the run, with a chosen precision.
        gpu: name of the ranks' GPU; None if unknown.
    """
    check_tf32(config)
    known = None if gpu is None else find(gpu)
    if config.tf32 and known is not None and not known.has_tf32:
        raise tf32_refusal(str(gpu))


def tf32_refusal(gpu: str) -> ConfigError:
    """Return the error for ``tf32=true`` on a GPU that does not support TF32. ``gpu`` is the name of the GPU."""
    return ConfigError(
        f"tf32=true on {gpu}, which has no TF32",
        "GPUs of compute capability 8.0 or more on all ranks",
        "tf32=null precision=auto, or tf32=null",
    )


def refuse_float8(config: TrainConfig, on_cpus: bool, gpu: str | None) -> None:
    """Raise ConfigError if ``float8`` is set, and the device is known not to support it.

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
    """Return the error for ``float8`` on devices, described by ``where``, that do not support it."""
    return ConfigError(
        f"float8={config.float8.name} on {where}",
        "GPUs whose matrix units compute in it, of compute capability 8.9 or more",
        "float8=none, or float8_emulate=true for its losses without its speed",
    )


def choose_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Return the compilation mode of a run: that of its config, or if that is ``auto`` the result of ``best_compile``.

    Raises:
        ConfigError: ``compile_fullgraph`` is set and nothing is compiled, or CUDA graphs do not work with the
            parallelism.
    """
    chosen = config.compile if config.compile is not CompileMode["auto"] else best_compile(config, world_size, on_cpus)
    if chosen in WITH_CUDA_GRAPHS and not on_cpus:
        refuse_cuda_graphs(config, world_size)
    if config.compile_fullgraph and chosen is CompileMode["none"]:
        raise ConfigError(
            f"compile_fullgraph=true with compile={config.compile.name}, by which nothing is compiled here",
            "a compilation mode, since only the compiler makes graphs",
            "compile=default, or compile_fullgraph=false",
        )
    return chosen


def refuse_cuda_graphs(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError if CUDA graphs do not work: with fsdp, or with several micro-batches a step.

    CUDA graphs need parameters at constant addresses. FSDP2 frees gathered parameters after their use
    (``FSDPParam.to_sharded``), and gathers them again at other addresses. For each new address a graph is recorded
    again. After 128 recordings the block runs without graphs (``torch._inductor``:
    ``cudagraph_unexpected_rerecord_limit``).

    With several micro-batches, a graph writes the gradients of a micro-batch to the place of the former gradients. If
    DeepSpeed moves the gradients after each micro-batch, this does not matter, and no error is raised.
    """
    if config.parallel.strategy is Strategy.fsdp:
        raise ConfigError(
            f"compile={config.compile.name} with parallel.strategy=fsdp",
            "whole parameters that keep their addresses, as CUDA graphs need; fsdp frees gathered ones after each use",
            "compile=default, or parallel=zero1",
        )
    dims = parallel_dims(config.parallel, world_size)
    batch = split_batch(config.optim, dims.data_ranks)
    # Only DeepSpeed may reduce or cast the gradients of a micro-batch before it adds those of the next one.
    moves_gradients = (config.parallel.zero_stage or 0) >= 2 or casts_weights(config)
    if batch.accumulation == 1 or (config.parallel.strategy is Strategy.deepspeed and moves_gradients):
        return
    fix = "compile=default"
    if dims.pp == 1:  # a pipeline needs several micro-batches
        fix += f", or optim.max_micro_batch={batch.per_rank}"
    raise ConfigError(
        f"compile={config.compile.name} with {batch.accumulation} micro-batches a step",
        "one micro-batch a step: CUDA graphs write the gradients of the next one where those of the former lie",
        fix,
    )


def best_compile(config: TrainConfig, world_size: int, on_cpus: bool) -> CompileMode:
    """Return the compilation mode for ``compile=auto``: ``default`` on GPUs if the parallelism works with it, else
    ``none``. On CPUs the compiler takes longer than most runs."""
    compiled = replace(config, compile=CompileMode["default"])
    if on_cpus:
        return CompileMode["none"]
    try:
        check_parallel_dims(compiled, world_size)
    except ConfigError:
        return CompileMode["none"]
    return compiled.compile
