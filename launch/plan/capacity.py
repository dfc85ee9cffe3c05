"""What this machine or the nodes of a cluster can hold, and the refusal of what does not fit.

Owns the look at this machine, without torch. Must not know what a run needs, beyond the number it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpt.accounting.hardware import GIGA, KNOWN, memory_bytes
from gpt.config import Device, Recompute, Strategy
from gpt.planning.hardware import Machine, Stated, cpus, free_memory, gpus
from gpt.planning.memory import GIB, Memory
from launch.config import ClusterKind, Config
from launch.errors import ConfigError
from launch.runs.ranges import closest


def refuse_what_does_not_fit(config: Config, needed: Memory, kind: ClusterKind) -> None:
    """Raise ConfigError where the nodes, as far as they are known, cannot hold ranks that need ``needed`` each."""
    if kind is ClusterKind.local:
        refuse_local_spares(config)
        refuse_too_few_gpus(config, local_gpus())
    refuse_too_little_memory(config, needed, kind)
    refuse_too_little_host(config, needed, kind)


def refuse_local_spares(config: Config) -> None:
    """Raise ConfigError where spares would be agents on the machine that they should stand in for."""
    if config.spares:
        raise ConfigError(
            f"spares={config.spares} with agents on this machine (cluster=local)",
            "a Slurm cluster: nodes on one machine are lost together",
            "spares=0, or cluster=slurm",
        )


def local_gpus() -> int:
    """GPUs of this machine that may be used, counted without torch."""
    named = _named_gpus()
    if named is not None:
        return len([word for word in named if word not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def visible_gpus() -> list[int]:
    """Their indices; those that CUDA_VISIBLE_DEVICES names in another way are left out."""
    named = _named_gpus()
    if named is not None:
        return [int(word) for word in named if word.isdigit()]
    return list(range(local_gpus()))


def _named_gpus() -> list[str] | None:
    """The words of CUDA_VISIBLE_DEVICES; None where it is not set, and all GPUs may be used."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if words is None else [word.strip() for word in words.split(",")]


def refuse_too_few_gpus(config: Config, gpus: int) -> None:
    """Raise ConfigError where local ranks would have to share GPUs, or there are none and cuda was asked for."""
    if config.device is Device.cpu or (config.device is Device.auto and gpus == 0):
        return
    if config.world_size > gpus:
        raise ConfigError(
            f"nodes={config.nodes} x {config.ranks_on_node} ranks = {config.world_size} ranks on a machine with {gpus} "
            "GPUs",
            "a GPU for each rank",
            "device=cpu" if gpus == 0 else f"nodes=1 ranks_per_node={gpus}, or device=cpu",
        )


def refuse_too_little_memory(config: Config, needed: Memory, kind: ClusterKind) -> None:
    """Raise ConfigError where the memory that is known cannot hold the run."""
    if on_cpus(config, kind) and kind is ClusterKind.local:
        have, ranks, where = free_memory(), config.world_size, "free on this machine"
        wanted = needed.total + needed.host
    elif (memory := gpu_memory(config)) is not None:
        have, ranks, where, wanted = memory, 1, f"on a GPU ({gpu_words(config)})", needed.total
    else:
        return
    if ranks * wanted > have:
        each = f"{wanted / GIB:.2f} GiB"
        total = f"{ranks} ranks x {each} = {ranks * wanted / GIB:.2f} GiB" if ranks > 1 else f"a rank of {each}"
        raise ConfigError(
            f"{total}, and {have / GIB:.2f} GiB {where}",
            "a run that fits",
            ", or ".join([*smaller(config), "a smaller model"]),
        )


def smaller(config: Config) -> Iterator[str]:
    """What is left to type for a run that needs less, the cheapest first."""
    if config.optim.micro_batch > 1:
        yield "optim.micro_batch=1"
    if config.recompute is Recompute.none:
        yield "recompute=selective"
    if config.parallel.strategy is Strategy.fsdp or config.parallel.zero_stage == 3:
        yield "more nodes"
    else:
        yield "parallel=fsdp"


