"""Announcement of a sweep before it is submitted: what is finished, where the rest goes on, and the worst case.

Owns what is printed. Submits and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from launch.config import Config
from launch.plan.plan import Plan, unfinished
from launch.plan.text import worst_case_text
from launch.runs.folder import RunFolder


def announce(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print which points are finished, where the others go on, their worst case, and what the plans warn of."""
    show_finished(plans, console)
    for plan in plans:
        if text := plan.goes_on.text(plan.max_steps):
            console.print(f"{plan.title}: {text}", highlight=False, markup=False)
    if unfinished(plans):
        console.print(worst_case_text(plans, configs), highlight=False, markup=False)
    show_warnings(plans, console)


def show_finished(plans: Sequence[Plan], console: Console) -> None:
    """Say which points are finished already, and how to run them again."""
    finished = [plan for plan in plans if plan.finished]
    names = [plan.title + ran_elsewhere(plan) for plan in finished]
    if names:
        them = "it again in a new folder" if len(names) == 1 else "them again in new folders"
        text = f"finished already, and not submitted: {', '.join(names)} (fresh=true runs {them})"
        console.print(text, highlight=False, markup=False)


def ran_elsewhere(plan: Plan) -> str:
    """Say where a finished point ran, if it was not on the cluster that this command is for."""
    ran = next(
        (e["cluster"] for e in reversed(RunFolder(plan.run_dir).read_events()) if e["event"] == "submitted"), None
    )
    return "" if ran in (None, plan.cluster) else f" (on {ran}, and so not compared with points on {plan.cluster})"


def show_warnings(plans: Sequence[Plan], console: Console) -> None:
    """Print what the plans warn of; a warning that several points share once."""
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        console.print(f"warning: {where}{warning}", highlight=False, markup=False)
