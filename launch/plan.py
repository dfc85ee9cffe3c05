"""One point of a sweep -> Plan: what it will use, and a refusal where it cannot work.

Owns everything that is promised before the queue. Torch-free, starts nothing and writes nothing. ``dry_run`` prints a
Plan; the run folder keeps it as ``plan.json``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpt import compose
from gpt.accounting import flops, memory, parameters
from gpt.batch import Batch, cut
from gpt.composition import lay_out
from gpt.config import Device, nearest_divisor
from gpt.data.corpus import check_fit, describe
from gpt.errors import ConfigError
from gpt.interchange.source import check_init_from
from gpt.topology import Topology
from launch import placement, snapshot
from launch.budget import Use, words
from launch.config import NOT_IN_POINT, ClusterKind, Config
from launch.placement import Placement
from launch.resources import place, worst_case

GIB = 2**30


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
        tuples = {key: tuple(known[key]) for key in ("command_run_dirs", "warnings")}
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
    layout = lay_out(config, config.world_size)
    batch = cut_batch(config, layout)
    corpus = describe(config.data, config.data_cache)
    check_fit(corpus, config.model, config.eval.sequences)
    counted = parameters.count(config.model)
    needed = memory.per_rank(
        config.model,
        config.optim,
        config.parallel,
        config.world_size,
        batch.micro,
        config.precision,
        config.recompute,
    )
    if kind is ClusterKind.local:
        refuse_local_spares(config)
        refuse_too_few_gpus(config, local_gpus())
    refuse_too_little_memory(config, needed.total, kind)
    code = snapshot.place(folder.path) if config.snapshot else None
    placed = place(config, code)
    worst = worst_case(placed, config.nodes_asked, config.cluster.timeout_min)
    return Plan(
        point=folder.point,
        run_dir=str(folder.path),
        cluster=kind.name,
        nodes=config.nodes,
        spares=config.spares,
        ranks_per_node=config.ranks_on_node,
        world_size=config.world_size,
        topology=layout.as_dict(),
        global_batch=batch.global_batch,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        block_size=config.model.block_size,
        max_steps=config.optim.max_steps,
        tokens_per_step=batch.global_batch * config.model.block_size,
        tokens_total=batch.global_batch * config.model.block_size * config.optim.max_steps,
        model=config.model.name,
        parameters=counted.total,
        parameters_non_embedding=counted.non_embedding,
        parameters_active=counted.active,
        flops_per_token=flops.training_flops_per_token(config.model).palm,
        memory_bytes=memory_parts(needed),
        data=str(corpus),
        timeout_min=config.cluster.timeout_min,
        node_hours=worst.node_hours,
        gpu_hours=worst.gpu_hours,
        cost=worst.cost,
        slurm=placed.candidates[0].slurm,
        placement=placed,
        code=None if code is None else str(code),
    )


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


def memory_parts(needed: memory.Memory) -> dict[str, int]:
    """Bytes per rank by kind, and their total."""
    return {**{k: int(v) for k, v in asdict(needed).items()}, "total": int(needed.total)}


def refuse_local_spares(config: Config) -> None:
    """Raise ConfigError where spares would be agents on the machine that they should stand in for."""
    if config.spares:
        raise ConfigError(
            f"spares={config.spares} with agents on this machine (cluster=local)",
            "a Slurm cluster: nodes on one machine are lost together",
            "spares=0, or cluster=slurm",
        )


def local_gpus() -> int:
    """GPUs of this machine that may be used, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def refuse_too_few_gpus(config: Config, gpus: int) -> None:
    """Raise ConfigError where local ranks would have to share GPUs, or there are none and cuda was asked for."""
    if config.device is Device.cpu or (config.device is Device.auto and gpus == 0):
        return
    if config.world_size > gpus:
        raise ConfigError(
            f"nodes={config.nodes} x {config.ranks_on_node} ranks = {config.world_size} ranks on a machine with {gpus} "
            "GPUs",
            "a GPU for each rank",
            "device=cpu" if gpus == 0 else f"nodes=1 ranks_per_node={gpus}, or device=cpu",
        )


def refuse_too_little_memory(config: Config, needed: float, kind: ClusterKind) -> None:
    """Raise ConfigError where the memory that is known cannot hold the run."""
    if kind is ClusterKind.local and (config.device is Device.cpu or local_gpus() == 0):
        have, ranks, where = available_memory(), config.world_size, "free on this machine"
    elif config.cluster.gpu_memory_gib is not None:
        have, ranks, where = int(config.cluster.gpu_memory_gib * GIB), 1, "on a GPU (cluster.gpu_memory_gib)"
    else:
        return
    if ranks * needed > have:
        total = f"{ranks} ranks x {needed / GIB:.2f} GiB = {ranks * needed / GIB:.2f} GiB"
        raise ConfigError(
            f"{total}, and {have / GIB:.2f} GiB {where}",
            "a run that fits",
            "parallel=fsdp, optim.micro_batch=1, or a smaller model",
        )


def available_memory() -> int:
    """Bytes of memory that this machine can give without swapping (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def active_text(plan: Plan) -> str:
    """How many parameters a token is computed with, where that is not all of them."""
    return f", {plan.parameters_active:,} active for a token" if plan.parameters_active != plan.parameters else ""


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    mem = plan.memory_bytes
    parts = ", ".join(f"{k} {v / GIB:.3f}" for k, v in mem.items() if k != "total" and v)
    gpus = "" if plan.gpu_hours is not None else ", no GPUs asked for"
    ranks = "rank" if plan.world_size == 1 else "ranks"
    spares = f", and {plan.spares} spare" if plan.spares else ""
    rows = {
        "nodes": f"{plan.nodes} x {plan.ranks_per_node} = {plan.world_size} {ranks} on {plan.cluster}{spares}",
        "topology": " ".join(f"{k}={v}" for k, v in plan.topology.items()),
        "model": f"{plan.model}: {plan.parameters:,} parameters ({plan.parameters_non_embedding:,} without "
        f"embeddings{active_text(plan)}), {plan.flops_per_token / 1e9:.3g} GFLOP a token",
        "batch": f"{plan.global_batch} sequences x {plan.block_size} tokens, on each rank {plan.accumulation} passes "
        f"of {plan.micro_batch}",
        "tokens": f"{plan.tokens_per_step:,} a step, {plan.tokens_total:,} in {plan.max_steps} steps",
        "memory": f"{mem['total'] / GIB:.3f} GiB per rank ({parts})",
        "data": plan.data,
        "worst case": f"{words(Use(plan.node_hours, plan.gpu_hours, plan.cost))}{gpus} ("
        f"{plan.nodes_asked} nodes for {plan.timeout_min} min)",
        "folder": plan.run_dir,
    }
    rows |= {"code": plan.code} if plan.code else {}
    lines = [f"point {plan.point}", *(f"  {key:<11} {value}" for key, value in rows.items())]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement.text(plan.placement)])
