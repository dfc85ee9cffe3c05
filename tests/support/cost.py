"""Cost of tests: seconds of files, as measured, and what a test's code tells of the processes it may start.

Owns the order of the files and the mark ``quick``. Must not know what is tested.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.support import commands, distributed

STARTERS: tuple[object, ...] = (subprocess, commands.run, commands.start, distributed.run_distributed)
SECONDS = {
    "accounting/test_memory.py": 25,
    "checkpoint/test_in_memory.py": 10,
    "checkpoint/test_scrub.py": 4,
    "data/test_mixture.py": 12,
    "data/test_prepare.py": 25,
    "data/test_synthetic.py": 21,
    "examples/test_examples.py": 101,
    "examples/test_programs.py": 34,
    "examples/test_workloads.py": 24,
    "launch/test_agreement.py": 14,
    "launch/test_auto.py": 22,
    "launch/test_budget.py": 33,
    "launch/test_code_changes.py": 35,
    "launch/test_doctor_requests.py": 14,
    "launch/test_failures.py": 78,
    "launch/test_memory_restarts.py": 20,
    "launch/test_placement.py": 35,
    "launch/test_refusals.py": 33,
    "launch/test_requeue.py": 41,
    "launch/test_secrets.py": 15,
    "launch/test_status.py": 18,
    "launch/test_storm.py": 84,
    "launch/test_strangers.py": 16,
    "launch/test_submission_checks.py": 19,
    "launch/test_sweep.py": 55,
    "launch/test_watchdog.py": 18,
    "launch/test_worker_runs.py": 27,
    "model/test_components.py": 12,
    "model/test_moe.py": 22,
    "parallel/test_context.py": 33,
    "parallel/test_deepspeed.py": 90,
    "parallel/test_deepspeed_pipeline.py": 57,
    "parallel/test_equivalence.py": 33,
    "parallel/test_expert.py": 45,
    "parallel/test_materialize.py": 21,
    "parallel/test_memory.py": 39,
    "parallel/test_pipeline.py": 67,
    "parallel/test_tensor.py": 56,
    "report/test_dashboard_in_browser.py": 14,
    "report/test_report_files.py": 21,
    "runs/test_full_disk.py": 12,
    "slurm/test_batch_script.py": 67,
    "slurm/test_doctor_on_slurm.py": 68,
    "slurm/test_grace_on_slurm.py": 36,
    "slurm/test_health_on_slurm.py": 17,
    "slurm/test_in_place_on_slurm.py": 82,
    "slurm/test_launch_on_slurm.py": 112,
    "slurm/test_lost_nodes_on_slurm.py": 103,
    "slurm/test_placement_on_slurm.py": 50,
    "slurm/test_requeue_on_slurm.py": 260,
    "slurm/test_sandbox.py": 20,
    "slurm/test_sandbox_faults.py": 31,
    "slurm/test_scripts_on_slurm.py": 114,
    "slurm/test_topologies_on_slurm.py": 48,
    "test_gpu_script.py": 24,
    "test_readme.py": 84,
    "test_wheel.py": 14,
    "tools/test_export.py": 22,
    "training/test_divergence.py": 52,
    "training/test_execution.py": 22,
    "training/test_loss_scale.py": 40,
    "training/test_reference.py": 19,
    "training/test_resume.py": 62,
}
"""Seconds of the files that take longest, on one of two cores; of what is not named, fewer than twelve."""
WAITS = "slurm"
"""The folder of tests that mostly wait: for Slurm to notice something, to schedule, to give up."""

TESTS = Path(__file__).resolve().parents[1]


def seconds(path: Path) -> int:
    """Seconds that a file of tests is known to take, 0 where that is not much."""
    return SECONDS.get(path.relative_to(TESTS).as_posix(), 0)


def is_quick(item: pytest.Item) -> bool:
    """A test that starts no process, as far as can be seen, in a file that is not known to take long."""
    if not isinstance(item, pytest.Function) or seconds(item.path) or item.path.parent.name == WAITS:
        return False
    fixtures = [found.func for every in item._fixtureinfo.name2fixturedefs.values() for found in every]
    return not any(_starts_anything(function) for function in (item.function, *fixtures))


@cache
def _starts_anything(function: Callable[..., Any]) -> bool:
    return _starts(function, set())


def _starts(function: Callable[..., Any], seen: set[object]) -> bool:
    """Look in a function of the tests, and in those of the tests that it names, for something that starts processes."""
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    function = getattr(function, "__wrapped__", function)
    if isinstance(function, type):
        return any(_starts(member, seen) for member in vars(function).values() if isinstance(member, FunctionType))
    if not isinstance(function, FunctionType) or function in seen or not function.__module__.startswith("tests"):
        return False
    seen.add(function)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if any(value is starter for starter in STARTERS) or (callable(value) and _starts(value, seen)):
            return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
