"""Start of a run's agents without submitit's srun: as a step of a job, or by ssh on its nodes or on a hostfile's hosts.

    python -m launch.agent.hosts COMMAND ...      runs submitit's command on every host, as srun runs it on every node

``ssh`` is the user's own, with its configuration and keys. It never asks for a password. On each host, a shell becomes
the agent. A helper of this shell reads numbers of signals from the connection, and sends them to the agent. If the
connection ends, for example because this process was killed, the helper kills the agent.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import join, quote

from submitit.core.utils import JobPaths

from launch.agent.node import OWNER, SHARES_JOB, TOKEN, VISIBLE_GPUS, Node, is_gone
from launch.config import Config
from launch.config.compose import read_point
from launch.errors import ConfigError, counted, refusing
from launch.plan.placement import agent_words
from launch.plan.remote import SSH
from launch.runs.folder import RunFolder
from launch.runs.process import share
from launch.slurm import client as scheduler

# The agents of a run as a step of a Slurm job that was not submitted for this run alone. The job is the user's own
# (``launch.slurm.resolve``), or that of several points (``cluster.points_per_job``).


OF_THIS_PROCESS = (TOKEN, OWNER, "CUDA_VISIBLE_DEVICES")
"""Environment variables that a step must not inherit from the process that starts the step."""


def run_step(run_dir: str, job: str, shares: bool) -> None:
    """Run the agents of a run as a step of a Slurm job, and send each SIGTERM on to the agents. Returns after the
    step's end.

    Args:
        run_dir: folder of the run.
        job: id of the job.
        shares: True to share CPUs and GPUs with other steps; False to wait until no other step uses them.

    Raises:
        SystemExit: srun left with another exit status than 0.
    """
    config = read_point(RunFolder(run_dir))
    name = f"launch-{os.getpid()}"
    words = ["srun", f"--jobid={job}", f"--job-name={name}", f"--nodes={config.nodes_asked}", "--ntasks-per-node=1"]
    # The agent is the only task of a node, and uses all CPUs of the job there.
    words += ["--overlap"] if shares else []
    words += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--no-kill", "--wait=0", *config.cluster.srun_args]
    words += agent_words(config.cluster, Path.cwd(), Path(run_dir), python=sys.executable)
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in OF_THIS_PROCESS and not key.startswith("SUBMITIT_")
    }
    process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def pass_on(*_: object) -> None:
        steps = scheduler.run("squeue", "--steps", "--noheader", "--format=%i %j", "--jobs", job).splitlines()
        mine = [step.split()[0] for step in steps if step.split()[1:] == [name]]
        if mine:
            scheduler.scancel(mine[0], "--signal=TERM")
        else:  # srun still waits for the nodes
            process.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    if process.wait():
        raise SystemExit(f"srun left with status {process.returncode}")


def take_part(run_dirs: Sequence[str]) -> str:
    """Return the run folder of this Slurm task. If several runs share the job, limit this process to its part of the
    node.

    ``run_dirs`` has one folder for each run. Each task of the job is the agent of one run. The tasks divide the CPUs,
    GPUs and memory of the node equally. The process binds itself to its CPUs if Slurm confines jobs to their CPUs. It
    changes Slurm's environment variables and CUDA_VISIBLE_DEVICES, so that they describe a job of one task with this
    part of the node.
    """
    if len(run_dirs) == 1:
        return run_dirs[0]
    env, parts = os.environ, len(run_dirs)
    part = int(env["SLURM_PROCID"])
    cpus = sorted(os.sched_getaffinity(0))
    # Where Slurm does not confine jobs to CPUs, another job on the node would bind itself to the same CPUs.
    if len(cpus) <= int(env["SLURM_CPUS_ON_NODE"]):
        os.sched_setaffinity(0, share(cpus, part, parts) or cpus)
    env |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", SHARES_JOB: "1"}
    if gpus := env.get("CUDA_VISIBLE_DEVICES"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(share(gpus.split(","), part, parts))
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE"):
        if whole := env.get(name):
            env[name] = str(max(1, int(whole) // parts))
    return run_dirs[part]


# Hosts of a run, from its hostfile.


LINE = re.compile(r"(\w[\w.:-]*)(?:\s+slots\s*=\s*([1-9]\d*))?")


def read_hostfile(config: Config) -> dict[str, int]:
    """Return the hosts of a run's hostfile, in order: host -> slots, the largest number of ranks; 0 for no limit.

    Raises:
        ConfigError: the file cannot be read, has a line of another form, or names a host twice.
    """
    hosts: dict[str, int] = {}
    path, problem = Path(str(config.cluster.hostfile)), ""
    try:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            text = line.partition("#")[0].strip()
            found = LINE.fullmatch(text)
            if found and found[1] not in hosts:
                hosts[found[1]] = int(found[2] or 0)
            elif text:
                problem = problem or f"line {number}: {text}"
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem:
        form = "each host once, on a line, as for DeepSpeed and MPI: NAME or NAME slots=8; # begins a comment"
        raise ConfigError(f"cluster.hostfile={path}: {problem}", form, "cluster.hostfile=FILE, with such lines")
    return hosts


def hosts_of(config: Config) -> list[str]:
    """Return the hosts of a run, spares included: the first hosts of its hostfile with slots for the ranks of a node.

    Raises:
        ConfigError: too few hosts have enough slots, or the file cannot be read.
    """
    ranks, wanted = config.ranks_on_node, config.nodes_asked
    hosts = [host for host, slots in read_hostfile(config).items() if not 0 < slots < ranks]
    if len(hosts) < wanted:
        fit = f"{counted(len(hosts), 'host')} with room for {counted(ranks, 'rank')}"
        raise ConfigError(
            f"{fit} in {config.cluster.hostfile}, and a run of {counted(wanted, 'node')}",
            "a host with enough slots for each node, spares included",
            "fewer nodes, spare_nodes or ranks_per_node, or more lines in that file",
        )
    return hosts[:wanted]


# A command on another host.


BY_SSH = (*SSH, "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
"""ssh that ends if the other host does not answer for a minute."""
STAY = 'trap "" TERM USR2; exec "$@"'
"""Shell script that replaces its shell by the command ``"$@"`` (ssh), which then ignores SIGTERM and SIGUSR2.

