"""Running our commands as a user does: real processes, watched, and ended by process id where a test ends them."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import psutil

from tests.support.forking import ForkedProcess, Job, Root, Server

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300

TINY = (
    "model.n_layer=2",
    "model.n_embd=64",
    "model.n_head=4",
    "model.n_kv_head=2",
    "model.block_size=32",
    "data.max_bytes=200000",
    "optim.global_batch=8",
    "optim.max_micro_batch=2",
    "eval.sequences=6",
)
"""A run of seconds: small, but with accumulation, grouped queries and an evaluation that no rank count divides."""

ON_SLURM = ("cluster=slurm", "launch.poll_s=1", "launch.report_files=[md,csv]")
"""On the sandbox, whose controller has nothing else to do than to answer."""


FORKED = ("gpt", "launch", "benchmarks", "torch.distributed.run")
"""Beginnings of the names of modules that ``run`` forks."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user who is in no job: nothing of an enclosing launcher, one thread a process."""
    gone = (
        "SLURM_",
        "SUBMITIT_",
        "TORCHELASTIC_",
        "LAUNCH_",
        "GPT_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "HYDRA_",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **extra}


def job_of(line: str, words: Sequence[str], cwd: Path, *, own_session: bool = False, **extra: str) -> Job:
    """The job of ``python -m line words``, where ``line`` is a module and words as a shell reads them."""
    module, *first = shlex.split(line)
    return Job(module, (*first, *words), str(cwd), environment(**extra), own_session)


def run(line: str, *words: str, cwd: Path, status: int | Collection[int] = 0, **extra: str) -> str:
    """``python -m line words`` to its end; returns what it printed, standard error included."""
    ended, text = run_to_end(line, *words, cwd=cwd, **extra)
    expected = {status} if isinstance(status, int) else status
    assert ended in expected, f"exit status {ended}, expected {status}:\n{text}"
    return text


def run_to_end(line: str, *words: str, cwd: Path, **extra: str) -> tuple[int, str]:
    """Exit status of ``python -m line words``, and what it printed, standard error included.

    Forked from a process that has imported everything, where nothing speaks against it (see ``forking``).
    """
    job = job_of(line, words, cwd, **extra)
    server = server_for(job) if job.module.startswith(FORKED) else None
    if server is None:
        done = subprocess.run(
            job.command,
            cwd=cwd,
            env=job.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=TIMEOUT_S,
        )
        ended, text = done.returncode, done.stdout
    else:
        with NamedTemporaryFile("r") as output:
            process = server.start(job, Path(output.name))
            try:
                ended = process.wait(TIMEOUT_S)
            finally:
                if process.returncode is None:
                    kill_all(process)
                text = output.read()
    return ended, text


def python(code: str, *words: object, cwd: Path, status: int = 0, **extra: str) -> str:
    """Return the output of ``python -c code words`` in an interpreter of its own, with this checkout on its path."""
    env = environment(**{"PYTHONPATH": str(ROOT), **extra})
    words = (sys.executable, "-c", code, *map(str, words))
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def call(main: Callable[[list[str]], int], *words: object, status: int = 0) -> str:
    """Return the output of ``main(words)`` in this process, standard error included."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        ended = main([*map(str, words)])
    assert ended == status, output.getvalue()
    return output.getvalue()


@cache
def fork_server(*modules: str) -> Server:
    """The process that ``run`` forks from, one for all workers of the tests; or one that imports more."""
    if modules:
        return fork_server().importing(modules)
    return library_server().importing(["tests.support.preload_commands"])


@cache
def library_server() -> Server:
    """The process that ``fork_server`` comes of, which has imported nothing of this project."""
    return Server.at(*shared_servers())


@cache
def root() -> Root:
    """The process that all servers come of; tests/conftest.py ends it."""
    return Root(environment())


SHARED: list[tuple[str, dict[str, str]]] = []
"""Address and variables of the process that the servers of all workers come of, in a worker (tests/conftest.py)."""


def shared_servers() -> tuple[str, dict[str, str]]:
    """Where the servers are asked for, and the variables that they have read."""
    return SHARED[0] if SHARED else (root().address, root().env)


def end_servers() -> None:
    """End the servers that this process has started."""
    if root.cache_info().currsize:
        root().end()
        root.cache_clear()


def server_for(job: Job) -> Server | None:
    """The server of which a fork does the same as a start."""
    return next((server for server in (fork_server(), library_server()) if server.takes(job)), None)


def answer_ctrl_c() -> None:
    """Have what is started answer SIGINT: a shell that runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


Process = subprocess.Popen[bytes] | ForkedProcess

STARTED: list[Process] = []
"""Processes of ``start`` and ``start_fork``. One that is alive when its test ends is killed (tests/conftest.py)."""


def start(line: str, *words: str, cwd: Path, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """``python -m line words`` in a session of its own, printing into ``log``."""
    job = job_of(line, words, cwd, **extra)
    with log.open("wb") as file:
        process = subprocess.Popen(
            job.command,
            cwd=cwd,
            env=job.env,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=answer_ctrl_c,
        )
    STARTED.append(process)
    return process


def start_fork(line: str, *words: str, cwd: Path, log: Path, **extra: str) -> ForkedProcess:
    """The same for a test that is not about processes, but about what a run does: forked as ``run`` forks."""
    job = job_of(line, words, cwd, own_session=True, **extra)
    server = server_for(job)
    assert server is not None
    process = server.start(job, log)
    STARTED.append(process)
    return process


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Look until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Process ``pid`` and everything it started, parents first."""
    with suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def running(pids: Iterable[int]) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Id, command line and environment of those of the processes that run."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            yield pid, process.cmdline(), process.environ()


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that is dead and not yet reaped does not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def kill_all(process: Process) -> list[int]:
    """``kill -9`` of a process and all it started; returns their ids."""
    family = descendants(process.pid)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of what was killed")
    return family


def ranks_of(pids: Iterable[int]) -> dict[int, int]:
    """Process ids of the training processes among ``pids``, by rank."""
    ranks: dict[int, int] = {}
    for pid, words, variables in running(pids):
        if "gpt.train" in words and "RANK" in variables:
            ranks.setdefault(int(variables["RANK"]), pid)  # parents come first, and a rank forks its writer
    return ranks


def agents_of(pid: int) -> dict[int, int]:
    """Process ids of the agents below process ``pid``, by node."""
    found: dict[int, int] = {}
    for child, _, variables in running(descendants(pid)):
        if "SUBMITIT_LOCAL_GLOBALID" in variables:  # parents come first, and an agent forks its ranks
            found.setdefault(int(variables["SUBMITIT_LOCAL_GLOBALID"]), child)
    return found
