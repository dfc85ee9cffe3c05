"""Checks of the parallel dimensions against model, batch and training options. Imports no torch.

The planner calls ``check_parallel_dims`` on the login node. The ranks call it again before a run folder exists.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from gpt.components import KINDS_OF_PARALLELISM, optimizer_state, part_counts
from gpt.config import (
    CpMethod,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    NormPosition,
    Precision,
    Recompute,
    Schedule,
    Strategy,
    TrainConfig,
)
from gpt.config.model import PARTS
from gpt.config.optim import ADAMW, MUON
from gpt.config.rules import GROUPED_MULTIPLE, divisors, is_importable
from gpt.topology import ParallelDims, check_expert, parallel_dims, split_batch
from gpt.topology.deepspeed_config import ds_config
from gpt.topology.schedules import check_pipeline, split_layers
from launch.errors import ConfigError


def check_parallel_dims(config: TrainConfig, world_size: int, ranks_per_node: int = 1) -> ParallelDims:
    """Return the parallel dimensions of a run on ``world_size`` ranks, checked against all of its config.

    An error proposes nodes of ``ranks_per_node`` ranks.

    Raises:
        ConfigError: the degrees do not divide the ranks, or do not suit the model.
    """
    dims = parallel_dims(config.parallel, world_size, ranks_per_node)
    checks = (check_parallel_parts, check_zero1, check_tensor, check_pipeline, check_context, check_expert)
    for check in (*checks, check_selective, check_deepspeed, check_muon):
        check(config, dims)
    return dims


def refuse_without_deepspeed(config: TrainConfig) -> None:
    """Raise ConfigError if the run needs DeepSpeed and this Python lacks it. Does not import DeepSpeed.

    Call this where the run trains, not on a login node, because only the nodes may have DeepSpeed.
    """
    if config.parallel.strategy is Strategy.deepspeed and not is_importable("deepspeed"):
        raise ConfigError(
            f"parallel.strategy=deepspeed, and no package deepspeed in {sys.executable}",
            "DeepSpeed, which all but the strategies of that name does without",
            "pip install -c constraints.txt deepspeed, or parallel=fsdp",
        )


def check_parallel_parts(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the user's optimizer, or a user's class in the model, is unusable.

    Also raises ConfigError if tp, cp or pp is above 1, and a user's class in the model does not declare its support.
    """
    model = config.model
    optimizer_state(config.optim)
    for key, counts in part_counts(model).items():
        part = "norm" if key == "head_norm" else key
        asked = [name for name in ("tp", "cp", "pp") if getattr(dims, name) > 1 and name not in counts.parallel]
        if not asked:
            continue
        name, able = asked[0], KINDS_OF_PARALLELISM[part]
        says = f'parallel = ("{name}",) in the class, where that holds; ' if name in able else ""
        raise ConfigError(
            f"parallel.{name}={getattr(dims, name)} with model.{part}={model.custom_parts[part]}",
            f"{says}a part that says it can be computed under {name}"
            + ("" if name in able else f", which of {part} only ours can"),
            f"parallel=fsdp parallel.{name}=1, or model.{part}={next(iter(PARTS[part])).name}",
        )


