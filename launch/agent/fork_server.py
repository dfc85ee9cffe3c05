"""The fork server of a node: a process that has imported once what every rank imports, and of which ranks are forked.

A rank that Python is started for spends seconds on the import of torch and of the program, and asks the filesystem for
some 40,000 names; a fork has all of it. The agent forks the server while it is a single thread, and hands each start
of a rank to it, those of a restart in place too. A rank becomes the agent's own child: the agent is a subreaper
(prctl(2)) while the process between server and rank ends. So it lives without the server, and dies with the agent.

Owns the server, what its imports must not have begun, and which starts must be executed instead. Torch-free by
itself. Must not know what is run. The life of a forked rank is ``launch.agent.forked_rank``'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from launch.agent import forked_rank
from launch.agent.forked_rank import Start
from launch.process import die_with_parent, lasting_imports

PRELOAD_S = 600.0
"""Longest wait for the imports of the server."""
LOOK_S = 0.2
FORK_S = 60.0
"""Longest wait for one rank; it takes some milliseconds."""
EARLY = ("PYTHON", "LD_", "GLIBC_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_")
"""Beginnings of variables that Python and its libraries read at their start, when it is too late to set them."""
LATE = ("PYTHONUNBUFFERED", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_NCCL_", "TORCH_FR_")
"""Beginnings of those that are read later, or are obeyed by a forked rank anyway."""
OUTLIVED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that reach a whole job or terminal; the server leaves with its agent."""
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h


class ForkedProcess:
    """A rank that was forked: ``subprocess.Popen`` as far as torch elastic uses it. A child of this process."""

    def __init__(self, args: Sequence[str], pid: int) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, that of a signal negative; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server of this process, for the length of a ``with`` block. To be made while there is one thread.

    Args:
        preload: modules that the server imports.
        code: state of the code that is imported, for whoever wants to know whether it is still that of the files.
    """

    def __init__(self, preload: Sequence[str], code: object = None) -> None:
        self.code = code
        self._env = dict(os.environ)
        self._cwd = str(Path.cwd())
        self._is_ready = False
        self._connection, theirs = Pipe()
        agent = os.getpid()
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # the kernel would forget how ranks ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        assert threading.active_count() == 1, "a lock that another thread holds would be held in the fork for ever"
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid: int | None = os.fork()
        if self._pid == 0:
            serve(theirs, preload, agent)
        theirs.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id; None where there is no server any more."""
        return self._pid

    def wait_ready(self, is_called_off: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything is imported, or it ``is_called_off``.

        Where an import fails ranks are executed, and tell the reason in their logs.
        """
        deadline = time.monotonic() + PRELOAD_S
        while self._pid is not None and not self._is_ready and not is_called_off():
            if self._connection.poll(LOOK_S) or time.monotonic() > deadline:
                self._is_ready = self._hear(0.0) is not None

    def start(self, args: Sequence[str], env: Mapping[str, str], cwd: str, log: str) -> ForkedProcess | None:
        """Fork a rank.

        Args:
            args: program and arguments.
            env: the whole environment.
            cwd: working directory.
            log: file that is appended to.

        Returns:
            None where it has to be executed: another program than ``python -m``, another working directory or
            environment than modules were imported with, or a server that is not ready, or gone.
        """
        if not self._is_ready or self._pid is None:
            return None
        why = self.why_executed(args, env, cwd)
        if why is not None:
            print(f"launch: rank {env.get('RANK')} is executed, not forked: {why}", file=sys.stderr)
            return None
        with adopting():
            pid = self._hear(FORK_S, Start(args[2], tuple(args[3:]), cwd, dict(env), log))
        return None if pid is None else ForkedProcess(args, pid)

    def why_executed(self, args: Sequence[str], env: Mapping[str, str], cwd: str) -> str | None:
        """Name what makes a fork another thing than a fresh interpreter; None where they are the same."""
        if len(args) < 3 or tuple(args[:2]) != (sys.executable, "-m"):
            return "not python -m"
        if cwd != self._cwd:
            return f"in {cwd}"
        early = {key for key in {**self._env, **env} if key.startswith(EARLY) and not key.startswith(LATE)}
        return ", ".join(sorted(key for key in early if self._env.get(key) != env.get(key))) or None

    def close(self) -> None:
        """End the server. Ranks that it has forked go on."""
        pid, self._pid = self._pid, None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._connection.close()

    def _hear(self, timeout_s: float, start: Start | None = None) -> int | None:
        """Hear a process id from the server, its own or that of a rank to ``start``; None where it is given up."""
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
        self.close()
        return None


@contextmanager
def adopting() -> Iterator[None]:
    """Become the parent of descendants whose parent ends meanwhile."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:  # what ranks leave behind when they are killed is not for the agent to reap
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def serve(requests: Connection, preload: Sequence[str], agent: int) -> NoReturn:
    """Import, tell how that went, then fork what is asked for until the agent is gone."""
    try:
        die_with_parent(agent)
        ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
        for number in OUTLIVED:
            signal.signal(number, signal.SIG_IGN)
        release_files(keep=requests.fileno())
        forked_rank.show_in_proc([Path(sys.executable).name, "-m", __name__])
        problem = import_all(preload) or why_not_to_fork()
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


def fork_rank(start: Start, agent: int, ignored: Collection[int], told: Connection) -> NoReturn:
    """Fork the rank, and end between it and the server, so that the agent becomes its parent."""
    between = os.getpid()
    try:
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            os.sched_yield()
        forked_rank.live(start, agent, ignored, told)
    except OSError as error:
        told.send(str(error))
    finally:
        os._exit(1)


def release_files(keep: int) -> None:
    """Let go of what the agent has open, as its connections. The numbers stay taken: objects may still close them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd not in (keep, nothing):
            with contextlib.suppress(OSError):
                os.fstat(fd)  # raises for that of the listing itself
                os.dup2(nothing, fd, inheritable=False)


def import_all(modules: Sequence[str]) -> str | None:
    """Import modules; the reason where one cannot be."""
    cwd = str(Path.cwd())
    if not sys.flags.safe_path and cwd not in sys.path:
        sys.path.insert(0, cwd)  # as ``python -m`` does
    try:
        with lasting_imports():
            for module in modules:
                importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def why_not_to_fork() -> str | None:
    """Name what an import has begun that a fork cannot take along; None where there is nothing."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        return f"an import has started threads ({', '.join(threads) or 'of a library'})"
    return None
