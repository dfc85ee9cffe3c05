"""Means that keep the points of a sweep on Slurm from measuring each other: whole nodes, and one point after another.

Owns the default of ``cluster.exclusive`` and the job dependencies of ``launch.sequential``. Must not know how a job is
submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from launch.config import ClusterKind, Config
from launch.plan.open_keys import settle_key
from launch.plan.plan import Plan

WHY = "cluster.exclusive=true: points of a sweep over nodes or ranks would measure each other on shared nodes"


def settle_exclusive(documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind]) -> str:
    """Have the points of a sweep over nodes or ranks ask Slurm for whole nodes, where the command leaves that open.

    The arguments are those of ``settle_key``.

    Returns:
        What was decided, for people; empty where nothing was.
    """
    sizes = {config.world_size for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm}

    def choose(config: Config) -> tuple[bool | None, str]:
        cluster = config.cluster
        is_open = cluster.exclusive is None and "exclusive" not in cluster.additional_parameters
        if len(sizes) < 2 or not is_open:
            return None, ""
        return True, f"{WHY} (cluster.exclusive=false shares them; a site may charge whole nodes)"

    return "".join(settle_key("exclusive", choose, documents, configs, kinds))


def wait_for(plan: Plan, before: Sequence[str]) -> Plan:
    """The plan of a point that starts when no job of ``before`` is left, and alone of its job array."""
    candidates = [
        replace(one, slurm={**one.slurm, **dependency(one.slurm, before), "array_parallelism": 1})
        for one in plan.placement.candidates
    ]
    return plan.replace_placement(replace(plan.placement, candidates=tuple(candidates)))


def dependency(slurm: dict[str, Any], before: Sequence[str]) -> dict[str, Any]:
    """The parameters of submitit by which a job waits for others too, beside what the user has it wait for."""
    if not before:
        return {}
    own = dict(slurm["additional_parameters"])
    typed = own.pop("dependency", None)
    after = f"afterany:{':'.join(dict.fromkeys(before))}"
    return {"additional_parameters": own, "dependency": f"{typed},{after}" if typed else after}
