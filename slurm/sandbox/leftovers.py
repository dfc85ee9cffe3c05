"""Taking a sandbox away, whole or half-built or crashed: its processes, its bridge, its directory, and nothing else.

Works from the record alone, so that it is the same after a crash as after a good day.
"""

from __future__ import annotations

import contextlib
import shutil

from slurm.sandbox import accounting, network, node, processes
from slurm.sandbox.commands import SandboxError, wait_until
from slurm.sandbox.state import State


def clear(state: State) -> None:
    """End every process of a sandbox that still runs, and remove its bridge and its directory."""
    for name in list(state.nodes):
        node.switch_off(state, name)
    for daemon in ("slurmctld", *accounting.DAEMONS, "munged"):
        if daemon in state.processes:
            processes.end(state.processes[daemon], grace_s=5.0)
            state.disown(daemon)
    if state.mode == "one-host":
        _end_jobs_on_one_host(state)
    if state.mode == "namespaces":
        network.remove(state)
    shutil.rmtree(state.directory)


def log_tails(state: State, lines: int = 5) -> str:
    """The last lines that every daemon of a sandbox printed, each under its name, for an error message."""
    parts = []
    for path in sorted((state.directory / "log").glob("*.out")):
        tail = path.read_text(errors="replace").splitlines()[-lines:]
        parts += [f"{path.name}:", *(f"  {line}" for line in tail)] if tail else []
    return "\n".join(parts)


def _end_jobs_on_one_host(state: State) -> None:
    """End what the slurmds, which must have ended before, left on this host; wherever its parent was, it is found."""

    def none_left() -> bool:
        left = [process for process in map(_identify, processes.all_pids()) if process and _is_ours(state, process.pid)]
        for process in left:
            processes.end(process, grace_s=0)
        return not left

    # Again and again, because what still runs may start others meanwhile.
    wait_until(none_left, timeout_s=30.0, what="the processes of jobs to end")


def _identify(pid: int) -> processes.Process | None:
    with contextlib.suppress(SandboxError):
        return processes.identify(pid)
    return None


def _is_ours(state: State, pid: int) -> bool:
    """True where a slurmd of this sandbox started a process: by our mark, or by what Slurm gives to tasks of a job.

    A shell under salloc has SLURM_CONF and SLURM_JOB_ID too, but is on no node. slurmstepd writes its title over its
    environment, and is known by its log.
    """
    if processes.name(pid) == "slurmstepd" and any(
        state.directory in path.parents for path in processes.open_files(pid)
    ):
        return True
    there = processes.environment(pid)
    in_job = there.get("SLURM_CONF") == str(state.slurm_conf) and "SLURMD_NODENAME" in there
    return there.get(node.MARK) == str(state.directory) or in_job
