"""Environment of a run: ``attempts/NNNN/environment.json`` as the report needs it.

Owns the reading of that file, the text for a topology, and the question whether ranks shared cores or a GPU. Every
workload names the ranks; the GPT library also names its model and its batch. Must not know of step times.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from launch.runs.folder import RunFolder
from launch.runs.wording import counted

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
