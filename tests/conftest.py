"""Fixtures of every test: one thread a process, as ranks have it, and nothing outlives the test that started it.

And the order of the files, which the workers take from the front, and the mark of those tests that are quick.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from launch.runs import folder as unwritten
from launch.runs.process import lasting_imports
from tests.support import commands, distributed
from tests.support.commands import SHARED, STARTED, end_servers, kill_all, shared_servers

# Where containers set this, every interpreter that a test starts would compile all of this project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before torch is imported. With two threads the last bits differed in 1 of 19 runs, and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Beside each run, where it is by default, every test would begin with an empty one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")

EMPTY_FOLDERS = ("launch", "examples")
# The same examples in each run, so that a change is what decides; HYPOTHESIS_PROFILE=random draws others. Neither looks
# at the clock, which ranks of other tests share.
UNTIMED = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], database=None, print_blob=True
)
hypothesis.settings.register_profile("same", UNTIMED, derandomize=True)
hypothesis.settings.register_profile("random", UNTIMED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Have Python's collector rest while everything is imported, and never look at that again."""
    with lasting_imports():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let ``-m quick`` have a worker more than there are cores, unless ``-n`` is typed: few of those tests wait.

    Each worker imports everything first.
    """
    typed = any(word.startswith(("-n", "--numprocesses")) for word in config.invocation_params.args)
    if config.option.markexpr == "quick" and not typed and config.getoption("numprocesses", None):
        config.option.numprocesses = min(config.option.numprocesses, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker is idle before the end, and mark what is quick."""
    items.sort(key=lambda item: -seconds(item.path))
    for item in items:
        if is_quick(item):
            item.add_marker("quick")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have all workers fork from the same servers, which end with this process."""
    node.workerinput["fork_servers"] = shared_servers()


def pytest_configure(config: pytest.Config) -> None:
    """Take, in a worker, the servers that it is told of."""
    if told := getattr(config, "workerinput", {}).get("fork_servers"):
        SHARED.append(told)


def pytest_unconfigure() -> None:
    """Leave no server behind."""
    end_servers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Have two workers wait while the others compute."""
    if config.getoption("dist") != "loadfile":
        return None
    return WaitingBesideComputing(config, log)


@pytest.fixture(autouse=True)
def keeps_nothing_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as a command does, which keeps no lines for later: the test before may have been a rank or an agent."""
    monkeypatch.setattr(unwritten, "_keeps", False)
    monkeypatch.setattr(unwritten, "_kept", {})


@pytest.fixture(autouse=True)
def draws_the_same_numbers() -> None:
    """Begin with one seed, so that what a test draws depends neither on those before it nor on its worker."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def empty_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder of a test: of those in ``EMPTY_FOLDERS``, which plan runs in this process, an empty one."""
    if request.path.parent.name in EMPTY_FOLDERS:
        monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    return Path.cwd()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Kill what the test has started and not waited for: a run without an end would slow all tests after it."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            kill_all(process)


# Cost of tests: seconds of files, as measured; which tests are quick; and which worker takes which file.

