"""A run on the sandbox for tests with faults: faults that are no node's, and steps that take their time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.storm import injection
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
