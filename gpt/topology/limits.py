"""What DeepSpeed's engine cannot be asked for, with the nearest thing that can. Torch-free."""

from __future__ import annotations

from gpt.config import NormPosition, Schedule, Strategy, TrainConfig
from gpt.topology.batch import cut
from gpt.topology.deepspeed_config import ds_config
from gpt.topology.dims import Topology
from gpt.topology.stages import split
from launch.errors import ConfigError


def check_deepspeed(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where DeepSpeed cannot spread this model so, or its file says something else than this run."""
    if config.parallel.strategy is not Strategy.deepspeed:
        return
    check_dimensions(config, layout)
    if layout.pp > 1:
        check_stages(config, layout)
    ds_config(config, cut(config.optim, layout.data_ranks))


def check_dimensions(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where more is cut than data ranks and stages."""
    others = [name for name in ("tp", "cp", "ep") if getattr(layout, name) > 1]
    if others:
        words = " ".join(f"parallel.{name}={getattr(layout, name)}" for name in others)
        engine = "" if config.parallel.engine is None else "parallel.engine=native "
        raise ConfigError(
            f"parallel.strategy=deepspeed with {words}",
            "data ranks and stages only: DeepSpeed does not cut the matrices, sequences or experts of this model",
            f"parallel=fsdp {engine}{words}",
        )


def check_stages(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where DeepSpeed's pipeline does not take what is asked."""
    parallel = config.parallel
    if parallel.zero_stage in (2, 3):
        # What a preset keeps on the host belongs to its stage.
        fix = "parallel=ds_pp_zero1" if parallel.offload_parameters else "parallel.zero_stage=1"
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage} with parallel.pp={layout.pp}",
            "stage 0 or 1: a stage of DeepSpeed's pipeline keeps its gradients over all micro-batches",
            f"{fix}, or parallel=fsdp parallel.pp={layout.pp}",
        )
    if parallel.offload_optimizer:
        raise ConfigError(
            f"parallel.offload_optimizer=true with parallel.pp={layout.pp}",
            "one of them: DeepSpeed's pipeline hands its gradients to an optimizer on the device",
            "parallel.offload_optimizer=false, or parallel.pp=1",
        )
    if parallel.schedule is not Schedule["1f1b"]:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule.name} with parallel.strategy=deepspeed",
            "1f1b, the only order that DeepSpeed has",
            f"parallel.schedule=1f1b, or parallel=pp parallel.pp={layout.pp}",
        )
    last = split(config.model, layout.pp, config.recompute)[-1]
    if parallel.zero_stage and config.model.norm_position is NormPosition.post and not last.blocks:
        raise ConfigError(
            f"parallel.pp={layout.pp} with model.norm_position=post, where the last stage has the output matrix alone",
            "matrices and norms in every stage: DeepSpeed adds their norms up over the stages, kind by kind",
            "parallel.zero_stage=0, or fewer stages",
        )
