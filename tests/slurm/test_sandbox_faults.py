"""Faults do on the nodes what their names say, Slurm notices, and heal undoes them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.errors import ConfigError
from slurm.sandbox import cluster as faults
from slurm.sandbox.__main__ import main
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.state import WITH_LOSS, SandboxError, missing_packages, require_state, wait_until
from tests.support.planning import refused

# Waits for one connection, then says how many bytes arrived in how many seconds.
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
start, count = time.monotonic(), 0
while data := connection.recv(65536):
    count += len(data)
print(count, time.monotonic() - start)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
"""
# A datagram server counts until it is told the end over and over, because that may be lost too.
COUNT = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: room for all, however late this process runs
server.bind((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
seen = set()
while (data := server.recv(64)) != b"end":
    seen.add(data)
print(len(seen))
"""
SCATTER = """
import socket, sys, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect((sys.argv[1], int(sys.argv[2])))
for number in range(int(sys.argv[3])):
    sender.send(str(number).encode())
    if number % 50 == 49:
        time.sleep(0.005)
for _ in range(40):
    try:
        sender.send(b"end")
    except ConnectionRefusedError:
        break
    time.sleep(0.02)
"""
CONNECT = """
import socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    pass
print(1000 * (time.monotonic() - start))
"""


@pytest.fixture(autouse=True)
def free_links(sandbox: Cluster) -> Iterator[None]:
    """Take the limits off the cables after every test; the rest the sandbox's fixture mends."""
    yield
    for entry in sandbox.status():
        if entry.power:
            faults.link(sandbox, entry.name)


def on_node(sandbox: Cluster, node: str, script: str, *args: str) -> subprocess.Popen[str]:
    """Start a Python script in a node's network, without Slurm in between."""
    inside = f"--net=/proc/{require_state(sandbox.directory).processes[node].pid}/ns/net"
    command = ["nsenter", inside, sys.executable, "-c", script, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def transfer(sandbox: Cluster, server: str, client: str, count: int) -> str:
    """Let ``client`` run against ``server`` between n1 and n2; the server's last words."""
    address = require_state(sandbox.directory).nodes["n1"]
    with on_node(sandbox, "n1", server, address) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        with on_node(sandbox, "n2", client, address, port, str(count)) as sender:
            assert sender.wait(60) == 0
        return receiver.communicate(timeout=60)[0]


def round_trip_ms(sandbox: Cluster, source: str, target: str) -> float:
    """Seconds that a refused connection takes between two nodes, the second time (the first asks for the address)."""
    address = require_state(sandbox.directory).nodes[target]
    for _ in range(2):
        with on_node(sandbox, source, CONNECT, address) as attempt:
            words = attempt.communicate(timeout=30)[0]
    return float(words)


def wait_down(sandbox: Cluster, node: str) -> None:
    wait_until(lambda: sandbox.slurm_states()[node].word == "down*", timeout_s=60, what=f"{node} to be down")


def status(sandbox: Cluster, node: str) -> tuple[bool, bool, bool]:
    """A node's power, link, and whether it is frozen."""
    entry = next(entry for entry in sandbox.status() if entry.name == node)
    return entry.power, entry.link, entry.frozen


def start_ticking(sandbox: Cluster, node: str, path: Path) -> str:
    """Start a job on a node that appends a letter to a file ten times a second; its id, once it ticks."""
    script = f"while :; do printf x >> {path}; sleep 0.1; done"
    options = ["--parsable", "--no-requeue", "--output=/dev/null", f"--nodelist={node}"]
    job = sandbox.slurm("sbatch", *options, "--wrap", script).strip()
    wait_until(lambda: path.exists() and path.stat().st_size > 0, timeout_s=30, what="the job to tick")
    return job


def ticks(path: Path, *, within_s: float = 1.0) -> bool:
    """Tell whether the file grows."""
    size, deadline = path.stat().st_size, time.monotonic() + within_s
    while time.monotonic() < deadline:
        if path.stat().st_size > size:
            return True
        time.sleep(0.05)
    return False


def test_a_node_without_power_and_one_without_a_link_are_called_down(sandbox: Cluster, tmp_path: Path) -> None:
    dead, alone = tmp_path / "dead", tmp_path / "alone"
    start_ticking(sandbox, "n3", dead)
    job = start_ticking(sandbox, "n2", alone)
    owner = require_state(sandbox.directory).processes["n3"]
    inside = psutil.Process(owner.pid).children()
    faults.power_cut(sandbox, "n3")
    faults.cut_link(sandbox, "n2")
    assert not owner.find() and inside and not any(process.is_running() for process in inside)
    assert not ticks(dead)
    assert status(sandbox, "n3") == (False, False, False)
    assert status(sandbox, "n2") == (True, False, False)
    refused(faults.cut_link, sandbox, "n3", said="which is off")
    wait_down(sandbox, "n3")
    wait_down(sandbox, "n2")
    assert ticks(alone, within_s=30), "the job's processes should not have noticed"
    faults.heal(sandbox, "n3")
    faults.heal(sandbox, "n2")
    sandbox.wait_idle(timeout_s=60)
    assert sandbox.slurm("srun", "--nodelist=n3", "hostname").strip() == "n3"
    wait_until(lambda: not ticks(alone), timeout_s=30, what=f"Slurm to end what was left of job {job}")


def test_a_frozen_node_stops_and_goes_on(sandbox: Cluster, tmp_path: Path) -> None:
    job = start_ticking(sandbox, "n4", tmp_path / "ticks")
    faults.freeze(sandbox, "n4")
    assert status(sandbox, "n4") == (True, True, True)
    assert not ticks(tmp_path / "ticks")
    assert round_trip_ms(sandbox, "n1", "n4") < 1000, "its kernel should still answer"
    faults.heal(sandbox, "n4")
    assert status(sandbox, "n4") == (True, True, False)
    assert ticks(tmp_path / "ticks", within_s=10)
    sandbox.slurm("scancel", job)


def test_the_command_line_says_what_it_did(sandbox: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> list[str]:
        assert main([*words, "--dir", str(sandbox.directory)]) == 0
        return capsys.readouterr().out.splitlines()

    undo = f"to undo it: python -m slurm.sandbox heal n3{sandbox.option}"
    assert said("power-cut", "n3") == ["n3 has no power", undo]
    assert said("freeze", "n4")[0] == "the processes of n4 are stopped, and its link is up"
    assert said("cut-link", "n2")[0] == "n2 has no link, and its processes run on"
    assert said("link", "n1", "--latency-ms", "5") == ["the link of n1, each direction: 5 ms of delay"]
    sandbox.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a test")
    refused(faults.freeze, sandbox, "n5", said="one of n1, n2, n3, n4")
    for option, value in {"loss_percent": 101, "bandwidth_mbit": 0}.items():
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} {value}"):
            faults.link(sandbox, "n1", **{option: value})
    sound = "n1: nothing to heal; its link has no limits"
    assert said("heal") == [sound, "n2: link up again, drained no more", "n3: switched on", "n4: processes go on"]
    assert said("heal", "n1") == [sound]


def test_a_drained_node_is_named_with_the_reason_and_resumed(sandbox: Cluster) -> None:
    sandbox.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=Kill task failed")
    fix = f"heal --dir {sandbox.directory} n2"
    with pytest.raises(SandboxError, match=rf"n1 idle, n2 drain \(Kill task failed\), .* to resume: .* {fix}"):
        sandbox.wait_idle(timeout_s=0)
    assert [entry.name for entry in sandbox.status() if entry.slurm.is_drained] == ["n2"]
    faults.power_cut(sandbox, "n2")
    faults.heal(sandbox, "n2")
    sandbox.wait_idle(timeout_s=30)
    assert sandbox.slurm("srun", "--nodelist=n2", "hostname").strip() == "n2"


def mbit_per_s(sandbox: Cluster) -> float:
    """Rate of a transfer from n2 to n1: lower on a busy machine, and never higher than the link lets through."""
    count, seconds = transfer(sandbox, RECEIVE, SEND, 10_000_000).split()
    assert int(count) == 10_000_000
    return 8 * int(count) / 1e6 / float(seconds)


def test_bandwidth_is_what_was_asked_for(sandbox: Cluster) -> None:
    faults.link(sandbox, "n1", bandwidth_mbit=40)
    # tbf counts the frames' headers too, 4 to 5 percent; the bucket is full at the start, and is 0.2 MB here.
    assert mbit_per_s(sandbox) < 42
    wait_until(lambda: 25 < mbit_per_s(sandbox) < 42, timeout_s=120, what="a transfer at the rate that is let through")
    faults.link(sandbox, "n1")
    wait_until(lambda: mbit_per_s(sandbox) > 80, timeout_s=120, what="a transfer without a limit")


def test_packets_are_lost_as_often_as_was_asked_for(sandbox: Cluster) -> None:
    missing_packages(WITH_LOSS) and pytest.skip("needs apt-get install nftables")
    faults.link(sandbox, "n1", loss_percent=30)
    # Five standard deviations of a binomial with n=2000 and p=0.7 are 102.
    assert 1298 < int(transfer(sandbox, COUNT, SCATTER, 2000)) < 1502


def test_a_delay_holds_for_each_direction_together_with_a_bandwidth(sandbox: Cluster) -> None:
    faults.link(sandbox, "n1", latency_ms=20, bandwidth_mbit=200)
    assert round_trip_ms(sandbox, "n2", "n1") >= 40
    # Slurm's own traffic takes the same way.
    assert sandbox.slurm("srun", "--nodelist=n1", "hostname").strip() == "n1"
    assert mbit_per_s(sandbox) < 210
    faults.link(sandbox, "n1")
    # A busy machine may take its time for one of them, but not for each.
    wait_until(lambda: round_trip_ms(sandbox, "n2", "n1") < 40, timeout_s=60, what="the delay to be gone")