def check_zero1(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if zero1 is combined with another kind of parallelism than data parallelism."""
    if config.parallel.strategy is Strategy.zero1:
        refuse_dimensions(
            dims,
            ("tp", "pp", "cp", "ep"),
            "parallel.strategy=zero1",
            "zero1 with data parallelism only: it shards the optimizer state of a model that every rank replicates",
            "parallel.strategy=fsdp parallel.reshard_after_forward=false",
        )


def refuse_dimensions(dims: ParallelDims, names: Sequence[str], found: str, expected: str, instead: str) -> None:
    """Raise ConfigError if one of the dimensions ``names`` has several ranks.

    Args:
        dims: the parallel dimensions.
        names: dimensions that are not possible.
        found: override that excludes these dimensions.
        expected: what is possible.
        instead: overrides with which these dimensions are possible.
    """
    others = " ".join(f"parallel.{name}={getattr(dims, name)}" for name in names if getattr(dims, name) > 1)
    if others:
        raise ConfigError(f"{found} with {others}", expected, f"{instead} {others}")


def check_context(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if sequences cannot be sharded over ``cp`` ranks."""
    model, cp = config.model, dims.cp
    if cp == 1:
        return
    if model.block_size % (2 * cp):
        raise ConfigError(
            f"parallel.cp={cp} with model.block_size={model.block_size}",
            f"a multiple of {2 * cp}: each rank takes an early and a late chunk of every sequence, all of equal length",
            f"model.block_size={-(-model.block_size // (2 * cp)) * 2 * cp}",
        )
    if model.capacity_factor is not None:
        raise ConfigError(
            f"parallel.cp={cp} with model.capacity_factor={model.capacity_factor:g}",
            "no capacity limit: whether an expert has room depends on tokens of the sequence that other ranks hold",
            "model.capacity_factor=null",
        )
    if model.dropout and config.parallel.cp_method is CpMethod.ring:
        raise ConfigError(
            f"parallel.cp_method=ring with model.dropout={model.dropout:g}",
            "no dropout: the noise of each block of keys would have to be drawn again in the backward pass",
            "parallel.cp_method=allgather, or model.dropout=0",
        )
    for key in ("window", "attention_softcap"):
        value = getattr(model, key)
        if value is not None and config.parallel.cp_method is CpMethod.ring:
            raise ConfigError(
                f"parallel.cp_method=ring with model.{key}={value:g}",
                "all earlier keys and their plain scores, since a ring computes and merges whole blocks of keys",
                f"parallel.cp_method=allgather, or model.{key}=null",
            )


def check_selective(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError for selective recomputation of compiled blocks under ``cp`` or ``ep``."""
    name = next((name for name in ("cp", "ep") if getattr(dims, name) > 1), None)
    if name and config.compiles and config.recompute is Recompute.selective:
        raise ConfigError(
            f"parallel.{name}={getattr(dims, name)} with recompute=selective and compile={config.compile.name}",
            "one of the two, or recompute=full: selective recomputation does not see into compiled code",
            "recompute=full, or compile=none",
        )


def check_tensor(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the model's matrices or activations cannot be sharded over ``tp`` ranks."""
    if dims.tp == 1:
        return
    model, tp = config.model, dims.tp
    check_matrices(model, tp)
    if model.padded_vocab % tp:
        raise ConfigError(
            f"parallel.tp={tp} with {model.padded_vocab} rows of the embedding (model.vocab_size={model.vocab_size}, "
            f"model.vocab_multiple={model.vocab_multiple})",
            f"a multiple of {tp} rows; padding rows take no part",
            f"model.vocab_multiple={math.lcm(model.vocab_multiple, tp)}",
        )
    check_sequence(config, dims)


def check_matrices(model: ModelConfig, tp: int) -> None:
    """Raise ConfigError if ``tp`` ranks do not evenly divide query heads, key-value heads or the inner width of the
    ffn."""
    shared = {
        f"model.n_head={model.n_head}": model.n_head,
        f"{model.kv_heads} key and value heads": model.kv_heads,
        f"{'experts' if model.ffn is Ffn.moe else 'a feed-forward layer'} {model.ffn_width} wide": model.ffn_width,
    }
    if isinstance(model.ffn, str):  # a layer of the user is replicated, and each rank computes its own tokens
        shared.popitem()
    sharers = max(
        n for n in divisors(tp) if all(number % n == 0 for number in shared.values()) and grouped_matmul_fits(model, n)
    )
    for text, number in shared.items():
        if number % tp:
            raise ConfigError(
                f"parallel.tp={tp} with {text}", f"a number of ranks that divides {number}", f"parallel.tp={sharers}"
            )
    if not grouped_matmul_fits(model, tp):
        raise ConfigError(
            f"parallel.tp={tp} with experts {model.ffn_width} wide, {model.ffn_width // tp} on each rank",
            f"multiples of {GROUPED_MULTIPLE} on each rank, since torch's grouped matmul takes rows of whole 16 bytes",
            f"model.expert_matmul=loop, or parallel.tp={sharers}",
        )


def grouped_matmul_fits(model: ModelConfig, tp: int) -> bool:
    """True if torch's grouped matmul accepts the shard of an expert's width."""
    grouped = model.ffn is Ffn.moe and model.expert_matmul is ExpertMatmul.grouped
    return not grouped or model.ffn_width % (GROUPED_MULTIPLE * tp) == 0


def check_sequence(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError for unequal sequence shards, and for dropout on replicated activations.

    Each rank draws its own dropout noise, so ranks with the same activations would drop different elements.
    """
    model, ranks = config.model, dims.tp * dims.cp
    wish = f"model.block_size={-(-model.block_size // ranks) * ranks}"
    if config.parallel.sequence_parallel and model.block_size % ranks:
        raise ConfigError(
            f"parallel.sequence_parallel=true with model.block_size={model.block_size} on {ranks} ranks",
            f"a multiple of {ranks}: each rank has an equal shard of every sequence",
            wish if model.dropout else f"parallel.sequence_parallel=false, or {wish}",
        )
    if model.dropout and not config.parallel.sequence_parallel:
        raise ConfigError(
            f"model.dropout={model.dropout:g} with parallel.tp={dims.tp} parallel.sequence_parallel=false",
            "sequence parallelism: ranks draw their own dropout noise, so replicated activations would diverge",
            "parallel.sequence_parallel=true" if model.block_size % ranks == 0 else "model.dropout=0",
        )


def check_deepspeed(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if DeepSpeed cannot parallelize this model, or its config file contradicts the run."""
    if config.parallel.strategy is not Strategy.deepspeed:
        return
    refuse_dimensions(
        dims,
        ("tp", "cp", "ep"),
        "parallel.strategy=deepspeed",
        "data and pipeline parallelism only: DeepSpeed does not shard matrices, sequences or experts of this model",
        "parallel=fsdp",
    )
    if dims.pp > 1:
        check_stages(config, dims)
        check_ends(config, dims)
    if config.optim.optimizer != ADAMW:
        raise ConfigError(
            f"optim.optimizer={config.optim.optimizer} with parallel.strategy=deepspeed",
            "AdamW, whose moments are what DeepSpeed's checkpoints are read and written by",
            "parallel=fsdp (ZeRO-3), parallel=zero1, or optim.optimizer=adamw",
        )
    if config.precision is Precision.fp16:
        raise ConfigError(
            "precision=fp16 with parallel.strategy=deepspeed",
            "bf16 or fp32: the loss scale of fp16 belongs to the engines of torch",
            "parallel=fsdp, or precision=fp32",
        )
    ds_config(config, split_batch(config.optim, dims.data_ranks))


def check_muon(config: TrainConfig, _: ParallelDims) -> None:
    """Raise ConfigError for Muon over parameters in host memory."""
    if config.optim.optimizer == MUON and config.parallel.cpu_offload:
        raise ConfigError(
            "optim.optimizer=muon with parallel.cpu_offload=true",
            "matrices on the devices, which orthogonalize them, or an optimizer for parameters in host memory",
            "parallel.cpu_offload=false, or optim.optimizer=adamw",
        )


def check_ends(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError for model.scale_embedding and model.logit_softcap, which DeepSpeed's pipeline lacks."""
    for key, idle in (("scale_embedding", False), ("logit_softcap", None)):
        if getattr(config.model, key) != idle:
            raise ConfigError(
                f"parallel.strategy=deepspeed parallel.pp={dims.pp} with model.{key}",
                "a plain embedding and plain logits: DeepSpeed's first and last layer are the shared matrix alone",
                f"parallel=pp parallel.pp={dims.pp}, or parallel.pp=1",
            )


def check_stages(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if DeepSpeed's pipeline does not support the ZeRO stage, offload or schedule."""
    parallel = config.parallel
    if parallel.zero_stage in (2, 3):
        # A preset with parameter offload implies ZeRO-3, so changing the ZeRO stage alone would not suffice.
        fix = "parallel=ds_pp_zero1" if parallel.offload_parameters else "parallel.zero_stage=1"
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage} with parallel.pp={dims.pp}",
            "stage 0 or 1: a stage of DeepSpeed's pipeline keeps its gradients over all micro-batches",
            f"{fix}, or parallel=fsdp parallel.pp={dims.pp}",
        )
    if parallel.offload_optimizer:
        raise ConfigError(
            f"parallel.offload_optimizer=true with parallel.pp={dims.pp}",
            "one of them: DeepSpeed's pipeline steps an optimizer on the device",
            "parallel.offload_optimizer=false, or parallel.pp=1",
        )
    if parallel.schedule is not Schedule["1f1b"]:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule.name} with parallel.strategy=deepspeed",
            "1f1b, DeepSpeed's only schedule",
            f"parallel.schedule=1f1b, or parallel=pp parallel.pp={dims.pp}",
        )
    last = split_layers(config.model, dims.pp, config.recompute)[-1]
    if parallel.zero_stage and config.model.norm_position is NormPosition.post and not last.blocks:
        raise ConfigError(
            f"parallel.pp={dims.pp} with model.norm_position=post, where the last stage has the output matrix alone",
            "both parameter groups in every stage: DeepSpeed reduces the gradient norm of each group over the stages",
            "parallel.zero_stage=0, or fewer stages",
        )
