"""What a pipeline asks of a model, a batch and a way of training. Torch-free.

Owns the refusals, each with what to type instead; what the schedules need is known in gpt/topology/stages.py.
"""

from __future__ import annotations

from gpt.config import Recompute, Strategy, TrainConfig
from gpt.topology.batch import Batch, cut
from gpt.topology.dims import Topology
from gpt.topology.stages import V_SHAPED, fewest_micro_batches, local_stages, runs_with
from launch.errors import ConfigError


def check_pipeline(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where the layers or the batch cannot be dealt out to ``pp`` ranks."""
    if layout.pp == 1:
        return
    check_host(config)
    check_layers(config)
    check_micro_batches(config, layout)
    if config.parallel.schedule in V_SHAPED:
        check_split_backward(config)


def check_host(config: TrainConfig) -> None:
    """The ranks that hold a tied embedding send each other its gradient, which only devices can."""
    if config.parallel.cpu_offload and config.model.tie_embeddings:
        raise ConfigError(
            f"parallel.cpu_offload=true with parallel.pp={config.parallel.pp} and model.tie_embeddings=true",
            "gradients on the devices, where first and last rank add up those of the matrix that they share",
            "parallel.cpu_offload=false",
        )


def check_layers(config: TrainConfig) -> None:
    """Every stage needs a layer."""
    ranks, held, layers = config.parallel.pp, local_stages(config.parallel), config.model.n_layer
    if ranks * held <= layers:
        return
    each = f" with {held} stages on each rank" if held > 1 else ""
    most = max(p for p in range(1, ranks + 1) if ranks % p == 0 and (p == 1 or p * held <= layers))
    raise ConfigError(
        f"parallel.pp={ranks}{each}, and model.n_layer={layers}",
        f"at most {layers} stages, one for each block",
        f"parallel.pp={most}",
    )


def check_micro_batches(config: TrainConfig, layout: Topology) -> None:
    """The schedules take some numbers of micro-batches only."""
    batch, parallel = cut(config.optim, layout.data_ranks), config.parallel
    if runs_with(parallel, batch.accumulation):
        return
    fewest = fewest_micro_batches(parallel)
    enough = f"at least {fewest}" if batch.accumulation < fewest else f"a multiple of {parallel.pp}"
    number = f"{batch.accumulation} micro-batch{'es' if batch.accumulation > 1 else ''}"
    raise ConfigError(
        f"{number} (optim.global_batch={batch.global_batch} over {batch.ranks} data ranks, "
        f"{batch.micro} sequences each) for parallel.schedule={parallel.schedule.name} on {parallel.pp} ranks",
        f"{enough} of them",
        other_batch(config, batch),
    )


def other_batch(config: TrainConfig, batch: Batch) -> str:
    """What to type for a number of micro-batches that the schedule takes: smaller ones, or else more of them."""
    sizes = [size for size in range(batch.micro, 0, -1) if batch.per_rank % size == 0]
    for size in sizes:
        if runs_with(config.parallel, batch.per_rank // size):
            return f"optim.micro_batch={size}"
    number = batch.accumulation
    while not runs_with(config.parallel, number):
        number += 1
    ranks = 1 if config.optim.weak_scaling else batch.ranks
    return f"optim.global_batch={number * batch.micro * ranks} optim.micro_batch={batch.micro}"


def check_split_backward(config: TrainConfig) -> None:
    """The two halves of a split backward pass go over what the forward pass has left, at different times."""
    schedule = config.parallel.schedule.name
    words, why = "", ""
    if config.compile.name != "none":
        words, why = (
            f"compile={config.compile.name}",
            "compile=none: compiled code has one backward pass, not two halves",
        )
    elif config.recompute is not Recompute.none:
        words = f"recompute={config.recompute.name}"
        why = "recompute=none: both halves, and each matrix, would compute the block again"
    if words:
        raise ConfigError(
            f"{words} with parallel.schedule={schedule}, which splits the backward pass",
            why,
            f"parallel.schedule=interleaved, or {why.split(':')[0]}",
        )
    if config.parallel.strategy is Strategy.fsdp and config.parallel.reshard_after_forward:
        raise ConfigError(
            f"parallel.reshard_after_forward=true with parallel.schedule={schedule}",
            "false: the second half of a split backward pass does not gather the parameters again",
            "parallel.reshard_after_forward=false",
        )
