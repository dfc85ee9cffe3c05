"""Shaping of a node's cable: less bandwidth (tbf), packets lost (nftables), delay (netem, or a program of ours).

Owns the words for tc and nft. Must not know Slurm. Delay and loss hold for each direction, so a round trip meets both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

from launch.errors import ConfigError
from slurm.sandbox import delay, packages
from slurm.sandbox.commands import SandboxError, run, search_path
from slurm.sandbox.network import cable
from slurm.sandbox.state import State

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
        delay.insert(state, node, latency_ms)
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
    delay.remove(state, node)
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
