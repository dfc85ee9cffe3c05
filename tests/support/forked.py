"""Servers that commands are forked from, and the lives of those commands: the other side of ``forking``.

One process imports the libraries, and each other server is a fork of it, or of another, that has imported more. They
answer all workers of the tests, and end with the process that started the first.
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
import traceback
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partialmethod
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from launch.agent import fork_server as forked_rank
from launch.runs.process import lasting_imports
from tests.support.forking import ROOT, Job

MESSAGE_BYTES = 1 << 17
OURS = ("gpt", "launch", "slurm", "hydra_plugins", "configs")
"""Packages that a command imports by itself, from where it is told, if it comes of a server of libraries."""
LIBRARIES = (
    *("filelock", "fsspec", "numpy", "packaging.requirements", "pytest", "safetensors.torch", "tqdm", "yaml"),
    *("hydra", "hydra._internal.config_loader_impl", "hydra._internal.core_plugins.basic_sweeper"),
    *("hydra.core.override_parser.overrides_parser", "matplotlib.backends.backend_agg", "matplotlib.figure"),
    *("rich.console", "rich.progress", "rich.table", "submitit.core._submit", "submitit.local._local"),
    *("tensorboard.compat.proto", "tensorboard.plugins.custom_scalar"),
    *("tensorboard.summary.writer.event_file_writer", "torch.distributed.checkpoint.state_dict"),
    *("torch.distributed.elastic.agent.server.local_elastic_agent", "torch.distributed.fsdp"),
    *("torch.distributed.pipelining", "torch.distributed.tensor.parallel", "torch.nn.attention.flex_attention"),
    *("torch.profiler", "torch.utils.flop_counter", "torch.utils.serialization"),
)
"""Modules of the first server: none of this project. A fork may import the project from another checkout, or with
something of a test's put before it."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
MADV_COLLAPSE = 25  # linux/mman.h; Linux 6.1
HUGE = 1 << 21


def serve(listener: int, alive: int) -> None:
    """Import the libraries once somebody asks, then fork what is asked for, until the process that started this ends.

    Args:
        listener: socket by which others come.
        alive: socket that can be read from when that process has ended.
    """
    if select.select([listener, alive], [], [])[0] == [alive]:
        return
    with lasting_imports():
        for library in LIBRARIES:
            importlib.import_module(library)
    global _ONLY_LIBRARIES
    _ONLY_LIBRARIES = True
    os.environ.pop("ROOM")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests, with which this process ends
    # What a command starts by itself is forked too; see ``Popen._execute_child`` for the parameters.
    subprocess.Popen._execute_child = partialmethod(_execute_child, subprocess.Popen._execute_child)  # type: ignore
    Forking(socket.socket(fileno=alive), socket.socket(fileno=listener)).serve()


