"""Files of measurements: rates of matrix products, links between ranks, and the memory and CPUs that a run used."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from launch.errors import ConfigError
from launch.runs.folder import RunFolder, read_json, write_json
from launch.runs.records import recent_records

# Read a file of measurements once, although a cost model needs it thousands of times.


FORMAT = 1
"""Version of the format of the files, for matmul rates and for links."""
Measured = TypeVar("Measured")
Size = TypeVar("Size", int, float)


def _read_measured(path: Path, key: str, parse: Callable[[Any], Measured], command: str) -> Measured:
    """Return the content of a file of measurements. The file is read again only after it has changed.

    Args:
        path: path of the file.
        key: key or option that names the file, for error messages.
        parse: function that returns the result for the JSON document. It raises ValueError, KeyError, TypeError or
            AttributeError for wrong content.
        command: command that writes such a file with ``--output``, for error messages.

    Raises:
        ConfigError: the file does not exist, or ``parse`` does not accept its content.
    """
    try:
        read: Measured = _read(path, path.stat().st_mtime_ns, parse)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The text of an OSError is enough; the texts of KeyError and the like are not understood without their names.
        problem = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}{' ' if key.startswith('-') else '='}{path}: {problem}",
            f"a file that {command} has written",
            f"{command} --output {path}, or the same without {key}",
        ) from error
    return read


@lru_cache(maxsize=16)
def _read(path: Path, _changed: int, parse: Callable[[Any], Any]) -> Any:
    document = json.loads(path.read_text())
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}, and this is the launcher of format {FORMAT}")
    return parse(document)


# Measured rates of matrix products by size, from the file ``cluster.matmul_rates``, and their interpolation.


@dataclass(frozen=True, eq=False)
class MatmulRates:
    """Rates of one device in one precision, in FLOP/s, on a grid of sizes of matrix products."""

    axes: tuple[tuple[int, ...], ...]
    """Sizes of m, n and k, each ascending."""
    flops_per_s: Mapping[tuple[int, ...], float]
    """(m, n, k) -> rate in FLOP/s, for each combination of the sizes in ``axes``."""

    @property
    def best(self) -> float:
        """Highest rate, FLOP/s."""
        return max(self.flops_per_s.values())

    def rate(self, m: float, n: float, k: float) -> float:
        """Return the rate of a product (m, k) x (k, n) in FLOP/s, interpolated in the logarithms of sizes and rates.

        Outside the grid, return the rate at the nearest edge.
        """
        corners = [between(axis, size) for axis, size in zip(self.axes, (m, n, k), strict=True)]
        total = 0.0
        for chosen in itertools.product(*corners):
            weight = math.prod(share for _, share in chosen)
            if weight:
                total += weight * math.log(self.flops_per_s[tuple(size for size, _ in chosen)])
        return math.exp(total)

    def times(self, factor: float) -> MatmulRates:
        """Return a copy with all rates multiplied by ``factor``."""
        return replace(self, flops_per_s={shape: factor * rate for shape, rate in self.flops_per_s.items()})


def between(axis: Sequence[Size], size: float) -> list[tuple[Size, float]]:
    """Return the two sizes of ``axis`` nearest to ``size``, each with its weight for an interpolation in logarithms.

    Outside the axis, return only the nearest size, with weight 1.
    """
    above = bisect_right(axis, size)
    if above in (0, len(axis)):
        return [(axis[max(0, above - 1)], 1.0)]
    low, high = axis[above - 1], axis[above]
    share = math.log(size / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


@dataclass(frozen=True)
class MatmulFile:
    """Content of a file of measured rates of matrix products."""

    device: str
    """Name from ``torch.cuda.get_device_name()``, or ``CPU``."""
    precisions: Mapping[str, MatmulRates]
    """Precision (fp32, tf32, bf16 or fp16) -> rates."""


def rates_document(device: str, samples: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file of matmul rates.

    ``device`` is the name of the device. ``samples`` have precision, m, n, k and seconds; ``measured`` has the
    conditions of the measurement.
    """
    return {"format": FORMAT, "device": device, "measured": dict(measured), "samples": [*map(dict, samples)]}


def read_matmul_rates(path: Path) -> MatmulFile:
    """Return the content of a file of measured rates, such as the file that ``cluster.matmul_rates`` names.

    Raises:
        ConfigError: the file does not exist, or is not a file of matmul rates.
    """
    return _read_measured(path, "cluster.matmul_rates", _parse_rates, "python -m gpt.bench_matmul")


