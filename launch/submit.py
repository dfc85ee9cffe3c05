"""Plans -> jobs, through submitit: one job array for each shape of resources on Slurm, one process group at a time here.

Owns what a submission looks like and what becomes of it. What runs inside a job is ``launch.agent``; its pickle holds
only the path of the run folder, so that a requeued job reads everything else afresh.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from launch import agent, scheduler
from launch.plan import Plan

INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "TORCHELASTIC_", "SUBMITIT_")
INHERITED_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""What tells the client which cluster to talk to stays."""


class Job(Protocol):
    """A submitted point."""

    plan: Plan
    job_id: str | None

    def state(self) -> str:
        """``queued``, ``running`` or ``over``, and the reason where there is one."""
        ...

    def stop(self) -> None:
        """Ask for a save and an end."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def log(self) -> Path | None:
        """Where the first agent writes."""
        ...


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide what an enclosing job or launcher left in the environment: it would bind and name the new job's processes.

    An inherited SLURM_CPU_BIND alone was seen to slow runs three times over.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(INHERITED) or name in INHERITED_NAMES) and name not in KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def submitit_folder(plan: Plan) -> Path:
    """Where submitit keeps its pickles and the agents' logs: beside the points, on the shared filesystem."""
    return Path(plan.run_dir).parent / ".submitit"


def shapes(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Group plans that ask Slurm for the same resources, in order of first appearance."""
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        key = json.dumps([str(submitit_folder(plan)), plan.slurm], sort_keys=True, default=str)
        groups.setdefault(key, []).append(plan)
    return list(groups.values())


def sbatch_text(plans: Sequence[Plan]) -> str:
    """The batch script that submitit writes for plans of one shape. Needs no Slurm."""
    folder = submitit_folder(plans[0]) / "%j"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = len(plans) if len(plans) > 1 else None
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **plans[0].slurm)
    assert isinstance(text, str)
    return text


class SlurmRun:
    """A Slurm job, or one element of a job array."""

    def __init__(self, plan: Plan, job: submitit.Job[None]) -> None:
        self.plan = plan
        self.job_id: str | None = job.job_id
        self._job = job
        self._seen = False

    def state(self) -> str:
        assert self.job_id is not None
        known = scheduler.job_states([self.job_id]).get(self.job_id)
        if known is None:  # forgotten by the controller some minutes after its end
            return "over"
        if known.is_over:
            return "over"
        waiting = known.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")
        return (
            f"queued ({known.reason})"
            if waiting and known.reason not in ("", "None")
            else "queued"
            if waiting
            else "running"
        )

    def stop(self) -> None:
        assert self.job_id is not None
        scheduler.cancel(self.job_id)

    def kill(self) -> None:
        self.stop()

    def log(self) -> Path | None:
        return Path(self._job.paths.stderr)


def submit_slurm(plans: Sequence[Plan]) -> list[SlurmRun]:
    """Submit the plans, one job array for each shape (a plain job where a shape has one plan). In the plans' order."""
    runs: dict[str, SlurmRun] = {}
    for group in shapes(plans):
        executor = submitit.SlurmExecutor(folder=submitit_folder(group[0]) / "%j")
        executor.update_parameters(**group[0].slurm)
        with clean_environment():
            if len(group) == 1:
                jobs = [executor.submit(agent.run, group[0].run_dir)]
            else:
                with executor.batch():
                    jobs = [executor.submit(agent.run, plan.run_dir) for plan in group]
        runs |= {plan.run_dir: SlurmRun(plan, job) for plan, job in zip(group, jobs, strict=True)}
    return [runs[plan.run_dir] for plan in plans]


class LocalRun:
    """A point on this machine: one submitit task for each node, started by ``start``."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.job_id: str | None = None
        self._job: Any = None

    def start(self) -> None:
        """Start the agents. They ignore the terminal's Ctrl-C, which the launcher turns into an orderly stop."""
        executor = submitit.LocalExecutor(folder=submitit_folder(self.plan) / "%j", max_num_timeout=0)
        gpus = visible_gpus()
        executor.update_parameters(
            tasks_per_node=self.plan.nodes,
            timeout_min=self.plan.timeout_min,
            gpus_per_node=len(gpus),
            visible_gpus=gpus,
        )
        os.environ[agent.TOKEN] = uuid.uuid4().hex
        os.environ[agent.OWNER] = str(os.getpid())
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with clean_environment():
                self._job = executor.submit(agent.run, self.plan.run_dir)
        finally:
            signal.signal(signal.SIGINT, handler)
        self.job_id = self._job.job_id

    def state(self) -> str:
        if self._job is None:
            return "queued"
        return "over" if self._job.done() else "running"

    def stop(self) -> None:
        if self._job is not None and not self._job.done():
            self._job._process.terminate()  # the controller hands SIGTERM on to every agent

    def kill(self) -> None:
        self.stop()  # a second SIGTERM ends the ranks at once

    def log(self) -> Path | None:
        return None if self._job is None else Path(self._job.paths.stderr)


def visible_gpus() -> list[int]:
    """Indices of the GPUs that local runs may use; submitit hides all others."""
    from launch.plan import local_gpus

    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is not None:
        return [int(word) for word in words.split(",") if word.strip().isdigit()]
    return list(range(local_gpus()))


def running_job(events: Sequence[dict[str, Any]]) -> str | None:
    """The job that still works on a run folder, from its ledger, or None."""
    submitted = [e for e in events if e["event"] == "submitted"]
    if not submitted:
        return None
    last = submitted[-1]
    job_id = str(last["job_id"])
    if last["cluster"] == "local":
        alive = last.get("host") == os.uname().nodename and is_local_job(int(job_id))
        return f"process {job_id}" if alive else None
    state = scheduler.job_states([job_id]).get(job_id)
    return f"job {job_id}, {state.state}" if state is not None and not state.is_over else None


def is_local_job(pid: int) -> bool:
    """Whether process ``pid`` is a submitit controller that still runs."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
