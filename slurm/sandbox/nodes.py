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
"""Range of private addresses. 10.0 to 10.63 are left to real clusters, which often use them."""
FIRST_NODE = 10
INIT = Path(__file__).with_name("node_init.sh")


def ip(words: str) -> str:
    """Run ``ip`` with these arguments and return its output."""
    return run_program(["ip", *words.split()])


def free_port(address: str) -> int:
    """Return a free port of ``address`` below the ports that the kernel uses for outgoing connections."""
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
    """Assign addresses on a new bridge to the controller and all nodes."""
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
    """Return a hardware address derived from an IP address. Other nodes remember it, so a returning node keeps it."""
    return ":".join(f"{byte:02x}" for byte in (2, 0, *ipaddress.IPv4Address(address).packed))


def delete(interface: str) -> None:
    """Delete a network interface. The kernel may delete it first, when the namespace at its other end is deleted."""

    def is_gone() -> bool:
        if not _exists(interface):
            return True
        with contextlib.suppress(SandboxError):
            ip(f"link del {interface}")
        return False

    wait_until(is_gone, timeout_s=20.0, what=f"the interface {interface} to be gone")


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


def cable(state: SandboxState, name: str) -> str:
    """Return the interface at the host's end of a node's cable."""
    return f"{state.bridge}{name}"


def delay_ends(state: SandboxState, name: str) -> tuple[str, str]:
    """Return the two interfaces of the program that delays frames, between a node's cable and the bridge.

    The interface at the bridge is second. Names of interfaces have at most 15 letters, and a cable's name may be as
    long.
    """
    rest = cable(state, name).removeprefix("ssb")
    return f"ssp{rest}", f"ssd{rest}"


def set_link(state: SandboxState, name: str, *, up: bool) -> None:
    """Connect or cut a node's cable at the bridge. While it is cut, the node's interface has no carrier."""
    ip(f"link set {cable(state, name)} {'up' if up else 'down'}")


def link_is_up(state: SandboxState, name: str) -> bool:
    """Return True if a node's cable exists and is connected."""
    with contextlib.suppress(OSError):
        return bool(int(Path("/sys/class/net", cable(state, name), "flags").read_text(), 16) & 1)
    return False


def switch_on(state: SandboxState, name: str) -> None:
    """Start a node and record it. Its slurmd registers with the controller."""
    (state.directory / "spool" / name).mkdir(parents=True, exist_ok=True)
    here, address = cable(state, name), state.nodes[name]

    def plug_in(pid: int) -> None:
        delete(here)
        ip(f"link add {here} type veth peer name eth0 address {_mac(address)} netns {pid}")
        ip(f"link set {here} master {state.bridge} up")

    inner = ["unshare", "--pid", "--fork", "--kill-child", "sh", str(INIT), str(state.directory), name, f"{address}/24"]
    state.start(name, inner, inside="unshare --net --uts --mount --ipc", before=plug_in)


def process_one(state: SandboxState, name: str) -> psutil.Process | None:
    """Return process 1 of a node; None if the node has no power."""
    owner = state.find(name)
    with contextlib.suppress(psutil.NoSuchProcess):
        return next(iter(owner.children()), None) if owner else None
    return None


def switch_off(state: SandboxState, name: str) -> None:
    """Kill a node and all its processes at once."""
    # The kernel ends process 1 only after all processes of its namespace. A slurmd that is still registering ignores
    # SIGTERM.
    for process in (process_one(state, name), state.find(name)):
        end(process)
    _remove_delay(state, name)
    state.forget(name)


def set_frozen(state: SandboxState, name: str, *, frozen: bool) -> None:
    """Stop or continue every process of a node. Its network still answers, as on a machine that hangs."""
    first = process_one(state, name)
    assert first is not None
    # The kernel signals all processes of the namespace together, except process 1, and none can fork meanwhile.
    number = "STOP" if frozen else "CONT"
    run_program(["nsenter", f"--pid=/proc/{first.pid}/ns/pid", "sh", "-c", f"kill -s {number} -- -1 || true"])
    first.suspend() if frozen else first.resume()


def is_frozen(state: SandboxState, name: str) -> bool:
    """Return True if process 1 of a node is stopped."""
    first = process_one(state, name)
    return first is not None and first.status() == psutil.STATUS_STOPPED


def register_again(state: SandboxState, name: str) -> None:
    """Have a node's slurmd register again. Otherwise the controller polls a lost node only after about a minute."""
    first = process_one(state, name)
    for child in first.children() if first else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "slurmd":
                child.send_signal(signal.SIGHUP)


# Limits on a cable: bandwidth (tbf), lost packets (nftables), delay (a program, because not every kernel has netem).

