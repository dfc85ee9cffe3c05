"""Keys of the config whose name has changed. The former names are accepted for one release, with a line that says so.

Owns the table. A former key stays in the schema, null unless it is typed or comes from an older file. Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

FORMER = {
    "strict": "require_same_code",
    "snapshot": "copy_code",
    "spares": "spare_nodes",
    "optim.micro_batch": "optim.max_micro_batch",
    "resilience.stop_grace_s": "resilience.grace_period_s",
    "resilience.frozen_timeout_s": "resilience.heartbeat_timeout_s",
    "resilience.hang_timeout_slow_s": "resilience.startup_and_save_timeout_s",
    "cluster.attainable": "cluster.matmul_efficiency",
    "cluster.links.inside_us": "cluster.interconnect.intra_node.latency_us",
    "cluster.links.inside_gb_per_s": "cluster.interconnect.intra_node.bandwidth_gb_per_s",
    "cluster.links.between_us": "cluster.interconnect.inter_node.latency_us",
    "cluster.links.between_gb_per_s": "cluster.interconnect.inter_node.bandwidth_gb_per_s",
}
"""Former key -> key."""

_told: set[str] = set()


def former_keys(key: str) -> list[str]:
    """Names under which ``key`` was known before."""
    return [former for former, now in FORMER.items() if now == key]


def is_former(key: str) -> bool:
    """Tell whether ``key``, or all that is in it, has another name now."""
    return key in FORMER or key == "cluster.links"


def adopt_former_keys(document: DictConfig) -> list[str]:
    """Move the values of former keys to their new ones, in place; the former keys whose value was moved."""
    moved = []
    for former, key in FORMER.items():
        value = OmegaConf.select(document, former, throw_on_missing=False)
        if value is not None:
            OmegaConf.update(document, key, value)
            OmegaConf.update(document, former, None)
            moved.append(former)
    return moved


def tell_former_keys(keys: Iterable[str]) -> None:
    """Say on standard error, once for each in a process, what keys are called now."""
    for key in keys:
        if key not in _told:
            _told.add(key)
            print(f"{key} is now {FORMER[key]}; the former name is accepted in this release", file=sys.stderr)


def in_former_spelling(override: str) -> str:
    """An override with the former name of its key, by which a run folder may have been named."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    former = former_keys(bare)
    return f"{key[: len(key) - len(bare)]}{former[0]}{equals}{value}" if former else override
