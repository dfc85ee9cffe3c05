"""One node of the sandbox, switched on and off; and the accounting database."""

from __future__ import annotations

import contextlib
import getpass
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch.errors import ConfigError
from slurm.sandbox import configuration, network, processes
from slurm.sandbox import network as delay
from slurm.sandbox import state as records
from slurm.sandbox.processes import Process, SandboxError, clean_environment, run, wait_until
from slurm.sandbox.state import Endpoint, State

# One node of the sandbox, switched on and off: namespaces of its own around a slurmd, or a slurmd on this host.


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
    delay.remove_delay(state, name)
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


# The accounting of a sandbox: a MariaDB and a slurmdbd of its own, or those of the sandbox that it has joined.


DAEMONS = ("slurmdbd", "mariadbd")
"""In the order in which they are ended."""


def place(state: State) -> None:
    """Choose where slurmdbd listens, or find the one to join; ConfigError if there is none."""
    if state.settings.join:
        state.accounting = _to_join(state)
    elif state.settings.accounting:
        state.accounting = Endpoint(state.controller.address, network.free_port("0.0.0.0"))


def _to_join(state: State) -> Endpoint:
    joined = Path(state.settings.join)
    other = records.load(joined)
    if other is None or not other.started or other.settings.join or other.accounting is None:
        raise ConfigError(
            f"--join {joined}, and no sandbox with accounting is up there",
            "the directory of one that was started with --accounting",
            f"python -m slurm.sandbox up --accounting --dir {joined}",
        )
    if other.settings.cluster_name == state.settings.cluster_name:
        raise ConfigError(
            f"--join {joined}, whose cluster is called {other.settings.cluster_name} as well",
            "a name of its own for each cluster",
            f"--cluster-name {other.settings.cluster_name}_2",
        )
    return other.accounting


def start(state: State) -> None:
    """Start the database and slurmdbd, and wait until they answer; nothing where they are not this sandbox's own."""
    if not state.settings.accounting or state.accounting is None:
        return
    conf = state.slurm_conf.with_name("slurmdbd.conf")
    conf.touch(mode=0o600)  # slurmdbd refuses a file that others can read
    conf.write_text(configuration.slurmdbd_conf(state))
    _start_database(state)
    env = {**environment(state), "MYSQL_UNIX_PORT": str(_socket(state))}
    processes.start(["slurmdbd", "-D"], log=state.log("slurmdbd"), env=env, record=partial(state.own, "slurmdbd"))
    at = (state.accounting.address, state.accounting.port)
    _wait_alive(state, "slurmdbd", lambda: _answers(socket.AF_INET, at))


def _socket(state: State) -> Path:
    return state.directory / "database" / "socket"


def _start_database(state: State) -> None:
    folder = _socket(state).parent
    folder.mkdir(mode=0o700)
    env, user, data = environment(state), getpass.getuser(), f"--datadir={folder}/data"
    # Without grant tables whoever can reach the socket is let in, and the folder around it lets in its owner alone.
    make = ["mariadb-install-db", "--no-defaults", data, f"--user={user}", "--skip-test-db", "--skip-name-resolve"]
    run([*make, "--auth-root-authentication-method=normal"], timeout_s=120.0, env=env)
    command = ["mariadbd", "--no-defaults", data, f"--user={user}", f"--socket={_socket(state)}", "--skip-networking"]
    command += ["--skip-grant-tables", f"--pid-file={folder}/pid", f"--tmpdir={folder}"]
    # What slurmdbd complains of otherwise; and nothing in here has to outlive a power cut.
    command += ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
    processes.start(command, log=state.log("mariadbd"), env=env, record=partial(state.own, "mariadbd"))
    _wait_alive(state, "mariadbd", lambda: _answers(socket.AF_UNIX, str(_socket(state))))


def _wait_alive(state: State, daemon: str, answers: Callable[[], bool]) -> None:
    def ready() -> bool:
        if not state.processes[daemon].alive():
            raise SandboxError(f"{daemon} ended instead of running on")
        return answers()

    wait_until(ready, timeout_s=120.0, what=f"{daemon} to answer")


def _answers(family: int, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def enter(state: State, slurm: Callable[..., str]) -> None:
    """Make the cluster known to slurmdbd, before its controller says where it is. ``slurm`` runs a command there."""
    if state.accounting is None:
        return
    name = state.settings.cluster_name
    if name not in slurm("sacctmgr", "--noheader", "--parsable2", "show", "clusters", "format=cluster").split():
        slurm("sacctmgr", "--immediate", "add", "cluster", name)


def is_known(state: State, slurm: Callable[..., str]) -> bool:
    """True where slurmdbd can tell others where the controller is; true if there is no slurmdbd."""
    if state.accounting is None:
        return True
    words = ("show", "clusters", state.settings.cluster_name, "format=controlport")
    return slurm("sacctmgr", "--noheader", "--parsable2", *words).strip() not in ("", "0")
