"""Running our commands as a user does: real processes, watched, and ended by process id where a test ends them."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

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
    """``python -m line words`` to its end; returns what it printed, standard error included.

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
    expected = {status} if isinstance(status, int) else status
    assert ended in expected, f"exit status {ended}, expected {status}:\n{text}"
    return text


def python(code: str, *words: object, cwd: Path, status: int = 0, **extra: str) -> str:
    """What ``python -c code words`` prints in an interpreter of its own, with this checkout on its path."""
    env = environment(**{"PYTHONPATH": str(ROOT), **extra})
    words = (sys.executable, "-c", code, *map(str, words))
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def call(main: Callable[[list[str]], int], *words: object, status: int = 0) -> str:
    """What ``main(words)`` prints in this process, standard error included."""
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
    """Process ``pid`` and everything it started, parents first, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_all(process: Process) -> list[int]:
    """``kill -9`` of a process and all it started; returns their ids."""
    family = descendants(process.pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in family), "the end of what was killed")
    return family


def ranks_of(pids: Sequence[int]) -> dict[int, int]:
    """Process ids of the training processes among ``pids``, by rank."""
    ranks = {}
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if b"gpt.train" in words and rank:
            ranks.setdefault(int(rank[0].split(b"=")[1]), pid)  # parents come first, and a rank forks its writer
    return ranks


def agents_of(pid: int) -> dict[int, int]:
    """Process ids of the agents below process ``pid``, by node."""
    found = {}
    for child in descendants(pid):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        index = [v.partition(b"=")[2] for v in variables if v.startswith(b"SUBMITIT_LOCAL_GLOBALID=")]
        if index:
            found.setdefault(int(index[0]), child)  # parents come first, and an agent forks its ranks
    return found
