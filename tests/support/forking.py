"""Commands forked from an interpreter that has imported everything, in place of one that starts from nothing.

Of the nine seconds of a run of two ranks on one machine, eight are imports: of the launcher, its two agents and their
ranks. Here one server process a test worker imports once, and each command is a fork of it that has run nothing: with
a process id, a parent, a session, signals, a folder and an environment of its own, as if Python had just been started.
What such a command starts with ``python -m`` is forked as well, and is its child, and so is the file of Python that an
agent starts for a rank of a script; the ranks of other workloads their agent forks by itself
(``launch.agent.fork_server``).

The server is forked from one that has imported libraries alone: of that one come commands that are to import this
project from another folder, or something of a test's before it. What cannot be forked at all (another program, other
variables that are read at the start) is started as ever.

Owns the processes between a test and its command. Must not know what is run. For tests that are about what commands
do; those that are about processes start real interpreters (``commands.start``).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import select
import signal
import site
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partialmethod
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from launch.agent import forked_rank
from launch.agent.numa import told_cpus
from launch.process import lasting_imports

ROOT = Path(__file__).resolve().parents[2]
MESSAGE_BYTES = 1 << 17
ROOM = "x" * 20_000
"""Room for the command line and the environment of what is forked, in the memory of the server's own."""
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "LD_")
"""Variables that Python and its libraries read only when they start, by how they begin."""
ANYWAY = ("PYTHONUNBUFFERED", "PYTHONHASHSEED", "OMP_PASSWORD")
"""Of those, the ones that may differ: nothing is buffered, no result depends on the order of a set, and no library
knows the third (tests/launch/test_secrets.py)."""
OURS = ("gpt", "launch", "slurm", "hydra_plugins", "configs")
"""Packages that a command imports by itself, from where it is told, if it comes of a server of libraries."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def umask() -> int:
    """The umask of this process, which what it starts begins with."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


@dataclass(frozen=True)
class Job:
    """``python -m module words`` or ``python FILE words``, and what it gets from whoever starts it."""

    module: str
    """Path of the file, where ``is_file``."""
    words: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    own_session: bool = False
    ignores_ctrl_c: bool = False
    is_file: bool = False
    log: str | None = None
    """File that everything printed is appended to, in place of the streams that are handed over."""
    umask: int = field(default_factory=umask)

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, *([] if self.is_file else ["-m"]), self.module, *self.words]

    @property
    def folder(self) -> Path:
        """The folder that it imports from first."""
        return Path(self.cwd, self.module).resolve().parent if self.is_file else Path(self.cwd)

    def can_be_forked(self, here: Mapping[str, str] = os.environ, only_libraries: bool = False) -> bool:
        """Tell whether it would import the same modules as this process, in the same way.

        Args:
            here: environment of the process that is forked.
            only_libraries: that process has imported nothing else, and paths to import from may differ.
        """
        may_differ = (*ANYWAY, *(["PYTHONPATH"] if only_libraries else []))
        read = {k for k in {**here, **self.env} if k.startswith(READ_AT_START) and k not in may_differ}
        folder = self.folder
        other_code = folder != ROOT and any((folder / name).exists() for name in ("gpt", "launch", "slurm", "configs"))
        return (only_libraries or not other_code) and all(here.get(k) == self.env.get(k) for k in read)


class Server:
    """The process that commands are forked from, for as long as this one lives."""

    def __init__(self, env: Mapping[str, str], connection: socket.socket, only_libraries: bool) -> None:
        self._env = dict(env)
        self._socket = connection
        self._only_libraries = only_libraries

    @classmethod
    def start_with(cls, env: Mapping[str, str]) -> Server:
        """Start one that imports the libraries which commands and ranks need."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from tests.support import forking; forking.serve({theirs.fileno()})"
        subprocess.Popen(
            [sys.executable, "-u", "-c", code, ROOM],
            cwd=ROOT,
            env={**env, "ROOM": ROOM},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        return cls(env, ours, only_libraries=True)

    def importing(self, modules: Sequence[str]) -> Server:
        """Fork one from this that imports ``modules`` as well."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(self._socket, [pickle.dumps(tuple(modules))], [theirs.fileno()])
        theirs.close()
        return Server(self._env, ours, only_libraries=False)

    def takes(self, job: Job) -> bool:
        """Tell whether a fork does the same as a start."""
        return job.can_be_forked(self._env, self._only_libraries)

    def start(self, job: Job, output: Path | None = None) -> ForkedProcess:
        """Start a command; what it prints is added to ``output``, or is printed by this process."""
        news, theirs = os.pipe()
        with Path(output or os.devnull).open("ab") as file, Path(os.devnull).open() as nothing:
            printed = (1, 2) if output is None else (file.fileno(), file.fileno())
            socket.send_fds(self._socket, [pickle.dumps(job)], [nothing.fileno(), *printed, theirs])
        os.close(theirs)
        return ForkedProcess(job, news)


