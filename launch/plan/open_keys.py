"""Keys of ``cluster`` that a command leaves open, and that are settled for its points on Slurm.

Owns that the composed config, which the run folder keeps, and the typed one change together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.config import ClusterKind, Config


def settle_key(
    key: str,
    choose: Callable[[Config], tuple[Any, str]],
    documents: Sequence[DictConfig],
    configs: Sequence[Config],
    kinds: Sequence[ClusterKind],
) -> list[str]:
    """Set a key of ``cluster`` in each point on Slurm.

    Args:
        key: its name in ``cluster``.
        choose: returns the value for a config, None to leave it, and what is to be said of that, if anything.
        documents: the composed config of each point, which its run folder will hold.
        configs: the same, typed; both are changed.
        kinds: the cluster of each point, settled.

    Returns:
        What was decided and by what, for people; each line once.
    """
    told: list[str] = []
    for document, config, kind in zip(documents, configs, kinds, strict=True):
        if kind is not ClusterKind.slurm:
            continue
        value, text = choose(config)
        if value is not None:
            setattr(config.cluster, key, value)
            OmegaConf.update(document, f"cluster.{key}", value)
        told += [text] if text else []
    return list(dict.fromkeys(told))
