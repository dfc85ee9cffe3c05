"""One rank of ``launch.bench_network``: it times each collective in each tier, for growing sizes, together with all
ranks.

    python -m launch.bench_network.measure --output FILE        started by the launcher on every rank

Ranks use NCCL if each has a GPU of its own, and gloo otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import worker
from launch.runs.folder import write_json
from launch.runs.measured import COLLECTIVES
from launch.runs.process import lasting_imports

with lasting_imports():
    import torch
    import torch.distributed as dist

MIB = 2**20
SMALLEST, FACTOR = 4096, 8
LARGEST_MIB = {"cpu": 16, "cuda": 256}
"""Device type -> default size in MiB of the largest message, which is enough to saturate the links."""
SLOW_S = 0.5
"""Seconds of a collective above which larger sizes are not measured."""
PASSES = 5
"""Number of timings of each size. Their median is the sample."""
TIMEOUT = timedelta(minutes=3)


class Bench:
    """One rank of a measurement, with its device. Needs a default process group that uses gloo.

    ``budget_s`` is the time in seconds for all timings of one size.
    """

    def __init__(self, budget_s: float = 0.0) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local, self.each = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self.budget_s = budget_s
        has_gpu = torch.cuda.is_available() and torch.cuda.device_count() > self.local
        on_gpus = -self.largest(-float(has_gpu)) == 1.0
        self.device = torch.device("cuda", self.local) if on_gpus else torch.device("cpu")
        if on_gpus:
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if on_gpus else "gloo"

    def largest(self, value: float) -> float:
        """Return the largest value over all ranks."""
        both = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both.item())

    def groups(self) -> Iterator[tuple[str, int, dist.ProcessGroup]]:
        """Yield tier, group size in ranks, and the process group of this size that contains this rank.

        The tiers are ``intra_node`` (ranks of one node) and ``inter_node`` (one rank of each of several nodes).
        """
        nodes = self.world // self.each
        for tier, most in (("intra_node", self.each), ("inter_node", nodes)):
            for size in tier_group_sizes(most):
                lists = group_ranks(tier, size, nodes, self.each)
                group, _ = dist.new_subgroups_by_enumeration(lists, timeout=TIMEOUT, backend=self.backend)
                yield tier, size, group

    def own_seconds(self, work: Callable[[], object], count: int = 1) -> float:
        """Return the mean seconds of one run of ``work`` over ``count`` runs on this rank, with its GPU kernels."""
        self._finish()
        start = time.perf_counter()
        for _ in range(count):
            work()
        self._finish()
        return (time.perf_counter() - start) / count

    def seconds(self, work: Callable[[], object], count: int) -> float:
        """Return the mean seconds of one run of ``work`` over ``count`` runs, on the slowest rank."""
        dist.barrier()
        return self.largest(self.own_seconds(work, count))

    def typical_seconds(self, work: Callable[[], object]) -> float:
        """Return the median seconds of one run of ``work`` over PASSES timings, on the slowest rank.

        A first run, which connects the ranks, does not count.
        """
        work()
        once = self.seconds(work, 1)
        count = min(50, max(1, round(self.budget_s / PASSES / max(once, 1e-6))))
        return statistics.median(self.seconds(work, count) for _ in range(PASSES))

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tier_group_sizes(most: int) -> list[int]:
    """Return the group sizes of a tier with ``most`` ranks: ``most``, and also 2 if ``most`` is even."""
    return [size for size in sorted({2, most}) if size > 1 and most % size == 0]


def group_ranks(tier: str, size: int, nodes: int, each: int) -> list[list[int]]:
    """Return the ranks of all groups of a tier: neighbors on a node, or equal local ranks on neighboring nodes.

    ``each`` is the number of ranks on a node.
    """
    if tier == "intra_node":
        return [[n * each + at + i for i in range(size)] for n in range(nodes) for at in range(0, each, size)]
    return [[(at + i) * each + local for i in range(size)] for at in range(0, nodes, size) for local in range(each)]


def work_of(collective: str, size: int, bench: Bench, group: dist.ProcessGroup) -> Callable[[], object]:
    """Return a function that runs a collective of ``size`` bytes once. A send runs in both directions."""
    ranks = dist.get_world_size(group)
    part = max(1, size // 4 // ranks)
    whole, shard = (torch.zeros(count, device=bench.device) for count in (part * ranks, part))
    first, last = dist.get_global_rank(group, 0), dist.get_global_rank(group, ranks - 1)
    sync = torch.zeros(1, device=bench.device)

    def there_and_back() -> None:
        for source, target in ((first, last), (last, first)):
            if bench.rank == source:
                dist.send(whole, target, group)
            else:
                dist.recv(whole, source, group)

    def spread() -> None:
        dist.broadcast(whole, first, group)
        dist.all_reduce(sync, group=group)  # Without this, the source would run ahead of ranks that still receive.

    other = torch.zeros_like(whole)
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, shard, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": spread,
        "send": there_and_back,
    }[collective]


def time_collectives(bench: Bench, largest: int, tell: Callable[[], None]) -> list[dict[str, Any]]:
    """Time every collective in every tier, up to ``largest`` bytes. Calls ``tell`` after each sample.

    Returns the same samples on every rank: tier, collective, ranks, bytes and seconds.
    """
    samples: list[dict[str, Any]] = []
    for tier, ranks, group in bench.groups():
        sync = torch.zeros(1, device=bench.device)
        waiting_s = bench.typical_seconds(lambda sync=sync, group=group: dist.all_reduce(sync, group=group))  # type: ignore
        for collective in COLLECTIVES:
            if collective == "send" and ranks > 2:
                continue
            size, seconds = SMALLEST, 0.0
            while size <= largest and seconds < SLOW_S:
                seconds = bench.typical_seconds(work_of(collective, size, bench, group))
                taken = {"broadcast": max(1e-7, seconds - waiting_s), "send": seconds / 2}.get(collective, seconds)
                known = {"tier": tier, "collective": collective, "ranks": ranks, "bytes": size, "seconds": taken}
                samples.append(known)
                tell()
                size *= FACTOR
    return samples


def main() -> None:
    """Measure. Rank 0 writes the samples with the software and hardware of the measurement."""
    parser = argparse.ArgumentParser(description="One rank of python -m launch.bench_network.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-mib", type=int, default=0)
    parser.add_argument("--budget-s", type=float, required=True)
    given = parser.parse_args()
    run = worker.attach()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    bench = Bench(given.budget_s)
    largest = (given.max_mib or LARGEST_MIB[bench.device.type]) * MIB
    done = iter(range(1, 1_000_000))
    samples = time_collectives(bench, largest, lambda: run.record(next(done)) if bench.rank == 0 else None)
    on_gpus = bench.device.type == "cuda"
    measured = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "nodes": bench.world // bench.each,
        "ranks_per_node": bench.each,
        "backend": bench.backend,
        "device": torch.cuda.get_device_name(bench.device) if on_gpus else f"CPU ({platform.machine()})",
        "software": {"python": platform.python_version(), "torch": torch.__version__}
        | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if on_gpus else {}),
        "samples": samples,
    }
    if bench.rank == 0:
        write_json(given.output, measured)
        run.finished(next(done) - 1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
