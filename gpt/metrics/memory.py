"""How much memory this rank uses: the allocator's figures on a GPU, the process's high-water mark on a CPU."""

from __future__ import annotations

import resource

import torch

GIB = 2**30


def memory_gib(device: torch.device) -> tuple[float | None, float, float | None]:
    """Allocated, peak and reserved memory, GiB.

    On a GPU: what tensors take now, the most they took in this attempt, and what the allocator keeps from the driver.
    A CPU knows only the most that the whole process, its libraries included, has held in RAM.
    """
    if device.type != "cuda":
        # Linux counts ru_maxrss in KiB (getrusage(2)).
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None
    known = torch.cuda.memory_stats(device)  # asked once: it takes a tenth of a millisecond
    return (
        known["allocated_bytes.all.current"] / GIB,
        known["allocated_bytes.all.peak"] / GIB,
        known["reserved_bytes.all.current"] / GIB,
    )
