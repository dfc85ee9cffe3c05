"""Environment of ranks: defaults that the user's own words override, open files, and what is recorded of both."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

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
from tests.support.scripts import LOCAL, printed, write_script

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
