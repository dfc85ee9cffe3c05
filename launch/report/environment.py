"""Environment of a run as ``environment.json`` records it, and the use of its GPUs as telemetry records it."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from launch.errors import counted
from launch.runs.environment import THROTTLE_REASONS, GpuSample, read_samples, telemetry_nodes
from launch.runs.folder import RunFolder

NO_CHANGES = hashlib.sha256(b"").hexdigest()


class RankPlace(msgspec.Struct, frozen=True):
    """Place of one rank. ``machine`` is the physical machine, on which several nodes may be."""

    node: int
    host: str
    machine: str
    device: str
    device_name: str
    cores: int
    threads: int
    # CUDA numbers devices per process: two ranks may both record cuda:0 and have different GPUs.
    gpu: str | None = msgspec.field(default=None, name="device_uuid")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Set-up of one attempt. Batches in sequences, ``block_size`` in tokens; what was not recorded is None."""

    ranks: tuple[RankPlace, ...]
    workload: str = "gpt"
    weak_scaling: bool | None = None
    stated_unit: str | None = msgspec.field(default=None, name="unit")
    work_per_step: float | None = None
    """Units that all ranks together do in a step, if that was stated."""
    max_steps: int | None = None
    command_words: list[Any] | None = msgspec.field(default=None, name="command")
    mesh: dict[str, Any] | None = msgspec.field(default=None, name="topology")
    """Strategy, and the number of ranks along each dimension."""
    global_batch: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    block_size: int | None = None
    precision: str | None = None
    model: str | None = None
    parameters: int | None = None
    software: dict[str, Any] | None = None
    git: dict[str, Any] | None = None

    @property
    def unit(self) -> str | None:
        """Unit of the throughput: tokens, samples, images."""
        return self.stated_unit or (None if self.block_size is None else "tokens")

    @property
    def command(self) -> str | None:
        """Command of a script, as one types it."""
        return None if self.command_words is None else shlex.join(map(str, self.command_words))

    @property
    def topology(self) -> str | None:
        """Strategy and every dimension larger than 1: ``fsdp dp_shard=4``, ``deepspeed_zero0 dp_replicate=2 pp=2``."""
        if self.mesh is None:
            return None
        strategy = str(self.mesh["strategy"])
        name = f"deepspeed_{strategy.removeprefix('ds_')}" if strategy.startswith("ds_") else strategy
        sizes = (f"{key}={size}" for key, size in self.mesh.items() if isinstance(size, int) and size > 1)
        return " ".join([name, *sizes])

    @property
    def per_rank_batch(self) -> int | None:
        """Sequences of one rank in a step."""
        known = self.micro_batch is not None and self.accumulation is not None
        return self.micro_batch * self.accumulation if known else None  # type: ignore[operator]

    @property
    def torch(self) -> str | None:
        """Version of PyTorch."""
        return (self.software or {}).get("torch")

    @property
    def commit(self) -> str | None:
        """Commit of the code."""
        return (self.git or {}).get("commit")

    @property
    def code(self) -> str | None:
        """Commit of the code, and the digest of what was changed since."""
        changes = (self.git or {}).get("diff_sha256")
        if self.commit is None:
            return None
        return self.commit[:12] + (f" with changes {changes[:8]}" if changes not in (None, "", NO_CHANGES) else "")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len({place.node for place in self.ranks})

    @property
    def device_names(self) -> str:
        """Kinds of devices, for people."""
        return " and ".join(sorted({place.device_name for place in self.ranks}))

    def same_setup(self, other: Environment) -> bool:
        """Return True if step times of both may be put together: all is equal but host names and the code."""
        return self._setup() == other._setup()

    def _setup(self) -> tuple[Any, ...]:
        machines: dict[str, Counter[tuple[Any, ...]]] = defaultdict(Counter)
        for place in self.ranks:
            machines[place.machine][(place.device_name, place.cores, place.threads)] += 1
        kinds = sorted(sorted(ranks.items()) for ranks in machines.values())
        batch = (self.global_batch, self.per_rank_batch, self.weak_scaling, self.block_size)
        work = (self.unit, self.work_per_step)
        return (self.topology, batch, work, self.precision, self.model, self.parameters, kinds)

    def crowding(self) -> list[str]:
        """Return one phrase for each way in which ranks shared cores or a GPU, with the place; empty if none did."""
        machines: dict[str, list[RankPlace]] = defaultdict(list)
        for place in self.ranks:
            machines[place.machine].append(place)
        where: dict[str, list[list[RankPlace]]] = defaultdict(list)
        for places in machines.values():
            gpus = Counter(place.gpu or place.device for place in places if place.device != "cpu")
            for ranks in dict.fromkeys(gpus.values()):
                if ranks > 1:
                    where[f"{ranks} ranks on one GPU"].append(places)
            on_cpu = [place for place in places if place.device == "cpu"]
            threads, cores = sum(place.threads for place in on_cpu), max((place.cores for place in on_cpu), default=0)
            if threads > cores:
                where[f"{counted(threads, 'thread')} on {counted(cores, 'core')}"].append(places)
        return [f"{what} {_location(crowded)}" for what, crowded in where.items()]