def _parse_rates(document: Any) -> MatmulFile:
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for sample in document["samples"]:
        shape = tuple(int(sample[name]) for name in "mnk")
        seconds = float(sample["seconds"])
        if min(shape) < 1 or not 0 < seconds < math.inf:
            raise ValueError(f"a product of m, n, k = {shape} in {seconds:g} s")
        found.setdefault(str(sample["precision"]), {})[shape] = 2 * math.prod(shape) / seconds
    if not found:
        raise ValueError("no samples")
    precisions = {}
    for name, rates in found.items():
        axes = tuple(tuple(sorted(set(sizes))) for sizes in zip(*rates))
        if missing := set(itertools.product(*axes)) - rates.keys():
            raise ValueError(f"no sample of m, n, k = {min(missing)} in {name}")
        precisions[name] = MatmulRates(axes, rates)
    return MatmulFile(str(document["device"]), precisions)


# Measured links, from the file that ``launch.bench_network`` writes, and the cost model of collectives.


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
TIERS = ("intra_node", "inter_node")
"""Kinds of links: inside a node, and between ranks with equal local ranks on different nodes."""
FASTEST = 1e13
"""Bandwidth in bytes/s for a link whose measured time does not grow with the size; more than any real link has."""


def terms(collective: str, ranks: int) -> tuple[float, float]:
    """Return (messages, share) of a collective over ``ranks`` ranks, from which ``LinkFit`` predicts its time.

    The time is ``messages * latency + share * bytes of the tensor / bandwidth``. ``messages`` is the number of messages
    that are sent one after another. ``share`` is the number of bytes on a rank's link, divided by the bytes of the
    tensor. The tensor is the result of an all-gather, the input of a reduce-scatter, and the input of each rank of an
    all-to-all.
    """
    if collective == "send":
        return 1.0, 1.0
    if collective == "broadcast":
        depth = float(math.ceil(math.log2(ranks))) if ranks > 1 else 0.0
        return depth, depth
    rounds = 2 if collective == "all_reduce" else 1
    return float(rounds * (ranks - 1)), rounds * (ranks - 1) / ranks


Curve = tuple[tuple[float, float], ...]
"""Pairs of a message size in bytes and its ratio of measured time to fitted time, in ascending order of sizes."""


@dataclass(frozen=True)
class LinkFit:
    """Latency and bandwidth of a rank's link in a collective, fitted to measured times.

    ``error`` is the root mean square of ``predicted time / measured time - 1``. The fitted time is a line over the
    message size. ``curve`` has a factor of correction for each message size, because a switch may buffer short bursts,
    and libraries change their algorithm for long messages. The curve is empty if there is no correction.
    """

    latency_s: float
    bytes_per_s: float
    error: float = 0.0
    curve: Curve = ()

    def seconds(self, collective: str, ranks: int, size: float) -> float:
        """Return the predicted time in seconds of a collective over ``ranks`` ranks. Its tensor has ``size`` bytes."""
        messages, share = terms(collective, ranks)
        if not messages:
            return 0.0
        line = messages * self.latency_s + share * size / self.bytes_per_s
        if not self.curve:
            return line
        # The curve is interpolated in logarithms; outside of it, its nearest value counts.
        near, known = between([point for point, _ in self.curve], share * size / messages), dict(self.curve)
        return line * math.exp(sum(weight * math.log(known[point]) for point, weight in near))


@dataclass(frozen=True)
class Network:
    """Measured links inside nodes and between nodes."""

    ranks_per_node: int
    """Number of ranks on each node, which all send at the same time."""
    tiers: Mapping[str, Mapping[str, LinkFit]]
    """Tier -> collective -> fit; a tier without links is absent."""


