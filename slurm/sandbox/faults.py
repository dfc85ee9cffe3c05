"""Deliberate faults of a cluster: power, cables, hangs, preemption.

Each function returns a sentence about the fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launch.errors import ConfigError
from slurm.sandbox import nodes
from slurm.sandbox.cluster import Cluster, SlurmState
from slurm.sandbox.state import State, opened, require


def _check_name(cluster: Cluster, state: State, fault: str, name: str) -> None:
    if name not in state.nodes:
        names = ", ".join(state.nodes)
        fix = f"python -m slurm.sandbox {fault} NODE{cluster.option}, with one of {names}"
        raise ConfigError(f"{fault} {name}, and there is no such node", f"one of {names}", fix)


@contextmanager
def _running(cluster: Cluster, fault: str, name: str) -> Iterator[State]:
    """Yield the record of a sandbox for a fault of a node. ConfigError if the node cannot have the fault."""
    with opened(cluster.directory) as state:
        if state.why_one_host:
            raise ConfigError(
                found=f"{fault} in a sandbox whose nodes share one host ({state.why_one_host})",
                expected="nodes that are hosts of their own; on one host there are only `preempt` and `heal`",
                fix="python -m slurm.sandbox down, then up as root where namespaces are allowed",
            )
        _check_name(cluster, state, fault, name)
        if not state.find(name):
            fix = f"python -m slurm.sandbox heal {name}"
            raise ConfigError(f"{fault} {name}, which is off", "a node that is on", fix)
        yield state


def power_cut(cluster: Cluster, name: str) -> str:
    """Cut the power of a node: its cable is cut before its processes end, so no peer is notified."""
    with _running(cluster, "power-cut", name) as state:
        nodes.set_link(state, name, up=False)
        nodes.switch_off(state, name)
    return f"{name} has no power"


def cut_link(cluster: Cluster, name: str) -> str:
    """Cut the cable of a node. All its processes continue."""
    with _running(cluster, "cut-link", name) as state:
        nodes.set_link(state, name, up=False)
    return f"{name} has no link, and its processes run on"


def freeze(cluster: Cluster, name: str) -> str:
    """Stop every process of a node; its kernel still acknowledges packets."""
    with _running(cluster, "freeze", name) as state:
        nodes.set_frozen(state, name, frozen=True)
    return f"the processes of {name} are stopped, and its link is up"


def link(cluster: Cluster, name: str, **limits: float | None) -> str:
    """Limit the cable of a node in each direction. ``limits`` are fields of ``nodes.Limits``.

    Without them, remove all limits.
    """
    given = nodes.Limits(**limits)
    with _running(cluster, "link", name) as state:
        nodes.limit(state, name, given)
    return f"the link of {name}, each direction: {given}"


def heal(cluster: Cluster, name: str) -> str:
    """Undo all faults of a node: power, stopped processes, and cable. Then resume the node in Slurm.

    Slurm itself also drains a node, for example after a step that it could not end, and leaves it to an operator.
    """
    done = []
    with opened(cluster.directory) as state:
        _check_name(cluster, state, "heal", name)
        if not state.find(name):
            nodes.switch_on(state, name)
            done.append("switched on")
        elif not state.why_one_host:
            done += [] if nodes.link_is_up(state, name) else ["link up again"]
            done += ["processes go on"] if nodes.is_frozen(state, name) else []
            nodes.set_link(state, name, up=True)
            nodes.limit(state, name, nodes.Limits())
            nodes.set_frozen(state, name, frozen=False)
            nodes.announce(state, name)
    if cluster.slurm_states().get(name, SlurmState()).is_drained:
        cluster.slurm("scontrol", "update", f"NodeName={name}", "State=UNDRAIN")
        done.append("drained no more")
    return f"{name}: {', '.join(done) or 'nothing to heal; its link has no limits'}"


def preempt(cluster: Cluster, job: str, *, seconds: int = 5) -> str:
    """Preempt a running job with a new job in the last partition. The new job takes all nodes for ``seconds``.

    Returns the new job's id. ConfigError if the job does not run, or runs in that partition already.
    """
    best = require(cluster.directory).settings.partitions[-1].partition(":")[0]
    rows = [line.split() for line in cluster.slurm("squeue", "--noheader", "--format=%i %A %T %P %N").splitlines()]
    found = [row for row in rows if job in row[:2] and row[2] == "RUNNING"]
    if not found or found[0][3] == best:
        where = f"runs in partition {best} already" if found else "does not run"
        raise ConfigError(f"preempt {job}, which {where}", f"a job that runs in a partition before {best}", "squeue")
    options = f"--parsable --partition {best} --nodelist {found[0][4]} --exclusive --output /dev/null --chdir /"
    wrap = ["--job-name", f"preempt-{job}", "--wrap", f"exec sleep {seconds}"]
    return cluster.slurm("sbatch", *options.split(), *wrap).strip()
