"""Whether the kernels that a run asks for can run on its devices: found out before the first step, and said.

Owns the refusal and its words; what is tried is the model's (gpt/model/fused.py).
"""

from __future__ import annotations

import torch

from gpt.config import AttentionBackend, Precision, TrainConfig
from gpt.model.fused import why_not_flash
from gpt.parallel.world import World
from launch.errors import ConfigError


def check_flash(config: TrainConfig, world: World) -> str | None:
    """Why attention=flash will not use the flash kernel on some rank, or None where it will or is not asked for.

    Collective, so that all ranks end the same way.

    Raises:
        ConfigError: it cannot, and ``model.force_flash`` is set.
    """
    if config.model.attention is not AttentionBackend.flash:
        return None
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    reasons = world.gather(why_not_flash(config.model, world.device, dtype))
    reason = next((r for r in reasons if r is not None), None)
    if reason is not None and config.model.force_flash:
        raise ConfigError(
            f"model.force_flash=true, but {reason}",
            "a device, precision and model for which torch has the flash kernel",
            "precision=bf16 on a GPU of compute capability 8.0 or more, or model.force_flash=false for another kernel",
        )
    return reason
