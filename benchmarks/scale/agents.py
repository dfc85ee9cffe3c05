"""Groups of 8 to 1,024 agents: how long they need to meet, to agree on a stop, and to notice a lost node.

    python -m benchmarks.scale.agents --write
    python -m benchmarks.scale.agents --agents 8,64

All agents run on this machine: the head node's agent is a process, all other agents are threads of a few processes.
Each has its own connection to the store of the head node, its own heartbeat, and the heartbeat file of one rank, which
does nothing. So messages, signatures, sockets and files are real, and the network and the ranks are not. The processes
of the other agents share the cores with the head node's process, which on a cluster has its node for itself: times are
upper bounds. On two cores, 2,048 agents were silent for longer than `resilience.node_timeout_s=30`. "Meet" is the time
from the start of the last process until all agents are in the first round. "Stop" is the time from a request to stop
until the last agent has set the step of the stop for its rank. "Lost" is the time from the last sign of life of one
node until the head node calls it lost, beyond `resilience.node_timeout_s`; it is below zero if the head node's clock of
the silence, which ticks each half second, is ahead. CPU, memory, open files and connections are those of the head
node's process; the CPU is that of ten seconds in which nothing happens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks.page import cores, keep, merged, stamp
from benchmarks.turns import ROOT
from launch.agent import exchange, rendezvous
from launch.agent.exchange import Agreement
from launch.agent.node import Node, RendezvousRound, RunContext
from launch.config import Config
from launch.runs.environment import raise_open_files
from launch.runs.folder import RunFolder, has_written, read_json
from launch.runs.process import HeartbeatFile

NODE_TIMEOUT_S = 30
EACH = 128
"""Largest number of agents in one process."""
QUIET_S = 10.0
LOOK_S = 0.05
SWITCH_S = 0.0005
"""Longest time in seconds for which a Python thread keeps the other threads of its process waiting."""
TITLES = (
    "agents",
    "meet, s",
    "stop, s",
    "lost, s",
    "CPU of one core",
    "memory, MiB",
    "open files",
    "connections",
)


def config_of(count: int) -> Config:
    """Return the config of a run on ``count`` nodes."""
    config = Config(nodes=count)
    config.resilience.health_check = False
    config.resilience.node_timeout_s = NODE_TIMEOUT_S
    return config


def join(folder: RunFolder, index: int, config: Config) -> rendezvous.AgentGroup:
    """Connect agent ``index`` to the store of the head node. Returns the group of all agents."""
    node = Node(index, config.nodes, "job", is_slurm=False)
    limits = config.resilience
    endpoint = exchange.open_endpoint(folder, node, limits.rendezvous_timeout_s, limits.node_timeout_s)
    return rendezvous.AgentGroup(RunContext(folder, node, config), endpoint)


def attach_rank(folder: RunFolder, group: rendezvous.AgentGroup, index: int, rdzv: RendezvousRound) -> HeartbeatFile:
    """Give agent ``index`` a rank, and register the rank for the agreements of a round. Returns the heartbeat file of
    the rank.
    """
    file = HeartbeatFile(folder.path / f"rank_{index}")
    group.heartbeat.agreement = Agreement(rdzv.number, index, rdzv.members, [file])
    return file


def follow(folder: RunFolder, first: int, end: int, count: int) -> None:
    """Run the agents ``first`` to ``end - 1``, of ``count`` in all, in threads until the head node ends the run. Write
    files with two monotonic times: when the last of these agents has received the stop, and when agent 1 has sent its
    last message."""
    config, files = config_of(count), dict[int, HeartbeatFile]()
    sys.setswitchinterval(SWITCH_S)
    # One after another: threads that connect at once look up a name, and wait for a name server.
    groups = {index: join(folder, index, config) for index in range(first, end)}

    def run(index: int) -> None:
        rdzv = groups[index].next_round(0)
        assert rdzv is not None
        files[index] = attach_rank(folder, groups[index], index, rdzv)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(first, end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while not all(file.cause for file in files.values()):
        time.sleep(LOOK_S)
    has_written(folder.path / f"stopped_{first}.json", {"at": time.monotonic()})
    while not (folder.path / "lose").exists():
        time.sleep(LOOK_S)
    if first == 1:
        groups[1].heartbeat.close()
        has_written(folder.path / "silent.json", {"at": time.monotonic()})
    while not (folder.path / "end").exists():
        time.sleep(LOOK_S)
    os._exit(0)


def lead(folder: RunFolder, count: int) -> None:
    """Run the agent of the head node, and print its measurements as JSON."""
    raise_open_files()
    folder.record_event("agent_started", job="job")
    process, config = psutil.Process(), config_of(count)
    group = join(folder, 0, config)
    rdzv = group.next_round(0)
    assert rdzv is not None and len(rdzv.members) == count
    met = time.time()
    file = attach_rank(folder, group, 0, rdzv)
    while any(group.heartbeat.of(index).agreement != 0 for index in range(1, count)):
        time.sleep(LOOK_S)
    used, began = time.process_time(), time.monotonic()
    time.sleep(QUIET_S)
    cpu = (time.process_time() - used) / (time.monotonic() - began)

    agreement, began = group.heartbeat.agreement, time.monotonic()
    assert agreement is not None
    agreement.request_stop(15)
    group.heartbeat.publish()
    processes = range(1, count, EACH)
    while not all((folder.path / f"stopped_{first}.json").exists() for first in processes) or not file.cause:
        time.sleep(LOOK_S)
    stopped = max(read_json(folder.path / f"stopped_{first}.json")["at"] for first in processes)
    stop_s = stopped - began

    (folder.path / "lose").touch()
    while not group.find_silent(rdzv):
        time.sleep(exchange.POLL_S)
    lost_s = time.monotonic() - read_json(folder.path / "silent.json")["at"] - config.resilience.node_timeout_s
    memory = process.memory_info().rss / 2**20
    found = {"met": met, "stop": stop_s, "lost": lost_s, "cpu": cpu, "memory": memory}
    counts = {"files": process.num_fds(), "connections": len(process.net_connections("tcp"))}
    print(json.dumps({**found, **counts}), flush=True)
    (folder.path / "end").touch()
    os._exit(0)


def measure(count: int) -> list[str]:
    """Return the row of the table for a group of ``count`` agents."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "benchmarks.scale.agents", "--folder", place, "--agents", str(count)]
        # torch's store looks up the name of each address, and here the name server sometimes does not answer.
        env = {**os.environ, "RES_OPTIONS": "timeout:1 attempts:1"}
        head = subprocess.Popen([*words, "--first", "0"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        firsts = [str(first) for first in range(1, count, EACH)]
        others = [subprocess.Popen([*words, "--first", first], cwd=ROOT, env=env, text=True) for first in firsts]
        began = time.time()
        try:
            text, _ = head.communicate(timeout=1200)
        finally:
            for process in (head, *others):
                process.kill()
                process.wait()
    if head.returncode:
        sys.exit(f"{count} agents: the head node's agent ended with {head.returncode}")
    found = json.loads(text)
    times = [f"{found['met'] - began:.1f}", f"{found['stop']:.2f}", f"{found['lost']:.2f}"]
    head_node = [f"{found['cpu']:.0%}", f"{found['memory']:.0f}", str(found["files"]), str(found["connections"])]
    return [f"{count:,}", *times, *head_node]


def main() -> int:
    """Measure each size. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="8,64,512,1024", help="numbers of agents")
    parser.add_argument("--write", action="store_true", help="keep the page")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = [int(number) for number in args.agents.split(",")]
    if args.folder is not None:
        folder, (count,) = RunFolder(args.folder), counts
        raise_open_files()
        if args.first:
            follow(folder, args.first, min(args.first + EACH, count), count)
        lead(folder, count)
    for count in counts:
        row = measure(count)
        print("  ".join(f"{title}: {cell}" for title, cell in zip(TITLES, row, strict=True)), flush=True)
        if args.write:
            keep(
                Path(__file__),
                "Groups of agents",
                __doc__,
                f"{stamp(cores())}\n\n{merged(Path(__file__), TITLES, [row])}",
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
