"""Matrix products of the blocks in 8-bit floating point (arXiv 2209.05433), by torchao.

Applied to the model from outside, before it is compiled and parallelized. Parameters keep their names, shapes and fp32
values, so that checkpoints are those of any other precision. torchao is imported only where it is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from gpt.config import Float8, TrainConfig
from gpt.model.gpt import GPT


def convert_linears(model: GPT, config: TrainConfig) -> None:
    """Have the linear layers of the blocks compute in float8 as ``config.float8`` says, forward and backward.

    Factors are scaled to the range of the format anew in each product, by their largest magnitude: that of the whole
    tensor, or of each row. What is not a linear layer stays as it is: embedding, norms, attention, the output matrix,
    whose logits need the bits, the router, which chooses, and experts, which compute in grouped products.
    """
    if config.float8 is Float8.none:
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(config.float8.name)
    recipe = replace(recipe, emulate=config.float8_emulate)
    convert_to_float8_training(model.blocks, config=recipe, module_filter_fn=is_converted)


def is_converted(module: nn.Module, name: str) -> bool:
    """Tell whether a module of the blocks computes in float8."""
    return isinstance(module, nn.Linear) and name.split(".")[-1] != "router"
