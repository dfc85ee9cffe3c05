"""The sandbox's own network: a bridge, a cable to each node, and less bandwidth, loss or delay on a cable."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from launch.errors import ConfigError
from slurm.sandbox import processes
from slurm.sandbox import processes as packages
from slurm.sandbox.processes import SandboxError, clean_environment, run, search_path, succeeds, wait_until
from slurm.sandbox.state import Endpoint, State

# The sandbox's own network: a bridge with the controller on it, and one cable to each node.


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
    """Take a node's cable away, if there is one."""
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


# The delay of a node's cable where the kernel has no netem: a program carries the frames.


PROGRAM = Path(__file__).with_name("delay_line.py")


def insert(state: State, name: str, latency_ms: float) -> None:
    """Put the program into a node's cable."""
    ours, bridged = second_cable(state, name)
    run(["ip", "link", "add", bridged, "type", "veth", "peer", "name", ours])
    for interface in (cable(state, name), ours):
        # They carry frames for others: the host, whose address is on the bridge, must not answer for it here.
        Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore").write_text("8")
    run(["ip", "link", "set", ours, "up"])
    run(["ip", "link", "set", bridged, "master", state.bridge, "up"])
    run(["ip", "link", "set", cable(state, name), "nomaster"])
    log = state.log(_owner(name))
    log.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM), cable(state, name), ours, f"{latency_ms:g}"]
    record = partial(state.own, _owner(name))
    line = processes.start(command, log=log, env=clean_environment(), record=record)

    def is_ready() -> bool:
        alive = line.alive()
        said = log.read_text()
        if not alive and "ready" not in said:
            raise SandboxError(f"the delay of {name} ended as soon as it was started: {said}")
        return "ready" in said

    wait_until(is_ready, timeout_s=30.0, what=f"the delay of {name}, see {log}")


def remove_delay(state: State, name: str) -> None:
    """Take the program out again, if there is one, and plug the cable, if there is one, into the bridge."""
    owner = state.processes.get(_owner(name))
    if owner is None:
        return
    processes.end(owner, grace_s=0)
    delete(second_cable(state, name)[1])
    plugged = cable(state, name)
    if succeeds(["ip", "link", "show", "dev", plugged]):
        run(["ip", "link", "set", plugged, "master", state.bridge])
    state.disown(_owner(name))


def _owner(name: str) -> str:
    return f"delay-{name}"


# Shaping of a node's cable: less bandwidth (tbf), packets lost (nftables), delay (netem, or a program of ours).


EMPTY_TABLE = "table netdev sandbox {}\ndelete table netdev sandbox\n"
RESOLUTION = 100_000


def shape(
    state: State,
    node: str,
    *,
    bandwidth_mbit: float | None = None,
    loss_percent: float | None = None,
    latency_ms: float | None = None,
) -> None:
    """Give a node's cable these limits in place of those it had; what is None is unlimited.

    Raises ConfigError for values that cannot be.
    """
    _check(bandwidth_mbit, loss_percent, latency_ms)
    _clear(state, node)
    by_kernel = bool(latency_ms) and _kernel_delays(state, node, latency_ms or 0.0)
    if latency_ms and not by_kernel:
        insert(state, node, latency_ms)
    for end in _ends(state, node):
        if bandwidth_mbit is not None:
            parent = ["parent", "1:1"] if by_kernel else ["root"]
            # A bucket smaller than a burst between two timer ticks (4 ms at 250 Hz) would never reach the rate.
            burst = max(65536, int(bandwidth_mbit * 1e6 / 8 * 0.004))
            rate = f"{int(bandwidth_mbit * 1000)}kbit"
            limit = ["handle", "10:", "tbf", "rate", rate, "burst", f"{burst}b", "latency", "100ms"]
            run([*end[:-1], "tc", "qdisc", "add", "dev", end[-1], *parent, *limit])
    if loss_percent:
        _lose(state, node, loss_percent)


def _check(bandwidth_mbit: float | None, loss_percent: float | None, latency_ms: float | None) -> None:
    if bandwidth_mbit is not None and not 0.1 <= bandwidth_mbit <= 100_000:
        raise ConfigError(f"--bandwidth-mbit {bandwidth_mbit:g}", "0.1 to 100000", "--bandwidth-mbit 100")
    if loss_percent is not None and not 0 <= loss_percent <= 100:
        raise ConfigError(f"--loss-percent {loss_percent:g}", "0 to 100", "--loss-percent 1")
    if latency_ms is not None and not 0 <= latency_ms <= 10_000:
        raise ConfigError(f"--latency-ms {latency_ms:g}", "0 to 10000", "--latency-ms 1")
    if loss_percent:
        packages.require(packages.WITH_LOSS)


def _inside(state: State, node: str) -> list[str]:
    return ["nsenter", f"--net=/proc/{state.processes[node].pid}/ns/net"]


def _ends(state: State, node: str) -> Iterator[list[str]]:
    """The two ends of a cable: the words that lead into its namespace, then the interface's name."""
    yield [cable(state, node)]
    yield [*_inside(state, node), "eth0"]


def _clear(state: State, node: str) -> None:
    remove_delay(state, node)
    for *inside, device in _ends(state, node):
        queues = json.loads(run([*inside, "tc", "-json", "qdisc", "show", "dev", device, "root"]))
        if any(queue["kind"] in ("tbf", "netem") for queue in queues):
            run([*inside, "tc", "qdisc", "del", "dev", device, "root"])
    if shutil.which("nft", path=search_path()):
        run([*_inside(state, node), "nft", "-f", "-"], stdin=EMPTY_TABLE)


def _kernel_delays(state: State, node: str, latency_ms: float) -> bool:
    """Delay both directions of a cable by netem; False, and nothing done, where this kernel has none."""
    netem = ["netem", "delay", f"{int(latency_ms * 1000)}us", "limit", "100000"]
    for *inside, device in _ends(state, node):
        try:
            run([*inside, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", *netem])
        except SandboxError as error:
            if "qdisc kind is unknown" not in str(error):
                raise
            return False
    return True


def _lose(state: State, node: str, loss_percent: float) -> None:
    share = f"numgen random mod {RESOLUTION} < {round(loss_percent / 100 * RESOLUTION)} drop"
    chains = "".join(
        f'chain {hook} {{ type filter hook {hook} device "eth0" priority 0; {share}; }}\n'
        for hook in ("ingress", "egress")
    )
    run([*_inside(state, node), "nft", "-f", "-"], stdin=f"{EMPTY_TABLE}table netdev sandbox {{\n{chains}}}\n")
