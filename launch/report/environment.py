"""Environment of a run as ``environment.json`` has it, and the use of its GPUs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.errors import counted
from launch.runs.environment import THROTTLE_REASONS, GpuSample, read_samples, telemetry_nodes
from launch.runs.folder import RunFolder

# Environment of a run: ``attempts/NNNN/environment.json`` as the report needs it.


NO_CHANGES = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class RankPlace:
    """Place of one rank: ``machine`` is the physical one (several nodes may lie on it)."""

    node: int
    host: str
    machine: str
    device: str
    device_name: str
    cores: int
    threads: int
    gpu: str | None = None
    """Identity of the GPU, over all processes and machines; None where it was not recorded."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Set-up of one attempt. Batches in sequences, ``block_size`` in tokens; what was not recorded is None."""

    ranks: tuple[RankPlace, ...]
    workload: str = "gpt"
    weak_scaling: bool | None = None
    unit: str | None = None
    """Unit of the throughput: tokens, samples, images."""
    work_per_step: float | None = None
    """Units that all ranks together do in a step, where that was said beforehand."""
    max_steps: int | None = None
    command: str | None = None
    topology: str | None = None
    global_batch: int | None = None
    per_rank_batch: int | None = None
    block_size: int | None = None
    precision: str | None = None
    model: str | None = None
    parameters: int | None = None
    torch: str | None = None
    commit: str | None = None
    changes: str | None = None
    """Digest of what was changed since that commit; None where nothing was, or nobody looked."""

    @property
    def code(self) -> str | None:
        """The code it ran: a commit, and what was changed since."""
        if self.commit is None:
            return None
        return self.commit[:12] + ("" if self.changes is None else f" with changes {self.changes[:8]}")

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
        """The kinds of devices used, for people."""
        return " and ".join(sorted({place.device_name for place in self.ranks}))

    def same_setup(self, other: Environment) -> bool:
        """Tell whether step times of both may be put together: all is equal but the names of hosts and the code."""
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
        """One phrase for each way in which ranks shared cores or a GPU, naming where; empty where each had its own."""
        machines: dict[str, list[RankPlace]] = defaultdict(list)
        for place in self.ranks:
            machines[place.machine].append(place)
        where: dict[str, list[list[RankPlace]]] = defaultdict(list)
        for places in machines.values():
            for what in _shared(places):
                where[what].append(places)
        return [f"{what} {_location(crowded)}" for what, crowded in where.items()]


def _shared(places: list[RankPlace]) -> list[str]:
    """Cores and GPUs that the ranks of one machine had to share."""
    gpus = Counter(place.gpu or place.device for place in places if place.device != "cpu")
    phrases = [f"{ranks} ranks on one GPU" for ranks in dict.fromkeys(gpus.values()) if ranks > 1]
    on_cpu = [place for place in places if place.device == "cpu"]
    threads, cores = sum(place.threads for place in on_cpu), max((place.cores for place in on_cpu), default=0)
    if threads > cores:
        phrases.append(f"{counted(threads, 'thread')} on {counted(cores, 'core')}")
    return phrases


def _location(machines: list[list[RankPlace]]) -> str:
    if len(machines) > 1:
        return f"on each of {len(machines)} machines"
    hosts = list(dict.fromkeys(place.host for place in machines[0]))
    if len(hosts) == 1:
        return f"of {hosts[0]}"
    return f"of one machine ({', '.join(hosts) if len(hosts) <= 4 else f'{hosts[0]} to {hosts[-1]}'})"


def read_environment(run: RunFolder, attempt: int) -> Environment | None:
    """The set-up of one attempt; None where its file is absent or not whole."""
    try:
        return _parse(json.loads(run.environment(attempt).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(content: dict[str, Any]) -> Environment:
    micro, accumulation = content.get("micro_batch"), content.get("accumulation")
    topology, command = content.get("topology"), content.get("command")
    return Environment(
        ranks=tuple(_place(rank) for rank in content["ranks"]),
        workload=content.get("workload") or "gpt",
        weak_scaling=content.get("weak_scaling"),
        # Records of the GPT library from before there were other workloads do not name it.
        unit=content.get("unit") or ("tokens" if "block_size" in content else None),
        work_per_step=content.get("work_per_step"),
        max_steps=content.get("max_steps"),
        command=None if command is None else shlex.join(map(str, command)),
        topology=None if topology is None else topology_label(topology),
        global_batch=content.get("global_batch"),
        per_rank_batch=None if micro is None or accumulation is None else micro * accumulation,
        block_size=content.get("block_size"),
        precision=content.get("precision"),
        model=content.get("model"),
        parameters=content.get("parameters"),
        torch=(content.get("software") or {}).get("torch"),
        commit=(content.get("git") or {}).get("commit"),
        changes=_changes((content.get("git") or {}).get("diff_sha256")),
    )


def _changes(digest: str | None) -> str | None:
    """The digest of a difference; None where there was none."""
    return None if digest in (None, "", NO_CHANGES) else digest


def _place(rank: dict[str, Any]) -> RankPlace:
    return RankPlace(
        node=rank["node"],
        host=rank["host"],
        machine=rank["machine"],
        device=rank["device"],
        device_name=rank["device_name"],
        cores=rank["cores"],
        threads=rank["threads"],
        # CUDA numbers devices per process, so two ranks may both say cuda:0 and mean different GPUs.
        gpu=rank.get("device_uuid"),
    )


def topology_label(topology: dict[str, Any]) -> str:
    """The strategy and every dimension larger than 1: ``fsdp dp_shard=4``, ``deepspeed_zero0 dp_replicate=2 pp=2``."""
    sizes = [f"{name}={size}" for name, size in topology.items() if isinstance(size, int) and size > 1]
    return " ".join([_strategy_label(str(topology["strategy"])), *sizes])


def _strategy_label(strategy: str) -> str:
    """The strategy's name in records, with DeepSpeed's prefix written out."""
    return f"deepspeed_{strategy.removeprefix('ds_')}" if strategy.startswith("ds_") else strategy


# Use of a run's GPUs, by the samples that its agents took: energy, power, clocks, and who was throttled.


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
