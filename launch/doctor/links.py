"""Measurements of one rank of the doctor's job: its device, an all-reduce over all ranks, and exchanges between nodes.

    python -m launch.doctor.links RECORD        started by launch.doctor.probe with the file to write

Ranks use NCCL if each has a GPU of its own, and gloo otherwise. ``launch.doctor.verdict`` judges the figures.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.process import lasting_imports
from launch.runs.files import write_json

with lasting_imports():
    import torch
    import torch.distributed as dist

MIB = 2**20
LARGE = 16 * MIB
SMALL = MIB
PINGS = 20
MOST_ROUNDS = 15
"""Each node is tried against so many others at most: all of them up to 16 nodes."""
PASSES = 3
"""Measurements of each link, seconds apart: on a machine that others use, one alone tells of its neighbors."""
SLOW_S = 0.05
"""Limit: where an exchange of SMALL bytes takes longer, LARGE ones would take too long for what they tell."""
TIMEOUT = timedelta(seconds=150)


def choose_device(store: dist.Store, rank: int, world: int, local: int) -> torch.device:
    """A GPU of this rank's own where every rank has one, the CPU on all of them elsewhere."""
    has_gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
    store.set(f"gpu/{rank}", "yes" if has_gpu else "no")
    if all(store.get(f"gpu/{other}") == b"yes" for other in range(world)):
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def finish(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time ``work``."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def matmul_tflops(device: torch.device) -> float:
    """The best of five matrix products on this device, TFLOP/s: bf16 on a GPU, fp32 on the CPU."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    a = torch.ones(size, size, device=device, dtype=kind)
    times = [seconds(lambda: a @ a, device) for _ in range(6)][1:]
    return 2 * size**3 / min(times) / 1e12


def group_all_reduce(device: torch.device) -> dict[str, float]:
    """An all-reduce over all ranks: latency of 4 bytes, and LARGE bytes as often as a second holds, once at least.

    ``bandwidth_gbit`` is bytes over time; ``bus_gbit`` counts what a ring moves over each link, 2 (n - 1) / n of it.
    """
    world = dist.get_world_size()
    scalar, block = torch.ones(1, device=device), torch.ones(LARGE // 4, device=device)
    for tensor in (scalar, block[: SMALL // 4]):
        dist.all_reduce(tensor)  # connections are made by the first one
    pings = [seconds(lambda: dist.all_reduce(scalar), device) for _ in range(PINGS)]
    times: list[float] = []
    spent = torch.zeros(1, device=device)
    while not times or (spent.item() < 1.0 and len(times) < 10):
        block.fill_(1.0)
        times.append(seconds(lambda: dist.all_reduce(block), device))
        assert block[0].item() == world, "the sum over all ranks is wrong"
        spent = torch.tensor([sum(times)], device=device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)  # so that all ranks leave after the same number
    rate = 8 * LARGE / statistics.median(times) / 1e9
    return {
        "bytes": LARGE,
        "latency_us": 1e6 * statistics.median(pings),
        "bandwidth_gbit": rate,
        "bus_gbit": rate * 2 * (world - 1) / world,
    }


def schedule(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which everybody meets everybody once, and nobody two at a time (the circle method)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def swap(peer: int, sent: torch.Tensor, received: torch.Tensor) -> None:
    """Send and receive at the same time."""
    both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def exchange_with(peer: int, device: torch.device) -> dict[str, float]:
    """Latency and bandwidth, each direction, between this rank and ``peer``."""
    scalar, answer = torch.ones(1, device=device), torch.empty(1, device=device)
    for _ in range(2):
        swap(peer, scalar, answer)
    pings = [seconds(lambda: swap(peer, scalar, answer), device) for _ in range(PINGS)]
    block = torch.ones(LARGE // 4, device=device)
    space = torch.empty_like(block)

    def timed(size: int) -> float:
        return seconds(lambda: swap(peer, block[: size // 4], space[: size // 4]), device)

    took = max(agree(timed(SMALL), peer, device), 1e-9)
    size = SMALL
    if took < SLOW_S:
        size = LARGE
        took = min(agree(timed(LARGE), peer, device) for _ in range(2))
    return {"latency_us": 1e6 * statistics.median(pings), "bandwidth_gbit": 8 * size / took / 1e9, "bytes": size}


def agree(value: float, peer: int, device: torch.device) -> float:
    """The larger of both sides' values, so that both take the same turn."""
    other = torch.empty(1, device=device)
    swap(peer, torch.tensor([value], device=device), other)
    return max(torch.tensor(value).item(), other.item())


def together(device: torch.device) -> None:
    """Wait for all ranks."""
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def exchanges(rank: int, nodes: int, each: int, device: torch.device) -> list[dict[str, float]]:
    """This rank against the rank of the same local number on the other nodes, round by round, PASSES times."""
    node, local = divmod(rank, each)
    measured: dict[int, list[dict[str, float]]] = {}
    for pairs in schedule(nodes)[:MOST_ROUNDS] * PASSES:
        together(device)
        partner = next((a + b - node for a, b in pairs if node in (a, b)), None)
        if partner is not None:
            measured.setdefault(partner, []).append(exchange_with(partner * each + local, device))
    return [{"node": partner, **merge(passes)} for partner, passes in measured.items()]


def merge(passes: Sequence[dict[str, float]]) -> dict[str, float]:
    """The measurements of one link as one: the median of its bandwidth with its range, and its least latency."""
    rates = [one["bandwidth_gbit"] for one in passes]
    return {
        "latency_us": min(one["latency_us"] for one in passes),
        "bandwidth_gbit": statistics.median(rates),
        "low_gbit": min(rates),
        "high_gbit": max(rates),
        "bytes": min(one["bytes"] for one in passes),
    }


def measure(path: Path) -> None:
    """Take part in all measurements, and write into ``path`` what this rank saw."""
    rank, world, local, each = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    torch.set_num_threads(1)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore("doctor/ranks", dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT))
    device = choose_device(store, rank, world, local)
    backend = "nccl" if device.type == "cuda" else "gloo"
    record: dict[str, Any] = {"rank": rank, "node": rank // each, "host": socket.gethostname(), "backend": backend}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record["gpus_seen"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    record["matmul_tflops"] = matmul_tflops(device)
    if world > 1:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        record["group"] = group_all_reduce(device)
        record["links"] = exchanges(rank, world // each, each, device)
        together(device)
        dist.destroy_process_group()
    write_json(path, record)


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
