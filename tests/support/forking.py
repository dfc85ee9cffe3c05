"""Commands forked from an interpreter that has imported everything, in place of one that starts from nothing.

Of the nine seconds of a run of two ranks on one machine, eight are imports: of the launcher, its two agents and their
ranks. Here one server process imports once for all workers of the tests, and each command is a fork of it that has run
nothing: with a process id, a parent, a session, signals, a folder and an environment of its own, as if Python had just
been started.
What such a command starts with ``python -m`` is forked as well, and is its child, and so is the file of Python that an
agent starts for a rank of a script; the ranks of other workloads their agent forks by itself
(``launch.agent.fork_server``).

The server is forked from one that has imported libraries alone: of that one come commands that are to import this
project from another folder, or something of a test's before it. What cannot be forked at all (another program, other
variables that are read at the start) is started as ever.

Owns what a test asks for; the servers' side is ``forked``. Must not know what is run. For tests that are about what
commands do; those that are about processes start real interpreters (``commands.start``).
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
ROOM = "x" * 20_000
"""Room for the command line and the environment of what is forked, in the memory of the server's own."""
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "LD_")
"""Variables that Python and its libraries read only when they start, by how they begin."""
ANYWAY = ("PYTHONUNBUFFERED", "PYTHONHASHSEED", "OMP_PASSWORD")
"""Of those, the ones that may differ: nothing is buffered, no result depends on the order of a set, and no library
knows the third (tests/launch/test_agent.py)."""


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
    alone: bool = False
    """Starts nothing that could be forked, and so needs no process beside it to fork that from (``forked.Starter``)."""
    log: str | None = None
    """File that everything printed is appended to, in place of the streams that are handed over."""
    umask: int = field(default_factory=umask)
    cpus: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))

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


class Root:
    """The process that all servers of a session come of, for as long as this one lives; it imports when it is asked."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._folder = TemporaryDirectory(prefix="forks_")
        self.address = str(Path(self._folder.name, "socket"))
        self._alive, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen()
            fds = [listener.fileno(), theirs.fileno()]
            code = f"from tests.support import forked; forked.serve{tuple(fds)}"
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", code, ROOM],
                cwd=ROOT,
                env={**env, "ROOM": ROOM},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self.env = {key: value for key, value in env.items() if key.startswith(READ_AT_START)}
        """Variables that a command has to agree with, to be forked."""

    def end(self) -> None:
        """End it and the servers that were forked from it; commands that are left run on."""
        self._alive.close()
        self._process.wait()
        self._folder.cleanup()


class Server:
    """A process that commands are forked from, as one process of the tests sees it."""

    def __init__(self, env: Mapping[str, str], connection: socket.socket, only_libraries: bool) -> None:
        self._env = env
        self._socket = connection
        self._only_libraries = only_libraries

    @classmethod
    def at(cls, address: str, env: Mapping[str, str]) -> Server:
        """The one that has imported the libraries which commands and ranks need (``Root``)."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(address)
        return cls(env, connection, only_libraries=True)

    def importing(self, modules: Sequence[str]) -> Server:
        """The one that has imported ``modules`` as well, which this one forks when it is first asked for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._socket, [pickle.dumps(tuple(modules))], [theirs.fileno()])
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
