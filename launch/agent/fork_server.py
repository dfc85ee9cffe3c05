"""Fork server of a node: a process that imports the libraries of the ranks once, and forks the ranks.

The file follows the life of a rank. The agent requests a fork (``ForkServer``), the server forks (``serve_forks``), the
rank runs (``run_rank``). A forked rank behaves as if ``python -m MODULE`` or ``python FILE`` had been executed.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import importlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from launch.runs.process import become_helper, die_with_parent, lasting_imports

# The agent's side.


LOOK_S = 0.2
EARLY = ("PYTHON", "LD_", "GLIBC_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_")
"""Prefixes of variables that Python and its libraries read at their start. A forked process sets them too late."""
LATE = ("PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_NCCL_", "TORCH_FR_")
"""Prefixes of variables that take effect even if a forked rank sets them: exceptions from ``EARLY``."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Start:
    """Request of the agent to fork one rank."""

    args: tuple[str, ...]
    """Arguments of Python: ``-m`` and a module, or a file, then the arguments of the program."""
    cwd: str
    env: Mapping[str, str]
    """Complete environment of the rank."""
    log: str
    """Path of the file to which the rank's output is appended."""


class ForkedProcess:
    """A forked rank, a child of this process. Has the part of ``subprocess.Popen`` that engines use."""

    def __init__(self, args: Sequence[str], pid: int) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the rank runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the rank has ended, and return its exit status.

        Raises:
            subprocess.TimeoutExpired: the rank has not ended after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return status


class ForkServer:
    """Fork server of this agent for the duration of a ``with`` block. Create it before this process has other threads.

    Args:
        preload: modules that the server imports.
        code: state of the code files at the time of the imports, from ``state_of``. The server does not use it. The
            agent compares it with the present state of the files before it forks ranks.
    """

    def __init__(self, preload: Sequence[str], code: object = None) -> None:
        self.code = code
        self._env = dict(os.environ)
        self._cwd = str(Path.cwd())
        self._is_ready = False
        self._connection, server_end = Pipe()
        agent = os.getpid()
        # Linux gives a forked rank to this process when the process between the server and the rank ends.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # With SIGCHLD ignored, the kernel would discard the exit statuses of the ranks.
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        assert threading.active_count() == 1, "a lock that another thread holds would stay locked in the fork"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid: int | None = os.fork()
        """Process id of the server; None if the server is gone."""
        if self.pid == 0:
            self._connection.close()
            serve_forks(server_end, preload, agent)
        server_end.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        """End the server. Ranks that the server has forked continue."""
        pid, self.pid = self.pid, None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._connection.close()

    def wait_ready(self, is_called_off: Callable[[], bool] = lambda: False) -> None:
        """Wait until all modules are imported, or until ``is_called_off`` returns True.

        If an import fails, the agent executes the ranks instead of forking them.
        """
        while self.pid is not None and not self._is_ready and not is_called_off():
            if self._connection.poll(LOOK_S):
                self._is_ready = self._receive() is not None

    def start(self, args: Sequence[str], env: Mapping[str, str], cwd: str, log: str) -> ForkedProcess | None:
        """Fork a rank. Returns None if the agent has to execute the rank instead.

        A fork needs all of this: a command ``python -m MODULE`` or ``python FILE``; a server that has imported its
        modules; for each variable of ``EARLY``, the value that it had during the imports; with ``-m``, also the same
        working directory.

        Args:
            args: program and arguments.
            env: complete environment of the rank.
            cwd: working directory.
            log: path of the file to which the rank's output is appended.
        """
        if not self._is_ready or self.pid is None:
            return None
        early = {key for key in {**self._env, **env} if key.startswith(EARLY) and not key.startswith(LATE)}
        why = ", ".join(sorted(key for key in early if self._env.get(key) != env.get(key)))
        if args[0] != sys.executable or len(args) < 2 or (args[1].startswith("-") and args[1] != "-m"):
            why = f"{shlex.join(args[:2])} is neither {sys.executable} FILE nor {sys.executable} -m MODULE"
        elif args[1] == "-m" and cwd != self._cwd:
            why = f"in {cwd}"
        if why:
            print(f"launch: rank {env.get('RANK')} is executed, not forked: {why}", file=sys.stderr)
            return None
        pid = self._receive(Start(tuple(args[1:]), cwd, dict(env), log))
        return None if pid is None else ForkedProcess(args, pid)

    def _receive(self, start: Start | None = None) -> int | None:
        """Wait for the next answer of the server, and return the process id in the answer.

        With ``start``, send this request first; the answer then has the id of the forked rank. Without a request, the
        answer has the id of the server, once its imports are done. If the server reports an error, or is gone, end the
        server and return None.

        Raises:
            InterruptedError: a stop was requested meanwhile.
        """
        try:
            if start is not None:
                self._connection.send(start)
            answer = self._connection.recv()
        except InterruptedError:  # A stop was requested.
            raise
        except (OSError, EOFError):
            answer = "it is gone"
        if isinstance(answer, int):
            return answer
        print(f"launch: from now on ranks are executed, not forked; the fork server: {answer}", file=sys.stderr)
        self.__exit__()
        return None