class ForkedProcess:
    """A command that was forked, with what ``subprocess.Popen`` has of one that was started."""

    def __init__(self, job: Job, news: int) -> None:
        self.args = job.command
        self.returncode: int | None = None
        self._news = os.fdopen(news, "rb", buffering=0)
        self.sentinel = self._news.fileno()
        """Can be read from once it has ended, as that of a process of multiprocessing."""
        told = self._news.readline()
        assert told, f"the server that commands are forked from has ended; its last words are above ({self.args})"
        self.pid = int(told)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended; raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._news.readline() or -signal.SIGKILL)
            self._news.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def serve(connection: int) -> None:
    """Import the libraries, then fork what is asked for, until nobody is left to ask."""
    import tests.support.preload_libraries  # noqa: F401

    global _ONLY_LIBRARIES
    _ONLY_LIBRARIES = True
    os.environ.pop("ROOM")
    # What a command starts by itself is forked too; see ``Popen._execute_child`` for the parameters.
    subprocess.Popen._execute_child = partialmethod(_execute_child, subprocess.Popen._execute_child)  # type: ignore
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    _answer(connection)


def _answer(connection: int) -> None:
    with socket.socket(fileno=connection) as requests:
        while request := _receive(requests):
            asked, fds = request
            if os.fork() == 0:
                requests.close()
                if isinstance(asked, Job):
                    _wait_for(asked, fds)
                _serve_with(asked, fds[0])
            for fd in fds:
                os.close(fd)


def _serve_with(modules: tuple[str, ...], connection: int) -> NoReturn:
    """Become a server that has imported more."""
    global _ONLY_LIBRARIES
    _ONLY_LIBRARIES = False
    try:
        with lasting_imports():
            for module in modules:
                importlib.import_module(module)
        _answer(connection)
    finally:  # never up through the frames of the server that this process is a copy of
        os._exit(0)


def _receive(requests: socket.socket) -> tuple[Any, list[int]] | None:
    message, fds, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
    return (pickle.loads(message), fds) if message else None


