"""``parallel=auto`` for ranks that nobody planned for: chosen by the first of them, for the device it finds.

Owns the look at the device; the choice is gpt/planning's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpt.config import TrainConfig
from gpt.parallel.world import World
from gpt.planning.hardware import Machine, Stated, cpus, free_memory, gpus
from gpt.planning.settle import Settled, settle
from gpt.planning.text import table
from launch.errors import ConfigError
from launch.runs.folder import RunFolder


def settle_here(config: TrainConfig, overrides: Sequence[str], folder: RunFolder, world: World) -> Settled:
    """How the model is spread, chosen for the device of this rank where the command leaves it open."""
    settled = settle(config, overrides, folder, world.size, lambda: machine_of(config, world))
    if settled.why:
        lines = [*table([choice.as_dict() for choice in settled.best]), *settled.left_out]
        print("\n".join([f"parallel.strategy=auto: {settled.why}", *(f"  {line}" for line in lines)]), flush=True)
    return settled


def machine_of(config: TrainConfig, world: World) -> Machine:
    """What the estimates assume of the nodes, all being like this one.

    Raises:
        ConfigError: the device is not known.
    """
    if world.device.type != "cuda":
        return cpus(free_memory() // world.local_size, world.local_size, Stated())
    seen = torch.cuda.get_device_properties(world.device)
    stated = Stated(memory=seen.total_memory, host_memory=free_memory() // world.local_size)
    found = gpus(seen.name, config.precision, world.local_size, stated)
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto on a {seen.name} in precision={config.precision.name}, whose peak is not known",
            "a device of gpt/accounting/hardware.py, or python -m launch, where cluster.gpu_tflops says it",
            "parallel=fsdp, or python -m launch ... cluster.gpu_tflops=N",
        )
    return found
