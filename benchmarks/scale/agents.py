"""Groups of 8 to 4,096 agents: how long they need to meet, to agree on a stop, and to notice a lost node.

    python -m benchmarks.scale.agents --write
    python -m benchmarks.scale.agents --agents 8,64

All agents run on this machine. The head node's agent is a process of its own, with the threads and connections that it
has on a cluster. It polls for failed and silent nodes as it does while ranks run. The other agents are in processes of
up to 512 agents. For each of these agents, the following is real: the search for the head node's file, its own
connection to the store, signed messages, the code and the intervals of the exchanges, the part in the agreement, and
the heartbeat file of one rank. The following is missing: the network, the ranks, the health checks, the threads, and
the polls of these agents for their ranks. One thread of a process makes the exchanges of all its agents, each when it
is due. The other agents share the cores with the head node's process, which on a cluster has its node for itself: times
are upper bounds. "Load" is the load average of the machine before the measurement. "Meet" is the time from the start of
the processes until the head node begins the first round with all agents. "Stop" is the time from a request to stop on
the head node until the last agent has set the step of the stop for its rank. "Lost" is the time from the last sign of
life of one node until the head node calls it lost, minus `resilience.node_timeout_s=30`. It can be below zero, because
the head node counts the silence in ticks of half a second. CPU, memory, open files and connections are those of the
head node's process. "Messages" are those from all other agents. Messages and CPU are measured in ten seconds in which
nothing happens. 4,096 agents on free cores send up to 8,190 messages/s. Where fewer arrive, other programs had the
cores, and all times are longer.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.page import cores, keep, merged, stamp
from benchmarks.turns import ROOT
from launch.agent import exchange, rendezvous
from launch.agent.exchange import Agreement, Heartbeat
from launch.agent.node import Node, RendezvousRound, RunContext, RunningClock
from launch.config import Config
from launch.runs.environment import raise_open_files
from launch.runs.folder import RunFolder, has_written, read_json
from launch.runs.process import HeartbeatFile, die_with_parent

NODE_TIMEOUT_S = 30
EACH = 512
"""Largest number of agents in one process."""
QUIET_S = 10.0
LOOK_S = 0.05
ARRIVAL_S = 0.01
"""Seconds between the arrivals of two agents of one process."""
TITLES = (
    "agents",
    "load",
    "meet, s",
    "stop, s",
    "lost, s",
    "messages/s",
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


class CalledHeartbeat(Heartbeat):
    """Heartbeat of an agent that has no thread of its own: ``follow`` makes the exchanges with the head node."""

    def _run(self) -> None:
        pass


def follow(folder: RunFolder, first: int, end: int, count: int) -> None:
    """Run the agents ``first`` to ``end - 1`` of ``count`` agents in this thread until the process is killed. Write two
    files with a monotonic time into ``folder``: in ``stopped_FIRST.json``, when the last of these agents has received
    the stop; in ``silent.json``, when agent 1 has sent its last message."""
    config, clock = config_of(count), RunningClock()
    groups, files = dict[int, rendezvous.AgentGroup](), dict[int, HeartbeatFile]()
    waiting = set(range(first, end))
    rendezvous.Heartbeat, exchange.RunningClock = CalledHeartbeat, lambda: clock  # type: ignore[misc,assignment]
    due = [(time.monotonic() + ARRIVAL_S * place, index) for place, index in enumerate(range(first, end))]
    while due:
        at, index = due[0]
        time.sleep(max(0.0, at - time.monotonic()))
        if index not in groups:
            groups[index] = join(folder, index, config)
            groups[index].heartbeat.publish(host=f"n{index}", ready=0)
        heartbeat = groups[index].heartbeat
        wait_s = heartbeat.exchange()
        now = time.monotonic()
        heapq.heapreplace(due, (now + wait_s, index))
        rdzv = heartbeat.of(0).round
        if index not in files and rdzv is not None:
            files[index] = attach_rank(folder, groups[index], index, rdzv)
        if index in waiting and index in files and files[index].cause:
            waiting.remove(index)
            if not waiting:
                has_written(folder.path / f"stopped_{first}.json", {"at": now})
        if index == 1 and (folder.path / "lose").exists():
            due = [each for each in due if each[1] != 1]
            heapq.heapify(due)
            has_written(folder.path / "silent.json", {"at": now})


def follow_all(folder: RunFolder, count: int) -> None:
    """Run all agents but that of the head node, in processes that end with this process."""
    parent = os.getpid()
    for first in range(1, count, EACH):
        if os.fork() == 0:
            die_with_parent(parent)
            follow(folder, first, min(first + EACH, count), count)
    signal.pause()


def sent(group: rendezvous.AgentGroup, count: int) -> int:
    """Return how many messages all agents but that of the head node have sent."""
    return sum(group.heartbeat.of(index).beat for index in range(1, count))


def lead(folder: RunFolder, count: int) -> None:
    """Run the agent of the head node until the process is killed, and print its measurements as JSON."""
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
    used, began, before = time.process_time(), time.monotonic(), sent(group, count)
    while time.monotonic() < began + QUIET_S:  # As ``Watch.poll``.
        assert not group.has_failed(0) and not group.find_silent(rdzv)
        time.sleep(exchange.POLL_S)
    quiet_s = time.monotonic() - began
    cpu, rate = (time.process_time() - used) / quiet_s, (sent(group, count) - before) / quiet_s

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
    found = {"met": met, "stop": stop_s, "lost": lost_s, "cpu": cpu, "rate": rate, "memory": memory}
    counts = {"files": process.num_fds(), "connections": len(process.net_connections("tcp"))}
    print(json.dumps({**found, **counts}), flush=True)
    signal.pause()  # The others end first.


def measure(count: int) -> list[str]:
    """Return the row of the table for a group of ``count`` agents."""
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "benchmarks.scale.agents", "--folder", place, "--agents", str(count)]
        # torch's store looks up the name of each address, and here the name server sometimes does not answer.
        env = {**os.environ, "RES_OPTIONS": "timeout:1 attempts:1"}
        began = time.time()
        head = subprocess.Popen([*words, "--head"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        others = subprocess.Popen(words, cwd=ROOT, env=env)
        assert head.stdout is not None
        text = head.stdout.readline()
        for process in (others, head):
            process.kill()
            process.wait()
    if not text:
        sys.exit(f"{count} agents: the head node's agent failed")
    found = json.loads(text)
    times = [f"{found['met'] - began:.1f}", f"{found['stop']:.2f}", f"{found['lost']:.2f}"]
    head_node = [
        f"{found['rate']:,.0f}",
        f"{found['cpu']:.0%}",
        f"{found['memory']:.0f}",
        str(found["files"]),
        str(found["connections"]),
    ]
    return [f"{count:,}", load, *times, *head_node]


def main() -> int:
    """Measure a group of each size, and print the table. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="8,64,512,1024,4096", help="numbers of agents")
    parser.add_argument("--write", action="store_true", help="keep the page")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = [int(number) for number in args.agents.split(",")]
    if args.folder is not None:
        folder, (count,) = RunFolder(args.folder), counts
        raise_open_files()
        (lead if args.head else follow_all)(folder, count)
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
