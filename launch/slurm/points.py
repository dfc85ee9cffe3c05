"""Plans of all points of a sweep: resolved with Slurm's facts, told apart, and compared with Slurm's limits.

The functions stand in the order of these steps. Nothing is written or submitted.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from launch.config import ClusterKind, Config
from launch.config.compose import typed_config, workload_of
from launch.errors import ConfigError
from launch.plan.plan import Plan, local_gpus, make_plan, unfinished
from launch.plan.preflight import add_warnings, settle_exclusive
from launch.plan.text import add_expected, share_budget
from launch.runs.find import labels_for
from launch.runs.overrides import typed_key, typed_value
from launch.runs.records import refuse_unknown_figure
from launch.runs.refusals import in_shell
from launch.slurm import client as scheduler
from launch.slurm.limits import Limits

if TYPE_CHECKING:
    from launch.slurm.facts import SlurmFacts


TEXTS = ("script.env.", "cluster.exclude", "cluster.partition", "cluster.additional_parameters.")
"""Beginnings of keys whose values may hold a comma."""


def plan_sweep(
    documents: Sequence[DictConfig], typed: Sequence[Sequence[str]], console: Console
) -> tuple[list[Plan], list[Config]]:
    """Plan the points of a command, and say what was settled for them.

    Args:
        documents: the composed config of each point; keys that the command leaves open are settled in it.
        typed: the overrides of each point.

    Returns:
        Plan and typed config of each point.

    Raises:
        ConfigError: a point cannot work, Slurm would refuse it or never start it, or two would share a folder.
    """
    kinds = choose_clusters(documents, console)
    configs = [typed_config(composed) for composed in documents]
    for config in configs:
        refuse_unknown_figure(config.objective, workload_of(config).figures)
    slurm = settle_resources(documents, configs, kinds, console)
    plans = label_plans(plan_points(configs, typed, kinds, slurm), typed)
    return check_plans(plans, configs, slurm, console), configs


def choose_clusters(configs: Sequence[DictConfig], console: Console) -> list[ClusterKind]:
    """The cluster of each point; ``auto`` is decided once and said.

    Raises:
        ConfigError: ``auto`` on a machine of a cluster whose controller does not answer.
    """
    kinds = [config.cluster.kind for config in configs]
    if ClusterKind.auto not in kinds:
        return list(kinds)
    problem = scheduler.controller_problem()
    if problem and not configs[0].dry_run:
        raise ConfigError(
            f"cluster=auto on a machine of a Slurm cluster that takes no jobs: {problem}",
            "a controller that answers; this may be a login node, so nothing is trained here unless that is said",
            "the same command when scontrol ping says UP, or cluster=local",
        )
    found = ClusterKind.slurm if problem is None else ClusterKind.local
    why = {None: "sbatch and a controller that answers", "": "no Slurm here: nodes are agents on this machine"}
    told = why.get(problem, f"no controller answers, and without dry_run this is refused: {problem}")
    console.print(f"cluster=auto: {found.name} ({told})", highlight=False)
    return [found if kind is ClusterKind.auto else kind for kind in kinds]


def settle_resources(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], console: Console
) -> SlurmFacts | None:
    """Settle what a command leaves open of its nodes, GPUs, ranks and CPUs, and say what was chosen.

    Args:
        documents: the composed config of each point.
        configs: the same, typed; both are changed.
        kinds: the cluster of each point.

    Returns:
        What Slurm tells of itself; None if it is not asked.

    Raises:
        ConfigError: more ranks are requested on a node than its GPUs, and nothing says which of the two is meant.
    """
    if whole := settle_exclusive(documents, configs, kinds):
        console.print(whole, highlight=False, markup=False)
    visible = local_gpus() if ClusterKind.local in kinds else 0
    asks = configs[0].launch.check_limits and ClusterKind.slurm in kinds
    if not asks and visible < 2:
        return None
    from launch.slurm import facts
    from launch.slurm import resources as cpus
    from launch.slurm import resources as gpus

    for line in gpus.settle_local_ranks(documents, configs, kinds, visible, facts.torch_version()):
        console.print(line, highlight=False, markup=False)
    if not asks:
        return None
    slurm = facts.ask_slurm(facts.clusters_named(configs))
    told = gpus.settle_gpus(documents, configs, kinds, slurm)  # before the CPUs, which go by the ranks of a node
    for line in [*told, *cpus.settle_cpus(documents, configs, kinds, slurm)]:
        console.print(line, highlight=False, markup=False)
    return slurm


def plan_points(
    configs: Sequence[Config],
    typed: Sequence[Sequence[str]],
    kinds: Sequence[ClusterKind],
    slurm: SlurmFacts | None = None,
) -> list[Plan]:
    """Plan all points of a command.

    Args:
        slurm: what Slurm tells of itself; None if it was not asked.

    Raises:
        ConfigError: one cannot work; where a cluster does not have its nodes, that is said first.
    """
    sizes = [config.world_size for config in configs]
    try:
        return [
            make_plan(config, overrides, kind, sizes, gpu_type_at(config, kind, slurm))
            for config, overrides, kind in zip(configs, typed, kinds, strict=True)
        ]
    except ConfigError:
        if slurm is not None:
            from launch.slurm import candidates

            on_slurm = [config for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm]
            # What would repair the point is of no use where it could never be given its nodes.
            candidates.refuse_missing_nodes(slurm, on_slurm)
        raise


def gpu_type_at(config: Config, kind: ClusterKind, slurm: SlurmFacts | None) -> str | None:
    """Type of the GPUs where a point may go, as Slurm names it; None where nobody tells."""
    if slurm is None or kind is not ClusterKind.slurm:
        return None
    from launch.slurm import resources as gpus

    return gpus.gpu_type(config, slurm)


def label_plans(plans: Sequence[Plan], typed: Sequence[Sequence[str]]) -> list[Plan]:
    """Return the plans, each with its label among the others.

    Raises:
        ConfigError: two of them would write into one folder.
    """
    refuse_same_folder(plans, typed)
    labels = labels_for([(Path(plan.run_dir), words) for plan, words in zip(plans, typed, strict=True)])
    return [replace(plan, label=label) for plan, label in zip(plans, labels, strict=True)]


def refuse_same_folder(plans: Sequence[Plan], typed: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError if two points would write into one folder."""
    seen: dict[str, Sequence[str]] = {}
    for plan, words in zip(plans, typed, strict=True):
        if plan.run_dir in seen:
            if [*words] == [*seen[plan.run_dir]]:
                raise twice(words, typed)
            apart = {typed_key(word) for word in {*seen[plan.run_dir]} ^ {*words}}
            texts = sorted(key for key in apart if key.startswith(TEXTS))
            each = {key: [value for point in typed if (value := typed_value(point, key)) is not None] for key in texts}
            quoted = [in_shell(key, f'"{",".join(dict.fromkeys(values))}"') for key, values in each.items()]
            raise ConfigError(
                f"two points of the sweep with the folder {plan.run_dir}"
                + (f", which differ in {', '.join(sorted(apart))}" if apart else ""),
                "a folder for each point; run_dir, cluster.* and resilience.* do not tell points apart"
                + ("; a comma outside quotes means several points" if quoted else ""),
                ", or ".join(
                    [
                        *([" ".join(quoted)] if quoted else []),
                        "a sweep over something that changes the run, or one command for each with its own name=NAME",
                    ]
                ),
            )
        seen[plan.run_dir] = words


