"""Use of a run's GPUs, by the samples that its agents took: energy, power, clocks, and who was throttled.

Owns the arithmetic over ``telemetry/node_*.jsonl`` and the sentences about it. Energy is known where every GPU of the
run was sampled, and else absent. Memory grows with the GPUs, not with the samples. Must not know how a report shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.report.environment import Environment
from launch.runs.folder import RunFolder
from launch.runs.telemetry import THROTTLE_REASONS, GpuSample, read_samples, telemetry_nodes

LEAST_THROTTLED = 0.01
"""Share of the samples below which nobody is called throttled."""
THROTTLING = sum(THROTTLE_REASONS)
"""All bits of ``THROTTLE_REASONS``."""
NAMED = 3
"""Throttled hosts that a note names; of more it tells the number."""
MOST_WINDOWS = 400
"""Points of a curve over the run; their width is doubled when there are more."""


@dataclass(frozen=True)
class HostGpus:
    """The GPUs of one host, over all attempts; what they did not tell is None."""

    host: str
    gpus: int
    energy_j: float | None
    mean_power_w: float | None
    """Of one GPU, over the time in which it was sampled."""
    sm_clock_mhz: float | None
    """Mean."""
    hottest_c: float | None
    throttled: float | None
    """Share of the samples in which clocks were lowered for a reason of ``THROTTLE_REASONS``."""
    reasons: Mapping[str, float]
    """Reason -> share of the samples, the most frequent first; several may hold at once."""


@dataclass(frozen=True)
class GpuWindow:
    """One point of the curves over a run: means, or extremes, of all GPUs in ``width_s`` seconds."""

    begun: float
    """Unix time, seconds."""
    values: Mapping[str, float]
    """power_w and sm_clock_mhz (means), sm_clock_min_mhz, temperature_max_c, throttled (share)."""


@dataclass(frozen=True)
class GpuUse:
    """Telemetry of a run over all attempts, from the start of the ranks to their end."""

    hosts: tuple[HostGpus, ...]
    """By name; those with numbers by number."""
    energy_j: float | None
    """Of all GPUs; None where some were not sampled, or tell neither energy nor power."""
    mean_power_w: float | None
    """Of one GPU."""
    throttled: float | None
    """Share of the samples of all GPUs."""
    unsampled: tuple[str, ...] = ()
    """Hosts on whose GPUs ranks ran and that have no samples of some attempt."""
    windows: tuple[GpuWindow, ...] = field(default=(), repr=False)


def read_gpu_use(run: RunFolder, setups: Mapping[int, Environment]) -> GpuUse | None:
    """Reduce the telemetry of a run whose attempts have these set-ups; None where no GPU was sampled."""
    reduction = _Reduction()
    for node in telemetry_nodes(run):
        for sample in read_samples(run, node):
            reduction.add(node, sample)
    return reduction.result(setups)


class _Gpu:
    """Sums of one GPU."""

    def __init__(self) -> None:
        self.last: tuple[int, float, Mapping[str, float]] | None = None
        self.energy_j, self.seconds, self.unknown_s = 0.0, 0.0, 0.0
        self.clock, self.samples = 0.0, 0
        """Sum of the SM clocks, and how many they are."""
        self.hottest: float | None = None
        self.told, self.lowered = 0, 0
        """Samples that tell the throttle reasons, and those with one."""
        self.reasons: dict[int, int] = defaultdict(int)

    def add(self, attempt: int, time: float, gauges: Mapping[str, float]) -> None:
        if self.last is not None and self.last[0] == attempt and time > self.last[1]:
            used = energy_between(self.last[2], gauges, time - self.last[1])
            if used is None:
                self.unknown_s += time - self.last[1]
            else:
                self.energy_j, self.seconds = self.energy_j + used, self.seconds + time - self.last[1]
        self.last = attempt, time, gauges
        if "sm_clock_mhz" in gauges:
            self.clock, self.samples = self.clock + gauges["sm_clock_mhz"], self.samples + 1
        if "temperature_c" in gauges:
            self.hottest = max(gauges["temperature_c"], self.hottest or gauges["temperature_c"])
        if "throttle_reasons" in gauges:
            self.told += 1
            held = int(gauges["throttle_reasons"]) & THROTTLING
            if held:
                self.lowered += 1
                for bit in THROTTLE_REASONS:
                    self.reasons[bit] += held & bit != 0


def energy_between(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> float | None:
    """Energy of one GPU between two samples in joules; None where they do not tell it.

    By its counter where both know it, and where it did not begin again with the driver; else by the mean power.
    """
    if "energy_j" in before and "energy_j" in after and after["energy_j"] >= before["energy_j"]:
        return after["energy_j"] - before["energy_j"]
    if "power_w" in before and "power_w" in after:
        return seconds * (before["power_w"] + after["power_w"]) / 2
    return None


class _Windows:
    """Means over stretches of the run, of a width that grows with its length."""

    def __init__(self) -> None:
        self.width_s = 1.0
        self.bins: dict[int, dict[str, list[float]]] = {}
        """Number of a stretch -> gauge -> sum, count, minimum, maximum."""

    def add(self, time: float, gpus: Sequence[Mapping[str, float]]) -> None:
        of_bin = self.bins.setdefault(int(time // self.width_s), {})
        for name in ("power_w", "sm_clock_mhz", "temperature_c"):
            values = [gauges[name] for gauges in gpus if name in gauges]
            if values:
                _merge(of_bin, name, [sum(values), len(values), min(values), max(values)])
        held = [int(gauges["throttle_reasons"]) & THROTTLING != 0 for gauges in gpus if "throttle_reasons" in gauges]
        if held:
            _merge(of_bin, "throttled", [sum(held), len(held), 0, 1])
        while len(self.bins) > MOST_WINDOWS:
            self.width_s *= 2
            wider: dict[int, dict[str, list[float]]] = {}
            for number, gauges_of in self.bins.items():
                for name, sums in gauges_of.items():
                    _merge(wider.setdefault(number // 2, {}), name, sums)
            self.bins = wider

    def result(self) -> tuple[GpuWindow, ...]:
        """Return them in order."""
        found = []
        for number, sums in sorted(self.bins.items()):
            values: dict[str, float] = {}
            values |= {name: sums[name][0] / sums[name][1] for name in ("power_w", "sm_clock_mhz") if name in sums}
            values |= {"sm_clock_min_mhz": sums["sm_clock_mhz"][2]} if "sm_clock_mhz" in sums else {}
            values |= {"temperature_max_c": sums["temperature_c"][3]} if "temperature_c" in sums else {}
            values |= {"throttled": sums["throttled"][0] / sums["throttled"][1]} if "throttled" in sums else {}
            found.append(GpuWindow(number * self.width_s, values))
        return tuple(found)


def _merge(of_bin: dict[str, list[float]], name: str, sums: list[float]) -> None:
    known = of_bin.get(name)
    if known is None:
        of_bin[name] = list(sums)
    else:
        known[:] = known[0] + sums[0], known[1] + sums[1], min(known[2], sums[2]), max(known[3], sums[3])


class _Reduction:
    """Sums over all samples of a run."""

    def __init__(self) -> None:
        self._gpus: dict[str, dict[str, _Gpu]] = defaultdict(dict)
        """Host -> address -> sums."""
        self._by: dict[tuple[int, str, str], int] = {}
        """Attempt, host, address -> node that sampled it: agents that share a machine may see the same GPU."""
        self._windows = _Windows()

    def add(self, node: int, sample: GpuSample) -> None:
        """Add one sample; those of a node come in the order of their time."""
        gpus, counted = self._gpus[sample.host], []
        for bus, gauges in sample.gauges.items():
            if gauges and self._by.setdefault((sample.attempt, sample.host, bus), node) == node:
                if bus not in gpus:
                    gpus[bus] = _Gpu()
                gpus[bus].add(sample.attempt, sample.time, gauges)
                counted.append(gauges)
        if counted:
            self._windows.add(sample.time, counted)

    def result(self, setups: Mapping[int, Environment]) -> GpuUse | None:
        """Return what is known when all samples were added."""
        self._gpus = {host: gpus for host, gpus in self._gpus.items() if gpus}
        if not self._gpus:
            return None
        gpus = [gpu for of_host in self._gpus.values() for gpu in of_host.values()]
        unsampled = self._unsampled(setups)
        told = sum(gpu.told for gpu in gpus)
        return GpuUse(
            hosts=tuple(_of_host(host, list(self._gpus[host].values())) for host in sorted(self._gpus, key=_natural)),
            energy_j=None if unsampled else _energy(gpus),
            mean_power_w=_power(gpus),
            throttled=sum(gpu.lowered for gpu in gpus) / told if told else None,
            unsampled=unsampled,
            windows=self._windows.result(),
        )

    def _unsampled(self, setups: Mapping[int, Environment]) -> tuple[str, ...]:
        """Hosts of which, in some attempt, fewer GPUs were sampled than ranks ran on."""
        sampled: dict[tuple[int, str], int] = defaultdict(int)
        for attempt, host, _ in self._by:
            sampled[attempt, host] += 1
        missing = set()
        for attempt, setup in setups.items():
            devices = {(place.host, place.gpu or place.device) for place in setup.ranks if place.device != "cpu"}
            for host in {host for host, _ in devices}:
                if sampled[attempt, host] < sum(of == host for of, _ in devices):
                    missing.add(host)
        return tuple(sorted(missing, key=_natural))


def _energy(gpus: Sequence[_Gpu]) -> float | None:
    whole = all(gpu.seconds > 0 and gpu.unknown_s == 0 for gpu in gpus)
    return sum(gpu.energy_j for gpu in gpus) if whole else None


def _power(gpus: Sequence[_Gpu]) -> float | None:
    seconds = sum(gpu.seconds for gpu in gpus)
    return sum(gpu.energy_j for gpu in gpus) / seconds if seconds else None


def _of_host(host: str, gpus: Sequence[_Gpu]) -> HostGpus:
    told, clocks = sum(gpu.told for gpu in gpus), sum(gpu.samples for gpu in gpus)
    counts = {text: sum(gpu.reasons[bit] for gpu in gpus) for bit, text in THROTTLE_REASONS.items()}
    frequent = sorted((text for text, count in counts.items() if count), key=lambda text: -counts[text])
    heats = [gpu.hottest for gpu in gpus if gpu.hottest is not None]
    return HostGpus(
        host=host,
        gpus=len(gpus),
        energy_j=_energy(gpus),
        mean_power_w=_power(gpus),
        sm_clock_mhz=sum(gpu.clock for gpu in gpus) / clocks if clocks else None,
        hottest_c=max(heats, default=None),
        throttled=sum(gpu.lowered for gpu in gpus) / told if told else None,
        reasons={text: counts[text] / told for text in frequent},
    )


def _natural(host: str) -> tuple[str, int, str]:
    """Sort n2 before n10."""
    name = host.rstrip("0123456789")
    return name, int(host[len(name) :] or 0), host


def gpu_notes(title: str, use: GpuUse | None) -> list[str]:
    """Say of a point which hosts were throttled, and why its energy is not known where its power is."""
    if use is None:
        return []
    found = []
    throttled = [host for host in use.hosts if host.throttled is not None and host.throttled >= LEAST_THROTTLED]
    if throttled:
        throttled.sort(key=lambda host: -(host.throttled or 0.0))
        told = "; ".join(
            f"host {host.host} {100 * (host.throttled or 0.0):.0f} % of samples ({', '.join(host.reasons)})"
            for host in throttled[:NAMED]
        )
        more = f"; and {len(throttled) - NAMED} more of {len(use.hosts)}" if len(throttled) > NAMED else ""
        found.append(f"At {title}, throttled: {told}{more}. Clocks lower than asked for make steps longer.")
    if use.unsampled:
        told = ", ".join(use.unsampled[:NAMED]) + (" and others" if len(use.unsampled) > NAMED else "")
        found.append(
            f"The energy of {title} is not known: GPUs of {told} were not sampled in every attempt "
            "(launch.gpu_sample_s; nvidia-ml-py has to be installed: pip install '.[gpu]')."
        )
    return found
