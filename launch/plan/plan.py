"""One point of a sweep -> Plan: what it will use, and a refusal where it cannot work.

Owns everything that is promised before the queue. Torch-free, starts nothing and writes nothing. ``dry_run`` prints a
Plan; the run folder keeps it as ``plan.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import DictConfig

from gpt.accounting import flops, parameters
from gpt.config import ParallelConfig, nearest_divisor
from gpt.conversion.source import check_init_from
from gpt.data.corpus import check_fit, describe
from gpt.planning import memory
from gpt.planning.auto import settle
from gpt.topology.batch import Batch, cut
from gpt.topology.dims import Topology
from gpt.topology.rules import lay_out
from launch.config import NOT_IN_POINT, ClusterKind, Config
from launch.errors import ConfigError
from launch.plan import code_copy as snapshot
from launch.plan.capacity import machine_of, refuse_what_does_not_fit
from launch.plan.placement import Placement, place, worst_case
from launch.runs import compose
from launch.runs.files import write_json
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """What one point promises. Bytes are per rank; GPU-hours and cost are the worst case of one start of the job, the
    whole time limit used: a requeued job starts anew, until ``budget`` or ``resilience.max_restarts`` end it."""

    point: str
    run_dir: str
    cluster: str
    nodes: int
    spares: int
    ranks_per_node: int
    world_size: int
    topology: dict[str, Any]
    global_batch: int
    micro_batch: int
    accumulation: int
    block_size: int
    max_steps: int
    tokens_per_step: int
    tokens_total: int
    model: str
    parameters: int
    parameters_non_embedding: int
    parameters_active: int
    """What one token is computed with: of experts those it goes to, else all."""
    flops_per_token: float
    memory_bytes: dict[str, int]
    parallel: dict[str, Any]
    """How the model is spread, every key, as the run folder's config has it: also where the command left it open."""
    micro_batch_limit: int
    """``optim.micro_batch`` there: smaller than typed where the layout was left open, and none fits otherwise."""
    data: str
    timeout_min: int
    node_hours: float
    gpu_hours: float | None
    """None where the nodes are not said to have GPUs."""
    cost: float | None
    """GPU-hours times cluster.price_per_gpu_hour; None where one of them is not known."""
    slurm: dict[str, Any]
    """The resources asked of Slurm, in submitit's words; points with the same ones share a job array."""
    placement: Placement
    """Where else the point may go, and when it does; ``slurm`` is what is asked at one of its candidates."""
    command_run_dirs: tuple[str, ...] = ()
    """The run folders of all points of the command, which share its budget."""
    code: str | None = None
    """The copy of the code that the job runs from; None where it runs from where it was submitted."""
    warnings: tuple[str, ...] = ()
    """What may go wrong, as far as earlier attempts tell."""
    chosen: str = ""
    """Why it is spread so, where the command left that open."""
    choices: tuple[dict[str, Any], ...] = ()
    """The best layouts there were, the chosen one first, each with what an estimate says of it."""
    left_out: tuple[str, ...] = ()
    """Why not another, and what it took to fit, in words."""

    @property
    def nodes_asked(self) -> int:
        """Nodes of the allocation, spares included."""
        return self.nodes + self.spares

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> Plan:
        """Read back what ``plan.json`` holds."""
        tuples = {key: tuple(known[key]) for key in ("command_run_dirs", "warnings", "choices", "left_out")}
        return cls(**{**known, **tuples, "placement": Placement.from_dict(known["placement"])})

    def at(self, index: int) -> Plan:
        """The same, submitted to a candidate of its placement."""
        return replace(self, slurm=self.placement.candidates[index].slurm)

    def placed(self, placement: Placement) -> Plan:
        """The same with another placement, submitted to its first candidate where the point could run."""
        assert placement.possible
        worst = worst_case(placement, self.nodes_asked, self.timeout_min)
        changed = replace(self, placement=placement, gpu_hours=worst.gpu_hours, cost=worst.cost)
        return changed.at(placement.possible[0])


