"""The environment of an attempt: place and device of a rank, and variables and limits of the ranks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs import environment as machine
from launch.runs.environment import (
    MOST_FILES,
    describe_environment,
    dumped_ranks,
    reachable_files,
    set_defaults,
    set_dump_file,
)
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, environment
from tests.support.runs import LOCAL, printed, write_script

RING = """
import os, sys, threading
from datetime import timedelta
import torch
import torch.distributed as dist

ranks, sums, kept = int(sys.argv[1]), [], []
store = dist.HashStore()

def live(rank):
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout, options._threads = timedelta(seconds=240), 1
    group = dist.ProcessGroupGloo(dist.PrefixStore("ring", store), rank, ranks, options)
    values = torch.tensor([float(rank)])
    group.allreduce([values]).wait()
    sums.append(values.item())
    kept.append(group)

threads = [threading.Thread(target=live, args=(rank,)) for rank in range(ranks)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(sums), set(sums), flush=True)
os._exit(0)  # sixteen groups are not taken apart
"""

TELL = """
import os, resource
print("limit", resource.getrlimit(resource.RLIMIT_NOFILE))
for name in ("TORCH_GLOO_LAZY_INIT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE",
             "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
    print(name, os.environ.get(name))
"""


def test_what_the_user_has_set_is_left_alone() -> None:
    nothing: dict[str, str] = {}
    set_defaults(nothing)
    assert nothing == {
        "TORCH_GLOO_LAZY_INIT": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    # Former names count as well: torch would join both, or warn.
    typed = {
        "TORCH_GLOO_LAZY_INIT": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    before = dict(typed)
    set_defaults(typed)
    assert typed == before
    set_defaults(nothing, typed=["PYTORCH_CUDA_ALLOC_CONF", "TORCH_GLOO_LAZY_INIT"])  # by script.env, which comes later
    assert nothing == {"TORCH_FR_BUFFER_SIZE": "20000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_each_attempt_has_dumps_of_its_own(tmp_path: Path) -> None:
    run_folder, env = RunFolder(tmp_path / "run"), dict[str, str]()
    for attempt in (1, 2):
        set_dump_file(run_folder.path, run_folder.attempt(attempt), env)
        assert env == {"TORCH_FR_DUMP_TEMP_FILE": f"{run_folder.attempt(attempt)}/nccl_trace_rank_"}
    typed = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/mine_"}
    set_dump_file(run_folder.path, run_folder.attempt(1), typed)
    assert typed == {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/mine_"}
    folder = run_folder.attempt(2)
    folder.mkdir(parents=True)
    assert dumped_ranks(folder) == []
    for name in ("nccl_trace_rank_10", "nccl_trace_rank_9", "nccl_trace_rank_9.json", "metrics"):
        (folder / name).touch()
    assert dumped_ranks(folder) == [9, 10]


def test_secrets_are_not_recorded() -> None:
    told = describe_environment({"OMP_NUM_THREADS": "1", "WANDB_API_KEY": "secret", "NCCL_SOCKET_IFNAME": "ib0"})
    assert told == {
        "OMP_NUM_THREADS": "1",
        "NCCL_SOCKET_IFNAME": "ib0",
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


@pytest.mark.parametrize(("hard", "reached"), [(4096, 4096), (-1, MOST_FILES), (2**31, MOST_FILES)])
def test_the_soft_limit_goes_up_to_the_hard_one(hard: int, reached: int) -> None:
    assert reachable_files(hard) == reached


def test_sixteen_ranks_of_gloo_in_one_process_of_256_files(tmp_path: Path) -> None:
    """All pairs would be 16 x 15 connections, each of two descriptors here: torch then ends the process."""
    script = write_script(tmp_path, RING)
    env = environment()
    env.pop("TORCH_GLOO_LAZY_INIT", None)
    set_defaults(env)
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", sys.executable, str(script), "16"],
        cwd=ROOT, env=env, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "16 {120.0}\n", done.stdout + done.stderr


def test_ranks_have_the_defaults_and_the_record_tells_them(tmp_path: Path) -> None:
    write_script(tmp_path, TELL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(512, reachable_files(hard) - 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))  # that of the user's shell
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *LOCAL, "script.path=script.py", "run_dir=run"],
            cwd=tmp_path, env=environment(PYTORCH_CUDA_ALLOC_CONF="garbage_collection_threshold:0.9"), timeout=300,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunFolder(tmp_path / "run")
    told = dict(line.split(" ", 1) for line in printed(folder).splitlines())
    assert told == {
        "limit": f"({reachable_files(hard)}, {hard})",
        "TORCH_GLOO_LAZY_INIT": "1",
        "PYTORCH_ALLOC_CONF": "None",
        "PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.9",
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder.attempt(1)}/nccl_trace_rank_",
    }
    record = json.loads(folder.environment(1).read_text())["environment"]
    assert record["open_files"] == reachable_files(hard)
    assert {name: record.get(name, "None") for name in told if name != "limit"} == {
        name: value for name, value in told.items() if name != "limit"
    }


# Machine of a rank.


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
    found = machine.visible_gpus(drivers(tmp_path, *[H100] * 4), environ)
    assert [gpu.index for gpu in found] == indices
    assert [gpu.uuid for gpu in found] == uuids
    assert {gpu.name for gpu in found} <= {H100}
    certain = [gpu for gpu in found if (gpu.uuid or "").startswith("GPU-")]
    assert [gpu.bus for gpu in certain] == [f"0000:{int(gpu.index) + 1:02x}:00.0" for gpu in certain]


def test_gpus_of_two_kinds_are_not_told_apart_by_number(tmp_path: Path) -> None:
    """CUDA puts the fastest first, which the driver's list does not know."""
    folder = drivers(tmp_path, "NVIDIA T4", H100)
    [gpu] = machine.visible_gpus(folder, {"CUDA_VISIBLE_DEVICES": "0"})
    assert (gpu.name, gpu.uuid) == (f"{H100} or NVIDIA T4", None)
    [gpu] = machine.visible_gpus(folder, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert (gpu.name, gpu.uuid) == ("NVIDIA T4", "GPU-00-aa")


def test_a_rank_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    entry = machine.describe_rank(5, 1, 2, on_cpu=True)
    assert (entry["rank"], entry["local_rank"], entry["node"]) == (5, 1, 2)
    assert (entry["device"], entry["device_name"]) == ("cpu", machine.cpu_name())
    assert (entry["cores"], entry["threads"]) == (len(os.sched_getaffinity(0)), 3)
    assert entry["host"] and entry["machine"] and "device_uuid" not in entry
    # proc(5): the CPUs of the process as the kernel lists them.
    assert f"Cpus_allowed_list:\t{entry['cpus']}\n" in Path("/proc/self/status").read_text()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine.describe_rank(5, 1, 2, on_cpu=True)["threads"] == entry["cores"]


@pytest.mark.parametrize(
    ("cpus", "text"), [([7], "7"), ([1, 0], "0-1"), ([0, 2], "0,2"), ([*range(4), 8, 10, 11], "0-3,8,10-11")]
)
def test_cpus_are_listed_as_linux_lists_them(cpus: list[int], text: str) -> None:
    assert machine.describe_cpus(cpus) == {"cores": len(cpus), "cpus": text}


def test_a_rank_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus = machine.visible_gpus(drivers(tmp_path, H100, H100), {})
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    entry = machine.describe_rank(1, 1, 0)
    assert (entry["device"], entry["device_name"], entry["device_uuid"]) == ("cuda:1", H100, "11-aa")
