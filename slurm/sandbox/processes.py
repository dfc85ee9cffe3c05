"""Programs of the system and processes that outlive this one: checked for, started, recognised later, ended."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError

# The one way to run a program of the system: with a timeout, and with its own words in the error.


# Debian keeps daemons and network tools here, and leaves these out of an ordinary user's PATH.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class SandboxError(RuntimeError):
    """Something on this machine did not do what the sandbox needs; the message ends with what that something said."""


def search_path() -> str:
    """The user's PATH, followed by the directories of system programs."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_DIRECTORIES])


def clean_environment(**extra: str) -> dict[str, str]:
    """An environment for daemons: nothing of the caller's, so a sandbox started inside a job behaves like any other."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TZ") if name in os.environ}
    return {**kept, "PATH": search_path(), **extra}


def run(
    args: Sequence[str], *, timeout_s: float = 30.0, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> str:
    """Run a program to its end and return what it printed.

    Raises SandboxError where it is missing, takes longer than ``timeout_s``, or ends with a status other than 0.
    """
    shown = " ".join(args)
    environment = dict(env) if env is not None else {**os.environ, "PATH": search_path()}
    try:
        done = subprocess.run(
            list(args), capture_output=True, text=True, timeout=timeout_s, env=environment, input=stdin, check=False
        )
    except FileNotFoundError as error:
        raise SandboxError(f"{args[0]}: not found in {environment.get('PATH', '')}") from error
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"`{shown}` did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip() or "it printed nothing"
        raise SandboxError(f"`{shown}` ended with status {done.returncode}: {words}")
    return done.stdout


def succeeds(args: Sequence[str], *, timeout_s: float = 30.0) -> bool:
    """True where a program can be run and ends with status 0."""
    try:
        run(args, timeout_s=timeout_s)
    except SandboxError:
        return False
    return True


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, what: str | Callable[[], str], interval_s: float = 0.05
) -> None:
    """Poll until the condition holds; SandboxError naming ``what`` (text, or a function for it) after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"waited {timeout_s:g} s in vain for {what if isinstance(what, str) else what()}")
        time.sleep(interval_s)


# Requirements of the machine, checked before anything is started: Debian's packages, and the rights for namespaces.


# program -> Debian package
EVERYWHERE = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
    "sinfo": "slurm-client",
    "squeue": "slurm-client",
    "scontrol": "slurm-client",
    "scancel": "slurm-client",
    "munged": "munge",
    "setsid": "util-linux",
}
WITH_NAMESPACES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
    "ip": "iproute2",
    "tc": "iproute2",
}
WITH_LOSS = {"nft": "nftables"}
WITH_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
    "sacctmgr": "slurm-client",
}


def missing(programs: dict[str, str]) -> list[str]:
    """The Debian packages, in order and once each, of those programs that are not on this machine."""
    path = search_path()
    return sorted({package for program, package in programs.items() if shutil.which(program, path=path) is None})


def require(programs: dict[str, str]) -> None:
    """Refuse with the one command that installs what is missing; ConfigError."""
    packages = missing(programs)
    if packages:
        raise ConfigError(
            found=f"this machine lacks Debian's {', '.join(packages)}",
            expected="Slurm, MUNGE and the programs that build the nodes",
            fix=f"apt-get install --no-install-recommends {' '.join(packages)}",
        )


def why_no_namespaces(probe_interface: str) -> str | None:
    """Reason for which nodes cannot be hosts of their own here, in the kernel's words; None where they can.

    Tries both rights that are needed: new namespaces with mounts in them, and a bridge (``probe_interface``, removed
    again) in the network namespace that this process is in.
    """
    mounts = "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys && ip link set lo up"
    try:
        run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", mounts])
        run(["ip", "link", "add", probe_interface, "type", "bridge"])
        run(["ip", "link", "del", probe_interface])
    except SandboxError as error:
        return str(error)
    return None


# Processes that outlive this program: started, recognised later, and ended, never by name and never the wrong one.


