"""The environment of an attempt: place and device of a rank, and variables and limits of the ranks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.agent.node import Node
from launch.agent.ranks import prepare_environment
from launch.config import Config
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
        "TORCH_NCCL_HIGH_PRIORITY": "1",
    }
    # Former names count as well: torch would join both, or warn.
    typed = {
        "TORCH_GLOO_LAZY_INIT": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_HIGH_PRIORITY": "0",
    }
    before = dict(typed)
    set_defaults(typed)
    assert typed == before
    set_defaults(nothing, typed=["PYTORCH_CUDA_ALLOC_CONF", "TORCH_GLOO_LAZY_INIT"])  # by script.env, which comes later
    kept = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_HIGH_PRIORITY")
    assert tuple(nothing) == kept


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


def test_the_soft_limit_goes_up_to_the_hard_one() -> None:
    assert [reachable_files(hard) for hard in (4096, -1, 2**31)] == [4096, MOST_FILES, MOST_FILES]


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


H100, T4 = "NVIDIA H100 80GB HBM3", "NVIDIA T4"
INFORMATION = """Model: \t\t {name}
IRQ:   \t\t 64
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.30.00.01
"""
FOUR = ["GPU-00-aa", "GPU-11-aa", "GPU-22-aa", "GPU-33-aa"]


def drivers(folder: Path, *names: str) -> Path:
    """The driver's folder of a machine with these GPUs, as /proc/driver/nvidia/gpus has it."""
    for index, name in enumerate(names):
        place = folder / f"0000:{index + 1:02x}:00.0"
        place.mkdir(parents=True)
        (place / "information").write_text(INFORMATION.format(name=name, uuid=f"GPU-{index}{index}-aa"))
    return folder


@pytest.mark.parametrize(
    ("models", "environ", "indices", "uuids"),
    [
        ([H100] * 4, {}, ["0", "1", "2", "3"], FOUR),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"], FOUR[2:]),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "3,-1,0"}, ["3"], FOUR[3:]),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": ""}, [], []),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "GPU-22"}, ["2"], [FOUR[2]]),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "MIG-7-8"}, ["0"], ["MIG-7-8"]),
        # A cgroup may show two others of the four as 0 and 1.
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "5"}, ["0", "1"], [None, None]),
        ([H100] * 4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_JOB_ID": "5"}, ["0", "1", "2", "3"], FOUR),
        # CUDA puts the fastest first, which the driver's list does not know.
        ([T4, H100], {"CUDA_VISIBLE_DEVICES": "0"}, ["0"], [None]),
        ([T4, H100], {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["0"], [FOUR[0]]),
    ],
)
def test_visible_gpus(
    models: list[str], environ: dict[str, str], indices: list[str], uuids: list[str | None], tmp_path: Path
) -> None:
    found = machine.visible_gpus(drivers(tmp_path, *models), environ)
    assert [gpu.index for gpu in found] == indices
    assert [gpu.uuid for gpu in found] == uuids
    names = {H100} if T4 not in models else {f"{H100} or {T4}"} if None in uuids else {T4}
    assert {gpu.name for gpu in found} <= names
    certain = [gpu for gpu in found if (gpu.uuid or "").startswith("GPU-")]
    assert [gpu.bus for gpu in certain] == [f"0000:{int(gpu.index) + 1:02x}:00.0" for gpu in certain]


def test_a_rank_on_a_cpu_and_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    entry = machine.describe_rank(5, 1, 2)
    assert (entry["rank"], entry["local_rank"], entry["node"]) == (5, 1, 2)
    assert (entry["device"], entry["device_name"]) == ("cpu", machine.cpu_name())
    assert (entry["cores"], entry["threads"]) == (len(os.sched_getaffinity(0)), 3)
    assert entry["host"] and entry["machine"] and "device_uuid" not in entry
    # proc(5): the CPUs of the process as the kernel lists them.
    assert f"Cpus_allowed_list:\t{entry['cpus']}\n" in Path("/proc/self/status").read_text()
    monkeypatch.delenv("OMP_NUM_THREADS")
    gpus = machine.visible_gpus(drivers(tmp_path, H100, H100), {})
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    found = machine.describe_rank(1, 1, 0)
    assert (found["device"], found["device_name"], found["device_uuid"]) == ("cuda:1", H100, "11-aa")
    assert found["threads"] == entry["cores"]


@pytest.mark.parametrize(
    ("cpus", "text"), [([7], "7"), ([1, 0], "0-1"), ([0, 2], "0,2"), ([*range(4), 8, 10, 11], "0-3,8,10-11")]
)
def test_cpus_are_listed_as_linux_lists_them(cpus: list[int], text: str) -> None:
    assert machine.describe_cpus(cpus) == {"cores": len(cpus), "cpus": text}


def test_ranks_share_the_cpus_of_a_node_to_compile_and_nccl_takes_one_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = SimpleNamespace(address="10.0.0.7")
    monkeypatch.setattr("launch.agent.ranks.psutil.net_if_addrs", lambda: {"eth0": [address], "eth01": []})
    for cpus, ranks, each in ((32, 8, "4"), (224, 8, "8"), (4, 8, "1")):
        monkeypatch.setattr("os.environ", {})
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        prepare_environment(Node(0, 2, "job", True, "1", 0, ("a", "b")), Config(ranks_per_node=ranks), "10.0.0.7")
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == each
        assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth0" and os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_gpus_without_the_folder_of_the_driver_are_counted_by_their_device_files(tmp_path: Path) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    assert machine.visible_gpus(tmp_path / "none", {}, devices) == []
    (devices / "dxg").touch()
    assert [gpu.index for gpu in machine.visible_gpus(tmp_path / "none", {}, devices)] == ["0"]
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (devices / name).touch()
    assert [gpu.index for gpu in machine.visible_gpus(tmp_path / "none", {}, devices)] == ["0", "1"]
    only = machine.visible_gpus(tmp_path / "none", {"CUDA_VISIBLE_DEVICES": "1"}, devices)
    assert [gpu.index for gpu in only] == ["1"]
