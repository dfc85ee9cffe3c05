"""The dry run: the plan of every point, and the batch script of every shape, as they would be submitted.

Owns what is printed. Submits and writes nothing, and needs no Slurm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from launch.config import Config
from launch.jobs.handles import SlurmJob
from launch.jobs.sbatch import sbatch_text
from launch.jobs.submit import in_line, shapes
from launch.plan.placement import cluster_of
from launch.plan.plan import Plan
from launch.plan.text import plan_text, worst_case_text


def show_plans(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print the plan of every point and the batch script of every shape."""
    for plan in plans:
        console.print(plan_text(plan), highlight=False, markup=False)
    console.print(worst_case_text(plans, configs), highlight=False, markup=False)
    for number, group in enumerate(shapes([plan for plan in plans if not plan.finished])):
        if configs[0].launch.sequential:
            group = in_line(group, [SlurmJob("JOBID", cluster_of(group[0].slurm))] if number else [])
        names = ", ".join(plan.title for plan in group)
        kind = f"job array of {len(group)}" if len(group) > 1 else "job"
        here = "" if group[0].cluster == "slurm" else ", as cluster=slurm would submit it"
        console.print(f"\nsbatch text of the {kind}{here}: {names}", highlight=False, markup=False)
        console.print(sbatch_text(group), highlight=False, markup=False)
        for text in elsewhere(group):
            console.print(text, highlight=False, markup=False)
    console.print("dry_run=true: nothing was submitted or written", highlight=False)


def elsewhere(group: Sequence[Plan]) -> Iterator[str]:
    """The lines of the batch script that differ at the other candidates of a placement."""
    placement, first = group[0].placement, sbatch_text(group).splitlines()
    for index in placement.possible[1:]:
        there = sbatch_text([plan.choose_candidate(index) for plan in group]).splitlines()
        gone = [f"- {line}" for line in first if line not in there]
        new = [f"+ {line}" for line in there if line not in first]
        yield "\n".join([f"at {placement.candidates[index].name} it differs in:", *gone, *new])