def refuse_too_little_host(config: Config, needed: Memory, kind: ClusterKind) -> None:
    """Raise ConfigError where what GPUs leave to the memory of their node is more than that has, as far as is known."""
    have = host_memory(config, kind)
    if on_cpus(config, kind) or have is None or needed.host <= have:
        return
    raise ConfigError(
        f"offload of {needed.host / GIB:.2f} GiB for each rank, and {have / GIB:.2f} GiB of a node's memory for each",
        "a node that holds what its GPUs leave to it",
        "more nodes, no offload, or cluster.mem_gb=N where the nodes have more",
    )


def on_cpus(config: Config, kind: ClusterKind) -> bool:
    """Whether the ranks will compute on CPUs, as far as can be told from here."""
    if config.device is not Device.auto:
        return config.device is Device.cpu
    if kind is ClusterKind.local:
        return local_gpus() == 0
    return not (config.cluster.gpus_per_node or config.cluster.gpu_name or "gpu" in (config.cluster.gres or ""))


def gpu_memory(config: Config) -> int | None:
    """Bytes of one GPU, as far as they are said or known."""
    cluster = config.cluster
    if cluster.gpu_memory_gib is not None:
        return int(cluster.gpu_memory_gib * GIB)
    return None if cluster.gpu_name is None else memory_bytes(cluster.gpu_name)


def gpu_words(config: Config) -> str:
    """Where the memory of a GPU is known from."""
    known = config.cluster.gpu_memory_gib is None
    return f"cluster.gpu_name={config.cluster.gpu_name}" if known else "cluster.gpu_memory_gib"


def machine_of(config: Config, kind: ClusterKind) -> Machine:
    """What the estimates assume of the nodes of a cluster.

    Raises:
        ConfigError: too little is said of them.
    """
    cluster, links = config.cluster, config.cluster.links
    stated = Stated(
        memory=gpu_memory(config),
        peak_tflops=cluster.gpu_tflops,
        attainable=cluster.attainable,
        inside_gb_per_s=links.inside_gb_per_s,
        between_gb_per_s=links.between_gb_per_s,
        inside_latency_s=links.inside_us / 1e6,
        between_latency_s=links.between_us / 1e6,
        host_memory=host_memory(config, kind),
    )
    if on_cpus(config, kind):
        return cpus(cpu_memory(config, kind), config.ranks_on_node, stated)
    name = cluster.gpu_name or (local_gpu_name() if kind is ClusterKind.local else None)
    found = gpus(name or "", config.precision, config.ranks_on_node, stated)
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto, and GPUs of which nothing is known ({name or 'no cluster.gpu_name'}) in "
            f"precision={config.precision.name}",
            "cluster.gpu_name, as nvidia-smi -L prints it; or cluster.gpu_tflops and cluster.gpu_memory_gib",
            f"""'cluster.gpu_name="{(closest(name or "", KNOWN) or ["NVIDIA H100 80GB HBM3"])[0]}"'""",
        )
    return found if name else replace(found, device="a GPU")


def host_memory(config: Config, kind: ClusterKind) -> int | None:
    """Bytes of a node's memory that one rank may have; None where nobody said."""
    if kind is ClusterKind.local:
        return free_memory() // config.world_size
    return None if config.cluster.mem_gb is None else int(config.cluster.mem_gb * GIGA) // config.ranks_on_node


def cpu_memory(config: Config, kind: ClusterKind) -> int:
    """Bytes that one rank on CPUs may have."""
    found = host_memory(config, kind)
    if found is None:
        raise ConfigError(
            "parallel.strategy=auto on nodes of unknown memory",
            "cluster.mem_gb, the memory of a node; or, on GPUs, cluster.gpu_name",
            "cluster.mem_gb=64",
        )
    return found


def local_gpu_name() -> str | None:
    """What the first GPU of this machine calls itself, asked of the driver's files."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None