def _location(machines: list[list[RankPlace]]) -> str:
    if len(machines) > 1:
        return f"on each of {len(machines)} machines"
    hosts = list(dict.fromkeys(place.host for place in machines[0]))
    if len(hosts) == 1:
        return f"of {hosts[0]}"
    return f"of one machine ({', '.join(hosts) if len(hosts) <= 4 else f'{hosts[0]} to {hosts[-1]}'})"


def read_environment(run: RunFolder, attempt: int) -> Environment | None:
    """Return the set-up of one attempt; None if its file is absent or not whole."""
    try:
        return msgspec.json.decode(run.environment(attempt).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError):
        return None


# Use of a run's GPUs by the samples of its agents: energy, power, clocks and throttling.


LEAST_THROTTLED = 0.01
"""Share of the samples below which no host is called throttled."""
THROTTLING = sum(THROTTLE_REASONS)
"""All bits of ``THROTTLE_REASONS``."""
NAMED = 3
"""Throttled hosts that a note names; of the rest it gives the number."""
MOST_WINDOWS = 400
"""Points of a curve over the run; their width is doubled when there are more."""


@dataclass(frozen=True)
class HostGpus:
    """The GPUs of one host over all attempts; an unknown figure is None."""

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
    """Reason -> share of the samples, the most frequent first; several may apply to one sample."""


@dataclass(frozen=True)
class GpuWindow:
    """One point of the curves over a run: means, or extremes, of all GPUs in a window."""

    begun: float
    """Unix time, seconds."""
    values: Mapping[str, float]
    """power_w and sm_clock_mhz (means), sm_clock_min_mhz, temperature_max_c, throttled (share)."""


@dataclass(frozen=True)
class GpuUse:
    """Telemetry of a run over all attempts, from the start of the ranks to their end."""

    hosts: tuple[HostGpus, ...]
    """By name; numbers in names are sorted as numbers."""
    energy_j: float | None
    """Of all GPUs; None if some were not sampled, or have neither energy nor power."""
    mean_power_w: float | None
    """Of one GPU."""
    throttled: float | None
    """Share of the samples of all GPUs."""
    unsampled: tuple[str, ...] = ()
    """Hosts with ranks on GPUs of which there are no samples of some attempt."""
    windows: tuple[GpuWindow, ...] = field(default=(), repr=False)