EMPTY_TABLE = "table netdev sandbox {}\ndelete table netdev sandbox\n"
RESOLUTION = 100_000


@dataclass(frozen=True)
class CableLimits:
    """Limits of a cable, equal in both directions. None means unlimited."""

    bandwidth_mbit: float | None = None
    loss_percent: float | None = None
    latency_ms: float | None = None

    def __str__(self) -> str:
        values = ((self.bandwidth_mbit, "Mbit/s"), (self.loss_percent, "% lost"), (self.latency_ms, "ms of delay"))
        return ", ".join(f"{value:g} {unit}" for value, unit in values if value is not None) or "no limits"


def limit(state: SandboxState, name: str, limits: CableLimits) -> None:
    """Replace the limits of a node's cable.

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
    _remove_delay(state, name)
    for inside, device in _ends(state, name):
        queues = json.loads(_tc(inside, f"-json qdisc show dev {device} root"))
        if any(queue["kind"] == "tbf" for queue in queues):
            _tc(inside, f"qdisc del dev {device} root")
    if shutil.which("nft", path=search_path()):
        _nft(state, name, EMPTY_TABLE)
    if limits.latency_ms:
        _insert_delay(state, name, limits.latency_ms)
    if limits.bandwidth_mbit is not None:
        # A bucket smaller than a burst between two timer ticks (4 ms at 250 Hz) would never reach the rate.
        burst = max(65536, int(limits.bandwidth_mbit * 1e6 / 8 * 0.004))
        rate = f"rate {int(limits.bandwidth_mbit * 1000)}kbit burst {burst}b latency 100ms"
        for inside, device in _ends(state, name):
            _tc(inside, f"qdisc add dev {device} root handle 10: tbf {rate}")
    if limits.loss_percent:
        share = round(limits.loss_percent / 100 * RESOLUTION)
        drop = f"numgen random mod {RESOLUTION} < {share} drop"
        hooks = ("ingress", "egress")
        chains = [f'chain {hook} {{ type filter hook {hook} device "eth0" priority 0; {drop}; }}\n' for hook in hooks]
        _nft(state, name, f"{EMPTY_TABLE}table netdev sandbox {{\n{''.join(chains)}}}\n")


def _inside(state: SandboxState, name: str) -> list[str]:
    return ["nsenter", f"--net=/proc/{state.processes[name].pid}/ns/net"]


def _ends(state: SandboxState, name: str) -> Iterator[tuple[list[str], str]]:
    """Yield both ends of a cable: the command that enters the end's namespace, and the interface."""
    yield [], cable(state, name)
    yield _inside(state, name), "eth0"


def _tc(inside: list[str], words: str) -> str:
    return run_program([*inside, "tc", *words.split()])


def _nft(state: SandboxState, name: str, rules: str) -> None:
    run_program([*_inside(state, name), "nft", "-f", "-"], stdin=rules)


def _insert_delay(state: SandboxState, name: str, latency_ms: float) -> None:
    """Insert the program that delays frames between a node's cable and the bridge."""
    here, (ours, bridged), log = cable(state, name), delay_ends(state, name), state.log(f"delay-{name}")
    ip(f"link add {bridged} type veth peer name {ours}")
    for interface in (here, ours):
        # These interfaces carry frames for others. The host has its address on the bridge, and must not answer here.
        Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore").write_text("8")
    ip(f"link set {ours} up")
    ip(f"link set {bridged} master {state.bridge} up")
    ip(f"link set {here} nomaster")
    log.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "slurm.sandbox.nodes", here, ours, f"{latency_ms:g}"]
    state.start(f"delay-{name}", command, PYTHONPATH=str(INIT.parents[2]))
    state.wait_ready(f"delay-{name}", lambda: "ready" in log.read_text())


def _remove_delay(state: SandboxState, name: str) -> None:
    if f"delay-{name}" not in state.processes:
        return
    end(state.find(f"delay-{name}"))
    delete(delay_ends(state, name)[1])
    if _exists(cable(state, name)):
        ip(f"link set {cable(state, name)} master {state.bridge}")
    state.forget(f"delay-{name}")


# The program that delays frames. Frames have the header of virtio (packet(7), PACKET_VNET_HDR): the kernel leaves
# checksums and the splitting of large segments to the next interface, as it does with network cards.

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 15, 23, 3
LARGEST_FRAME = 10 + 65535 + 64
"""Largest frame in bytes: virtio's header, a segment that is not yet split, and headers of Ethernet and tags."""
Queue = deque[tuple[float, bytes]]
"""Frames in transit, each with the time at which it is due."""


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
    """Carry Ethernet frames between two interfaces with a delay of ``delay_s`` seconds, until an interface is gone."""
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
