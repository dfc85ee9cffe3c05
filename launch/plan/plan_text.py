"""A plan as a person reads it, in the dry run and in the output of a batch script."""

from __future__ import annotations

from gpt.planning.memory import GIB
from gpt.planning.text import table
from gpt.topology.dims import Topology
from launch.plan import placement
from launch.plan.budget import Use, words
from launch.plan.plan import Plan


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    mem = plan.memory_bytes
    parts = ", ".join(f"{k} {v / GIB:.3f}" for k, v in mem.items() if k not in ("total", "host") and v)
    host = f", and {mem['host'] / GIB:.3f} GiB of the host" if mem.get("host") else ""
    gpus = "" if plan.gpu_hours is not None else ", no GPUs asked for"
    ranks = "rank" if plan.world_size == 1 else "ranks"
    spares = f", and {plan.spares} spare" if plan.spares else ""
    rows = {
        "nodes": f"{plan.nodes} x {plan.ranks_per_node} = {plan.world_size} {ranks} on {plan.cluster}{spares}",
        "topology": str(Topology(**plan.topology)),
        "model": f"{plan.model}: {plan.parameters:,} parameters ({plan.parameters_non_embedding:,} without "
        f"embeddings{active_text(plan)}), {plan.flops_per_token / 1e9:.3g} GFLOP a token",
        "batch": f"{plan.global_batch} sequences x {plan.block_size} tokens, on each rank {plan.accumulation} passes "
        f"of {plan.micro_batch}",
        "tokens": f"{plan.tokens_per_step:,} a step, {plan.tokens_total:,} in {plan.max_steps} steps",
        "memory": f"{mem['total'] / GIB:.3f} GiB per rank ({parts}){host}",
        "data": plan.data,
        "worst case": f"{words(Use(plan.node_hours, plan.gpu_hours, plan.cost))}{gpus} ("
        f"{plan.nodes_asked} nodes for {plan.timeout_min} min)",
        "folder": plan.run_dir,
    }
    rows |= {"code": plan.code} if plan.code else {}
    rows |= {"chosen": plan.chosen} if plan.chosen else {}
    lines = [f"point {plan.point}", *(f"  {key:<11} {value}" for key, value in rows.items())]
    lines += [f"  {'':<11} {line}" for line in (*table(plan.choices), *plan.left_out)]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement.text(plan.placement)])


def active_text(plan: Plan) -> str:
    """How many parameters a token is computed with, where that is not all of them."""
    return f", {plan.parameters_active:,} active for a token" if plan.parameters_active != plan.parameters else ""