class Forking:
    """One server: waits for who comes, what they ask for, the ends of what it has forked, and its own end."""

    def __init__(self, alive: socket.socket, listener: socket.socket | None = None) -> None:
        keep_operators()
        use_huge_pages()
        self._alive = alive
        self._listener = listener
        self._asking: list[socket.socket] = []
        self._news: dict[int, int] = {}
        """Pipes into which the ends of commands are told, by process id."""
        self._others: dict[tuple[str, ...], socket.socket] = {}
        """Servers that were forked from this one, by what they have imported; they hear who asks them."""
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Answer until nobody is left to ask."""
        while True:
            waited_for: list[Any] = [
                self._alive,
                self._woken,
                *([self._listener] if self._listener else []),
                *self._asking,
            ]
            ready = select.select(waited_for, [], [])[0]
            if self._woken in ready:
                os.read(self._woken, 1 << 10)
                self._tell_ends()
            if self._listener in ready:
                assert self._listener is not None
                self._asking.append(self._listener.accept()[0])
            for connection in [one for one in self._asking if one in ready]:
                self._answer(connection)
            if self._alive in ready and not self._hear_who_asks():
                return

    def _hear_who_asks(self) -> bool:
        """Take the socket of somebody that the server this one comes of has handed on; False if that has ended."""
        if told := _receive(self._alive):
            self._asking.append(socket.socket(fileno=told[1][0]))
        return told is not None

    def _answer(self, connection: socket.socket) -> None:
        request = None
        with suppress(ConnectionResetError):
            request = _receive(connection)
        if request is None:
            self._asking.remove(connection)
            connection.close()
            return
        asked, fds = request
        if isinstance(asked, Job):
            self._start(asked, fds)
        else:
            self._hand_on(asked, fds[0])

    def _start(self, job: Job, fds: list[int]) -> None:
        """Fork a command."""
        *streams, news = fds
        pid = os.fork()
        if pid == 0:
            self._leave()
            os.close(news)
            _never_return(_begin, job, streams)
        for fd in streams:
            os.close(fd)
        self._news[pid] = news
        _tell(news, pid)

    def _tell_ends(self) -> None:
        """Tell how commands have ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if news := self._news.pop(pid, None):
                    _tell(news, os.waitstatus_to_exitcode(status))
                    os.close(news)

    def _hand_on(self, modules: tuple[str, ...], asks: int) -> None:
        """Hand the socket of somebody who asks to the server that has imported more; it is forked if there is none."""
        if modules not in self._others:
            self._others[modules], alive = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                self._leave()
                _never_return(_import_and_serve, modules, alive)
            alive.close()
        with suppress(BrokenPipeError):  # who asks notices that it has ended
            socket.send_fds(self._others[modules], [pickle.dumps(None)], [asks])
        os.close(asks)

    def _leave(self) -> None:
        """Keep nothing of the server's, in a fork of it."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (self._alive, self._listener, *self._asking, *self._others.values()):
            if one is not None:
                one.close()
        for fd in (self._woken, self._wakes, *self._news.values()):
            os.close(fd)


def _tell(news: int, number: int) -> None:
    with suppress(BrokenPipeError):
        os.write(news, b"%d\n" % number)


def _never_return(function: Callable[..., object], *args: object) -> NoReturn:
    """Call a function in a fork, which must never come back up through the frames of what it is a copy of."""
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _import_and_serve(modules: tuple[str, ...], alive: socket.socket) -> None:
    """Become a server that has imported more."""
    global _ONLY_LIBRARIES
    _ONLY_LIBRARIES = False
    with lasting_imports():
        for module in modules:
            importlib.import_module(module)
    Forking(alive).serve()


def keep_operators() -> None:
    """Have torch's operators stay registered to the end of a fork, as its memory goes with it: 30 ms for each."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        found = finalizer.peek()
        if found is not None and found[1].__module__ == "torch.library":
            finalizer.atexit = False


def use_huge_pages() -> None:
    """Have what was imported in huge pages, where Linux can do so: a fork then copies a third of the page tables."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, rights, _, _, _, *path = line.split()
        if rights == "rw-p" and path in ([], ["[heap]"]):
            begin, end = (int(address, 16) for address in area.split("-"))
            begin, end = -(-begin // HUGE) * HUGE, end // HUGE * HUGE
            if begin < end:
                madvise(begin, end - begin, MADV_COLLAPSE)


def _receive(requests: socket.socket) -> tuple[Any, list[int]] | None:
    message, fds, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
    return (pickle.loads(message), fds) if message else None


def _begin(job: Job, streams: list[int]) -> NoReturn:
    """Become the command."""
    global _STARTER
    if job.own_session:
        os.setsid()
    if not job.alone:
        _STARTER = Starter(streams)
    os.umask(job.umask)
    os.sched_setaffinity(0, job.cpus)
    forked_rank.take_streams(streams)
    if job.log is not None:
        forked_rank.open_streams(job.log)
    os.chdir(job.cwd)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(job.env)
    forked_rank.show_in_proc(job.command, job.env)
    signal.signal(signal.SIGINT, signal.SIG_IGN if job.ignores_ctrl_c else signal.default_int_handler)
    sys.argv = [job.module if job.is_file else "-m", *job.words]
    sys.orig_argv = job.command
    sys.path[0] = str(job.folder)
    if _ONLY_LIBRARIES:
        _import_from(before.get("PYTHONPATH", ""), job.env.get("PYTHONPATH", ""))
    sys.modules["__main__"] = types.ModuleType("__main__")
    importlib.invalidate_caches()
    status = forked_rank.run_main(job.command[1:])
    forked_rank.end_with(forked_rank.leave() or status)


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
    from launch.agent.engine import START_RANK

    if words[1:3] != ["-c", START_RANK] or len(words) < 8:
        return None
    workdir, logs, python, file, *rest = words[4:]
    if python != sys.executable or not Path(logs).is_dir() or not Path(workdir, file).is_file():
        return None
    env = dict(given["env"])
    log = str(Path(logs, f"rank_{int(env['RANK']):05d}.log").absolute())
    job = Job(file, tuple(rest), workdir, env, given["start_new_session"], is_file=True, log=log)
    return job if job.can_be_forked(only_libraries=_ONLY_LIBRARIES) else None
