"""The sandbox's own network: a bridge with the controller on it, and one cable to each node.

Owns addresses, ports, cables and what slows them down. Must not know Slurm. A cable's far end lies in its node's
network namespace and dies with it, but the kernel takes its time over that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from slurm.sandbox.commands import SandboxError, run, succeeds, wait_until
from slurm.sandbox.state import Endpoint, State

# Private addresses; 10.0 to 10.63 are left to real clusters, which like them.
RANGE = ipaddress.ip_network("10.64.0.0/10")
FIRST_NODE = 10


@contextlib.contextmanager
def _choosing() -> Iterator[None]:
    """Let one sandbox at a time choose addresses; the lock vanishes with its process and leaves no file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:

        def take() -> bool:
            try:
                lock.bind("\0slurm-sandbox-addresses")
            except OSError:
                return False
            return True

        wait_until(take, timeout_s=60.0, what="another sandbox to finish choosing its addresses")
        yield


def _taken() -> list[ipaddress.IPv4Network]:
    """All networks that this machine has an address in or a route to, but for the default route."""
    addresses = [
        f"{entry['local']}/{entry['prefixlen']}"
        for link in json.loads(run(["ip", "-json", "-4", "address", "show"]))
        for entry in link.get("addr_info", [])
        if "local" in entry
    ]
    routes = [entry["dst"] for entry in json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]))]
    networks = [text for text in addresses + routes if text != "default"]
    return [ipaddress.IPv4Network(text, strict=False) for text in networks]


def _free_network() -> ipaddress.IPv4Network:
    taken = _taken()
    candidates = list(RANGE.subnets(new_prefix=24))
    random.SystemRandom().shuffle(candidates)
    for network in candidates:
        assert isinstance(network, ipaddress.IPv4Network)
        if not any(network.overlaps(other) for other in taken):
            return network
    raise SandboxError(f"no free network in {RANGE}: this machine has routes to all of it")


def free_port(address: str) -> int:
    """A port that nothing listens on, outside the range from which the kernel takes ports for outgoing connections."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10000, low) if low > 11000 else range(1024, 65536)
    for _ in range(1000):
        port = random.SystemRandom().choice(candidates)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise SandboxError(f"found no free port at {address} in 1000 attempts")


def build(state: State) -> None:
    """Make the bridge and give the controller and every node an address of a network of their own."""
    with _choosing():
        network = _free_network()
        # Left to itself, a bridge changes its hardware address when a cable goes, and the nodes lose the controller.
        run(["ip", "link", "add", state.bridge, "address", _mac(str(network[1])), "type", "bridge"])
        run(["ip", "address", "add", f"{network[1]}/24", "dev", state.bridge])
    run(["ip", "link", "set", state.bridge, "up"])
    # One that has joined another sandbox listens at every address.
    state.controller = Endpoint(str(network[1]), free_port("0.0.0.0" if state.settings.join else str(network[1])))
    for index, name in enumerate(state.settings.node_names()):
        state.nodes[name] = Endpoint(str(network[FIRST_NODE + index]), state.controller.port)


def build_on_one_host(state: State) -> None:
    """Give the controller and every node a port of this machine."""
    ports: set[int] = set()
    while len(ports) <= state.settings.nodes:
        ports.add(free_port("127.0.0.1"))
    first, *others = ports
    state.controller = Endpoint("127.0.0.1", first)
    state.nodes = {name: Endpoint("127.0.0.1", port) for name, port in zip(state.settings.node_names(), others)}


def remove(state: State) -> None:
    """Take the bridge and all cables away, where they are there."""
    for node in state.nodes:
        delete(cable(state, node))
        delete(second_cable(state, node)[1])
    delete(state.bridge)


def delete(name: str) -> None:
    """Take an interface away. One that goes by itself, as its far end's namespace ends, is only waited for."""

    def is_gone() -> bool:
        if not succeeds(["ip", "link", "show", "dev", name]):
            return True
        succeeds(["ip", "link", "del", name])
        return False

    wait_until(is_gone, timeout_s=20.0, what=f"the interface {name} to be gone")


def _mac(address: str) -> str:
    """A hardware address made from an IP address: a node keeps it when it comes back, as others still remember it."""
    return ":".join(f"{byte:02x}" for byte in (2, 0, *ipaddress.IPv4Address(address).packed))


def cable(state: State, node: str) -> str:
    """The name of the host's end of a node's cable."""
    return f"{state.bridge}{node}"


def second_cable(state: State, node: str) -> tuple[str, str]:
    """The ends of what lies between a node's cable and the bridge where something stands in between, the bridge's last.

    Names of interfaces have 15 letters at the most, and a cable's may have as many.
    """
    rest = cable(state, node).removeprefix("ssb")
    return f"ssp{rest}", f"ssd{rest}"


def plug_in(state: State, node: str, pid: int) -> None:
    """Lay a cable from the bridge to eth0 in the network namespace of a process."""
    unplug(state, node)
    here, mac = cable(state, node), _mac(state.nodes[node].address)
    run(["ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", str(pid)])
    run(["ip", "link", "set", here, "master", state.bridge, "up"])


def unplug(state: State, node: str) -> None:
    """Take a node's cable away, where there is one."""
    delete(cable(state, node))


def set_link(state: State, node: str, *, up: bool) -> None:
    """Connect or cut a node's cable at the bridge; the node sees it lose its carrier."""
    run(["ip", "link", "set", cable(state, node), "up" if up else "down"])


def link_is_up(state: State, node: str) -> bool:
    """True where a node's cable is there and connected."""
    path = Path("/sys/class/net") / cable(state, node) / "flags"
    try:
        return bool(int(path.read_text(), 16) & 1)
    except (FileNotFoundError, OSError):
        return False