Slurm sends these signals to all processes of a batch script, and the connections must stay open while agents save.
"""
RECEIVE = 'read -r line && eval "$(printf %s "$line" | base64 -d)"'
"""Shell script that reads one line from standard input, which contains more script in base64, and executes it.

The received script sets directory, environment, logs, and the command ``"$@"``. It is not an argument, since every user
of a host can read command lines, and the environment may have secrets.
"""
BECOME = ' && exec "$@" </dev/null'
"""Text after ``RECEIVE`` for a command that ends by itself: the shell becomes this command."""
KEEP = (
    ' && exec 3<&0 && { { trap "" TERM USR2; while read -r number <&3; do kill -"$number" $$; done; kill -s KILL $$; }'
    ' >/dev/null 2>&1 & } && exec "$@" </dev/null 3<&-'
)
"""Text after ``RECEIVE`` for an agent: the shell becomes the agent, and a helper process sends signals to the agent."""


def start_on(
    host: str, words: Sequence[str], env: Mapping[str, str], script: str, logs: Sequence[Path] = ()
) -> subprocess.Popen[str]:
    """Start a command on a host, in the working directory of this process.

    Returns the process: the command itself on this host, or the ssh that runs the command on another host.

    Args:
        host: name of the host.
        words: program and arguments.
        env: environment of the command.
        script: ``BECOME`` for a command that ends by itself. ``KEEP`` for an agent, which must also get signals: for
            each number that is written as a line to the standard input of the returned process, the agent gets the
            signal with this number. At the end of that input, the agent is killed.
        logs: files for standard output and error; by default, both are pipes of the returned process.
    """
    lines = [f"cd {quote(str(Path.cwd()))} || exit", f"set -- {join(words)}"]
    # The shell protects some variables, such as UID, and may refuse them.
    lines += [f"command export {name}={quote(value)}" for name, value in env.items() if name.isidentifier()]
    lines += [f"exec {stream}>>{quote(str(log))}" for stream, log in enumerate(logs, start=1)]
    is_here = host in (socket.gethostname(), os.environ.get("SLURMD_NODENAME"), "localhost")
    shell = ["sh", "-c", RECEIVE + script]
    connect = ["sh", "-c", STAY, "sh", *BY_SSH, host, f"exec {join(shell)}"]
    pipe = None if logs else subprocess.PIPE
    process = subprocess.Popen(
        shell if is_here else connect,
        stdin=subprocess.PIPE,
        stdout=pipe,
        stderr=pipe,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    write_line(process, base64.b64encode(os.fsencode("\n".join(lines))).decode())
    return process


def write_line(process: subprocess.Popen[str], line: str) -> None:
    """Write a line to the standard input of a process, unless the process has ended."""
    with suppress(BrokenPipeError):
        print(line, file=process.stdin, flush=True)


ASK = """import os, sys, gpt_launch
sys.exit(f"Python {sys.version}" if sys.version != sys.argv[2] else 0 if os.path.exists(sys.argv[1]) else 3)"""
"""Python program that exits with 0 if its Python has version ``argv[2]`` and the file ``argv[1]`` exists.

