"""Runs that tests launch: scripts, examples, the program that counts, a run on the sandbox with faults; a real ssh."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib.image import imread

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.storm import injection
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.nodes import SandboxNode
from slurm.sandbox.state import require_state
from tests.support.commands import ON_SLURM, ROOT, Process, descendants, running, start_fork, wait_for

EXAMPLES = ROOT / "examples"
LOCAL = ("cluster=local", "ranks_per_node=1", "workload=script", "launch.poll_s=1", "launch.report_files=[md,csv]")
"""Nodes are agents on this machine, of one rank each, and no pictures are drawn."""
PROGRESS = r"script.progress=step (?P<step>\d+): loss (?P<loss>[\d.]+)"
"""Finds what plain_ddp.py prints."""


def write_script(folder: Path, text: str, name: str = "script.py") -> Path:
    """Write a program that a test launches."""
    path = folder / name
    path.write_text(text)
    return path


def write_program(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def names(folder: RunFolder) -> list[str]:
    """Names of the events of a run."""
    return [event["event"] for event in folder.read_events()]


def recorded(folder: RunFolder, *events: Mapping[str, Any]) -> RunFolder:
    """The run folder with these events."""
    for event in events:
        folder.record_event(**event)
    return folder


def printed(folder: RunFolder, attempt: int = 1, rank: int = 0) -> str:
    """The log of a rank; nothing where there is none."""
    log = folder.log(attempt, rank)
    return log.read_text() if log.exists() else ""


def last_loss(folder: RunFolder) -> tuple[int, float]:
    """Step and loss of the last record of rank 0."""
    record = read_records(folder.metrics(0))[-1]
    return record["step"], record["loss"]


def printed_loss(text: str, step: int) -> float:
    """Loss that plain_ddp.py has printed for a step."""
    (loss,) = re.findall(rf"^step {step}: loss ([\d.]+)$", text, re.MULTILINE)
    return float(loss)


def first_step(text: str) -> int:
    """The first step that plain_ddp.py has printed; torch may print warnings before."""
    found = re.search(r"^step (\d+):", text, re.MULTILINE)
    assert found, text
    return int(found[1])


def rank_of_script(pid: int, script: str, rank: int) -> int | None:
    """Process id of a rank that runs ``script`` below process ``pid``, and not of the shell that becomes it."""
    for found, words, variables in running(descendants(pid)):
        if len(words) > 1 and words[1].endswith(script) and variables.get("RANK") == str(rank):
            return found
    return None


def causes(folder: RunFolder) -> list[str]:
    """Outcomes of the attempts of a run."""
    return [str(e["cause"]) for e in folder.read_events() if e["event"] == "attempt_ended"]


def start_training(
    folder: RunFolder, *words: str, steps: int = 3, begin: Callable[..., Process] = start_fork
) -> Process:
    """A launched run of which rank 1 has made ``steps`` steps; what it prints is in ``log`` beside its folder."""
    log = folder.path.parent / "log"
    process = begin("launch", *words, f"run_dir={folder.path}", cwd=log.parent, log=log)
    wait_for(lambda: len(read_records(folder.metrics(1))) >= steps or process.poll() is not None, f"step {steps}")
    assert process.poll() is None, log.read_text()
    return process


MEETING = """
import os, pathlib, sys, time

me, all_of_us = sys.argv[1:]
pathlib.Path(f"here_{me}").touch()
print("CPUs", *os.sched_getaffinity(0), flush=True)
while len(list(pathlib.Path().glob("here_*"))) < int(all_of_us):
    time.sleep(0.05)