STARTERS: tuple[object, ...] = (subprocess, commands.run, commands.start, distributed.run_distributed)
STARTING_MODULES = ("selenium.webdriver",)
"""Modules that start processes, by name, because they are slow to import."""
SECONDS = {
    "accounting/test_counts.py": 34,
    "checkpoint/test_damage.py": 25,
    "checkpoint/test_in_memory.py": 18,
    "components/test_custom_parts.py": 15,
    "data/test_prepare.py": 54,
    "examples/test_examples.py": 66,
    "examples/test_workloads.py": 25,
    "launch/test_agent.py": 20,
    "launch/test_api.py": 60,
    "launch/test_budget.py": 21,
    "launch/test_code_and_containers.py": 25,
    "launch/test_damaged_folders.py": 11,
    "launch/test_doctor_requests.py": 14,
    "launch/test_dry_run.py": 30,
    "launch/test_failures.py": 104,
    "launch/test_placement.py": 11,
    "launch/test_policy.py": 40,
    "launch/test_refusals.py": 35,
    "launch/test_resolve.py": 28,
    "launch/test_status.py": 12,
    "launch/test_storm.py": 80,
    "launch/test_strangers.py": 16,
    "launch/test_sweep.py": 50,
    "launch/test_worker.py": 32,
    "model/test_gpt.py": 15,
    "model/test_moe.py": 20,
    "parallel/test_deepspeed.py": 45,
    "parallel/test_engines.py": 120,
    "parallel/test_fsdp.py": 15,
    "planning/test_choice.py": 15,
    "report/test_projection.py": 13,
    "report/test_report_files.py": 20,
    "report/test_tensorboard.py": 12,
    "runs/test_full_disk.py": 18,
    "slurm/test_batch_script.py": 59,
    "slurm/test_doctor_on_slurm.py": 83,
    "slurm/test_launch_on_slurm.py": 74,
    "slurm/test_lost_nodes_on_slurm.py": 121,
    "slurm/test_order_on_slurm.py": 40,
    "slurm/test_requeue_on_slurm.py": 261,
    "slurm/test_runs_on_slurm.py": 175,
    "slurm/test_sandbox.py": 63,
    "tools/test_tools.py": 19,
    "training/test_divergence.py": 30,
    "training/test_execution.py": 40,
    "training/test_loop.py": 30,
    "training/test_metrics.py": 31,
    "training/test_resume.py": 78,
    "training/test_step.py": 20,
    "test_docs.py": 121,
    "test_gpu_script.py": 17,
    "test_structure.py": 15,
    "test_wheel.py": 21,
}
"""Seconds of the files that take longest, on one of two cores; of what is not named, fewer than twelve."""
QUICK_BESIDE_PROCESSES = frozenset(
    {
        *("components/test_custom_parts.py", "examples/test_examples.py", "examples/test_workloads.py"),
        *(
            f"launch/test_{name}.py"
            for name in ("agent", "code_and_containers", "damaged_folders", "failures", "status")
        ),
        *(f"launch/test_{name}.py" for name in ("storm", "strangers", "sweep", "worker")),
        *("report/test_tensorboard.py", "runs/test_full_disk.py", "tools/test_tools.py"),
        *(f"training/test_{name}.py" for name in ("divergence", "loop", "metrics", "resume", "step")),
    }
)
"""Files of ``SECONDS`` whose time is that of the processes they start: their other tests take seconds together."""
assert SECONDS.keys() >= QUICK_BESIDE_PROCESSES
COMPUTE_LONG = frozenset(
    {
        "test_a_planted_fault_is_found_with_its_rank_or_line",
        "test_nothing_is_found_where_nothing_was_planted_and_states_and_peak_are_those_of_the_plan",
        "test_efficiency_is_speedup_over_ranks_whatever_the_order",
        "test_the_heat_map_of_a_thousand_ranks_takes_no_more_memory_than_that_of_few",
        "test_the_interval_holds_the_true_efficiency_in_95_of_100_seeds",
        "test_without_shuffling_the_stream_is_the_prepared_corpus_again_and_again",
        "test_every_epoch_has_each_document_once_in_another_order_of_the_shards",
        "test_gpts_vocabulary_is_padded_to_what_gpus_multiply_fast",
        "test_a_row_that_fails_is_not_reached",
        "test_a_silent_fp32_is_seen",
        "test_a_changed_sbatch_line_and_a_key_that_is_not_named_are_found",
        "test_memory_does_not_grow_with_the_number_of_ranks",
        "test_ranks_end_with_a_killed_launcher",
    }
)
"""Tests that start no process, and that take as long as a hundred quick ones (``pytest -m quick --durations=25``)."""
WAITS = "slurm"
"""The folder of tests that mostly wait: for Slurm to notice something, to schedule, to give up."""

TESTS = Path(__file__).resolve().parent


def seconds(path: Path) -> int:
    """Seconds that a file of tests is known to take, 0 where that is not much."""
    return SECONDS.get(path.relative_to(TESTS).as_posix(), 0)


def is_quick(item: pytest.Item) -> bool:
    """A test that starts no process, as far as can be seen, in a file whose other tests do not compute for long."""
    if not isinstance(item, pytest.Function) or item.path.parent.name == WAITS:
        return False
    if seconds(item.path) and item.path.relative_to(TESTS).as_posix() not in QUICK_BESIDE_PROCESSES:
        return False
    # The suites of Hydra start jobs.
    if item.originalname in COMPUTE_LONG or not item.function.__module__.startswith("tests"):
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
        if any(value is starter for starter in STARTERS) or getattr(value, "__name__", None) in STARTING_MODULES:
            return True
        if callable(value) and _starts(value, seen):
            return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# Files on workers, in the order in which they are to be started: the last two workers take those that wait.


def waiting(workers: int) -> int:
    """Number of workers that begin with the files that wait: each starts a sandbox of its own."""
    return 2 if workers > 3 else min(1, workers - 1)


class WaitingBesideComputing(LoadFileScheduling):
    """A worker takes the first file of its own kind that is left, and one of the other kind where there is none."""

    def _assign_work_unit(self, node: Any) -> None:
        for_waiting = any(node is one for one in self.nodes[len(self.nodes) - waiting(len(self.nodes)) :])
        of_its_kind = [scope for scope in self.workqueue if (f"{WAITS}/" in scope) == for_waiting]
        if of_its_kind:
            self.workqueue.move_to_end(of_its_kind[0], last=False)
        super()._assign_work_unit(node)
