"""Life of a forked rank, from its birth in the fork server to its exit: as if ``python -m MODULE`` had been executed.

Owns all that sets a fork apart from a fresh interpreter: parent, session, streams, signals, environment, command line,
``__main__``, random numbers, exit status. Torch-free by itself. Must not know what is run, nor who asks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import os
import runpy
import signal
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import process as multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from launch.agent.numa import told_cpus
from launch.process import die_with_parent

ALWAYS_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that a fresh Python ignores (Python/pylifecycle.c)."""


@dataclass(frozen=True)
class Start:
    """One rank, as the agent asks for it."""

    module: str
    """Run as ``__main__``."""
    words: tuple[str, ...]
    """Arguments after the name of the module."""
    cwd: str
    env: Mapping[str, str]
    """The whole environment."""
    log: str
    """File that everything printed is appended to."""


def live(start: Start, agent: int, ignored: Collection[int], told: Connection) -> NoReturn:
    """Run a rank to its end in this process, which was forked for it, as a child of ``agent``.

    Args:
        start: what to run, with which environment.
        agent: process id that this process must have as its parent by now.
        ignored: signals that an executed rank would have inherited as ignored.
        told: hears the process id, or the reason why there is no rank.
    """
    status = 1
    try:
        try:
            settle(start, agent, ignored)
        except Exception as error:
            told.send(f"{type(error).__name__}: {error}")
            os._exit(1)
        told.send(os.getpid())
        told.close()
        status = run_main(start.module)
        status = leave() or status
    finally:  # never up through the frames of the agent that this process is a copy of
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status & 0xFF)


def settle(start: Start, agent: int, ignored: Collection[int]) -> None:
    """Give this process what an executed rank gets from its agent and from a fresh Python."""
    if os.getppid() != agent:
        raise ProcessLookupError(f"the parent is process {os.getppid()}, and not the agent, process {agent}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        raise RuntimeError("CUDA was initialized before the fork")
    die_with_parent(agent)
    os.setsid()
    os.chdir(start.cwd)
    open_streams(start.log)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(start.env)
    if cpus := told_cpus(start.env):
        os.sched_setaffinity(0, cpus)
    reset_signals(ignored)
    sys.orig_argv = [sys.executable, "-m", start.module, *start.words]
    sys.argv = ["-m", *start.words]  # runpy puts the path of the module there
    shown = [Path(sys.executable).name, *sys.orig_argv[1:]]
    show_in_proc(shown, {**{k: v for k, v in start.env.items() if before.get(k) != v}, **start.env})
    sys.modules["__main__"] = types.ModuleType("__main__")
    forget(start.module)
    multiprocessing.current_process().authkey = os.urandom(32)
    if "numpy" in sys.modules:  # ``random`` does so by itself in a fork, torch begins with a fixed seed
        sys.modules["numpy"].random.seed()


def open_streams(log: str) -> None:
    """Append to the log what is printed, by C code too, and read nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    take_streams((nothing, printed, printed))


def take_streams(sources: Sequence[int]) -> None:
    """Make open files the three standard streams, and close them. Unbuffered, as PYTHONUNBUFFERED has it."""
    for fd, source in enumerate(sources):
        os.dup2(source, fd)
    for source in {*sources} - {0, 1, 2}:
        os.close(source)
    sys.stdin = sys.__stdin__ = text_stream(0, "stdin")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = text_stream(1, "stdout")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = text_stream(2, "stderr")  # type: ignore[misc]


def text_stream(fd: int, name: str) -> io.TextIOWrapper:
    """Open a standard stream as Python does at its start (create_stdio in Python/pylifecycle.c)."""
    before = getattr(sys, name)
    mode = "w" if fd else "r"
    raw = io.FileIO(fd, mode, closefd=False)
    raw.name = f"<{name}>"
    binary: Any = raw if fd else io.BufferedReader(raw)
    encoding, errors = getattr(before, "encoding", "utf-8"), getattr(before, "errors", "backslashreplace")
    text = io.TextIOWrapper(binary, encoding, errors, newline="\n" if fd else None, write_through=bool(fd))
    text.mode = mode  # type: ignore[misc]
    return text


def reset_signals(ignored: Collection[int]) -> None:
    """Give every signal what it has in a fresh Python, whatever the agent does with it."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in ignored or number in ALWAYS_IGNORED:
            signal.signal(number, signal.SIG_IGN)
        else:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def forget(module: str) -> None:
    """Have ``module`` run as ``__main__`` although it was preloaded; runpy would warn that it is there twice."""
    if not hasattr(sys.modules.get(module), "__path__"):  # a package runs its ``__main__``
        sys.modules.pop(module, None)


def run_main(module: str) -> int:
    """Run a module as ``python -m`` does, and return its exit status; that of a signal is negative."""
    return exit_status(runpy._run_module_as_main, module)  # type: ignore[attr-defined]  # what python -m calls


def exit_status(program: Callable[..., object], *args: object) -> int:
    """Call what Python would run as ``__main__``, and return its exit status; that of a signal is negative."""
    try:
        program(*args)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave() -> int:
    """Do what Python does at its end, up to where it would take itself apart; 120 where output was lost, else 0."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does it in its own forks
    atexit._run_exitfuncs()
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    ctypes.CDLL(None).fflush(None)  # what C code has printed
    return status


def show_in_proc(words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Show a command line and, where the environment was set anew, that environment in /proc, for ps and people.

    Linux shows the memory in which the process found them when it was executed (proc(5), /proc/PID/stat, fields 48 to
    51). What has no room there is cut off.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = [int(field) for field in Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[45:49]]
        write_strings(fields[0], fields[1], words)
        if env is not None:
            write_strings(fields[2], fields[3], [f"{key}={value}" for key, value in env.items()])


def write_strings(begin: int, end: int, strings: Iterable[str]) -> None:
    """Fill memory from ``begin`` up to ``end`` with strings that end in a zero byte each."""
    if 0 < begin < end:
        text = "".join(f"{string}\0" for string in strings).encode(errors="surrogateescape")[: end - begin - 1]
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, text, len(text))
