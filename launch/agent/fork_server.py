"""The fork server of a node: a process that imports once what every rank imports, and forks the ranks.

The file follows the life of a rank: the agent requests a fork (``ForkServer``), the server forks (``serve``), the rank
runs (``run_rank``). A forked rank behaves as if ``python -m MODULE`` had been executed. The last part binds ranks to
CPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing import process as multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from launch.process import die_with_parent, lasting_imports
from launch.runs.environment import Gpu

# The agent's end.


PRELOAD_S = 600.0
"""Longest wait for the imports of the server."""
LOOK_S = 0.2
FORK_S = 60.0
"""Longest wait for one rank; it takes some milliseconds."""
EARLY = ("PYTHON", "LD_", "GLIBC_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_")
"""Prefixes of variables that Python and its libraries read at their start: in a fork it is too late to set them."""
LATE = ("PYTHONUNBUFFERED", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_NCCL_", "TORCH_FR_")
"""Prefixes of variables that are read later, or that a forked rank obeys anyway."""
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h


@dataclass(frozen=True)
class Start:
    """Request of the agent for one rank."""

    module: str
    """Module that runs as ``__main__``."""
    words: tuple[str, ...]
    """Arguments after the name of the module."""
    cwd: str
    env: Mapping[str, str]
    """The whole environment."""
    log: str
    """File to which the output is appended."""


class ForkedProcess:
    """A rank that was forked: ``subprocess.Popen`` as far as torch elastic uses it. A child of this process."""

    def __init__(self, args: Sequence[str], pid: int) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, that of a signal negative; None while the rank runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the rank has ended.

        Raises:
            subprocess.TimeoutExpired: the rank has not ended after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the rank has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """The server of this process, for the length of a ``with`` block. To be made while there is one thread.

    Args:
        preload: modules that the server imports.
        code: state of the code that is imported; the caller compares it with the files.
    """

    def __init__(self, preload: Sequence[str], code: object = None) -> None:
        self.code = code
        self._env = dict(os.environ)
        self._cwd = str(Path.cwd())
        self._is_ready = False
        self._connection, server_end = Pipe()
        agent = os.getpid()
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # the kernel would forget how ranks ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        assert threading.active_count() == 1, "a lock that another thread holds would be held in the fork for ever"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid: int | None = os.fork()
        """Process id; None if there is no server any more."""
        if self.pid == 0:
            serve(server_end, preload, agent)
        server_end.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        """End the server. Ranks that it has forked continue."""
        pid, self.pid = self.pid, None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._connection.close()

    def wait_ready(self, is_called_off: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything is imported, or until ``is_called_off`` returns True.

        If an import fails, ranks are executed, and their logs have the reason.
        """
        deadline = time.monotonic() + PRELOAD_S
        while self.pid is not None and not self._is_ready and not is_called_off():
            if self._connection.poll(LOOK_S) or time.monotonic() > deadline:
                self._is_ready = self._receive(0.0) is not None

    def start(self, args: Sequence[str], env: Mapping[str, str], cwd: str, log: str) -> ForkedProcess | None:
        """Fork a rank.

        Args:
            args: program and arguments.
            env: the whole environment.
            cwd: working directory.
            log: file to which the output is appended.

        Returns:
            None if the rank has to be executed. Then the program is not ``python -m``, or the working directory or
            environment differs from that of the imports, or the server is not ready, or gone.
        """
        if not self._is_ready or self.pid is None:
            return None
        early = {key for key in {**self._env, **env} if key.startswith(EARLY) and not key.startswith(LATE)}
        why = ", ".join(sorted(key for key in early if self._env.get(key) != env.get(key)))
        if len(args) < 3 or tuple(args[:2]) != (sys.executable, "-m"):
            why = "not python -m"
        elif cwd != self._cwd:
            why = f"in {cwd}"
        if why:
            print(f"launch: rank {env.get('RANK')} is executed, not forked: {why}", file=sys.stderr)
            return None
        with adopting():
            pid = self._receive(FORK_S, Start(args[2], tuple(args[3:]), cwd, dict(env), log))
        return None if pid is None else ForkedProcess(args, pid)

    def _receive(self, timeout_s: float, start: Start | None = None) -> int | None:
        """Receive the process id of the server, or of a rank to ``start``; None if the server is given up."""
        try:
            if start is not None:
                self._connection.send(start)
            answer = self._connection.recv() if self._connection.poll(timeout_s) else "no answer in time"
        except InterruptedError:  # a request to stop
            raise
        except (OSError, EOFError):
            answer = "it is gone"
        if isinstance(answer, int):
            return answer
        print(f"launch: from now on ranks are executed, not forked; the fork server: {answer}", file=sys.stderr)
        self.__exit__()
        return None


