"""The accounting of a sandbox: a MariaDB and a slurmdbd of its own, or those of the sandbox that it has joined.

Owns both daemons and the sandbox's entry in the database. The database is reached through a Unix socket in the
sandbox's directory alone, which only its user can enter, so it asks for no password and takes no port.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch.errors import ConfigError
from slurm.sandbox import configuration, network, node, processes
from slurm.sandbox import state as records
from slurm.sandbox.commands import SandboxError, run, wait_until
from slurm.sandbox.state import Endpoint, State

DAEMONS = ("slurmdbd", "mariadbd")
"""In the order in which they are ended."""


def place(state: State) -> None:
    """Choose where slurmdbd listens, or find the one to join; ConfigError where there is none."""
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
    env = {**node.environment(state), "MYSQL_UNIX_PORT": str(_socket(state))}
    processes.start(["slurmdbd", "-D"], log=state.log("slurmdbd"), env=env, record=partial(state.own, "slurmdbd"))
    at = (state.accounting.address, state.accounting.port)
    _wait_alive(state, "slurmdbd", lambda: _answers(socket.AF_INET, at))


def _socket(state: State) -> Path:
    return state.directory / "database" / "socket"


def _start_database(state: State) -> None:
    folder = _socket(state).parent
    folder.mkdir(mode=0o700)
    env, user, data = node.environment(state), getpass.getuser(), f"--datadir={folder}/data"
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
    """True where slurmdbd can tell others where the controller is; true where there is no slurmdbd."""
    if state.accounting is None:
        return True
    words = ("show", "clusters", state.settings.cluster_name, "format=controlport")
    return slurm("sacctmgr", "--noheader", "--parsable2", *words).strip() not in ("", "0")