# The program runs only after its number was recorded: a caller that dies in between closes the pipe, and `read` fails.
# The shell says its number as the mount of /proc that it sees has it, and exec keeps number and start time. It says so
# last, when the log is open: whoever has started a program may read its log at once.
WAIT_FOR_GO = """
read -r pid _ < /proc/self/stat
exec 3>&1 >> "$1" 2>&1; shift
echo "$pid" >&3; exec 3>&-
read -r go && [ "$go" = go ] && exec "$@" < /dev/null
"""


@dataclass(frozen=True)
class Process:
    """One process of this machine; ``start_ticks`` is field 22 of /proc/PID/stat, ``boot`` the kernel's boot id."""

    pid: int
    start_ticks: int
    boot: str

    def alive(self) -> bool:
        """True while this very process runs; one that is dead and not yet reaped does not."""
        return self.boot == boot_id() and _start_ticks(self.pid) == self.start_ticks


def boot_id() -> str:
    """The kernel's identity for the time since this machine started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (the second, the name, may hold blanks)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields is not None and fields[0] not in "ZX" else None


def state_letter(pid: int) -> str | None:
    """The kernel's letter for a process's state (T is stopped, Z a zombie); None if there is none such."""
    fields = _stat_fields(pid)
    return fields[0] if fields is not None else None


def name(pid: int) -> str:
    """Name that a process gives itself; empty if there is none such."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def environment(pid: int) -> dict[str, str]:
    """The variables a process was started with; empty if there is none such, or it is another user's."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in text.split("\0")) if name}


def open_files(pid: int) -> list[Path]:
    """Paths that a process holds open; empty if there is none such, or it is another user's."""
    found = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            found.append(entry.readlink())
    return found


def all_pids() -> list[int]:
    """The numbers of all processes that /proc shows."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def children(pid: int) -> list[int]:
    """The numbers of the living children of a process."""
    found = []
    for candidate in all_pids():
        fields = _stat_fields(candidate)
        if fields is not None and int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(candidate)
    return found


def identify(pid: int) -> Process:
    """The process that has this number now; SandboxError if there is none."""
    ticks = _start_ticks(pid)
    if ticks is None:
        raise SandboxError(f"process {pid} ended as soon as it was started")
    return Process(pid, ticks, boot_id())


def start(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    record: Callable[[Process], None],
    inside: Sequence[str] = (),
) -> Process:
    """Start a program in a session of its own, not as a child of this one, with its output appended to ``log``.

    The log is there on return; SandboxError where it cannot be written. ``inside`` is a prefix such as
    ``unshare --net``; ``record`` is called with the process in those namespaces before the program itself runs, and the
    program never runs if it raises.
    """
    shell = ["setsid", "--fork", *inside, "sh", "-c", WAIT_FOR_GO, "sh", str(log), *command]
    with subprocess.Popen(
        shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(env), text=True, cwd="/"
    ) as launcher:
        assert launcher.stdin is not None and launcher.stdout is not None and launcher.stderr is not None
        line = launcher.stdout.readline()
        if not line.strip().isdigit():
            raise SandboxError(f"`{' '.join(command)}` did not start: {line}{launcher.stderr.read()}".strip())
        process = identify(int(line))
        record(process)
        launcher.stdin.write("go\n")
    return process


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to this very process; whether it was there to get it."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # Only after the handle is held is the identity checked, so the number cannot change hands in between.
        if not process.alive():
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def wait_gone(process: Process, timeout_s: float) -> bool:
    """Wait for the end of a process that need not be a child; whether it came within ``timeout_s``."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.alive():
            return True
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def end(process: Process, *, grace_s: float) -> None:
    """End a process: SIGTERM and ``grace_s`` for it to leave (none where 0), then SIGKILL; SandboxError if it stays."""
    if grace_s > 0 and send(process, signal.SIGTERM) and wait_gone(process, grace_s):
        return
    send(process, signal.SIGKILL)
    if not wait_gone(process, 20.0):
        raise SandboxError(f"process {process.pid} is still there 20 s after SIGKILL")
