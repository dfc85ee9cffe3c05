"""What can be composed: which topologies a model and a way of training allow. Torch-free.

Owns the refusals, each with its reason and the nearest thing that can be done. The planner asks on the login node, the
ranks ask again before there is a run folder.
"""

from __future__ import annotations

from gpt.config import Strategy, TrainConfig
from gpt.topology.context_rules import check_context
from gpt.topology.dims import Topology, topology
from gpt.topology.experts import check_expert
from gpt.topology.limits import check_deepspeed
from gpt.topology.stage_rules import check_pipeline
from gpt.topology.tensor_rules import check_tensor
from launch.errors import ConfigError


def lay_out(config: TrainConfig, world_size: int) -> Topology:
    """The topology of a run on ``world_size`` ranks.

    Raises:
        ConfigError: the ranks cannot be laid out so, or the model cannot be spread over them so.
    """
    layout = topology(config.parallel, world_size)
    for check in (check_zero1, check_tensor, check_pipeline, check_context, check_expert, check_deepspeed):
        check(config, layout)
    return layout


def check_zero1(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where zero1 is asked to do more than share the optimizer among data ranks."""
    others = [name for name in ("tp", "pp", "cp", "ep") if getattr(layout, name) > 1]
    if config.parallel.strategy is Strategy.zero1 and others:
        words = " ".join(f"parallel.{name}={getattr(layout, name)}" for name in others)
        raise ConfigError(
            f"parallel.strategy=zero1 with {words}",
            "zero1 with data ranks only: it cuts the optimizer of a model that every rank holds whole",
            f"parallel.strategy=fsdp parallel.reshard_after_forward=false {words}",
        )