Without the file it exits with 3. With another version, it prints this version and exits with 1.
"""


def check_hosts(hosts: Sequence[str], folder: Path) -> None:
    """Raise ConfigError for the first host that does not answer, does not see ``folder``, or has another Python.

    The versions of Python must be equal. If ``folder`` does not exist yet, the hosts must see the deepest existing
    folder above it.
    """
    there, here = next(path for path in (folder, *folder.parents) if path.is_dir()), quote(str(Path.cwd()))
    with tempfile.NamedTemporaryFile(prefix=".launch-", dir=there) as probe:
        words = [sys.executable, "-c", ASK, probe.name, sys.version]
        asked = [start_on(host, words, os.environ, BECOME) for host in hosts]
        for host, process in zip(hosts, asked, strict=True):
            said, status = process.communicate()[1].strip(), process.returncode
            expected = f"this folder, {here}, and {sys.executable} with this package, as here"
            fix = f"ssh {host} ls -ld {here} {quote(sys.executable)}"
            if status == 255:
                expected = "a host that your ssh reaches by a key, without a password or a question"
                fix = f"ssh -o BatchMode=yes {host} true"
            elif status == 3:
                said = f"it does not see a new file in {there}"
                expected, fix = "a folder on a filesystem that all hosts of the run mount", "output_dir=FOLDER"
            if status:
                raise ConfigError(f"host {host}: {said}", expected, fix)


# The agents of a run.


POLL_S = 0.1
LEAVE_S = 10.0
"""Longest wait in seconds for the other agents to leave, after the agent of the first node has left."""


@refusing
def main() -> int:
    """Start the agent of each host by ssh, and pass signals on to the agents.

    The arguments of this process are the command that submitit would start on each node.

    Returns:
        The largest exit status of the agents; 2 if a host is refused. If a signal ended an agent, the number of the
        signal counts as its exit status.
    """
    node, words = Node.from_env(), sys.argv[1:]
    folder = words[-1]
    check_hosts(node.hosts, Path(folder))
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: asked.append(number))
    # Variables that are true on this host only, and variables with the number of a node.
    of_this_host, numbered = ["SLURM_TOPOLOGY_ADDR"], ["SLURM_PROCID", "SLURM_NODEID"]
    if not node.is_slurm:
        of_this_host, numbered = [OWNER, VISIBLE_GPUS, "CUDA_VISIBLE_DEVICES"], ["SUBMITIT_LOCAL_GLOBALID"]
    env = {name: value for name, value in os.environ.items() if name not in of_this_host}
    env["SUBMITIT_LOCAL_NTASKS"] = str(len(node.hosts))
    started = []
    for index, host in enumerate(node.hosts):
        paths = JobPaths(folder, node.slurm_job or env["SUBMITIT_LOCAL_JOB_ID"], index)
        own = {**env, **dict.fromkeys(numbered, str(index))}
        started.append(start_on(host, words, own, KEEP, (paths.stdout, paths.stderr)))
    owner = os.environ.get(OWNER)
    while started[0].poll() is None:
        if owner is not None and is_gone(int(owner)):
            asked.append(signal.SIGTERM)
            owner = None
        while asked:
            line = str(int(asked.pop(0)))
            for process in started:
                write_line(process, line)
        time.sleep(POLL_S)
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_S)
        process.kill()
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    sys.exit(main())
