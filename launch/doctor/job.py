"""The doctor's job: its submission, the measurement on each node, and the collection of the results.

The job has a folder, ``<output_dir>/.doctor/<time>-<random>/``. Each node writes ``nodes/00000.json`` and each rank
``ranks/00000.json``. The login node joins them in ``results.json``, which ``launch.doctor.findings`` reads. A node
finds the other nodes, its address and its network interfaces in the same way as the agents of a run. The login node
submits ``measure_node`` by name, and so does not import torch.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Any

import psutil
from omegaconf import OmegaConf

from launch.agent.health import GpuReading, HealthCheck
from launch.agent.node import Node
from launch.config import Config
from launch.doctor.findings import filesystem_of
from launch.plan.plan import JOBS
from launch.plan.remote import SSH
from launch.runs import compose
from launch.runs.environment import driver_problem, driver_version, missing_for_compiling, reachable_files
from launch.runs.folder import RunFolder, write_json
from launch.runs.process import lasting_imports
from launch.slurm.checks import Request
from launch.slurm.jobs import SlurmJob, ask_queue
from launch.slurm.submit import submit_calls

if TYPE_CHECKING:
    from launch.agent.exchange import RendezvousEndpoint

TRY_STARTS = (
    '{{ srun --nodes=1 --ntasks=1 true || {{ {ssh} "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)" '
    "test -d {root} && echo cluster.start=ssh; }}; }}"
)
"""Shell line at the end of the batch script, which tries to start a task with srun and then with ssh.

If srun works, the line prints nothing. Otherwise it prints the errors, and ``cluster.start=ssh`` if ssh works.
"""
JOB_MIN = 5
"""Time limit of the job in minutes; ``cluster.timeout_min`` if that is shorter."""
POLL_S = 1.0
LATE_S = 5.0
"""Seconds for which the login node waits for files of the nodes. NFS may show them late."""
ARRIVAL_S = 60
"""Seconds within which all nodes of the job must have joined the rendezvous."""
RANKS_S = 180
"""Seconds after which ranks that still measure are killed."""
CONNECT_S = 5.0
ON_CPUS = "on_cpus"
"""Name of a file in the job's folder that means: ranks compute on CPUs, although the nodes may have GPUs."""
CLOCK = struct.Struct("!d")
Record = dict[str, Any]


# On the login node.


def measure_nodes(request: Request, output: Path, wait_min: float, say: Callable[[str], None]) -> Record:
    """Submit a job that measures nodes, and wait until it ends. Writes ``results.json`` and returns its content.

    Args:
        request: request to Slurm whose resources the job also requests.
        output: output_dir of the run.
        wait_min: minutes after which a pending job is cancelled.
        say: function that prints a line of progress.

    Raises:
        SlurmError: the controller no longer answers.
        submitit.core.utils.FailedJobError: sbatch refused.
    """
    config, plan = request.config, request.plan
    (output / ".doctor").mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=output / ".doctor"))
    for name in ("nodes", "ranks", "seen"):
        (root / name).mkdir()
    compose.write_config(RunFolder(root), OmegaConf.structured(config), [])
    uses_cpus = bool(plan.promised.uses_cpus)
    if uses_cpus:
        (root / ON_CPUS).touch()
    limit = min(JOB_MIN, config.cluster.timeout_min)
    resources = {**plan.slurm, "job_name": "doctor", "time": limit, "signal_delay_s": 0}
    start = root / "start"
    resources["teardown"] = [TRY_STARTS.format(ssh=join(SSH), root=quote(str(root))) + f" >{quote(str(start))} 2>&1"]
    (job,) = submit_calls(root / JOBS, resources, measure_node, [[str(root)]])
    say(f"job {job.job_id} on {config.nodes} nodes, folder {root}")
    try:
        state, started = wait_for_job(job, wait_min, say)
    except BaseException:
        job.kill()
        raise
    deadline = time.monotonic() + (LATE_S if started else 0)
    while len(records(root, "nodes")) < config.nodes and time.monotonic() < deadline:
        time.sleep(POLL_S)
    results = {
        "job_id": job.job_id,
        "state": state,
        "started": started,
        "folder": str(root),
        "logs": str(root / JOBS),
        "asked": {
            "nodes": config.nodes,
            "ranks_per_node": config.ranks_on_node,
            "cpus_per_task": config.cluster.cpus_per_task,
            "gpus_per_node": None if uses_cpus else config.cluster.gpus_per_node,
        },
        "start": start.read_text().strip() if start.exists() else "",
        "nodes": records(root, "nodes"),
        "ranks": records(root, "ranks"),
    }
    write_json(root / "results.json", results)
    return results