def _wait_for(job: Job, fds: list[int]) -> NoReturn:
    """Fork the command and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, news = fds
    pid = os.fork()
    if pid == 0:
        os.close(news)
        _begin(job, streams)
    for fd in streams:
        os.close(fd)
    os.write(news, b"%d\n" % pid)
    os.write(news, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _begin(job: Job, streams: list[int]) -> NoReturn:
    """Become the command."""
    global _STARTER
    if job.own_session:
        os.setsid()
    _STARTER = Starter(streams)
    os.umask(job.umask)
    forked_rank.take_streams(streams)
    if job.log is not None:
        forked_rank.open_streams(job.log)
    os.chdir(job.cwd)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(job.env)
    if cpus := told_cpus(job.env):
        os.sched_setaffinity(0, cpus)
    forked_rank.show_in_proc(job.command, job.env)
    signal.signal(signal.SIGINT, signal.SIG_IGN if job.ignores_ctrl_c else signal.default_int_handler)
    sys.argv = [job.module if job.is_file else "-m", *job.words]
    sys.orig_argv = job.command
    sys.path[0] = str(job.folder)
    if _ONLY_LIBRARIES:
        _import_from(before.get("PYTHONPATH", ""), job.env.get("PYTHONPATH", ""))
    sys.modules["__main__"] = types.ModuleType("__main__")
    importlib.invalidate_caches()
    if job.is_file:
        status = forked_rank.exit_status(_run_file, job.module)
    else:
        forked_rank.forget(job.module)
        status = forked_rank.run_main(job.module)
    status = forked_rank.leave() or status
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _import_from(before: str, told: str) -> None:
    """Put the folders of PYTHONPATH in the place of those that it named ``before``, and forget what is imported there.

    A ``sitecustomize`` among them runs, as at the start of Python (``site``).
    """
    there = len(list(filter(None, before.split(os.pathsep))))
    added = [str(Path(folder).absolute()) for folder in filter(None, told.split(os.pathsep))]
    sys.path[1 : 1 + there] = added
    shadowed = {path.stem for folder in added if Path(folder) != ROOT for path in Path(folder).glob("*")}
    for name in [name for name in sys.modules if name.partition(".")[0] in {*OURS, *shadowed, "sitecustomize"}]:
        del sys.modules[name]
    site.execsitecustomize()


def _run_file(path: str) -> None:
    """Run a file as ``__main__``, as ``python FILE`` does."""
    main = sys.modules["__main__"]
    main.__file__ = path
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


class Starter:
    """A process beside a command that is as clean as the command was at its start: the command's children come of it.

    The command is a subreaper (prctl(2)): where the process between the two ends, what that one has started becomes
    the command's own child.
    """

    def __init__(self, not_its_own: Sequence[int]) -> None:
        self.owner = os.getpid()
        self._one_at_a_time = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if os.fork() == 0:
            self._socket.close()
            for fd in {*not_its_own} - {0, 1, 2}:
                os.close(fd)
            self._serve(theirs)
        theirs.close()

    def start(self, job: Job, streams: Sequence[int]) -> int:
        """Start a command; its process id."""
        with self._one_at_a_time:
            socket.send_fds(self._socket, [pickle.dumps(job)], list(streams))
            return int(self._socket.recv(64))

    def _serve(self, requests: socket.socket) -> NoReturn:
        os.setsid()  # what is sent to the command's group is not for this process
        while request := _receive(requests):
            job, streams = request
            between = os.fork()
            if between == 0:
                self._fork(requests, job, streams)
            os.waitpid(between, 0)
            for fd in streams:
                os.close(fd)
        os._exit(0)

    def _fork(self, requests: socket.socket, job: Job, streams: list[int]) -> NoReturn:
        between = os.getpid()
        orphaned, alive = os.pipe()
        if os.fork():
            os._exit(0)
        os.close(alive)
        os.read(orphaned, 1)  # ends with the process between
        os.close(orphaned)
        while os.getppid() == between:
            os.sched_yield()
        requests.send(str(os.getpid()).encode())  # by now a child that the command can wait for
        requests.close()
        _begin(job, streams)


_STARTER: Starter | None = None
_ONLY_LIBRARIES = False
"""The process that this one was forked from has imported nothing else."""


def _execute_child(popen: subprocess.Popen[bytes], original: Any, *args: Any, **kwargs: Any) -> None:
    """Fork what ``Popen`` would start, where that comes to the same."""
    given = signature(original).bind(popen, *args, **kwargs).arguments
    job = _job_of(given)
    if job is None or _STARTER is None or _STARTER.owner != os.getpid():
        return original(popen, *args, **kwargs)
    pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    popen.pid = _STARTER.start(job, [fd if pipe == -1 else pipe for fd, pipe in enumerate(pipes)])
    popen._child_created = True  # type: ignore[attr-defined]
    ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    popen._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]
    return None


def _job_of(given: Mapping[str, Any]) -> Job | None:
    """The job that a call of ``Popen`` asks for, if it can be forked."""
    args = given["args"]
    if given["shell"] or given["preexec_fn"] or given["pass_fds"] or isinstance(args, str | bytes | os.PathLike):
        return None
    words = [os.fsdecode(word) for word in args]
    if words[0] == "/bin/sh":
        return _rank_of(words, given)
    options = words.index("-m") if words[0] == sys.executable and "-m" in words else 0
    if words[1:options] not in ([], ["-u"]) or not options:
        return None
    module, *rest = words[options + 1 :]
    env = dict(os.environ if given["env"] is None else given["env"])
    cwd = str(Path(os.fsdecode(given["cwd"] or ".")).absolute())
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    job = Job(module, tuple(rest), cwd, env, given["start_new_session"], ignored)
    return job if job.can_be_forked(only_libraries=_ONLY_LIBRARIES) else None


def _rank_of(words: list[str], given: Mapping[str, Any]) -> Job | None:
    """The job of the shell by which an agent starts a rank, if that is a file of Python (``workers.entrypoint``)."""
    from launch.agent.workers import START_RANK

    if words[1:3] != ["-c", START_RANK] or len(words) < 8:
        return None
    workdir, logs, python, file, *rest = words[4:]
    if python != sys.executable or not Path(logs).is_dir() or not Path(workdir, file).is_file():
        return None
    env = dict(given["env"])
    log = str(Path(logs, f"rank_{int(env['RANK']):05d}.log").absolute())
    job = Job(file, tuple(rest), workdir, env, given["start_new_session"], is_file=True, log=log)
    return job if job.can_be_forked(only_libraries=_ONLY_LIBRARIES) else None
