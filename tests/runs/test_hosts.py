"""Place and device of a rank, told without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.agent.fork_server import parse_cpus
from launch.runs import environment as hosts

H100 = "NVIDIA H100 80GB HBM3"
INFORMATION = """Model: \t\t {name}
IRQ:   \t\t 64
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.30.00.01
Bus Location: \t 0000:{bus}:00.0
Device Minor: \t {minor}
"""


def drivers(folder: Path, *names: str) -> Path:
    """The driver's folder of a machine with these GPUs, as /proc/driver/nvidia/gpus has it."""
    for index, name in enumerate(names):
        place = folder / f"0000:{index + 1:02x}:00.0"
        place.mkdir(parents=True)
        text = INFORMATION.format(name=name, uuid=f"GPU-{index}{index}-aa", bus=f"{index + 1:02x}", minor=index)
        (place / "information").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("environ", "indices", "uuids"),
    [
        ({}, ["0", "1", "2", "3"], ["GPU-00-aa", "GPU-11-aa", "GPU-22-aa", "GPU-33-aa"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"], ["GPU-22-aa", "GPU-33-aa"]),
        ({"CUDA_VISIBLE_DEVICES": "3,-1,0"}, ["3"], ["GPU-33-aa"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-22"}, ["2"], ["GPU-22-aa"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-7-8"}, ["0"], ["MIG-7-8"]),
        # A cgroup may show two others of the four as 0 and 1.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "5"}, ["0", "1"], [None, None]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_JOB_ID": "5"},
            ["0", "1", "2", "3"],
            ["GPU-00-aa", "GPU-11-aa", "GPU-22-aa", "GPU-33-aa"],
        ),
    ],
)
def test_visible_gpus(tmp_path: Path, environ: dict[str, str], indices: list[str], uuids: list[str | None]) -> None:
    found = hosts.visible_gpus(drivers(tmp_path, *[H100] * 4), environ)
    assert [gpu.index for gpu in found] == indices
    assert [gpu.uuid for gpu in found] == uuids
    assert {gpu.name for gpu in found} <= {H100}


def test_gpus_of_two_kinds_are_not_told_apart_by_number(tmp_path: Path) -> None:
    """CUDA puts the fastest first, which the driver's list does not know."""
    folder = drivers(tmp_path, "NVIDIA T4", H100)
    [gpu] = hosts.visible_gpus(folder, {"CUDA_VISIBLE_DEVICES": "0"})
    assert (gpu.name, gpu.uuid) == (f"{H100} or NVIDIA T4", None)
    [gpu] = hosts.visible_gpus(folder, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert (gpu.name, gpu.uuid) == ("NVIDIA T4", "GPU-00-aa")


def test_a_rank_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    entry = hosts.describe_rank(5, 1, 2, on_cpu=True)
    assert (entry["rank"], entry["local_rank"], entry["node"]) == (5, 1, 2)
    assert (entry["device"], entry["device_name"]) == ("cpu", hosts.cpu_name())
    assert (entry["cores"], entry["threads"]) == (len(os.sched_getaffinity(0)), 3)
    assert entry["host"] and entry["machine"] and "device_uuid" not in entry
    # proc(5): the CPUs of the process as the kernel lists them.
    assert f"Cpus_allowed_list:\t{entry['cpus']}\n" in Path("/proc/self/status").read_text()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert hosts.describe_rank(5, 1, 2, on_cpu=True)["threads"] == entry["cores"]


@pytest.mark.parametrize("text", ["7", "0-1", "0,2", "0-3,8,10-11", "64-127,192-255"])
def test_cpus_are_listed_as_linux_lists_them(text: str) -> None:
    cpus = frozenset(parse_cpus(text))
    assert hosts.describe_cpus(cpus) == {"cores": len(cpus), "cpus": text}


def test_a_rank_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus = hosts.visible_gpus(drivers(tmp_path, H100, H100), {})
    monkeypatch.setattr(hosts, "visible_gpus", lambda: gpus)
    entry = hosts.describe_rank(1, 1, 0)
    assert (entry["device"], entry["device_name"], entry["device_uuid"]) == ("cuda:1", H100, "11-aa")


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; from launch.runs.environment import describe_rank as d; d(0, 0, 0); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