def records(root: Path, kind: str) -> list[Record]:
    """Return the records in the subfolder ``kind`` of the job's folder ``root``, by number of the node or rank.

    ``kind`` is ``nodes`` or ``ranks``.
    """
    return [json.loads(file.read_text()) for file in sorted((root / kind).glob("*.json"))]


def wait_for_job(job: SlurmJob, wait_min: float, say: Callable[[str], None]) -> tuple[str, bool]:
    """Wait until a job ends. Returns Slurm's name of the last state, and whether the job has started.

    If the job is still pending after ``wait_min`` minutes, it is cancelled. ``say`` is a function that prints a line
    of progress.

    Raises:
        SlurmError: Slurm does not answer.
    """
    deadline = time.monotonic() + 60 * wait_min
    last, started = "", False
    while (known := ask_queue([job]).get(job.job_id)) is not None:
        started = started or known.state not in ("PENDING", "CONFIGURING")
        if known.phase == "over":
            return known.state, started
        state = known.state if known.reason in ("", "None") else f"{known.state} ({known.reason})"
        if state != last:
            say(f"job {job.job_id}: {state}")
            last = state
        if not started and time.monotonic() > deadline:
            job.kill()
            return last, False
        time.sleep(POLL_S)
    return last or "unknown", started


# On each node of the job.