# The server's side.


def serve_forks(requests: Connection, preload: Sequence[str], agent: int) -> NoReturn:
    """Run the server in this process, until the agent is gone.

    The server imports ``preload``, and sends its own process id to the agent, or the error of an import. Then it forks
    a rank for each request.

    Args:
        requests: connection to the agent.
        preload: modules to import.
        agent: process id of the agent.
    """
    try:
        become_helper(agent)
        show_in_proc([Path(sys.executable).name, "-m", __name__])
        problem = import_all(preload)
        requests.send(problem or os.getpid())
        while problem is None:
            start = requests.recv()
            try:
                between = os.fork()
            except OSError as error:  # The system has no memory left, or too many processes.
                requests.send(str(error))
                continue
            if between == 0:
                fork_rank(start, agent, requests)
            os.waitpid(between, 0)
    except EOFError:
        pass
    finally:  # Never return into the agent's frames: this process is a copy of the agent.
        os._exit(0)


def import_all(modules: Sequence[str]) -> str | None:
    """Import modules. Returns None if ranks can be forked, else the reason: a failed import, or a started thread."""
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


def fork_rank(start: Start, agent: int, requests: Connection) -> NoReturn:
    """Fork the rank from this process, a child of the server, and end this process.

    The kernel then makes the agent the parent of the rank.

    Args:
        start: program and environment of the rank.
        agent: process id of the agent.
        requests: connection through which an error of the fork is reported to the agent.
    """
    between = os.getpid()
    try:
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            os.sched_yield()
        run_rank(start, agent, requests)
    except OSError as error:
        requests.send(str(error))
    finally:
        os._exit(1)


# The rank.


IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that a fresh Python ignores (Python/pylifecycle.c)."""


def run_rank(start: Start, agent: int, requests: Connection) -> NoReturn:
    """Run a rank to its end in this process, which was forked for the rank and is a child of ``agent``.

    Args:
        start: program and environment.
        agent: process id of the agent, which must be the parent of this process.
        requests: connection through which this process sends its id, or the reason why the rank cannot start.
    """
    status = 1
    try:
        try:
            become_rank(start, agent)
        except Exception as error:
            requests.send(f"{type(error).__name__}: {error}")
            os._exit(1)
        requests.send(os.getpid())
        requests.close()
        status = run_main(start.args)
        status = leave() or status
    finally:  # Never return into the agent's frames: this process is a copy of the agent.
        end_with(status)


def become_rank(start: Start, agent: int) -> None:
    """Give this forked process the state of an executed rank: environment, signals, streams and working directory.

    ``start`` describes the rank; ``agent`` is the process id of the agent.

    Raises:
        ProcessLookupError: the parent of this process is not the agent.
        RuntimeError: CUDA was initialized before the fork.
    """
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
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in IGNORED else default)
    sys.orig_argv = [sys.executable, *start.args]
    # With -m, runpy puts the path of the module into sys.argv[0].
    sys.argv = ["-m", *start.args[2:]] if start.args[0] == "-m" else list(start.args)
    shown = [Path(sys.executable).name, *sys.orig_argv[1:]]
    show_in_proc(shown, {**{k: v for k, v in start.env.items() if before.get(k) != v}, **start.env})
    sys.modules["__main__"] = types.ModuleType("__main__")
    if "numpy" in sys.modules:  # A fork seeds ``random`` anew by itself; torch begins with a fixed seed.
        sys.modules["numpy"].random.seed()


def open_streams(log: str) -> None:
    """Append all output to the log, including output of C code. Standard input is empty."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    take_streams((nothing, printed, printed))


