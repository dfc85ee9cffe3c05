"""Measurements of one rank of the doctor's job: its device, and exchanges between nodes.

    python -m launch.doctor.links RECORD        started by launch.doctor.job, with the file for the results

Ranks use NCCL if each has a GPU of its own, and gloo otherwise. ``launch.doctor.verdict`` compares the figures.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.bench_network.measure import MIB, Bench
from launch.runs.folder import write_json
from launch.runs.process import lasting_imports

with lasting_imports():
    import torch
    import torch.distributed as dist

LARGE = 16 * MIB
SMALL = MIB
MOST_ROUNDS = 15
"""Largest number of other nodes with which a node is measured. With up to 16 nodes, these are all other nodes."""
PASSES = 3
"""Number of measurements of each link, seconds apart. A single measurement may be slow because of other work."""
SLOW_S = 0.05
"""Seconds of an exchange of SMALL bytes above which LARGE bytes, which would take too long, are not measured."""
TIMEOUT = timedelta(seconds=150)


class LinkBench(Bench):
    """One rank of the measurement, with its device and a process group of all ranks for that device."""

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("doctor/ranks", dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT))
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        super().__init__()
        self.group = dist.new_group(backend=self.backend, timeout=TIMEOUT)

    def matmul_tflops(self) -> float:
        """Return the best speed of five matrix products in TFLOP/s: bf16 on a GPU, fp32 on the CPU."""
        size, kind = (8192, torch.bfloat16) if self.backend == "nccl" else (384, torch.float32)
        a = torch.ones(size, size, device=self.device, dtype=kind)
        times = [self.own_seconds(lambda: a @ a) for _ in range(6)][1:]
        return 2 * size**3 / min(times) / 1e12

    def exchange_with(self, peer: int) -> float:
        """Return the bandwidth of one direction to ``peer`` in Gbit/s."""
        block = torch.ones(LARGE // 4, device=self.device)
        space = torch.empty_like(block)

        def swap(size: int) -> None:
            sent, received = block[: size // 4], space[: size // 4]
            pairs = ((dist.isend, sent), (dist.irecv, received))
            for work in dist.batch_isend_irecv([dist.P2POp(do, part, peer, self.group) for do, part in pairs]):
                work.wait()

        def agreed_s(size: int) -> float:
            """Return the seconds of one exchange: the larger of both ranks' times, so that both make the same
            decision.
            """
            block[0] = self.own_seconds(lambda: swap(size))
            swap(4)
            return max(block[0].item(), space[0].item(), 1e-9)

        swap(4)
        size, took = SMALL, agreed_s(SMALL)
        if took < SLOW_S:
            size, took = LARGE, min(agreed_s(LARGE) for _ in range(2))
        return 8 * size / took / 1e9

    def exchanges(self) -> list[dict[str, float]]:
        """Measure PASSES times the link of this rank to the rank of the same local number on each other node.

        Returns one record for each measured node: its index and the largest bandwidth. Other work of the machine can
        only make a measurement slower.
        """
        ones = torch.ones(1, device=self.device)
        dist.all_reduce(ones, group=self.group)  # NCCL needs all ranks of a group in the first operation of the group.
        assert ones.item() == self.world, "the sum over all ranks is wrong"
        node, nodes = self.rank // self.each, self.world // self.each
        measured: dict[int, float] = {}
        for turn in list(range(nodes - 1 + nodes % 2))[:MOST_ROUNDS] * PASSES:
            dist.barrier()
            other = partner(node, turn, nodes)
            if other is not None:
                rate = self.exchange_with(other * self.each + self.local)
                measured[other] = max(measured.get(other, 0.0), rate)
        return [{"node": other, "bandwidth_gbit": rate} for other, rate in measured.items()]


def partner(node: int, turn: int, count: int) -> int | None:
    """Return the node that is measured together with ``node`` in this turn; None if ``node`` pauses.

    ``count`` is the number of nodes. In ``count`` turns, or one less if ``count`` is even, each node meets each other
    node once.
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
    """Take part in all measurements, and write this rank's figures into ``path``."""
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


if __name__ == "__main__":
    measure_rank(Path(sys.argv[1]))
