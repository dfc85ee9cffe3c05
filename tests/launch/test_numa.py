"""Ranks near their GPUs: which CPUs, when none is bound, and that executed and forked ranks run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.agent.fork_server import cpus_in, cpus_of_ranks, parse_cpus
from launch.runs.environment import Gpu, visible_gpus
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, environment, run
from tests.support.scripts import LOCAL, printed, write_script

NEAR = {"0000:01:00.0": "0-3,8-11", "0000:02:00.0": "0-3,8-11", "0000:81:00.0": "4-7,12-15\n"}
"""A machine of two sockets with 8 CPUs each, and CPUs near each GPU as Linux lists them."""


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    for bus, cpus in NEAR.items():
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "local_cpulist").write_text(cpus)
    return tmp_path


def gpus(*buses: str | None) -> list[Gpu]:
    return [Gpu(str(index), "H100", None, bus) for index, bus in enumerate(buses)]


A, B, C = NEAR
FIRST, SECOND = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("buses", "ranks", "allowed", "expected"),
    [
        ((A, B, C), 3, range(16), [FIRST, FIRST, SECOND]),
        ((A, B, C), 2, range(16), [FIRST, FIRST]),
        ((A, C), 2, range(6), [[0, 1, 2, 3], [4, 5]]),  # those of the job alone
        ((A, B, C), 3, range(5), [[0, 1, 2, 3], [0, 1, 2, 3], [4]]),
        ((A, B, C), 3, [0, 4, 5], None),  # one CPU near two GPUs
        ((A, B, C), 3, range(4), None),  # none near the third
        ((A, B), 2, FIRST, None),  # all are near
        ((A, None, C), 3, range(16), None),  # Slurm hides which it is
        ((A, "0000:ff:00.0"), 2, range(16), None),
        ((A,), 2, range(16), None),
        ((), 1, range(16), None),
    ],
)
def test_each_rank_has_the_cpus_near_its_gpu(
    devices: Path, buses: tuple[str | None, ...], ranks: int, allowed: list[int], expected: list[list[int]] | None
) -> None:
    found = cpus_of_ranks(ranks, gpus(*buses), allowed, devices)
    assert (None if found is None else [sorted(cpus) for cpus in found]) == expected


def test_lists_of_cpus_are_read_as_linux_writes_them() -> None:
    assert list(parse_cpus("0-2,5,7-8\n")) == [0, 1, 2, 5, 7, 8] and list(parse_cpus("\n")) == []
    assert cpus_in({}) == frozenset() and cpus_in({"LAUNCH_CPUS": "3,1"}) == {1, 3}


def test_the_driver_tells_where_a_gpu_is(tmp_path: Path) -> None:
    for bus in ("0000:01:00.0", "0000:C1:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text("Model: \t NVIDIA H100\nGPU UUID: \t GPU-??\n")
    assert [gpu.bus for gpu in visible_gpus(tmp_path, {})] == ["0000:01:00.0", "0000:c1:00.0"]
    assert [gpu.bus for gpu in visible_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"})] == ["0000:c1:00.0"]


LAST_CPU = """
import launch.agent.fork_server as numa
numa.cpus_of_ranks = lambda ranks, gpus, allowed: [frozenset([max(allowed)])] * ranks
"""
FORK = """
import os, sys
from pathlib import Path
from launch.agent.fork_server import ForkServer
with ForkServer(["where"]) as server:
    server.wait_ready()
    env = {**os.environ, "LAUNCH_CPUS": sys.argv[1]}
    rank = server.start([sys.executable, "-m", "where"], env, str(Path.cwd()), "log")
    assert rank is not None
    sys.exit(rank.wait())
"""
WHERE = "import os\nprint(sorted(os.sched_getaffinity(0)))\n"


@pytest.mark.parametrize("binds", [True, False])
def test_executed_ranks_run_where_they_are_bound(tmp_path: Path, binds: bool) -> None:
    """The agent of a machine whose GPUs are all near its last CPU."""
    write_script(tmp_path, WHERE)
    write_script(tmp_path, LAST_CPU, "sitecustomize.py")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    executed = "script.env.OMP_DYNAMIC=false"  # read at the start of a process, so that the rank is not forked
    words = (*LOCAL, "script.path=script.py", "run_dir=run", f"cluster.bind_cpus={binds}", executed)
    run("launch", *words, cwd=tmp_path, PYTHONPATH=path)
    folder, all_cpus = RunFolder(tmp_path / "run"), sorted(os.sched_getaffinity(0))
    expected = all_cpus[-1:] if binds else all_cpus
    assert printed(folder) == f"{expected}\n"
    (told,) = json.loads(folder.environment(1).read_text())["ranks"]
    assert told["cores"] == len(expected) and [*parse_cpus(told["cpus"])] == expected


def test_forked_ranks_run_where_they_are_bound(tmp_path: Path) -> None:
    write_script(tmp_path, WHERE, "where.py")
    last = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(last)], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "log").read_text() == f"[{last}]\n"
