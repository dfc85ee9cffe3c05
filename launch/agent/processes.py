"""State of a process of this machine, from /proc/PID/stat and /proc/PID/status. Torch-free.

Owns the layout of these files. Must not know whose process it is, nor what is made of the answer.
"""

from __future__ import annotations

from pathlib import Path


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, also where its parent has not asked after it yet."""
    fields = _fields(pid)
    return fields is None or fields[0] in "ZX"


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by a signal (SIGSTOP), or by a debugger."""
    fields = _fields(pid)
    return fields is not None and fields[0] in "Tt"


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which with its id names it for good. None: not there."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def is_pending(pid: int, number: int) -> bool:
    """Tell whether a process was sent a signal that none of its threads has begun to handle."""
    return _has_signal(Path(f"/proc/{pid}/status"), "ShdPnd", number)


def threads_blocking(pid: int, number: int) -> set[str]:
    """Ids of the threads of a process that block a signal, as a thread also does while it handles that signal."""
    threads = Path(f"/proc/{pid}/task").glob("*/status")
    return {path.parent.name for path in threads if _has_signal(path, "SigBlk", number)}


def _has_signal(status: Path, field: str, number: int) -> bool:
    """Tell whether a signal is in a set of signals of a status file: hexadecimal, with the lowest bit for signal 1."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith(f"{field}:"))


def _fields(pid: int) -> list[str] | None:
    """The fields from the third on, which is the state: the second, a name in parentheses, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