def network_document(network: Network, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file of measured links: fits in GB/s and microseconds, and ``measured``.

    ``measured`` has the samples and the conditions of the measurement.
    """
    tiers = {
        tier: {
            name: {
                "latency_us": 1e6 * fit.latency_s,
                "bandwidth_gb_per_s": fit.bytes_per_s / 1e9,
                "error": fit.error,
            }
            for name, fit in fits.items()
        }
        for tier, fits in network.tiers.items()
    }
    return {
        "format": FORMAT,
        "ranks_per_node": network.ranks_per_node,
        "tiers": tiers,
        "measured": dict(measured),
    }


def read_network(path: Path, key: str = "cluster.network") -> Network:
    """Return the measured links in a file.

    Args:
        path: path of the file.
        key: key or option that names the file, for error messages.

    Raises:
        ConfigError: the file does not exist, or is not a file of measured links.
    """
    return _read_measured(path, key, _parse_network, "python -m launch.bench_network nodes=2")


def _parse_network(document: Any) -> Network:
    ranks = document["ranks_per_node"]
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks_per_node {ranks!r}")
    samples = document.get("measured", {}).get("samples", [])
    tiers = {
        tier: {name: _fit(tier, name, fit, samples) for name, fit in fits.items() if name in COLLECTIVES}
        for tier, fits in document["tiers"].items()
        if tier in TIERS
    }
    if not any(tiers.values()):
        raise ValueError(f"no tiers: none of {' and '.join(TIERS)}")
    return Network(ranks, tiers)


def _fit(tier: str, name: str, document: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> LinkFit:
    """Return the fit of a collective from its entry in the file. Raises ValueError for impossible numbers.

    The curve of the fit has, for each message size, the geometric mean of (measured time / fitted time) over samples.

    Args:
        tier: one of ``TIERS``.
        name: name of the collective.
        document: entry of the file.
        samples: samples of all collectives and tiers in the file.
    """
    latency, bandwidth = (float(document[key]) for key in ("latency_us", "bandwidth_gb_per_s"))
    if not (0 <= latency < math.inf and 0 < bandwidth < math.inf):
        raise ValueError(f"tiers.{tier}.{name}: latency_us {latency:g} and bandwidth_gb_per_s {bandwidth:g}")
    fit = LinkFit(latency / 1e6, bandwidth * 1e9, float(document.get("error", 0.0)))
    found = defaultdict[float, list[float]](list)
    for sample in samples:
        if (sample["tier"], sample["collective"]) == (tier, name):
            ranks, size, seconds = int(sample["ranks"]), float(sample["bytes"]), float(sample["seconds"])
            if ranks < 2 or not 0 < size < math.inf or not 0 < seconds < math.inf:
                raise ValueError(f"samples of {name} that cannot be")
            messages, share = terms(name, ranks)
            found[share * size / messages].append(math.log(seconds / fit.seconds(name, ranks, size)))
    return replace(fit, curve=tuple((size, math.exp(fmean(logs))) for size, logs in sorted(found.items())))


# Memory, CPUs and GPU memory that a run used, compared with its request, and the request to type next time.


FIRST_S, SAMPLE_S = 1.0, 10.0
"""Seconds until the first sample of the ranks' memory and CPU time, and the longest time between two samples."""
WASTED = 0.5
"""If a job used a smaller share than this of what it requested from Slurm, a smaller request is proposed."""
ROOM = 1.25
"""Factor by which a proposed request to Slurm is larger than the memory, CPUs or time that the job used."""
GIB = 2**30


def usage_file(folder: RunFolder, attempt: int, node: int) -> Path:
    """Return the path of the file with the resources that a node used in an attempt."""
    return folder.attempt(attempt) / "usage" / f"node_{node:05d}.json"


class UsageMeter:
    """Meter of the peak memory and the mean number of busy CPUs of a node's ranks and all their child processes."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_S
        self._began = self._sampled = time.monotonic()
        self._memory = 0
        self._cpu_s: dict[int, float] = {}
        """Process id -> CPU seconds, also of processes that have ended."""

    def poll(self, ranks: Collection[int]) -> None:
        """Sample memory and CPU time of the ranks.

        ``ranks`` has their process ids. Does nothing if the next sample is not due yet. The time between samples grows
        from ``FIRST_S`` to ``SAMPLE_S``, so that a short run also has a sample shortly before its end.
        """
        now = time.monotonic()
        if now < self._next or not ranks:
            return
        self._next, self._sampled = now + min(SAMPLE_S, now - self._began), now
        import psutil  # the layouts of gpt.planning read this module, and are counted without the agent's libraries

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
        """Write the resources that the ranks used, and those that Slurm gave the node, to the JSON file ``path``.

        If there is no sample, nothing is written. Errors of the disk are ignored.
        """
        if not self._memory:
            return
        given = os.environ.get("SLURM_MEM_PER_NODE", "")
        known = {
            "memory_gib": self._memory / GIB,
            "memory_given_gib": int(given) / 1024 if given.isdigit() and int(given) else None,
            "cpus": sum(self._cpu_s.values()) / (self._sampled - self._began),
            "cpus_given": int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0))),
        }
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)


def usage_text(folder: RunFolder) -> str:
    """Return a text on the memory, CPUs and time that a finished Slurm job used and had requested; "" for other runs.

    Memory and CPUs are those of the node that used most. If less than half of a request was used, the text ends with a
    smaller request to type.
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
    """Return the peak memory use and the memory size of the fullest GPU of an attempt in GiB; (0, None) if unknown.

    Both are known if ranks record the memory of their GPU, as those of the GPT library do.
    """
    ranks = read_json(folder.environment(attempt)).get("ranks") or ()
    peaks = [(0.0, None)]
    for rank in (rank for rank in ranks if rank.get("memory_gib")):
        newest = (recent_records(folder.metrics(rank["rank"])) or [{}])[-1]
        used = max(newest.get(name) or 0.0 for name in ("memory_peak_gib", "memory_reserved_gib"))
        peaks.append((used, rank["memory_gib"]))
    return max(peaks, key=lambda peak: peak[0])
