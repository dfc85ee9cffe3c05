"""Hardware of the nodes that a point asks for, as far as it is said or seen, and the time of a step on it.

Torch-free. Must not know what is refused or printed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpt.accounting.hardware import KNOWN, expand, memory_bytes
from gpt.config import Device, TrainConfig
from gpt.planning.cost import estimate
from gpt.planning.execution import choose_tf32
from gpt.planning.hardware import Machine, MachineOverrides, cpus, free_memory, gpus, known_gpu, with_network
from gpt.planning.memory import GIB
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims
from launch.errors import ConfigError, closest
from launch.runs.measured import MatmulRates, read_matmul_rates, read_network
from launch.workload import PlanRequest, StepTime


def on_cpus(config: TrainConfig, request: PlanRequest) -> bool:
    """True where the ranks will compute on CPUs, as far as can be told from here."""
    if config.device is not Device.auto:
        return config.device is Device.cpu
    if request.is_local:
        return request.local_gpus == 0
    return not (request.cluster.gpus_per_node or request.cluster.gpu_name or "gpu" in (request.cluster.gres or ""))


def gpu_memory(request: PlanRequest) -> int | None:
    """Bytes of one GPU, as far as they are said or known."""
    cluster = request.cluster
    if cluster.gpu_memory_gib is not None:
        return int(cluster.gpu_memory_gib * GIB)
    name = known_gpu(cluster.gpu_name, cluster.gpu_memory_gib)
    return None if name is None else memory_bytes(name)


def gpu_name(request: PlanRequest) -> str | None:
    """Return the whole name of the GPUs, as it is said of the nodes, seen on this machine or told by Slurm; None where
    unknown. Of several devices of one type it is the one with the least memory: their peaks are the same."""
    said = known_gpu(request.cluster.gpu_name, request.cluster.gpu_memory_gib) or request.local_gpu_name
    told = expand(request.gpu_type) if said is None and request.gpu_type is not None else []
    return said or min(told, key=lambda name: memory_bytes(name) or 0, default=None)


def gpu_words(request: PlanRequest) -> str:
    """Source of the known memory of a GPU, in words."""
    cluster = request.cluster
    if cluster.gpu_memory_gib is not None:
        return "cluster.gpu_memory_gib"
    return f"cluster.gpu_name: {known_gpu(cluster.gpu_name, None)}"


def machine_of(config: TrainConfig, request: PlanRequest) -> Machine:
    """Return the hardware that the estimates assume of the nodes of a cluster.

    Raises:
        ConfigError: too little is said of them.
    """
    cluster, links = request.cluster, request.cluster.interconnect
    rates = matmul_rates(config, request)
    overrides = MachineOverrides(
        memory=gpu_memory(request),
        peak_tflops=cluster.gpu_tflops,
        attainable=cluster.matmul_efficiency,
        inside_gb_per_s=links.intra_node.bandwidth_gb_per_s,
        between_gb_per_s=links.inter_node.bandwidth_gb_per_s,
        inside_latency_s=links.intra_node.latency_us / 1e6,
        between_latency_s=links.inter_node.latency_us / 1e6,
        host_memory=host_memory(request),
    )
    if on_cpus(config, request):
        return calibrate(measured(cpus(cpu_memory(request), request.ranks_per_node, overrides), rates), request)
    name = gpu_name(request)
    tf32 = choose_tf32(config, on_cpus=False)
    found = gpus(name or "", config.precision, request.ranks_per_node, overrides, tf32)
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto, and GPUs of which nothing is known ({name or 'no cluster.gpu_name'}) in "
            f"precision={config.precision.name}",
            "cluster.gpu_name, as nvidia-smi -L prints it; or cluster.gpu_tflops and cluster.gpu_memory_gib",
            f"""'cluster.gpu_name="{(closest(name or "", KNOWN) or ["NVIDIA H100 80GB HBM3"])[0]}"'""",
        )
    return calibrate(measured(found if name else replace(found, device="a GPU"), rates), request)


def measured(machine: Machine, rates: MatmulRates | None) -> Machine:
    """Return a machine with rates as they were measured, if they were."""
    return machine if rates is None else replace(machine, flops_per_s=rates.best, matmul=rates)


def calibrate(machine: Machine, request: PlanRequest) -> Machine:
    """Return a machine whose links are as they were measured, and that computes and sends faster or slower by the
    factors of a request.

    Raises:
        ConfigError: ``cluster.network`` is no such measurement.
    """
    if request.cluster.network is not None:
        machine = with_network(machine, read_network(Path(request.cluster.network)))
    if request.rate_factor == request.link_factor == 1:
        return machine
    factor = request.link_factor
    faster = [
        link.changed(lambda latency_s, rate: (latency_s / factor, rate * factor))
        for link in (machine.intra_node, machine.inter_node)
    ]
    rate = machine.flops_per_s * request.rate_factor
    matmul = None if machine.matmul is None else machine.matmul.times(request.rate_factor)
    return replace(machine, flops_per_s=rate, matmul=matmul, intra_node=faster[0], inter_node=faster[1])


def matmul_rates(config: TrainConfig, request: PlanRequest) -> MatmulRates | None:
    """Return the measured rates of matrix products on the devices of a request, in the precision of a run.

    Raises:
        ConfigError: the file is broken, of another device, or lacks the precision.
    """
    if request.cluster.matmul_rates is None:
        return None
    path = Path(request.cluster.matmul_rates)
    found, is_on_cpus = read_matmul_rates(path), on_cpus(config, request)
    device = "CPU" if is_on_cpus else gpu_name(request)
    again = f"python -m gpt.bench_matmul --output {path} on such a node, or cluster.matmul_rates=null"
    if device is not None and device != found.device:
        raise ConfigError(f"cluster.matmul_rates={path}, measured on {found.device}", f"rates of {device}", again)
    precision = "tf32" if choose_tf32(config, is_on_cpus) else config.precision.name
    if precision == "auto":
        precision = "fp32" if is_on_cpus else "bf16"
    if precision not in found.precisions:
        told = f"cluster.matmul_rates={path}, with rates in {', '.join(found.precisions)}"
        raise ConfigError(told, f"rates in {precision}, the precision of the run", again)
    return found.precisions[precision]


def host_memory(request: PlanRequest) -> int | None:
    """Bytes of a node's memory that one rank may have; None where nobody said."""
    if request.is_local:
        return free_memory() // request.world_size
    return None if request.cluster.mem_gb is None else int(request.cluster.mem_gb * GIB) // request.ranks_per_node


def cpu_memory(request: PlanRequest) -> int:
    """Bytes that one rank on CPUs may have."""
    found = host_memory(request)
    if found is None:
        raise ConfigError(
            "parallel.strategy=auto on nodes of unknown memory",
            "cluster.mem_gb, the memory of a node; or, on GPUs, cluster.gpu_name",
            "cluster.mem_gb=64",
        )
    return found


def estimated_step(config: TrainConfig, dims: ParallelDims, batch: Batch, request: PlanRequest) -> StepTime | None:
    """Time of a step by the cost model of the layouts; None on this machine's CPUs, and where too little is known."""
    if request.is_local and on_cpus(config, request):
        return None
    matmul_rates(config, request)  # a file of another device is refused, where too little said is not
    try:
        machine = machine_of(config, request)
    except ConfigError:  # too little is said of the nodes, which only parallel=auto has to know
        return None
    found = estimate(config, dims, batch, machine)
    return StepTime(found.compute_s, found.bubble_s, found.communication_s)
