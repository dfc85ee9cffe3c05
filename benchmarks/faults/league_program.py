"""The training program of the league: DDP, a checkpoint every ten steps, and a resume from the newest checkpoint.

Every engine of ``benchmarks.faults.league`` starts this file unchanged. The samples of a step depend on the number of
the step alone, so two runs with the same number of ranks end with the same weights, whatever happened in between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

START = time.time()
STEPS = 900
SAVE_EVERY = 10
STEP_S = 0.2
"""Seconds that each step sleeps until the file ``hurry`` exists."""
TIMEOUT_S = 30
"""Timeout of a collective, in seconds."""


def weights_sum(model: torch.nn.Module) -> str:
    """Return the SHA-256 hash of all parameters, in the order of the model."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def new_layers() -> torch.nn.Module:
    """Return the untrained model. Every rank and every engine begins with the same weights."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))


def samples_of(step: int) -> torch.Tensor:
    """Return the samples of a step for all ranks, of shape (8, 16)."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def record(folder: Path, step: int, start: float) -> None:
    """Append a step to ``steps.jsonl`` in ``folder``. ``start`` is the Unix time at which the process started, or with
    torchft at which the set of replicas last changed."""
    with (folder / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "start": start}) + "\n")


def record_end(folder: Path, model: torch.nn.Module) -> None:
    """Write the hash of the final weights into ``end.json``."""
    (folder / "end.tmp").write_text(json.dumps({"sum": weights_sum(model), "pid": os.getpid()}))
    (folder / "end.tmp").replace(folder / "end.json")


def pause(folder: Path, rank: int) -> None:
    """Sleep for ``STEP_S`` seconds, unless the file ``hurry`` exists in ``folder``, the folder of the run.

    Before that, rank 1 allocates 2 GiB if the file ``hog`` in this folder is younger than the process.
    """
    hog = folder / "hog"
    if rank == 1 and hog.exists() and hog.stat().st_mtime > START:
        b"x" * 2**31
    if not (folder / "hurry").exists():
        time.sleep(STEP_S)


def train(folder: Path, *, heartbeats: bool = False) -> None:
    """Train from the newest checkpoint in ``folder`` to the last step.

    Rank 0 appends a line to ``steps.jsonl`` for each step: step, Unix time of the step, Unix time at which the process
    started. At the end rank 0 writes ``end.json``.

    Args:
        folder: folder of the run, shared by all ranks.
        heartbeats: True reports each step to the rank monitor of nvidia-resiliency-ext, as its documentation
            recommends.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layers = new_layers()
    model = DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    newest, done = folder / "newest.pt", 0
    if newest.exists():
        state = torch.load(newest)
        layers.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    monitor = None
    if heartbeats:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        monitor = RankMonitorClient()
        monitor.init_workload_monitoring()
    for step in range(done + 1, STEPS + 1):
        batch = samples_of(step)[rank::ranks]
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor:
            monitor.send_heartbeat()
        pause(folder, rank)
        if rank == 0:
            record(folder, step, START)
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
            if step % SAVE_EVERY == 0 or step == STEPS:
                torch.save(
                    {"step": step, "model": layers.state_dict(), "optimizer": optimizer.state_dict()},
                    newest.with_suffix(".tmp"),
                )
                newest.with_suffix(".tmp").replace(newest)
    if monitor:
        monitor.shutdown_workload_monitoring()
    dist.barrier()  # no rank leaves while another one still computes
    if rank == 0:
        record_end(folder, layers)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the run, shared by all ranks")
    parser.add_argument("--heartbeats", action="store_true", help="report steps to nvidia-resiliency-ext")
    args = parser.parse_args()
    train(args.folder, heartbeats=args.heartbeats)
