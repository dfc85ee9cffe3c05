"""A run on the sandbox that faults are thrown at, and those faults that are no node's: srun, agents, the controller."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.jobs.sbatch import SUBMISSION
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox import processes
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, start_fork, wait_for


class StormyRun:
    """A run of two nodes on the sandbox, followed by its launcher, which writes ``log``."""

    def __init__(self, sandbox: Cluster, folder: Path, *words: str, **extra: str) -> None:
        self.sandbox = sandbox
        self.log = folder / "log"
        self.folder = RunFolder(folder / "run")
        words = (*ON_SLURM, "nodes=2", f"run_dir={self.folder.path}", *words)
        self.process = start_fork("launch", *words, cwd=folder, log=self.log, **sandbox.env, **extra)
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

    def hosts(self) -> list[str]:
        """Nodes of the job, in order: the batch host is the first."""
        names = self.sandbox.slurm("squeue", "--noheader", "--format=%N", "--jobs", self.job).strip()
        return self.sandbox.slurm("scontrol", "show", "hostnames", names).split()

    def kill_srun(self, *, alone: bool = False) -> None:
        """Kill the srun of the batch script with SIGKILL.

        ``alone`` leaves the process that srun forks to look after it, and that ends the step then; without it the step
        goes on, and nobody waits for it.
        """
        signal_job(self.sandbox, self.job, "srun", SUBMISSION, signal.SIGKILL, only_parent=alone)

    def tell_agents_to_leave(self) -> None:
        """Send SIGTERM to the agents as slurmstepd does, for which nobody has to reach the controller."""
        signal_job(self.sandbox, self.job, "python", SUBMISSION, signal.SIGTERM)


def signal_job(
    sandbox: Cluster, job: str, program: str, module: str, number: signal.Signals, *, only_parent: bool = False
) -> None:
    """Signal the processes of a job, on whatever node, that ``program`` is and that name a Python ``module``."""
    mine = {"SLURM_JOB_ID": job, "SLURM_CONF": sandbox.env["SLURM_CONF"]}
    found = []
    for pid in processes.all_pids():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            is_program = Path(command[0].decode()).name.startswith(program) and module.encode() in command
            if is_program and processes.environment(pid).items() >= mine.items():
                found.append(pid)
    assert found, f"no {program} of job {job}"
    children = [pid for parent in found for pid in processes.children(parent) if pid in found]
    parents = [pid for pid in found if pid not in children]
    for pid in parents if only_parent else [*children, *parents]:  # a child that outlives its parent may act on it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
