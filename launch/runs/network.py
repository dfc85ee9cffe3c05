"""Measured links: the file that ``launch.bench_network`` writes, and the cost model that its figures belong to.

A collective of n bytes over k ranks takes ``messages(k) * latency + share(k) * n / bandwidth`` (the alpha-beta model;
Thakur, Rabenseifner and Gropp, 2005): rings for all but a broadcast, which is a tree, and a send. Latency and bandwidth
are fitted for each collective and tier, so that they hold what a library does besides. What the samples take by the
bytes of a message, against that line, corrects it between the measured sizes. Must not know who asks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.runs.measured import read_measured

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
TIERS = ("intra_node", "inter_node")
"""Within a node, and between ranks of the same local number on different nodes, while all ranks of a node send."""
FORMAT = 1
FASTEST = 1e13
"""Bytes a second of a link whose time does not grow with the size, as far as was measured: more than any has."""


def terms(collective: str, ranks: int) -> tuple[float, float]:
    """Messages one after the other, and the share of the bytes that pass a rank's link.

    The bytes are those of the whole tensor: of the result of an all-gather, of the input of a reduce-scatter, and of
    what each rank has in an all-to-all.
    """
    if collective == "send":
        return 1.0, 1.0
    if collective == "broadcast":
        depth = float(math.ceil(math.log2(ranks))) if ranks > 1 else 0.0
        return depth, depth
    rounds = 2 if collective == "all_reduce" else 1
    return float(rounds * (ranks - 1)), rounds * (ranks - 1) / ranks


Curve = tuple[tuple[float, float], ...]
"""Bytes of a message, ascending, and measured over fitted time."""


@dataclass(frozen=True)
class LinkFit:
    """Latency and bandwidth of a rank's link in one collective, fitted to measured times, with their standard errors.

    ``error`` is the root mean square of predicted over measured time less one. ``curve`` is how far the line is off
    by the bytes of a message; empty for the line alone.
    """

    latency_s: float
    bytes_per_s: float
    latency_error_s: float = 0.0
    bytes_per_s_error: float = 0.0
    error: float = 0.0
    curve: Curve = ()

    def seconds(self, collective: str, ranks: int, size: float) -> float:
        """Return the time of a collective of ``size`` bytes over ``ranks`` ranks."""
        messages, share = terms(collective, ranks)
        if not messages:
            return 0.0
        line = messages * self.latency_s + share * size / self.bytes_per_s
        return line * factor_at(self.curve, share * size / messages)


def factor_at(curve: Curve, size: float) -> float:
    """Return measured over fitted time of a message: between two measured sizes by logarithms, beyond as the nearest.

    No line describes a switch that lets a burst pass, or a library that has another algorithm for long messages.
    """
    if not curve:
        return 1.0
    above = bisect_right(curve, size, key=lambda one: one[0])
    if above in (0, len(curve)):
        return curve[max(0, above - 1)][1]
    (low, before), (high, after) = curve[above - 1], curve[above]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(before) + share * math.log(after))


def curve_of(fit: LinkFit, collective: str, samples: Iterable[tuple[int, float, float]]) -> Curve:
    """Return how far a line is off by the bytes of a message; where groups of several sizes send such, their mean.

    Args:
        fit: the line.
        collective: what was measured.
        samples: ranks, bytes and seconds.
    """
    found = defaultdict[float, list[float]](list)
    for ranks, size, seconds in samples:
        messages, share = terms(collective, ranks)
        found[share * size / messages].append(math.log(seconds / fit.seconds(collective, ranks, size)))
    return tuple((size, math.exp(fmean(logs))) for size, logs in sorted(found.items()))


@dataclass(frozen=True)
class Network:
    """Links of some nodes, as they were measured."""

    ranks_per_node: int
    """Ranks of a node that sent at the same time."""
    tiers: Mapping[str, Mapping[str, LinkFit]]
    """Tier -> collective -> fit; a tier that was not there is absent."""


def as_document(network: Network, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file holds: the fits in the units of ``cluster.interconnect``, and how they were measured."""
    tiers = {
        tier: {
            name: {
                "latency_us": 1e6 * fit.latency_s,
                "bandwidth_gb_per_s": fit.bytes_per_s / 1e9,
                "latency_error_us": 1e6 * fit.latency_error_s,
                "bandwidth_error_gb_per_s": fit.bytes_per_s_error / 1e9,
                "error": fit.error,
            }
            for name, fit in fits.items()
        }
        for tier, fits in network.tiers.items()
    }
    return {"format": FORMAT, "ranks_per_node": network.ranks_per_node, "tiers": tiers, "measured": dict(measured)}


def read_network(path: Path, key: str = "cluster.network") -> Network:
    """Read measured links.

    Args:
        path: of the file.
        key: key or option that names it, for refusals.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    return read_measured(path, key, _parse, FORMAT, "python -m launch.bench_network", "nodes=2")


def _parse(document: Any) -> Network:
    ranks = document["ranks_per_node"]
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks_per_node {ranks!r}")
    samples = document.get("measured", {}).get("samples", [])
    tiers = {
        tier: {
            name: _with_curve(_fit(f"tiers.{tier}.{name}", fit), tier, name, samples)
            for name, fit in fits.items()
            if name in COLLECTIVES
        }
        for tier, fits in document["tiers"].items()
        if tier in TIERS
    }
    if not any(tiers.values()):
        raise ValueError(f"no tiers: none of {' and '.join(TIERS)}")
    return Network(ranks, tiers)


def _with_curve(fit: LinkFit, tier: str, name: str, samples: Sequence[Mapping[str, Any]]) -> LinkFit:
    known = [
        (int(sample["ranks"]), float(sample["bytes"]), float(sample["seconds"]))
        for sample in samples
        if (sample["tier"], sample["collective"]) == (tier, name)
    ]
    if any(ranks < 2 or not 0 < size < math.inf or not 0 < seconds < math.inf for ranks, size, seconds in known):
        raise ValueError(f"samples of {name} that cannot be")
    return replace(fit, curve=curve_of(fit, name, known))


def _fit(name: str, document: Mapping[str, Any]) -> LinkFit:
    """The fit of one collective; ValueError where its numbers cannot be."""
    latency, bandwidth = (float(document[key]) for key in ("latency_us", "bandwidth_gb_per_s"))
    if not (0 <= latency < math.inf and 0 < bandwidth < math.inf):
        raise ValueError(f"{name}: latency_us {latency:g} and bandwidth_gb_per_s {bandwidth:g}")
    errors = [float(document.get(key, 0.0)) for key in ("latency_error_us", "bandwidth_error_gb_per_s", "error")]
    return LinkFit(latency / 1e6, bandwidth * 1e9, errors[0] / 1e6, errors[1] * 1e9, errors[2])