def twice(words: Sequence[str], typed: Sequence[Sequence[str]]) -> ConfigError:
    """Return the refusal of a point that a sweep has more than once; proposes the sweep with each value once."""
    points = dict.fromkeys(tuple(word.removeprefix("++") for word in point) for point in typed)
    columns = [list(dict.fromkeys(column)) for column in zip(*points, strict=True)]
    values = [[words[0], *(word.partition("=")[2] for word in words[1:])] for words in columns]
    is_grid = math.prod(map(len, columns)) == len(points)
    each_once = shlex.join(["python", "-m", "launch", "-m", *(",".join(column) for column in values)])
    return ConfigError(
        f"the point {' '.join(words)} more than once in the sweep",
        "each point once: a second run with the same settings would write into the folder of the first",
        each_once if is_grid else "each value once, or seed=0,1 for runs that differ in their seed alone",
    )


def check_plans(plans: list[Plan], configs: Sequence[Config], slurm: SlurmFacts | None, console: Console) -> list[Plan]:
    """Hold the plans against Slurm's limits, and add their share of the budget, expected times and warnings.

    Args:
        slurm: what Slurm tells of itself; None if it was not asked.

    Raises:
        ConfigError: Slurm would refuse a point, or never start it.
    """
    limits: Mapping[str | None, Limits] = {}
    if slurm is not None:
        from launch.slurm import candidates

        if unfinished(plans) and not configs[0].dry_run:
            candidates.refuse_without_controller(slurm)
        plans, limits = candidates.look_before_submitting(slurm, plans, configs, console), slurm.known
    if configs[0].launch.detach:
        refuse_local(plans)
    budgeted = share_budget(plans, configs)
    return [add_warnings(add_expected(plan), config, limits) for plan, config in zip(budgeted, configs, strict=True)]


def refuse_local(plans: Sequence[Plan]) -> None:
    """Raise ConfigError if a run would have to do without the launcher that it is bound to."""
    if any(plan.cluster == "local" for plan in plans):
        raise ConfigError(
            "launch.detach=true with agents on this machine (cluster=local)",
            "a Slurm cluster: a local run ends with its launcher, so that it cannot be forgotten",
            "cluster=slurm; or, without launch.detach: nohup python -m launch ... > launch.out &",
        )
