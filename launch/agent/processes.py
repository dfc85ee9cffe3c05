"""State of a process of this machine, from /proc/PID/stat. Torch-free.

Owns the layout of that file. Must not know whose process it is, nor what is made of the answer.
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


def _fields(pid: int) -> list[str] | None:
    """The fields from the third on, which is the state: the second, a name in parentheses, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
