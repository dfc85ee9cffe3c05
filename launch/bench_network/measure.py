"""Ranks that measure: collectives for ``launch.bench_network``, and the device and links for ``launch.doctor``.

    python -m launch.bench_network.measure --output FILE        started by the launcher on every rank of a measurement
    python -m launch.bench_network.measure RECORD               started by launch.doctor.job on every rank of its job

Ranks use NCCL if each has a GPU of its own, and gloo otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
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
"""Device type -> default size in MiB of the largest message, which saturates the links."""
SLOW_S = 0.5
"""If a collective takes longer than this time in seconds, larger sizes are not measured."""
PASSES = 5
"""Number of timings of each size. Their median is the sample."""
TIMEOUT = timedelta(minutes=3)


class Bench:
    """One rank of a measurement, with its device. Needs a default process group of gloo.

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
        """Return the largest ``value`` that a rank has passed. All ranks must call this method together."""
        both = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both.item())

    def groups(self) -> Iterator[tuple[str, int, dist.ProcessGroup]]:
        """Yield (tier, group size in ranks, process group) for each process group of this rank that is measured.

        The tiers are ``intra_node`` (ranks of one node) and ``inter_node`` (one rank of each of several nodes).
        """
        nodes = self.world // self.each
        for tier, most in (("intra_node", self.each), ("inter_node", nodes)):
            for size in tier_group_sizes(most):
                lists = group_ranks(tier, size, nodes, self.each)
                group, _ = dist.new_subgroups_by_enumeration(lists, timeout=TIMEOUT, backend=self.backend)
                yield tier, size, group

    def own_seconds(self, work: Callable[[], object], count: int = 1) -> float:
        """Return the mean seconds that ``work`` takes on this rank, over ``count`` calls. GPU kernels are included."""
        self._finish()
        start = time.perf_counter()
        for _ in range(count):
            work()
        self._finish()
        return (time.perf_counter() - start) / count

    def seconds(self, work: Callable[[], object], count: int) -> float:
        """Return the mean seconds that ``work`` takes on the slowest rank, over ``count`` calls.

        All ranks must call this method together.
        """
        dist.barrier()
        return self.largest(self.own_seconds(work, count))

    def typical_seconds(self, work: Callable[[], object]) -> float:
        """Return the median seconds that ``work`` takes on the slowest rank, over PASSES timings.

        A first call, which connects the ranks, is not timed.
        """
        work()
        once = self.seconds(work, 1)
        count = min(50, max(1, round(self.budget_s / PASSES / max(once, 1e-6))))
        return statistics.median(self.seconds(work, count) for _ in range(PASSES))

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tier_group_sizes(most: int) -> list[int]:
    """Return the sizes of the groups to measure in a tier with ``most`` ranks, ascending.

    The sizes are ``most``, and 2 if ``most`` is even. Empty if ``most`` is 1.
    """
    return [size for size in sorted({2, most}) if size > 1 and most % size == 0]


def group_ranks(tier: str, size: int, nodes: int, each: int) -> list[list[int]]:
    """Return the ranks of each group of ``size`` ranks. Each rank is in one group.

    In the tier ``intra_node``, a group has neighboring ranks of one node. In the tier ``inter_node``, a group has the
    ranks with the same local rank on neighboring nodes, and ``size`` is its number of nodes.

    Args:
        tier: ``intra_node`` or ``inter_node``.
        size: number of ranks in a group.
        nodes: number of nodes.
        each: number of ranks on each node.
    """
    if tier == "intra_node":
        return [[n * each + at + i for i in range(size)] for n in range(nodes) for at in range(0, each, size)]
    return [[(at + i) * each + local for i in range(size)] for at in range(0, nodes, size) for local in range(each)]


def work_of(collective: str, size: int, bench: Bench, group: dist.ProcessGroup) -> Callable[[], object]:
    """Return a function that runs a collective of ``size`` bytes once over ``group``, on the device of ``bench``.

    A send runs once in each direction.
    """
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
    """Time every collective inside a node and between nodes, up to ``largest`` bytes.

    Calls ``tell`` after each sample, so that the launcher sees progress.

    Returns one dictionary for each sample, the same on every rank: tier, collective, ranks, bytes and seconds.
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


# The doctor's job: the device of each rank, and the links between nodes. ``launch.doctor.findings`` compares them.


LARGE = 16 * MIB
SMALL = MIB
MOST_ROUNDS = 15
"""Largest number of other nodes to which the links of a node are measured.

With up to 16 nodes, all links are measured.
"""
LINK_PASSES = 3
"""Number of measurements of each link, seconds apart. Other work on the machine may make a single one slow."""
SLOW_LINK_S = 0.05
"""If an exchange of SMALL bytes takes this time in seconds or longer, LARGE bytes are not measured on the link.