@dataclass
class _Gpu:
    """Energy of one GPU so far, and its last sample: attempt, Unix time, gauges."""

    last: tuple[int, float, Mapping[str, float]] | None = None
    energy_j: float = 0.0
    seconds: float = 0.0
    unknown_s: float = 0.0
    """Seconds of which the energy is unknown."""

    def add(self, sample: GpuSample, gauges: Mapping[str, float]) -> None:
        if self.last is not None and self.last[0] == sample.attempt and sample.time > self.last[1]:
            seconds = sample.time - self.last[1]
            energy_j = energy_between(self.last[2], gauges, seconds)
            if energy_j is None:
                self.unknown_s += seconds
            else:
                self.energy_j, self.seconds = self.energy_j + energy_j, self.seconds + seconds
        self.last = sample.attempt, sample.time, gauges


def energy_between(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> float | None:
    """Return the energy of one GPU between two samples in joules; None if they do not say.

    By its counter if both have it and the driver did not reset it; else by the mean power.
    """
    if "energy_j" in before and "energy_j" in after and after["energy_j"] >= before["energy_j"]:
        return after["energy_j"] - before["energy_j"]
    if "power_w" in before and "power_w" in after:
        return seconds * (before["power_w"] + after["power_w"]) / 2
    return None


class _Gauges(dict[str, tuple[float, int, float, float]]):
    """Gauge -> sum, count, minimum and maximum of its samples; ``throttled`` and each reason count 0 or 1."""

    def add(self, name: str, total: float, count: int, low: float, high: float) -> None:
        if name in self:
            known = self[name]
            total, count, low, high = known[0] + total, known[1] + count, min(known[2], low), max(known[3], high)
        self[name] = total, count, low, high

    def sample(self, gauges: Mapping[str, float]) -> None:
        for name in ("power_w", "sm_clock_mhz", "temperature_c"):
            if name in gauges:
                self.add(name, gauges[name], 1, gauges[name], gauges[name])
        if "throttle_reasons" in gauges:
            bits = int(gauges["throttle_reasons"]) & THROTTLING
            for name, bit in (("throttled", bits), *((text, bits & bit) for bit, text in THROTTLE_REASONS.items())):
                self.add(name, bit != 0, 1, 0, 1)

    def mean(self, name: str) -> float | None:
        return self[name][0] / self[name][1] if name in self else None


def read_gpu_use(run: RunFolder, setups: Mapping[int, Environment]) -> GpuUse | None:
    """Reduce the telemetry of a run whose attempts have these set-ups; None if no GPU was sampled."""
    gpus: dict[str, dict[str, _Gpu]] = defaultdict(lambda: defaultdict(_Gpu))
    gauges_of: dict[str, _Gauges] = defaultdict(_Gauges)
    sampled_by: dict[tuple[int, str, str], int] = {}
    """Attempt, host, address -> node: agents on one machine may sample the same GPU."""
    windows: dict[int, _Gauges] = defaultdict(_Gauges)
    width_s = 1.0
    for node in telemetry_nodes(run):
        for sample in read_samples(run, node):
            for bus, gauges in sample.gauges.items():
                if gauges and sampled_by.setdefault((sample.attempt, sample.host, bus), node) == node:
                    gpus[sample.host][bus].add(sample, gauges)
                    gauges_of[sample.host].sample(gauges)
                    windows[int(sample.time // width_s)].sample(gauges)
            while len(windows) > MOST_WINDOWS:
                width_s *= 2
                narrow, windows = windows, defaultdict(_Gauges)
                for number, known in narrow.items():
                    for name, sums in known.items():
                        windows[number // 2].add(name, *sums)
    if not gpus:
        return None
    every = [gpu for of_host in gpus.values() for gpu in of_host.values()]
    unsampled = _unsampled(sampled_by, setups)
    counts = [of_host["throttled"] for of_host in gauges_of.values() if "throttled" in of_host]
    return GpuUse(
        hosts=tuple(_host(name, list(gpus[name].values()), gauges_of[name]) for name in sorted(gpus, key=_natural)),
        energy_j=None if unsampled else _energy(every),
        mean_power_w=_power(every),
        throttled=sum(lowered for lowered, *_ in counts) / sum(count for _, count, *_ in counts) if counts else None,
        unsampled=unsampled,
        windows=tuple(GpuWindow(number * width_s, _curves(windows[number])) for number in sorted(windows)),
    )


def _curves(gauges: _Gauges) -> dict[str, float]:
    means = {name: gauges.mean(name) for name in ("power_w", "sm_clock_mhz", "throttled")}
    found = {name: mean for name, mean in means.items() if mean is not None}
    found |= {"sm_clock_min_mhz": gauges["sm_clock_mhz"][2]} if "sm_clock_mhz" in gauges else {}
    return found | ({"temperature_max_c": gauges["temperature_c"][3]} if "temperature_c" in gauges else {})


def _unsampled(sampled_by: Mapping[tuple[int, str, str], int], setups: Mapping[int, Environment]) -> tuple[str, ...]:
    """Return the hosts of which, in some attempt, fewer GPUs were sampled than ranks ran on."""
    sampled = Counter((attempt, host) for attempt, host, _ in sampled_by)
    missing = set()
    for attempt, setup in setups.items():
        devices = {(place.host, place.gpu or place.device) for place in setup.ranks if place.device != "cpu"}
        used = Counter(host for host, _ in devices)
        missing |= {host for host, count in used.items() if sampled[attempt, host] < count}
    return tuple(sorted(missing, key=_natural))


def _energy(gpus: Sequence[_Gpu]) -> float | None:
    whole = all(gpu.seconds > 0 and gpu.unknown_s == 0 for gpu in gpus)
    return sum(gpu.energy_j for gpu in gpus) if whole else None


def _power(gpus: Sequence[_Gpu]) -> float | None:
    seconds = sum(gpu.seconds for gpu in gpus)
    return sum(gpu.energy_j for gpu in gpus) / seconds if seconds else None


def _host(host: str, gpus: Sequence[_Gpu], gauges: _Gauges) -> HostGpus:
    counts = {text: gauges[text][0] for text in THROTTLE_REASONS.values() if text in gauges and gauges[text][0]}
    frequent = sorted(counts, key=lambda text: -counts[text])
    return HostGpus(
        host=host,
        gpus=len(gpus),
        energy_j=_energy(gpus),
        mean_power_w=_power(gpus),
        sm_clock_mhz=gauges.mean("sm_clock_mhz"),
        hottest_c=gauges["temperature_c"][3] if "temperature_c" in gauges else None,
        throttled=gauges.mean("throttled"),
        reasons={text: counts[text] / gauges[text][1] for text in frequent},
    )


def _natural(host: str) -> tuple[str, int, str]:
    """Return the key that sorts n2 before n10."""
    name = host.rstrip("0123456789")
    return name, int(host[len(name) :] or 0), host


def gpu_notes(title: str, use: GpuUse | None) -> list[str]:
    """Return the notes of a point on throttled hosts, and on why its energy is unknown."""
    if use is None:
        return []
    found = []
    throttled = [host for host in use.hosts if (host.throttled or 0.0) >= LEAST_THROTTLED]
    if throttled:
        throttled.sort(key=lambda host: -(host.throttled or 0.0))
        named = "; ".join(
            f"host {host.host} {100 * (host.throttled or 0.0):.0f} % of samples ({', '.join(host.reasons)})"
            for host in throttled[:NAMED]
        )
        more = f"; and {len(throttled) - NAMED} more of {len(use.hosts)}" if len(throttled) > NAMED else ""
        found.append(f"At {title}, throttled: {named}{more}. Clocks lower than asked for make steps longer.")
    if use.unsampled:
        named = ", ".join(use.unsampled[:NAMED]) + (" and others" if len(use.unsampled) > NAMED else "")
        found.append(
            f"The energy of {title} is not known: GPUs of {named} were not sampled in every attempt "
            "(launch.gpu_sample_s; nvidia-ml-py has to be installed: pip install '.[gpu]')."
        )
    return found
