"""Blocks that FSDP shards and gathers together: the engine makes these units, and the plan counts with them."""

from __future__ import annotations

import math

from gpt.accounting.parameters import block_shapes
from gpt.config import TrainConfig


def fsdp_units(config: TrainConfig, layers: int) -> list[int]:
    """Return the number of blocks of each unit, in the order of the forward pass.

    One block each, or as many neighbors as together have ``parallel.fsdp_min_num_params`` parameters; what is left over
    at the end belongs to the last unit, so that none has fewer.

    Args:
        config: of the run.
        layers: blocks of the model, or of a pipeline stage. A stage with too few parameters is one unit.
    """
    least = config.parallel.fsdp_min_num_params
    if least is None:
        return [1] * layers
    of_a_block = sum(math.prod(shape) for shape in block_shapes(config.model).values())
    together = min(-(-least // of_a_block), layers)
    if not together:
        return []
    units = [together] * (layers // together)
    units[-1] += layers % together
    return units
