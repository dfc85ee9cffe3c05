"""The nodes of a sandbox: their addresses, cables and power; limits on a cable; frozen processes.

A bridge joins the controller and all nodes, each by one cable (a veth pair). A node is a process with its own
namespaces around a slurmd.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import select
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from launch.errors import ConfigError
from slurm.sandbox.state import (
    WITH_LOSS,
    SandboxError,
    SandboxState,
    end,
    require_packages,
    run_program,
    search_path,
    wait_until,
)

RANGE = ipaddress.IPv4Network("10.64.0.0/10")
"""Range of private addresses for sandboxes. Real clusters often use 10.0 to 10.63."""
FIRST_NODE = 10
INIT = Path(__file__).with_name("node_init.sh")


def ip(words: str) -> str:
    """Run the program ``ip`` (iproute2) with the arguments ``words``, separated by blanks, and return its output.

    Raises SandboxError if ``ip`` fails.
    """
    return run_program(["ip", *words.split()])


def free_port(address: str) -> int:
    """Return a free port at ``address``, below the ports that the kernel uses for outgoing connections.

    Raises SandboxError if no port is free.
    """
    for port in random.SystemRandom().sample(range(10000, 30000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise SandboxError(f"found no free port at {address} in 1000 attempts")


def _free_network() -> ipaddress.IPv4Network:
    routes = json.loads(ip("-json -4 route show table all"))
    taken = [ipaddress.IPv4Network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    candidates = [*RANGE.subnets(new_prefix=24)]
    random.SystemRandom().shuffle(candidates)
    for network in candidates:
        if not any(network.overlaps(other) for other in taken):
            return network
    raise SandboxError(f"no free network in {RANGE}: this machine has routes to all of it")


def assign_addresses(state: SandboxState) -> None:
    """Create the bridge of a sandbox, and choose the addresses of the controller and all nodes, and the port."""
    names = [f"n{index}" for index in range(1, state.settings.nodes + 1)]
    # One sandbox at a time chooses its network.
    with FileLock("/run/lock/slurm-sandbox", timeout=60.0):
        network = _free_network()
        # By default, a bridge changes its hardware address when a cable is removed, and the nodes lose the controller.
        ip(f"link add {state.bridge} address {_mac(str(network[1]))} type bridge")
        ip(f"address add {network[1]}/24 dev {state.bridge}")
        ip(f"link set {state.bridge} up")
    state.controller, state.port = str(network[1]), free_port(str(network[1]))
    state.nodes = {name: str(network[FIRST_NODE + index]) for index, name in enumerate(names)}


def _mac(address: str) -> str:
    """Return the hardware address for an IP address.

    A node that is switched on again gets the same hardware address, because other nodes remember the first one.
    """
    return ":".join(f"{byte:02x}" for byte in (2, 0, *ipaddress.IPv4Address(address).packed))


def delete(interface: str) -> None:
    """Delete a network interface, and wait until it is gone.

    The kernel may delete it first, when the namespace at its other end is deleted.
    """

    def is_gone() -> bool:
        if not _exists(interface):
            return True
        with contextlib.suppress(SandboxError):
            ip(f"link del {interface}")
        return False

    wait_until(is_gone, timeout_s=20.0, what=f"the interface {interface} to be gone")


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


# Limits on a cable: bandwidth (tbf), lost packets (nftables), delay (a program, because not every kernel has netem).

EMPTY_TABLE = "table netdev sandbox {}\ndelete table netdev sandbox\n"
RESOLUTION = 100_000


@dataclass(frozen=True)
class CableLimits:
    """Limits of a cable, equal in both directions. None means no limit."""

    bandwidth_mbit: float | None = None
    loss_percent: float | None = None
    latency_ms: float | None = None

    def __str__(self) -> str:
        values = ((self.bandwidth_mbit, "Mbit/s"), (self.loss_percent, "% lost"), (self.latency_ms, "ms of delay"))
        return ", ".join(f"{value:g} {unit}" for value, unit in values if value is not None) or "no limits"


def _tc(inside: list[str], words: str) -> str:
    return run_program([*inside, "tc", *words.split()])


@dataclass(frozen=True)
class SandboxNode:
    """One node of a sandbox, with its cable, its power, and its processes."""

    state: SandboxState
    name: str

    @property
    def cable(self) -> str:
        """Return the name of the network interface at this machine's end of the node's cable."""
        return f"{self.state.bridge}{self.name}"

    @property
    def delay_ends(self) -> tuple[str, str]:
        """Return the names of the two ends of a veth pair, which joins the program that delays frames to the bridge.

        The first end is at the program, the second at the bridge. Each name is as long as the cable's name, which may
        already have the 15 letters that Linux permits.
        """
        rest = self.cable.removeprefix("ssb")
        return f"ssp{rest}", f"ssd{rest}"

    def set_link(self, *, up: bool) -> None:
        """Connect or cut the node's cable at the bridge. While it is cut, the node's interface has no carrier."""
        ip(f"link set {self.cable} {'up' if up else 'down'}")

    @property
    def link_is_up(self) -> bool:
        """Return whether the node's cable exists and is connected."""
        with contextlib.suppress(OSError):
            return bool(int(Path("/sys/class/net", self.cable, "flags").read_text(), 16) & 1)
        return False

    def switch_on(self) -> None:
        """Start the node and record it. Its slurmd registers with the controller."""
        (self.state.directory / "spool" / self.name).mkdir(parents=True, exist_ok=True)
        here, address = self.cable, self.state.nodes[self.name]

        def plug_in(pid: int) -> None:
            delete(here)
            ip(f"link add {here} type veth peer name eth0 address {_mac(address)} netns {pid}")
            ip(f"link set {here} master {self.state.bridge} up")

        inner = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            str(INIT),
            str(self.state.directory),
            self.name,
            f"{address}/24",
        ]
        self.state.start(self.name, inner, inside="unshare --net --uts --mount --ipc", before=plug_in)

    def process_one(self) -> psutil.Process | None:
        """Return process 1 of the node; None if the node has no power."""
        owner = self.state.find(self.name)
        with contextlib.suppress(psutil.NoSuchProcess):
            return next(iter(owner.children()), None) if owner else None
        return None

    def switch_off(self) -> None:
        """Kill all processes of the node at once."""
        # The kernel ends process 1 only after all processes of its namespace. A slurmd that is still registering
        # ignores SIGTERM.
        for process in (self.process_one(), self.state.find(self.name)):
            end(process)
        self._remove_delay()
        self.state.forget(self.name)

    def set_frozen(self, *, frozen: bool) -> None:
        """Stop or continue every process of the node. Its network still answers, as on a machine that hangs."""
        first = self.process_one()
        assert first is not None
        # The kernel signals all processes of the namespace together, except process 1, and none can fork meanwhile.
        number = "STOP" if frozen else "CONT"
        run_program(["nsenter", f"--pid=/proc/{first.pid}/ns/pid", "sh", "-c", f"kill -s {number} -- -1 || true"])
        first.suspend() if frozen else first.resume()

    @property
    def is_frozen(self) -> bool:
        """Return whether process 1 of the node is stopped."""
        first = self.process_one()
        return first is not None and first.status() == psutil.STATUS_STOPPED

    def register_again(self) -> None:
        """Make the node's slurmd register with the controller at once.

        Without this, the controller polls a lost node only after about a minute.
        """
        first = self.process_one()
        for child in first.children() if first else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == "slurmd":
                    child.send_signal(signal.SIGHUP)

    def limit(self, limits: CableLimits) -> None:
        """Replace the limits of the node's cable.

        Raises:
            ConfigError: a value is out of its range, or the program that drops packets is not installed.
        """
        for option, value, low, high, example in (
            ("--bandwidth-mbit", limits.bandwidth_mbit, 0.1, 100_000, 100),
            ("--loss-percent", limits.loss_percent, 0, 100, 1),
            ("--latency-ms", limits.latency_ms, 0, 10_000, 1),
        ):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{option} {value:g}", f"{low:g} to {high:g}", f"{option} {example}")
        if limits.loss_percent:
            require_packages(WITH_LOSS)
        self._remove_delay()
        for inside, device in self._ends():
            queues = json.loads(_tc(inside, f"-json qdisc show dev {device} root"))
            if any(queue["kind"] == "tbf" for queue in queues):
                _tc(inside, f"qdisc del dev {device} root")
        if shutil.which("nft", path=search_path()):
            self._nft(EMPTY_TABLE)
        if limits.latency_ms:
            self._insert_delay(limits.latency_ms)
        if limits.bandwidth_mbit is not None:
            # A bucket smaller than a burst between two timer ticks (4 ms at 250 Hz) would never reach the rate.
            burst = max(65536, int(limits.bandwidth_mbit * 1e6 / 8 * 0.004))
            rate = f"rate {int(limits.bandwidth_mbit * 1000)}kbit burst {burst}b latency 100ms"
            for inside, device in self._ends():
                _tc(inside, f"qdisc add dev {device} root handle 10: tbf {rate}")
        if limits.loss_percent:
            share = round(limits.loss_percent / 100 * RESOLUTION)
            drop = f"numgen random mod {RESOLUTION} < {share} drop"
            hooks = ("ingress", "egress")
            chains = [
                f'chain {hook} {{ type filter hook {hook} device "eth0" priority 0; {drop}; }}\n' for hook in hooks
            ]
            self._nft(f"{EMPTY_TABLE}table netdev sandbox {{\n{''.join(chains)}}}\n")

    def _inside(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.state.processes[self.name].pid}/ns/net"]

    def _ends(self) -> Iterator[tuple[list[str], str]]:
        """Yield (command that enters the network namespace, name of the interface) for both ends of the cable."""
        yield [], self.cable
        yield self._inside(), "eth0"

    def _nft(self, rules: str) -> None:
        run_program([*self._inside(), "nft", "-f", "-"], stdin=rules)

    def _insert_delay(self, latency_ms: float) -> None:
        """Start the program that delays frames, between the node's cable and the bridge."""
        here, (ours, bridged), log = self.cable, self.delay_ends, self.state.log(f"delay-{self.name}")
        ip(f"link add {bridged} type veth peer name {ours}")
        for interface in (here, ours):
            # These interfaces carry frames for others. The host has its address on the bridge, and must not answer
            # here.
            Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore").write_text("8")
        ip(f"link set {ours} up")
        ip(f"link set {bridged} master {self.state.bridge} up")
        ip(f"link set {here} nomaster")
        log.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "slurm.sandbox.nodes", here, ours, f"{latency_ms:g}"]
        self.state.start(f"delay-{self.name}", command, PYTHONPATH=str(INIT.parents[2]))
        self.state.wait_ready(f"delay-{self.name}", lambda: "ready" in log.read_text())

    def _remove_delay(self) -> None:
        if f"delay-{self.name}" not in self.state.processes:
            return
        end(self.state.find(f"delay-{self.name}"))
        delete(self.delay_ends[1])
        if _exists(self.cable):
            ip(f"link set {self.cable} master {self.state.bridge}")
        self.state.forget(f"delay-{self.name}")


