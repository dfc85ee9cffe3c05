"""Probe of the doctor's job, on every node: inspects the node, meets the other nodes, and starts the ranks.

The probe uses the rendezvous, addresses and interfaces of the agents, and writes a record of its node,
``nodes/00000.json``. Importing this module loads no torch: the login node submits ``run`` by name.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.agent.health import HealthCheck
from launch.agent.node import Node
from launch.config import Config
from launch.process import lasting_imports
from launch.runs.compose import read_config
from launch.runs.environment import reachable_files
from launch.runs.files import read_json, write_json
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler
from launch.slurm.facts import filesystem_of

if TYPE_CHECKING:
    from launch.agent.exchange import RendezvousEndpoint

ARRIVAL_S = 60
"""Seconds in which all nodes of the job must have met."""
RANKS_S = 180
"""Seconds after which ranks that still measure are ended."""
CONNECT_S = 5.0
PINGS = 8
REQUEST = "request.json"
"""File of the request that the job was made for, in its folder."""
CLOCK = struct.Struct("!d")


def node_record(root: Path, index: int) -> Path:
    """Path of a node's record."""
    return root / "nodes" / f"{index:05d}.json"


def run(root: str) -> None:
    """Take this node's part in the doctor's job, whose folder is ``root``. What goes wrong is recorded, not raised."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # submitit would ignore the one and requeue on the other
    folder = RunFolder(root)
    config = read_config(folder, Config)
    node = Node.from_env(None)
    record: dict[str, Any] = {"index": node.index, "time_s": time.time(), **look_around(folder.path)}
    health = HealthCheck(folder.path, config.resilience.health_check, config.cluster.gpus_per_node)
    record["faults"] = [fault.found for fault in health.examine()]
    try:
        record["names"] = resolve(job_hosts())
        visit(folder, node, config, record)
    except Exception as error:  # whatever it is, the login node wants to read it
        record["error"] = f"{type(error).__name__}: {error}"
    write_json(node_record(folder.path, node.index), record)


def look_around(root: Path) -> dict[str, Any]:
    """Record what can be seen without the other nodes."""
    unlimited = resource.RLIM_INFINITY
    limits = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE, "memlock": resource.RLIMIT_MEMLOCK}
    soft = {name: resource.getrlimit(number)[0] for name, number in limits.items()}
    soft["nofile"] = reachable_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # what an agent has there
    return {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpus_of_machine": os.cpu_count(),
        "limits": {name: -1 if value == unlimited else value for name, value in soft.items()},
        "python": ".".join(str(number) for number in sys.version_info[:3]),
        "torch": metadata.version("torch"),
        "filesystem": filesystem_of(root),
    }


def job_hosts() -> list[str]:
    """Names of the nodes of this job."""
    return scheduler.run("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def resolve(hosts: list[str]) -> dict[str, str]:
    """The address of each name as this node sees it, or why there is none, after a ``!``."""
    found = {}
    for host in hosts:
        try:
            found[host] = socket.gethostbyname(host)
        except OSError as error:
            found[host] = f"!{error.strerror or error}"
    return found


def visit(folder: RunFolder, node: Node, config: Config, record: dict[str, Any]) -> None:
    """Meet the other nodes, look for their files, call at their ports, and start this node's ranks."""
    with lasting_imports():
        from launch.agent import exchange as heartbeat
        from launch.agent import ranks

    endpoint = heartbeat.open_endpoint(folder, node, ARRIVAL_S, ARRIVAL_S)
    record["address"] = endpoint.address
    own = folder.path / "seen" / str(node.index)
    own.parent.mkdir(exist_ok=True)
    own.write_text("here\n")
    with Listener(endpoint.address) as listener:
        told = exchange(endpoint, node, f"{endpoint.address}:{listener.port}")
        record["missing"] = [index for index in range(node.count) if index not in told]
        record["unseen"] = unseen(own.parent, set(told))
        record["ports"] = {str(index): call(address) for index, address in told.items() if index != node.index}
        if node.index and 0 in told:
            with suppress(OSError):
                record["clock_offset_s"], record["clock_error_s"] = clock_offset(told[0])
        closed = sum(1 for problem in record["ports"].values() if problem)
        endpoint.store.set(f"doctor/closed/{node.index}", str(closed))
        everybody(endpoint, "called", node.index, list(told))
    if record["missing"]:
        record["skipped"] = f"node {record['missing'][0]} of the job did not come to the rendezvous"
    elif any(endpoint.store.get(f"doctor/closed/{index}") != b"0" for index in told):
        record["skipped"] = "not every node reaches every other"
    else:
        ranks.prepare_environment(node, config, endpoint.address)
        record["error"] = start_ranks(folder.path, node, config, endpoint)
    # The head node holds the store, so it leaves last.
    everybody(endpoint, "done", node.index, list(told) if node.index == 0 else [])