@contextmanager
def adopting() -> Iterator[None]:
    """Become the parent of descendants whose parent ends meanwhile."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:  # processes that killed ranks leave behind are not for the agent to reap
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


# The server's end.


OUTLIVED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that reach a whole job or terminal; the server ends with its agent."""


def serve(requests: Connection, preload: Sequence[str], agent: int) -> NoReturn:
    """Import, send the result, then fork the requested ranks until the agent is gone."""
    try:
        die_with_parent(agent)
        ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
        for number in OUTLIVED:
            signal.signal(number, signal.SIG_IGN)
        release_files(keep=requests.fileno())
        show_in_proc([Path(sys.executable).name, "-m", __name__])
        problem = import_all(preload)
        requests.send(problem or os.getpid())
        while problem is None:
            start = requests.recv()
            try:
                between = os.fork()
            except OSError as error:  # no memory, or too many processes
                requests.send(str(error))
                continue
            if between == 0:
                fork_rank(start, agent, ignored, requests)
            os.waitpid(between, 0)
    except EOFError:
        pass
    finally:  # never up through the frames of the agent that this process is a copy of
        os._exit(0)


def release_files(keep: int) -> None:
    """Close the files that the agent has open, as its connections. Objects may still close the same numbers later."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd not in (keep, nothing):
            with contextlib.suppress(OSError):
                os.fstat(fd)  # raises for that of the listing itself
                os.dup2(nothing, fd, inheritable=False)


def import_all(modules: Sequence[str]) -> str | None:
    """Import modules. Returns why ranks cannot be forked afterwards: an import failed, or has started threads."""
    cwd = str(Path.cwd())
    if not sys.flags.safe_path and cwd not in sys.path:
        sys.path.insert(0, cwd)  # as ``python -m`` does
    try:
        with lasting_imports():
            for module in modules:
                importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        return f"an import has started threads ({', '.join(threads) or 'of a library'})"
    return None


def fork_rank(start: Start, agent: int, ignored: Collection[int], requests: Connection) -> NoReturn:
    """Fork the rank from a process between it and the server, and end: the agent then becomes the rank's parent."""
    between = os.getpid()
    try:
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            os.sched_yield()
        run_rank(start, agent, ignored, requests)
    except OSError as error:
        requests.send(str(error))
    finally:
        os._exit(1)


# The rank.


ALWAYS_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that a fresh Python ignores (Python/pylifecycle.c)."""


def run_rank(start: Start, agent: int, ignored: Collection[int], requests: Connection) -> NoReturn:
    """Run a rank to its end in this process, which was forked for it, as a child of ``agent``.

    Args:
        start: program and environment.
        agent: process id that must be this process's parent by now.
        ignored: signals that an executed rank would have inherited as ignored.
        requests: receives the process id, or the reason why there is no rank.
    """
    status = 1
    try:
        try:
            become_rank(start, agent, ignored)
        except Exception as error:
            requests.send(f"{type(error).__name__}: {error}")
            os._exit(1)
        requests.send(os.getpid())
        requests.close()
        status = run_main(start.module)
        status = leave() or status
    finally:  # never up through the frames of the agent that this process is a copy of
        end_with(status)


def become_rank(start: Start, agent: int, ignored: Collection[int]) -> None:
    """Give this process the state of an executed rank: what it gets from its agent and from a fresh Python."""
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
    if cpus := cpus_in(start.env):
        os.sched_setaffinity(0, cpus)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored or number in ALWAYS_IGNORED else default)
    sys.orig_argv = [sys.executable, "-m", start.module, *start.words]
    sys.argv = ["-m", *start.words]  # runpy puts the path of the module there
    shown = [Path(sys.executable).name, *sys.orig_argv[1:]]
    show_in_proc(shown, {**{k: v for k, v in start.env.items() if before.get(k) != v}, **start.env})
    sys.modules["__main__"] = types.ModuleType("__main__")
    multiprocessing.current_process().authkey = os.urandom(32)
    if "numpy" in sys.modules:  # ``random`` does so by itself in a fork, torch begins with a fixed seed
        sys.modules["numpy"].random.seed()


def open_streams(log: str) -> None:
    """Append all output to the log, that of C code too, and read nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    take_streams((nothing, printed, printed))