On such a link, LARGE bytes would take too long.
"""
LINK_TIMEOUT = timedelta(seconds=150)


class LinkBench(Bench):
    """One rank of the doctor's measurement, with its device and a process group of all ranks for that device."""

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("doctor/ranks", dist.TCPStore(address, port, is_master=False, timeout=LINK_TIMEOUT))
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=LINK_TIMEOUT)
        super().__init__()
        self.group = dist.new_group(backend=self.backend, timeout=LINK_TIMEOUT)

    def matmul_tflops(self) -> float:
        """Return the best speed of five matrix products in TFLOP/s: bf16 on a GPU, fp32 on the CPU."""
        size, kind = (8192, torch.bfloat16) if self.backend == "nccl" else (384, torch.float32)
        a = torch.ones(size, size, device=self.device, dtype=kind)
        times = [self.own_seconds(lambda: a @ a) for _ in range(6)][1:]
        return 2 * size**3 / min(times) / 1e12

    def exchange_with(self, peer: int) -> float:
        """Return the bandwidth to rank ``peer`` in one direction in Gbit/s, while both ranks send.

        Both ranks must call this method at the same time.
        """
        block = torch.ones(LARGE // 4, device=self.device)
        space = torch.empty_like(block)

        def swap(size: int) -> None:
            sent, received = block[: size // 4], space[: size // 4]
            pairs = ((dist.isend, sent), (dist.irecv, received))
            for work in dist.batch_isend_irecv([dist.P2POp(do, part, peer, self.group) for do, part in pairs]):
                work.wait()

        def agreed_s(size: int) -> float:
            """Return the seconds of one exchange of ``size`` bytes: the larger of both ranks' times.

            So both ranks make the same decision on the measurement of LARGE bytes.
            """
            block[0] = self.own_seconds(lambda: swap(size))
            swap(4)
            return max(block[0].item(), space[0].item(), 1e-9)

        swap(4)
        size, took = SMALL, agreed_s(SMALL)
        if took < SLOW_LINK_S:
            size, took = LARGE, min(agreed_s(LARGE) for _ in range(2))
        return 8 * size / took / 1e9

    def exchanges(self) -> list[dict[str, float]]:
        """Measure the links of this rank to the ranks with the same local rank on other nodes, LINK_PASSES times each.

        Returns one record for each measured node: its index (``node``) and the largest measured bandwidth in Gbit/s
        (``bandwidth_gbit``). The largest is used because other work on the machine can only make a measurement slower.
        """
        ones = torch.ones(1, device=self.device)
        dist.all_reduce(ones, group=self.group)  # NCCL needs all ranks of a group in the first operation of the group.
        assert ones.item() == self.world, "the sum over all ranks is wrong"
        node, nodes = self.rank // self.each, self.world // self.each
        measured: dict[int, float] = {}
        for turn in list(range(nodes - 1 + nodes % 2))[:MOST_ROUNDS] * LINK_PASSES:
            dist.barrier()
            other = partner(node, turn, nodes)
            if other is not None:
                rate = self.exchange_with(other * self.each + self.local)
                measured[other] = max(measured.get(other, 0.0), rate)
        return [{"node": other, "bandwidth_gbit": rate} for other, rate in measured.items()]


def partner(node: int, turn: int, count: int) -> int | None:
    """Return the node with which ``node`` exchanges data in one turn; None if ``node`` pauses in this turn.

    In a turn, pairs of nodes exchange data at the same time. After all turns, each node has met each other node once.

    Args:
        node: index of the node.
        turn: index of the turn. There are ``count`` turns if ``count`` is odd, else ``count - 1``.
        count: number of nodes.
    """
    # The number of nodes is odd. With an even number, the last node is outside of the circle.
    circle = count - 1 + count % 2
    if node == circle:
        return turn * (circle + 1) // 2 % circle
    other = (turn - node) % circle
    if other != node:
        return other
    return circle if circle < count else None


def measure_rank(path: Path) -> None:
    """Measure this rank for the doctor's job, and write the JSON file ``path`` with its device, speed and links."""
    torch.set_num_threads(1)
    bench = LinkBench()
    on_gpus = bench.backend == "nccl"
    record: dict[str, Any] = {
        "rank": bench.rank,
        "node": bench.rank // bench.each,
        "host": socket.gethostname(),
        "backend": bench.backend,
        "device": torch.cuda.get_device_name(bench.device) if on_gpus else "cpu",
        "gpus_seen": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "matmul_tflops": bench.matmul_tflops(),
    }
    if bench.world > 1:
        record["links"] = bench.exchanges()
    dist.barrier()
    dist.destroy_process_group()
    write_json(path, record)


def main() -> None:
    """Measure the links between nodes if the command line names a RECORD; otherwise measure collectives.

    For links, every rank writes its own file RECORD. For collectives, rank 0 writes the samples of all ranks into the
    file of ``--output``, with the software and hardware of the measurement.
    """
    parser = argparse.ArgumentParser(description="One rank of python -m launch.bench_network, or of the doctor's job.")
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--max-mib", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=0.0)
    given = parser.parse_args()
    if given.record is not None:
        measure_rank(given.record)
        return
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