# The program that delays frames. Frames have the header of virtio (packet(7), PACKET_VNET_HDR): the kernel leaves
# checksums and the splitting of large segments to the next interface, as it does with network cards.

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 15, 23, 3
LARGEST_FRAME = 10 + 65535 + 64
"""Largest frame in bytes: virtio's header, a segment that is not yet split, and headers of Ethernet and tags."""
Queue = deque[tuple[float, bytes]]
"""Frames in transit, each with the time of the monotonic clock at which it is sent on."""


def _listen(interface: str) -> socket.socket:
    """Return a socket that receives every frame that arrives at an interface, and sends frames unchanged."""
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    frames.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    frames.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 2**20)
    frames.bind((interface, ETH_P_ALL))
    frames.setblocking(False)
    return frames


def _receive(frames: socket.socket, queue: Queue, delay_s: float) -> None:
    with contextlib.suppress(OSError):  # No frame is left, or the interface is down.
        while True:
            queue.append((time.monotonic() + delay_s, frames.recv(LARGEST_FRAME)))


def _send_due(queue: Queue, frames: socket.socket) -> None:
    while queue and queue[0][0] <= time.monotonic():
        try:
            frames.send(queue[0][1])
        except BlockingIOError:
            return  # The interface's queue is full: try a little later.
        except OSError:
            pass  # An interface that is down loses the frame, as a cut cable does.
        queue.popleft()


def carry(interfaces: list[str], delay_s: float) -> None:
    """Send Ethernet frames from each of two interfaces to the other, ``delay_s`` seconds late, until an interface is
    gone.
    """
    ends, queues = [_listen(interface) for interface in interfaces], (Queue(), Queue())
    print("ready", flush=True)
    while all(map(_exists, interfaces)):
        due = [queue[0][0] for queue in queues if queue]
        # Wakes at least once a second to check that both interfaces still exist. A full queue gets a pause.
        pause_s = max(0.0001, min(due) - time.monotonic()) if due else 1.0
        readable, _, _ = select.select(ends, [], [], min(1.0, pause_s))
        for near, far, queue in zip(ends, reversed(ends), queues, strict=True):
            if near in readable:
                _receive(near, queue, delay_s)
            _send_due(queue, far)


if __name__ == "__main__":
    carry(sys.argv[1:3], float(sys.argv[3]) / 1000)