def make_plan(config: Config, overrides: Sequence[str], kind: ClusterKind) -> Plan:
    """Plan one point for a cluster of ``kind`` (local or slurm).

    Raises:
        ConfigError: the point cannot work.
    """
    config.validate()
    folder = compose.choose_folder(config, overrides, NOT_IN_POINT)
    compose.refuse_other_run(folder, config)
    check_init_from(config, folder)
    settled = settle(config, overrides, folder, config.world_size, lambda: machine_of(config, kind))
    config = settled.apply(config)
    layout = lay_out(config, config.world_size)
    batch = cut_batch(config, layout)
    corpus = describe(config.data, config.data_cache)
    check_fit(corpus, config.model, config.eval.sequences)
    needed = memory.per_rank(config, layout, batch)
    refuse_what_does_not_fit(config, needed, kind)
    code = snapshot.place(folder.path) if config.snapshot else None
    return Plan(
        point=folder.point,
        run_dir=str(folder.path),
        topology=layout.as_dict(),
        memory_bytes={**asdict(needed), "total": needed.total},
        parallel=plain_values(config.parallel),
        chosen=settled.why,
        choices=tuple(choice.as_dict() for choice in settled.best),
        left_out=settled.left_out,
        micro_batch_limit=settled.micro_batch,
        data=str(corpus),
        code=None if code is None else str(code),
        **of_model(config),
        **of_batch(config, batch),
        **of_nodes(config, kind, place(config, code)),
    )


def plain_values(parallel: ParallelConfig) -> dict[str, Any]:
    """The keys of ``parallel`` as JSON and YAML hold them."""
    return {key: value.name if isinstance(value, Enum) else value for key, value in asdict(parallel).items()}


def of_model(config: Config) -> dict[str, Any]:
    """The fields of a plan that say what is trained."""
    counted = parameters.count(config.model)
    return {
        "model": config.model.name,
        "parameters": counted.total,
        "parameters_non_embedding": counted.non_embedding,
        "parameters_active": counted.active,
        "flops_per_token": flops.training_flops_per_token(config.model).palm,
    }


def of_batch(config: Config, batch: Batch) -> dict[str, Any]:
    """The fields of a plan that say how much is trained on."""
    tokens_per_step = batch.global_batch * config.model.block_size
    return {
        "global_batch": batch.global_batch,
        "micro_batch": batch.micro,
        "accumulation": batch.accumulation,
        "block_size": config.model.block_size,
        "max_steps": config.optim.max_steps,
        "tokens_per_step": tokens_per_step,
        "tokens_total": tokens_per_step * config.optim.max_steps,
    }


def of_nodes(config: Config, kind: ClusterKind, placed: Placement) -> dict[str, Any]:
    """The fields of a plan that say where it runs, and what that uses at worst."""
    worst = worst_case(placed, config.nodes_asked, config.cluster.timeout_min)
    return {
        "cluster": kind.name,
        "nodes": config.nodes,
        "spares": config.spares,
        "ranks_per_node": config.ranks_on_node,
        "world_size": config.world_size,
        "timeout_min": config.cluster.timeout_min,
        "node_hours": worst.node_hours,
        "gpu_hours": worst.gpu_hours,
        "cost": worst.cost,
        "slurm": placed.candidates[0].slurm,
        "placement": placed,
    }


def cut_batch(config: Config, layout: Topology) -> Batch:
    """Cut the global batch, naming nodes and ranks where that does not go."""
    total, ranks = config.optim.global_batch, layout.data_ranks
    if not config.optim.weak_scaling and total % ranks:
        found = (
            f"nodes={config.nodes} x {config.ranks_on_node} ranks = {ranks} ranks, but optim.global_batch={total} is "
            f"not a multiple of {ranks}"
        )
        fewer = nearest_divisor(total, ranks)
        raise ConfigError(
            found,
            "the same number of sequences for every rank",
            f"optim.global_batch={-(-total // ranks) * ranks}, or {fewer} ranks in all",
        )
    return cut(config.optim, ranks)


def write_run(plan: Plan, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Make the run folder: the config, in which nothing is left open, what was typed, and the plan."""
    folder = RunFolder(plan.run_dir)
    compose.settle_parallel(composed, plan.parallel, plan.micro_batch_limit)
    compose.write_config(folder, composed, overrides)
    write_json(folder.plan, plan.as_dict())