def measure_node(root: str) -> None:
    """Measure this node for the job whose folder is ``root``, and write ``nodes/00000.json`` (here for node 0).

    An error of a measurement is not raised, but written into this file.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # submitit would ignore the first signal, and requeue at the second.
    folder, node = RunFolder(root), Node.from_env()
    config = compose.read_config(folder, Config)
    record: Record = {
        "index": node.index,
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "open_files": reachable_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": metadata.version("torch"),
        "filesystem": filesystem_of(folder.path),
    }
    health = HealthCheck(folder.path, config.resilience, config.cluster.gpus_per_node)
    record["faults"] = [fault.found for fault in health.examine()]
    record["lacks"] = [] if (folder.path / ON_CPUS).exists() else lacking_parts(health.first or ())
    try:
        meet_others(folder, node, config, record)
    except Exception as error:  # The login node shows errors of any kind.
        record["error"] = f"{type(error).__name__}: {error}"
    write_json(folder.path / "nodes" / f"{node.index:05d}.json", record)


SMALL_SHM = 2**30
"""Bytes of /dev/shm that worker processes of data loaders need at least."""


def lacking_parts(
    gpus: Sequence[GpuReading] = (),
    devices: Path = Path("/sys/class/infiniband"),
    shm: Path = Path("/dev/shm"),
    switches: Path = Path("/dev"),
) -> list[list[str]]:
    """Return (finding, effect, remedy) for each part of this node that training on GPUs needs and that is missing or
    wrong.

    Args:
        gpus: state of the GPUs before ranks run.
        devices: folder with the InfiniBand devices of the machine.
        shm: filesystem for memory that processes share.
        switches: folder with the device files of NVSwitches.
    """
    compilers = "the site's modules in cluster.setup, or the packages gcc and python3-dev"
    found = [[part, "torch.compile needs it", compilers] for part in missing_for_compiling()]
    if (problem := driver_problem(driver_version(), torch_cuda())) != "":
        found.append([problem, "the ranks cannot use the GPUs", "a newer driver, or a torch for an older CUDA"])
    if any(switches.glob("nvidia-nvswitch*")) and "nv-fabricmanager" not in running_programs():
        effect = "without it, CUDA does not start (error 802, system not yet initialized)"
        fix = "systemctl status nvidia-fabricmanager there"
        found.append(["NVSwitches, and no visible nv-fabricmanager", effect, fix])
    for gpu in gpus:
        if gpu.users:
            held = f"GPU {gpu.bus} with {gpu.used / 2**30:.1f} GiB in use by process {', '.join(map(str, gpu.users))}"
            fix = "nvidia-smi there; cluster.exclusive=true"
            found.append([held, "ranks may run out of memory, and are slower", fix])
    if not all(gpu.is_persistent for gpu in gpus):
        effect = "each first use of a GPU takes seconds, and its error counts are lost"
        found.append(["persistence mode off", effect, "nvidia-persistenced, by the site"])
    states = [path.read_text() for path in devices.glob("*/ports/*/state")]
    if any("ACTIVE" in state for state in states):
        if ctypes.util.find_library("ibverbs") is None:
            slow = "NCCL does not use InfiniBand, and is many times slower"
            found.append(["InfiniBand without libibverbs", slow, "the packages libibverbs1 and ibverbs-providers"])
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked not in (resource.RLIM_INFINITY, -1):
            limit = "NCCL cannot register its buffers with InfiniBand"
            found.append([f"ulimit -l is {locked // 1024} KiB", limit, "LimitMEMLOCK=infinity of slurmd, by the site"])
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if size < SMALL_SHM:
        effect = "workers of data loaders end with a bus error"
        found.append(
            [f"{shm} of {size / 2**20:.0f} MiB", effect, "a larger one: docker run --shm-size=8g, or the site"]
        )
    return found


def running_programs() -> set[str]:
    """Return the names of the programs that run on this machine."""
    return {process.info["name"] for process in psutil.process_iter(["name"])}


def torch_cuda() -> str | None:
    """Return the version of CUDA for which torch was built; None for a torch without CUDA."""
    with lasting_imports():
        from torch.version import cuda

    return cuda


def meet_others(folder: RunFolder, node: Node, config: Config, record: Record) -> None:
    """Check this node together with the other nodes of the job, and add the results to ``record``.

    The node waits for the agents of all nodes. Then it looks for the files of the other nodes in ``folder``, connects
    to their ports, and runs its ranks.
    """
    with lasting_imports():
        from launch.agent import exchange, ranks

    endpoint = exchange.open_endpoint(folder, node, ARRIVAL_S, ARRIVAL_S)
    seen = folder.path / "seen"
    (seen / str(node.index)).write_text("here\n")
    with socket.create_server((endpoint.address, 0), backlog=512) as listener:
        threading.Thread(target=serve_clock, args=(listener,), daemon=True).start()
        address = f"{endpoint.address}:{listener.getsockname()[1]}"
        others = share_value(endpoint, "at", node.index, address, range(node.count))
        record["missing"] = [index for index in range(node.count) if index not in others]
        record["unseen"] = unseen(seen, set(others))
        record["ports"] = {}
        for index, address in others.items():
            if index != node.index:
                record["ports"][str(index)], offset = read_clock(address)
                if index == 0 and offset:
                    record["clock_offset_s"], record["clock_error_s"] = offset
        closed = share_value(endpoint, "closed", node.index, str(any(record["ports"].values())), others)
    if record["missing"]:
        record["skipped"] = f"node {record['missing'][0]} of the job did not come to the rendezvous"
    elif "True" in closed.values():
        record["skipped"] = "not every node reaches every other"
    else:
        ranks.prepare_environment(node, config, endpoint.address)
        record["error"] = run_link_ranks(folder.path, node, config, endpoint)
    # The head node runs the store, so it leaves last.
    share_value(endpoint, "done", node.index, "", others if node.index == 0 else ())


def share_value(endpoint: RendezvousEndpoint, name: str, own: int, value: str, nodes: Iterable[int]) -> dict[int, str]:
    """Publish a value of this node, and wait at most about ARRIVAL_S seconds for the values of other nodes.

    Returns index of a node -> its value. Nodes whose value does not arrive in time are absent.

    Args:
        endpoint: rendezvous of the job, with the store for the values.
        name: name of the value.
        own: index of this node.
        value: value of this node.
        nodes: indices of the nodes whose values are returned.
    """
    endpoint.store.set(f"doctor/{name}/{own}", value)
    deadline, found = time.monotonic() + ARRIVAL_S, {}
    for index in nodes:
        with suppress(Exception):  # DistStoreError: a value did not arrive in time.
            left_s = max(0.5, deadline - time.monotonic())
            endpoint.store.wait([f"doctor/{name}/{index}"], timedelta(seconds=left_s))
            found[index] = endpoint.store.get(f"doctor/{name}/{index}").decode()
    return found


def unseen(folder: Path, wanted: set[int], timeout_s: float = 15.0) -> list[int]:
    """Return the nodes of ``wanted`` whose file in ``folder`` this node does not see within ``timeout_s`` seconds.

    This function waits because NFS may show a file late.
    """
    deadline = time.monotonic() + timeout_s
    while (left := wanted - {int(file.name) for file in folder.iterdir()}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return sorted(left)


def serve_clock(listener: socket.socket) -> None:
    """Send the time of this node's clock to each client, until the listener is closed."""
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client, suppress(OSError):
                client.sendall(CLOCK.pack(time.time()))