def take_streams(sources: Sequence[int]) -> None:
    """Make open files the three standard streams, and close them. Unbuffered, as with PYTHONUNBUFFERED."""
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


def run_main(module: str) -> int:
    """Run a module as ``python -m`` does, also one that was imported before; returns its exit status."""
    if not hasattr(sys.modules.get(module), "__path__"):  # a package runs its ``__main__``
        sys.modules.pop(module, None)  # runpy would warn that the module is there twice
    return exit_status(runpy._run_module_as_main, module)  # type: ignore[attr-defined]  # as python -m does


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
    """Do the work of Python's end, except for the destruction of its objects. Returns 120 if output is lost, else 0."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does it in its own forks
    atexit._run_exitfuncs()
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    ctypes.CDLL(None).fflush(None)  # the output of C code
    return status


def end_with(status: int) -> NoReturn:
    """End this process at once with an exit status; a negative one is a signal."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def show_in_proc(words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Show a command line, and a new environment if there is one, in /proc, for ps and people.

    Linux shows the memory that held them when the process was executed (proc(5), /proc/PID/stat, fields 48 to 51).
    Strings without room there are cut off.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = [int(field) for field in Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[45:49]]
        shown = [(fields[:2], words)]
        if env is not None:
            shown.append((fields[2:], [f"{key}={value}" for key, value in env.items()]))
        for (begin, end), strings in shown:
            if 0 < begin < end:
                text = "".join(f"{string}\0" for string in strings).encode(errors="surrogateescape")
                ctypes.memset(begin, 0, end - begin)
                ctypes.memmove(begin, text, min(len(text), end - begin - 1))


# CPUs of each rank near its GPU: those of the NUMA node of the GPU, as far as Linux and the driver know it.


VARIABLE = "LAUNCH_CPUS"
"""CPUs that a rank is bound to, in its environment."""
DEVICES = Path("/sys/bus/pci/devices")


def cpus_of_ranks(
    ranks: int, gpus: Sequence[Gpu], allowed: Collection[int], devices: Path = DEVICES
) -> list[frozenset[int]] | None:
    """CPUs for each rank of a node, by local rank, out of those this process may use; None to bind no rank.

    None if a GPU or its place is not known, or if all CPUs are near. None also if some GPUs have fewer near CPUs than
    ranks: a job that shares its node may have CPUs of another socket.
    """
    if len(gpus) < ranks or ranks == 0:
        return None
    near = []
    for gpu in gpus[:ranks]:
        text = ""
        with contextlib.suppress(OSError):
            text = (devices / gpu.bus / "local_cpulist").read_text() if gpu.bus is not None else ""
        near.append(frozenset(parse_cpus(text)) & frozenset(allowed))
    if any(len(cpus) < count for cpus, count in Counter(near).items()) or set(near) == {frozenset(allowed)}:
        return None
    return near


def parse_cpus(text: str) -> Iterator[int]:
    """The CPUs of a list as Linux writes it: ``0-3,8``."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def cpus_in(environment: Mapping[str, str]) -> frozenset[int]:
    """CPUs that a rank with this environment is bound to; empty if it is not bound."""
    return frozenset(parse_cpus(environment.get(VARIABLE, "")))


@contextmanager
def bound(cpus: Collection[int]) -> Iterator[None]:
    """Start processes in a ``with`` block that run on these CPUs only; on all CPUs if ``cpus`` is empty."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)  # of this thread, and of the processes that it starts
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)
