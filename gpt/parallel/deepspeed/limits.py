"""What DeepSpeed's engine cannot be asked for, with the nearest thing that can. Torch-free."""

from __future__ import annotations

from gpt.batch import cut
from gpt.config import Strategy, TrainConfig
from gpt.errors import ConfigError
from gpt.parallel.deepspeed.config import ds_config
from gpt.topology import Topology


def check_deepspeed(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where DeepSpeed cannot spread this model so, or its file says something else than this run."""
    if config.parallel.strategy is not Strategy.deepspeed:
        return
    check_dimensions(layout)
    ds_config(config, cut(config.optim, layout.data_ranks))


def check_dimensions(layout: Topology) -> None:
    """Raise ConfigError where more is cut than data ranks and stages."""
    others = [name for name in ("tp", "pp", "cp", "ep") if getattr(layout, name) > 1]
    if others:
        words = " ".join(f"parallel.{name}={getattr(layout, name)}" for name in others)
        raise ConfigError(
            f"parallel.strategy=deepspeed with {words}",
            "data ranks only: DeepSpeed cuts nothing else of this model",
            f"parallel=fsdp {words}",
        )