def read_clock(address: str) -> tuple[str, tuple[float, float] | None]:
    """Compare this node's clock with the clock that another node serves at ``address`` (``host:port``).

    Returns (error, comparison). The error is the text of a connection error; "" if there is none. The comparison is
    None after an error. Otherwise it is a pair in seconds: by how much this node's clock is ahead of the other, and the
    largest error of this figure, half the round trip (Cristian 1989).
    """
    host, _, port = address.rpartition(":")
    start = time.time()
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S) as connection:
            answer = connection.recv(CLOCK.size, socket.MSG_WAITALL)
    except OSError as error:
        return str(error), None
    if len(answer) < CLOCK.size:
        return "closed the connection", None
    end = time.time()
    return "", ((start + end) / 2 - CLOCK.unpack(answer)[0], (end - start) / 2)


def run_link_ranks(root: Path, node: Node, config: Config, endpoint: RendezvousEndpoint) -> str:
    """Run this node's ranks with torchrun's environment variables, for at most RANKS_S seconds.

    ``root`` is the folder of the job; the ranks connect to the store of ``endpoint``.

    Returns one text on the ranks that failed or were killed; "" if there are none.
    """
    each, problems, started = config.ranks_on_node, [], []
    shared = {"WORLD_SIZE": str(each * node.count), "LOCAL_WORLD_SIZE": str(each)}
    shared |= {"MASTER_ADDR": endpoint.store.host, "MASTER_PORT": str(endpoint.store.port)}
    shared |= {"CUDA_VISIBLE_DEVICES": ""} if (root / ON_CPUS).exists() else {}
    for local in range(each):
        rank = node.index * each + local
        path = root / "ranks" / f"{rank:05d}.log"
        command = [sys.executable, "-m", "gpt_launch", "launch.bench_network.measure", str(path.with_suffix(".json"))]
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
        quiet = subprocess.DEVNULL
        with path.open("wb") as log:
            started.append((rank, path, subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=quiet)))
    deadline = time.monotonic() + RANKS_S
    for rank, path, process in started:
        try:
            status = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problems.append(f"rank {rank} still measured after {RANKS_S} s ({path})")
            continue
        if status:
            lines = path.read_text(errors="replace").strip().splitlines() or [""]
            problems.append(f"rank {rank} left with status {status}: {lines[-1]} ({path})")
    return "; ".join(problems)
