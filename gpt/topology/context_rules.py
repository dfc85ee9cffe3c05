"""Which sequences ``cp`` ranks can share, and what to type for what they cannot. Torch-free.

Owns the reasons of context parallelism; ``gpt.topology.composition`` asks. How they share them is
``gpt.parallel.context``'s.
"""

from __future__ import annotations

from gpt.config import CpMethod, Recompute, TrainConfig
from gpt.topology.dims import Topology
from launch.errors import ConfigError


def check_context(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where a sequence cannot be shared by ``cp`` ranks."""
    model, cp = config.model, layout.cp
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
            "experts without a limit: whether a place is left depends on tokens of the sequence that other ranks hold",
            "model.capacity_factor=null",
        )
    if model.dropout and config.parallel.cp_method is CpMethod.ring:
        raise ConfigError(
            f"parallel.cp_method=ring with model.dropout={model.dropout:g}",
            "no dropout, since each block's noise would have to be drawn again when its keys come round a second time",
            "parallel.cp_method=allgather, or model.dropout=0",
        )
    if config.compile.name != "none" and config.recompute is Recompute.selective:
        raise ConfigError(
            f"parallel.cp={cp} with recompute=selective and compile={config.compile.name}",
            "one of the two, or full recomputation: the compiler hides from a selective one what could be kept",
            "recompute=full, or compile=none",
        )
