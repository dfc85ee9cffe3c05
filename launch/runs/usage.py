"""Memory, CPUs and GPU memory that a run used, compared with its request, and the request to type next time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil

from .files import read_json, write_json
from .folder import RunFolder
from .records import recent_records

FIRST_S, SAMPLE_S = 1.0, 10.0
"""Seconds until the first sample, and between samples."""
WASTED = 0.5
"""Share of a request: if a run used less than this, a smaller request is proposed."""
ROOM = 1.25
"""Factor from the use of a run to the request that is proposed."""
GIB = 2**30


def usage_file(folder: RunFolder, attempt: int, node: int) -> Path:
    """Return the file with the use of a node in an attempt."""
    return folder.attempt(attempt) / "usage" / f"node_{node:05d}.json"


class UsageMeter:
    """Peak memory and mean number of busy CPUs of the ranks on a node, with all processes that they have started."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_S
        self._began = time.monotonic()
        self._memory = 0
        self._cpu_s: dict[int, float] = {}
        """Process id -> CPU seconds, also of processes that have ended."""

    def poll(self, ranks: Collection[int]) -> None:
        """Sample the ranks with these process ids, at most every ``SAMPLE_S`` seconds."""
        if time.monotonic() < self._next or not ranks:
            return
        self._next = time.monotonic() + SAMPLE_S
        own, shared = 0, 0
        for rank in ranks:
            with suppress(psutil.Error):
                process = psutil.Process(rank)
                for each in (process, *process.children(recursive=True)):
                    memory, times = each.memory_info(), each.cpu_times()
                    # Forked ranks share the memory of their libraries.
                    own, shared = own + memory.rss - memory.shared, max(shared, memory.shared)
                    self._cpu_s[each.pid] = times.user + times.system
        self._memory = max(self._memory, own + shared)

    def write(self, path: Path) -> None:
        """Write the use, and the resources that Slurm gave, unless there was no sample. Ignores errors of the disk."""
        if not self._memory:
            return
        given = os.environ.get("SLURM_MEM_PER_NODE", "")
        known = {
            "memory_gib": self._memory / GIB,
            "memory_given_gib": int(given) / 1024 if given.isdigit() and int(given) else None,
            "cpus": sum(self._cpu_s.values()) / (time.monotonic() - self._began),
            "cpus_given": int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0))),
        }
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)


def usage_text(folder: RunFolder) -> str:
    """Describe the share of its request that a finished Slurm job used on its busiest node; empty for all other runs.

    If less than half of a request was used, the text ends with a smaller request to type.
    """
    events, last = folder.read_events(), max(folder.attempts(), default=0)
    newest = {event["event"]: event for event in events}
    found = [read_json(path) for path in sorted(usage_file(folder, last, 0).parent.glob("node_*.json"))]
    is_finished = (
        newest.get("finished", {}).get("attempt") == last and {"agent_started", "agent_ended"} <= newest.keys()
    )
    if not found or not is_finished or newest.get("submitted", {}).get("cluster") != "slurm":
        return ""
    memory, cpus = (max(float(node[name]) for node in found) for name in ("memory_gib", "cpus"))
    job, ended_at = newest["agent_started"], newest["agent_ended"]["ended_at"]
    rows = (
        ("cluster.mem_gb", memory, found[0].get("memory_given_gib"), "GiB of memory on a node"),
        ("cluster.cpus_per_task", cpus, found[0].get("cpus_given"), "CPUs on average"),
        ("", *gpu_memory_gib(folder, last), "GiB of memory on the fullest GPU"),
        ("cluster.timeout_min", (ended_at - job["allocated_at"]) / 60, job["limit_s"] / 60, "min"),
    )
    known = [(key, used, float(asked), unit) for key, used, asked, unit in rows if asked]
    less = [f"{key}={max(1, math.ceil(ROOM * used))}" for key, used, asked, _ in known if key and used < WASTED * asked]
    texts = ", ".join(f"{used:.3g} of {asked:.4g} {unit}" for _, used, asked, unit in known)
    return f"used {texts}" + (f"; next time: {' '.join(less)}" if less else "")


def gpu_memory_gib(folder: RunFolder, attempt: int) -> tuple[float, float | None]:
    """Return the peak use and the size of the memory of the fullest GPU of an attempt in GiB; 0 and None if unknown.

    They are known if ranks record the memory of their GPU, as those of the GPT library do.
    """
    ranks = read_json(folder.environment(attempt)).get("ranks") or ()
    peaks = [(0.0, None)]
    for rank in (rank for rank in ranks if rank.get("memory_gib")):
        newest = (recent_records(folder.metrics(rank["rank"])) or [{}])[-1]
        used = max(newest.get(name) or 0.0 for name in ("memory_peak_gib", "memory_reserved_gib"))
        peaks.append((used, rank["memory_gib"]))
    return max(peaks, key=lambda peak: peak[0])
