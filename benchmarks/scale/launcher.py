"""Rows of benchmarks/scale/growth.py about the launcher: limits of its ranks, files that they open, plans and dry runs.

Each function measures one row and returns the finding in words, and whether it meets the demand.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.starts import opened
from tests.support.commands import ROOT, environment

FILES, RANKS = 256, 16
LAZY = "TORCH_GLOO_LAZY_INIT"
RANK = """
import json, os, resource, sys
json.dump([os.environ.get("NAME"), resource.getrlimit(resource.RLIMIT_NOFILE)], open(sys.argv[1], "w"))
"""
GROUPS = """
import os, sys, threading
from datetime import timedelta
import torch, torch.distributed as dist
size, store = int(sys.argv[1]), dist.HashStore()
groups, summed = [None] * size, []
def join(rank):
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=120)
    options._threads = 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    groups[rank] = dist.ProcessGroupGloo(dist.PrefixStore("x", store), rank, size, options)
    ones = torch.ones(1)
    groups[rank].allreduce([ones]).wait()
    summed.append(ones.item())
threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.stdout.write("starts" if summed == [size] * size else "fails")
sys.stdout.flush()
os._exit(0)
"""
GPUS = ("model=gpt2_124m", "optim=gpt2", "cluster=slurm", "cluster.partition=gpu", "cluster.gpus_per_node=8")
"""Arguments of the README's command for GPUs."""


def limit_files() -> None:
    """Set the soft limit of open files of this process to ``FILES``, as strict login shells do."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def open_files() -> tuple[str, bool]:
    """Return row A5: the limit of open files that a rank of a launched script gets, and whether 16 gloo ranks start
    under it.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with tempfile.TemporaryDirectory() as name:
        script, told = Path(name) / "rank.py", Path(name) / "told"
        script.write_text(RANK.replace("NAME", LAZY))
        words = ["cluster=local", "nodes=1", "ranks_per_node=1", "workload=script", f"script.path={script}"]
        words += [f"script.args={told}", f"run_dir={name}/run"]
        command = [sys.executable, "-m", "launch", *words]
        env = environment(PYTHONPATH=str(ROOT))
        subprocess.run(command, cwd=name, env=env, preexec_fn=limit_files, capture_output=True, check=True)
        lazy, (soft, _) = json.loads(told.read_text())
    env = {name: value for name, value in env.items() if name != LAZY} | ({LAZY: lazy} if lazy else {})
    command = [sys.executable, "-c", GROUPS, str(RANKS)]
    ended = subprocess.run(command, env=env, preexec_fn=limit_files, capture_output=True, text=True)
    outcome = ended.stdout if ended.returncode == 0 and ended.stdout else f"aborts ({ended.returncode})"
    return f"{outcome}; {'the hard limit' if soft == hard else soft}", outcome == "starts" and soft == hard


def dry_run(folder: str, *words: str) -> str:
    """Return the text that a dry run prints."""
    command = [sys.executable, "-m", "launch", "-m", *words, "dry_run=true"]
    env = environment(PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stdout.strip().splitlines()[-1])
    return ended.stdout


def precision_of_the_readme() -> tuple[str, bool]:
    """Return row A13: the precision in the plan, and whether the plan warns of fp32 on H100s.

    The second dry run sets ``cluster.gpu_name``, which Slurm reports on a cluster.
    """
    with tempfile.TemporaryDirectory() as name:
        asked = re.search(r"execution +(\w+)", dry_run(name, "nodes=1", *GPUS))
        typed = dry_run(name, "nodes=1", *GPUS, "cluster.gpu_name=H100", "precision=fp32")
    told = [line for line in typed.splitlines() if "warning" in line and "fp32" in line]
    factor = any(re.search(r"\d+(\.\d+)? (x|times)|(factor|x) ?\d", line) and "precision=" in line for line in told)
    text = f"{asked[1] if asked else 'unsaid'}; {'the factor, and what to type' if factor else told or 'nothing'}"
    return text, bool(asked and asked[1] == "bf16" and factor)


def opened_files() -> tuple[str, bool]:
    """Return row A15: how many files a start opens on a node of eight ranks, relative to one rank. strace counts them,
    and ranks are forked.
    """
    one, eight = opened(1, forked=True), opened(8, forked=True)
    return f"{eight / one:.2f} x ({one:,} and {eight:,})", eight <= 1.5 * one


def dry_run_of_100() -> tuple[str, bool]:
    """Return row A19: the CPU seconds of a dry run of a sweep over 100 learning rates."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as name:
        rates = ",".join(f"{1e-4 * (i + 1):.4f}" for i in range(100))
        text = dry_run(name, f"optim.lr={rates}", "optim.min_lr=0", "nodes=1", "cluster=local")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    points = len(re.findall(r"^point ", text, re.MULTILINE))
    return f"{seconds:.1f} s ({points} points, {os.cpu_count()} cores)", seconds <= 8 and points == 100