def take_streams(sources: Sequence[int]) -> None:
    """Use open files as standard input, output and error. Output is unbuffered, as with PYTHONUNBUFFERED.

    ``sources`` are the three descriptors, in this order. They are closed afterwards. The stream objects are made as
    Python makes them at its start (create_stdio in Python/pylifecycle.c).
    """
    for fd, source in enumerate(sources):
        os.dup2(source, fd)
    for source in {*sources} - {0, 1, 2}:
        os.close(source)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        before, mode = getattr(sys, name), "w" if fd else "r"
        raw = io.FileIO(fd, mode, closefd=False)
        binary: Any = raw if fd else io.BufferedReader(raw)
        encoding, errors = getattr(before, "encoding", "utf-8"), getattr(before, "errors", "backslashreplace")
        text = io.TextIOWrapper(binary, encoding, errors, newline="\n" if fd else None, write_through=bool(fd))
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def run_main(args: Sequence[str]) -> int:
    """Run a program as Python does with these arguments: ``-m`` and a module, which may have been imported before, or a
    file. Returns the exit status.
    """
    if args[0] != "-m":
        return exit_status(run_file, args[0])
    module = args[1]
    if not hasattr(sys.modules.get(module), "__path__"):  # a package runs its ``__main__``
        sys.modules.pop(module, None)  # runpy would warn that the module is already in sys.modules.
    return exit_status(runpy._run_module_as_main, module)  # type: ignore[attr-defined]  # as python -m does


def run_file(name: str) -> None:
    """Run a file as ``python FILE`` does. Its folder comes first in ``sys.path``, instead of the working directory."""
    if not sys.flags.safe_path:
        del sys.path[0]
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(Path(name).resolve().parent))
    main, file = sys.modules["__main__"], str(Path(name).absolute())
    main.__dict__.update(__file__=file, __builtins__=builtins)
    exec(compile(Path(file).read_bytes(), file, "exec"), main.__dict__)


def exit_status(program: Callable[..., object], *args: object) -> int:
    """Call ``program`` with ``args``, as Python runs a main program. Returns the exit status, negative for a signal.

    An exception is printed as Python prints it.
    """
    try:
        program(*args)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # The traceback leaves out this file.
        while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == __file__:
            error.__traceback__ = error.__traceback__.tb_next
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave() -> int:
    """Wait for threads, call the functions of ``atexit`` and flush the output, as Python does at its exit.

    Unlike Python, the function destroys no objects. Returns 120 if output is lost, else 0.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does it in its own forks
    atexit._run_exitfuncs()
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    ctypes.CDLL(None).fflush(None)  # Flush the output of C code.
    return status


def end_with(status: int) -> NoReturn:
    """End this process at once with exit status ``status``; if negative, by signal ``-status``."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def show_in_proc(words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Change the command line of this process in ps and /proc, and the environment in /proc if ``env`` is not None.

    ``words`` are the program and arguments to show.

    Linux shows the memory into which the kernel wrote command line and environment when the process was executed
    (proc(5), /proc/PID/stat, fields 48 to 51). This function overwrites that memory, and cuts off text that does not
    fit.
    """
    with suppress(OSError, ValueError, IndexError):
        fields = [int(field) for field in Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[45:49]]
        shown = [(fields[:2], words)]
        if env is not None:
            shown.append((fields[2:], [f"{key}={value}" for key, value in env.items()]))
        for (begin, end), strings in shown:
            if 0 < begin < end:
                text = "".join(f"{string}\0" for string in strings).encode(errors="surrogateescape")
                ctypes.memset(begin, 0, end - begin)
                ctypes.memmove(begin, text, min(len(text), end - begin - 1))
