"""One node of the sandbox, switched on and off: namespaces of its own around a slurmd, or a slurmd on this host.

Must not know why a node is switched on or off.
"""

from __future__ import annotations

import contextlib
import signal
from functools import partial
from pathlib import Path

from slurm.sandbox import delay, network, processes
from slurm.sandbox.commands import SandboxError, clean_environment, wait_until
from slurm.sandbox.processes import Process
from slurm.sandbox.state import State

INIT = Path(__file__).with_name("node_init.sh")
MARK = "SLURM_SANDBOX"


def environment(state: State) -> dict[str, str]:
    """The environment of every daemon; the last variable marks slurmd's children as ours."""
    return clean_environment(SLURM_CONF=str(state.slurm_conf), **{MARK: str(state.directory)})


def switch_on(state: State, name: str) -> None:
    """Start a node and record it; slurmd registers with the controller by itself."""
    (state.directory / "spool" / name).mkdir(parents=True, exist_ok=True)
    if state.mode == "one-host":
        record = partial(state.own, name)
        processes.start(["slurmd", "-D", "-N", name], log=state.log(name), env=environment(state), record=record)
        return

    def record_and_plug_in(process: Process) -> None:
        state.own(name, process)
        network.plug_in(state, name, process.pid)

    address = f"{state.nodes[name].address}/24"
    inner = ["unshare", "--pid", "--fork", "--kill-child", "sh", str(INIT), str(state.directory), name, address]
    outer = ["unshare", "--net", "--uts", "--mount", "--ipc"]
    processes.start(inner, log=state.log(name), env=environment(state), record=record_and_plug_in, inside=outer)


def is_on(state: State, name: str) -> bool:
    """True where a node's processes run (frozen or not)."""
    return name in state.processes and state.processes[name].alive()


def process_one(state: State, name: str) -> Process | None:
    """Process 1 of a node, as this machine numbers it; None where the node is off."""
    owner = state.processes.get(name)
    if owner is None or not owner.alive():
        return None
    for pid in processes.children(owner.pid):
        with contextlib.suppress(SandboxError):
            return processes.identify(pid)
    return None


def switch_off(state: State, name: str) -> None:
    """Kill a node at once with everything that runs on it; nothing where it is off."""
    first = process_one(state, name) if state.mode == "namespaces" else None
    if first is not None:
        # The kernel ends process 1 only after every process of its namespace has ended.
        processes.end(first, grace_s=0)
    owner = state.processes.get(name)
    if owner is not None:
        # slurmd that is still registering ignores SIGTERM, so nothing waits for it to be polite.
        processes.end(owner, grace_s=0)
    delay.remove(state, name)
    state.disown(name)


def members(state: State, name: str) -> list[int]:
    """The numbers of all processes in a node's process namespace."""
    first = process_one(state, name)
    if first is None:
        return []
    inside = _namespace(first.pid)
    return [pid for pid in processes.all_pids() if inside is not None and _namespace(pid) == inside]


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def set_frozen(state: State, name: str, *, frozen: bool) -> None:
    """Stop or continue every process of a node; its network still answers, as that of a hung machine does.

    Repeats until none is left to do, because a process that still runs may start others meanwhile.
    """
    number = signal.SIGSTOP if frozen else signal.SIGCONT

    def all_done() -> bool:
        letters = {pid: processes.state_letter(pid) for pid in members(state, name)}
        pending = [
            pid for pid, letter in letters.items() if letter not in (None, "Z", "X") and (letter == "T") != frozen
        ]
        for pid in pending:
            with contextlib.suppress(SandboxError):
                processes.send(processes.identify(pid), number)
        return not pending

    wait_until(all_done, timeout_s=20.0, what=f"the processes of {name} to {'stop' if frozen else 'go on'}")


def announce(state: State, name: str) -> None:
    """Let a node's slurmd register again; left alone, the controller asks a lost node only after a minute or so."""
    for pid in members(state, name):
        if processes.name(pid) == "slurmd":
            with contextlib.suppress(SandboxError):
                processes.send(processes.identify(pid), signal.SIGHUP)


def is_frozen(state: State, name: str) -> bool:
    """True where process 1 of a node is stopped."""
    first = process_one(state, name)
    return first is not None and processes.state_letter(first.pid) == "T"