"""
"""A program that ends only if so many of its kind run at the same time."""
PROGRAM = Path(__file__).parent / "programs" / "counting.py"
COUNTING = ("workload=script", f"script.path={PROGRAM}", "script.resumes=true")


def rank_hosts(folder: RunFolder, attempt: int = 1) -> list[str]:
    """Hosts of the ranks of an attempt, in the order of the ranks."""
    return [rank["host"] for rank in json.loads(folder.environment(attempt).read_text())["ranks"]]


def options(**values: object) -> list[str]:
    """Options of the program, as words of a command line."""
    return [f"script.options.{name.replace('_', '-')}={value}" for name, value in values.items()]


def sum_of_squares(steps: int) -> int:
    """What it has counted after so many steps, in closed form."""
    return steps * (steps + 1) * (2 * steps + 1) // 6


def checkpoint(folder: RunFolder) -> dict[str, int]:
    """Its newest checkpoint: step, sum, and the attempt that wrote it."""
    found = json.loads((folder.checkpoints / "newest.json").read_text())
    assert isinstance(found, dict) and found["sum"] == sum_of_squares(found["step"]), "each step once"
    return found


def from_step(folder: RunFolder, attempt: int, rank: int = 0) -> int | None:
    """Step that an attempt has gone on from; None where it did not come so far."""
    found = re.search(r"^goes on from step (\d+)$", printed(folder, attempt, rank), re.MULTILINE)
    return int(found[1]) if found else None


class StormyRun:
    """A run on the sandbox, followed by its launcher, which writes ``log``."""

    def __init__(self, sandbox: Cluster, folder: Path, *words: str, nodes: int = 2) -> None:
        self.sandbox = sandbox
        self.log = folder / "log"
        self.folder = RunFolder(folder / "run")
        words = (*ON_SLURM, f"nodes={nodes}", f"run_dir={self.folder.path}", *words)
        self.process = start_fork("launch", *words, cwd=folder, log=self.log, **sandbox.env)
        self.wait(lambda: self.of("submitted"), "the submission")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until ``condition`` holds; the launcher must not have ended by then."""
        wait_for(lambda: condition() or self.process.poll() is not None, what)
        assert condition(), (f"the run ended before {what}", self.folder.read_events(), self.log.read_text())

    def of(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names."""
        return [e for e in self.folder.read_events() if e["event"] in names]

    @property
    def job(self) -> str:
        """Slurm's id of its job."""
        return str(self.of("submitted")[-1]["job_id"])

    def wait_for_ranks(self, attempt: int) -> None:
        """Wait until the ranks of an attempt have started; they need not have made a step."""
        self.wait(lambda: self.folder.log(attempt, 0).exists(), f"the ranks of attempt {attempt}")

    def wait_for_steps(self, attempt: int, count: int = 10) -> None:
        """Wait until an attempt has made some steps."""

        def steps() -> int:
            return sum(record["attempt"] == attempt for record in read_records(self.folder.metrics(0)))

        self.wait(lambda: steps() >= count, f"step {count} of attempt {attempt}")

    def rank_hosts(self, attempt: int) -> list[str]:
        """Hosts of the ranks of an attempt. The agent records them beside the first steps."""
        self.wait(self.folder.environment(attempt).exists, f"the ranks that the agent records of attempt {attempt}")
        return rank_hosts(self.folder, attempt)

    def end(self, *options: str) -> int:
        """Cancel the job, and return the exit status of the launcher."""
        self.sandbox.slurm("scancel", *options, self.job)
        return self.process.wait(timeout=300)

    def hosts(self) -> list[str]:
        """Nodes of the job, in order: the batch host is the first."""
        names = self.sandbox.slurm("squeue", "--noheader", "--format=%N", "--jobs", self.job).strip()
        return self.sandbox.slurm("scontrol", "show", "hostnames", names).split()

    def kill_srun(self, *, alone: bool = False) -> None:
        """Kill the srun of the batch script with SIGKILL.

        ``alone`` leaves the process that srun forks to look after it, and that ends the step then; without it the step
        goes on, and nobody waits for it.
        """
        found = self._processes("srun")
        injection.send(found[-1:] if alone else found, signal.SIGKILL)

    def tell_agents_to_leave(self) -> None:
        """Send SIGTERM to the agents as slurmstepd does, for which nobody has to reach the controller."""
        injection.send(self._processes("python"), signal.SIGTERM)

    def _processes(self, program: str) -> list[psutil.Process]:
        found = injection.of_job(self.job, program, self.sandbox.env["SLURM_CONF"])
        assert found, f"no {program} of job {self.job}"
        return found


PACED = """
import importlib.machinery, os, sys, time

class Pacemaker:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "gpt.training.step" else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), self.pace(module))
        return spec

    def pace(self, module):
        lr_at = module.lr_at
        def paced(config, step):
            if not os.path.exists(os.environ["HURRY"]):
                time.sleep(0.1)
            return lr_at(config, step)
        module.lr_at = paced

if "HURRY" in os.environ:
    sys.meta_path.insert(0, Pacemaker())
"""
"""Imported at the start of every interpreter of the run; asks for the file HURRY in each step."""


def paced(folder: Path) -> tuple[list[str], Path]:
    """Words with which a run on Slurm waits in each step, and the file that ends this once it is there."""
    there, hurry = folder / "paced", folder / "hurry"
    there.mkdir()
    (there / "sitecustomize.py").write_text(PACED)
    return [f"cluster.setup=['export PYTHONPATH={there}:$PYTHONPATH','export HURRY={hurry}']"], hurry


def png_shape(png: bytes) -> tuple[int, int, int]:
    """Width, height and channels of a PNG file, as matplotlib reads it."""
    height, width, channels = imread(io.BytesIO(png)).shape
    return width, height, channels


# A real ssh with keys made for a test: a client's command in a folder of its own, and servers that know its key.


SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin")
CLIENT = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
SERVER = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


def make_ssh(folder: Path, client: str = "") -> Path:
    """Make keys, a server's ``sshd_config`` and a client's ``bin/ssh`` in a new folder.

    Skips where no server is installed. ``client`` is put before the client's configuration, with ``{folder}`` and
    ``{sshd}`` filled in.
    """
    if SSHD is None or os.getuid() != 0:
        pytest.skip("needs openssh-server and root")
    Path("/run/sshd").mkdir(exist_ok=True)
    folder.mkdir(parents=True)
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "config").write_text((client + CLIENT).format(sshd=SSHD, folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    write_program(folder / "bin" / "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    return folder


def serve_ssh(sandbox: Cluster, folder: Path) -> dict[str, str]:
    """Start a server on each node of a sandbox. Returns node -> address. A node that has one keeps it."""
    state = require_state(sandbox.directory)
    for name in state.nodes:
        first = SandboxNode(state, name).process_one()
        assert first is not None and SSHD is not None
        inside = ["nsenter", f"--target={first.pid}", *(f"--{kind}" for kind in ("mount", "uts", "ipc", "net", "pid"))]
        subprocess.run([*inside, SSHD, "-f", folder / "sshd_config"], check=False)
    return dict(state.nodes)