def exchange(endpoint: RendezvousEndpoint, node: Node, address: str) -> dict[int, str]:
    """Tell all nodes where this one listens, and learn it of those that come in time."""
    endpoint.store.set(f"doctor/at/{node.index}", address)
    return {
        index: endpoint.store.get(f"doctor/at/{index}").decode()
        for index in everybody(endpoint, "at", None, list(range(node.count)))
    }


def everybody(endpoint: RendezvousEndpoint, event: str, own: int | None, indices: list[int]) -> list[int]:
    """Wait until the nodes of ``indices`` have set ``event``; those that did, in time. ``own`` says it first."""
    if own is not None:
        endpoint.store.set(f"doctor/{event}/{own}", "")
    deadline = time.monotonic() + ARRIVAL_S
    there = []
    for index in indices:
        with suppress(Exception):  # DistStoreError: not in time
            left = max(0.5, deadline - time.monotonic())
            endpoint.store.wait([f"doctor/{event}/{index}"], timedelta(seconds=left))
            there.append(index)
    return there


def unseen(folder: Path, wanted: set[int], timeout_s: float = 15.0) -> list[int]:
    """Nodes whose file does not show up here, although they have written it. NFS may show it some seconds late."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = wanted - {int(file.name) for file in folder.iterdir()}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        time.sleep(0.2)


class Listener:
    """A port of this node's own, which answers every byte with the time of its clock."""

    def __init__(self, address: str) -> None:
        self._server = socket.create_server((address, 0), backlog=512)
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> Listener:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while connection.recv(1):
                connection.sendall(CLOCK.pack(time.time()))


def connect(address: str) -> socket.socket:
    """A connection to ``host:port``."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=CONNECT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def call(address: str) -> str:
    """Empty where a port answers, else why not."""
    try:
        with connect(address) as connection:
            connection.sendall(b"?")
            return "" if connection.recv(CLOCK.size) else "closed the connection"
    except OSError as error:
        return str(error)


def clock_offset(address: str) -> tuple[float, float]:
    """Measure how far this clock is ahead of the one at ``address``, and how wrong that may be, in seconds.

    Half the shortest round trip bounds the error (Cristian 1989).
    """
    best = (0.0, float("inf"))
    with connect(address) as connection:
        for _ in range(PINGS):
            start = time.time()
            connection.sendall(b"?")
            (there,) = CLOCK.unpack(connection.recv(CLOCK.size, socket.MSG_WAITALL))
            end = time.time()
            best = min(best, ((start + end) / 2 - there, (end - start) / 2), key=lambda pair: pair[1])
    return best


def start_ranks(root: Path, node: Node, config: Config, endpoint: RendezvousEndpoint) -> str:
    """Run this node's ranks to their end; what went wrong, or nothing."""
    each = config.ranks_on_node
    (root / "ranks").mkdir(exist_ok=True)
    started = []
    for local in range(each):
        rank = node.index * each + local
        record = root / "ranks" / f"{rank:05d}.json"
        log = record.with_suffix(".log")
        env = rank_environment(rank, local, each * node.count, each, endpoint)
        if read_json(root / REQUEST).get("uses_cpus"):
            env["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("wb") as file:
            command = [sys.executable, "-m", "gpt_launch", "launch.doctor.links", str(record)]
            started.append(
                (rank, log, subprocess.Popen(command, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL))
            )
    deadline = time.monotonic() + RANKS_S
    problems = [
        wait_for_rank(rank, log, process, lambda: deadline - time.monotonic()) for rank, log, process in started
    ]
    return "; ".join(problem for problem in problems if problem)


def rank_environment(rank: int, local: int, world: int, each: int, endpoint: RendezvousEndpoint) -> dict[str, str]:
    """Environment of a rank, as torchrun would set it, and the endpoint's store as its master."""
    numbers = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": each}
    master = {"MASTER_ADDR": str(endpoint.store.host), "MASTER_PORT": str(endpoint.store.port)}
    return {**os.environ, **{name: str(number) for name, number in numbers.items()}, **master}


def wait_for_rank(rank: int, log: Path, process: subprocess.Popen[bytes], left: Callable[[], float]) -> str:
    """Wait for a rank, end it where it takes too long; what went wrong, with its last line."""
    try:
        status = process.wait(max(0.1, left()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"rank {rank} still measured after {RANKS_S} s ({log})"
    if status == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"rank {rank} left with status {status}: {lines[-1] if lines else ''} ({log})"


def read_records(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of nodes and of ranks that are there, in order."""
    found = []
    for kind in ("nodes", "ranks"):
        folder = root / kind
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        found.append([json.loads(file.read_text()) for file in files])
    return found[0], found[1]
