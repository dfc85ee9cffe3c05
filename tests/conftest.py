"""Fixtures of every test: one thread a process, as ranks have it, and nothing outlives the test that started it.

And the order of the files, which the workers take from the front, and the mark of those tests that are quick.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from launch.process import lasting_imports
from launch.runs import files as unwritten
from tests.support.commands import SHARED, STARTED, end_servers, kill_all, shared_servers
from tests.support.cost import is_quick, seconds

# Where containers set this, every interpreter that a test starts would compile all of this project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before torch is imported. With two threads the last bits differed in 1 of 19 runs, and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Beside each run, where it is by default, every test would begin with an empty one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")

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
    from tests.support.cost import WaitingBesideComputing

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
def nothing_is_left() -> Iterator[None]:
    """Kill what the test has started and not waited for: a run without an end would slow all tests after it."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            kill_all(process)
