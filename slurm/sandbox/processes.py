"""Processes that outlive this program: started, recognised later, and ended, never by name and never the wrong one.

A process is known by its number together with its start time and the boot it belongs to, because numbers are used
again. Must not know Slurm.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.sandbox.commands import SandboxError

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
    """The kernel's letter for a process's state (T is stopped, Z a zombie); None where there is none such."""
    fields = _stat_fields(pid)
    return fields[0] if fields is not None else None


def name(pid: int) -> str:
    """Name that a process gives itself; empty where there is none such."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def environment(pid: int) -> dict[str, str]:
    """The variables a process was started with; empty where there is none such, or it is another user's."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in text.split("\0")) if name}


def open_files(pid: int) -> list[Path]:
    """Paths that a process holds open; empty where there is none such, or it is another user's."""
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
    """The process that has this number now; SandboxError where there is none."""
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
