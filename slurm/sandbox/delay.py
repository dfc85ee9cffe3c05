"""The delay of a node's cable where the kernel has no netem: a program carries the frames.

Owns that program and the piece of cable it needs: the node's cable is taken off the bridge, a second one is plugged in
there, and the program stands between the two. Must not know Slurm.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from slurm.sandbox import network, processes
from slurm.sandbox.commands import SandboxError, clean_environment, run, succeeds, wait_until
from slurm.sandbox.state import State

PROGRAM = Path(__file__).with_name("delay_line.py")


def insert(state: State, name: str, latency_ms: float) -> None:
    """Put the program into a node's cable."""
    ours, bridged = network.second_cable(state, name)
    run(["ip", "link", "add", bridged, "type", "veth", "peer", "name", ours])
    for interface in (network.cable(state, name), ours):
        # They carry frames for others: the host, whose address is on the bridge, must not answer for it here.
        Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore").write_text("8")
    run(["ip", "link", "set", ours, "up"])
    run(["ip", "link", "set", bridged, "master", state.bridge, "up"])
    run(["ip", "link", "set", network.cable(state, name), "nomaster"])
    log = state.log(_owner(name))
    log.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM), network.cable(state, name), ours, f"{latency_ms:g}"]
    record = partial(state.own, _owner(name))
    line = processes.start(command, log=log, env=clean_environment(), record=record)

    def is_ready() -> bool:
        alive = line.alive()
        said = log.read_text()
        if not alive and "ready" not in said:
            raise SandboxError(f"the delay of {name} ended as soon as it was started: {said}")
        return "ready" in said

    wait_until(is_ready, timeout_s=30.0, what=f"the delay of {name}, see {log}")


def remove(state: State, name: str) -> None:
    """Take the program out again, where there is one, and plug the cable, where there is one, into the bridge."""
    owner = state.processes.get(_owner(name))
    if owner is None:
        return
    processes.end(owner, grace_s=0)
    network.delete(network.second_cable(state, name)[1])
    cable = network.cable(state, name)
    if succeeds(["ip", "link", "show", "dev", cable]):
        run(["ip", "link", "set", cable, "master", state.bridge])
    state.disown(_owner(name))


def _owner(name: str) -> str:
    return f"delay-{name}"
