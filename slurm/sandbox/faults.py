"""Faults of a cluster, injected on purpose: power, cables, hangs, preemption."""

from __future__ import annotations

from launch.errors import ConfigError
from slurm.sandbox import network, node
from slurm.sandbox import network as shaping
from slurm.sandbox import state as records
from slurm.sandbox.cluster import Cluster, SlurmState
from slurm.sandbox.state import State

NEEDS_NAMESPACES = ("power-cut", "cut-link", "freeze", "link")


def _open(cluster: Cluster, fault: str, name: str) -> State:
    """The sandbox's record, once it is sure that this fault can happen to this node; ConfigError."""
    state = records.require(cluster.directory)
    if state.mode == "one-host" and fault in NEEDS_NAMESPACES:
        raise ConfigError(
            found=f"{fault} in a sandbox whose nodes share one host ({state.why_one_host})",
            expected="nodes that are hosts of their own; on one host there are only `preempt` and `heal`",
            fix="python -m slurm.sandbox down, then up as root where namespaces are allowed",
        )
    if name not in state.nodes:
        names = ", ".join(state.nodes)
        raise ConfigError(
            f"{fault} {name}, and there is no such node",
            f"one of {names}",
            f"python -m slurm.sandbox {fault} NODE{cluster.option}, with one of {names}",
        )
    return state


def _open_running(cluster: Cluster, fault: str, name: str) -> State:
    """Return the node, for a fault that needs the node to be switched on; ConfigError."""
    state = _open(cluster, fault, name)
    if not node.is_on(state, name):
        raise ConfigError(f"{fault} {name}, which is off", "a node that is on", f"python -m slurm.sandbox heal {name}")
    return state


def power_cut(cluster: Cluster, name: str) -> str:
    """End a node within an instant, silently: its cable is dead before its processes are, so no peer is told.

    Returns what was done, in words, as the other faults do.
    """
    with records.locked(cluster.directory):
        state = _open_running(cluster, "power-cut", name)
        network.set_link(state, name, up=False)
        node.switch_off(state, name)
    return f"{name} has no power"


def cut_link(cluster: Cluster, name: str) -> str:
    """Pull a node's cable; everything on it runs on."""
    with records.locked(cluster.directory):
        network.set_link(_open_running(cluster, "cut-link", name), name, up=False)
    return f"{name} has no link, and its processes run on"


def freeze(cluster: Cluster, name: str) -> str:
    """Stop every process of a node; its kernel still acknowledges what arrives."""
    with records.locked(cluster.directory):
        node.set_frozen(_open_running(cluster, "freeze", name), name, frozen=True)
    return f"the processes of {name} are stopped, and its link is up"


def link(
    cluster: Cluster,
    name: str,
    *,
    bandwidth_mbit: float | None = None,
    loss_percent: float | None = None,
    latency_ms: float | None = None,
) -> str:
    """Limit a node's cable, in each direction: megabits a second, percent of packets lost, milliseconds of delay.

    What is None is unlimited.
    """
    with records.locked(cluster.directory):
        state = _open_running(cluster, "link", name)
        shaping.shape(state, name, bandwidth_mbit=bandwidth_mbit, loss_percent=loss_percent, latency_ms=latency_ms)
    limits = ((bandwidth_mbit, "Mbit/s"), (loss_percent, "% lost"), (latency_ms, "ms of delay"))
    given = ", ".join(f"{value:g} {unit}" for value, unit in limits if value is not None)
    return f"the link of {name}, each direction: {given or 'no limits'}"


def heal(cluster: Cluster, name: str) -> str:
    """Undo what happened to a node: switch it on, or else continue its processes and free its cable; then resume it.

    Slurm drains a node by itself too, such as one on which it could not end a step, and leaves it to an operator.
    """
    done = []
    with records.locked(cluster.directory):
        state = _open(cluster, "heal", name)
        if not node.is_on(state, name):
            node.switch_on(state, name)
            done.append("switched on")
        elif state.mode == "namespaces":
            done += [] if network.link_is_up(state, name) else ["link up again"]
            done += ["processes go on"] if node.is_frozen(state, name) else []
            network.set_link(state, name, up=True)
            shaping.shape(state, name)
            node.set_frozen(state, name, frozen=False)
            node.announce(state, name)
    if cluster.slurm_states().get(name, SlurmState()).is_drained:
        cluster.slurm("scontrol", "update", f"NodeName={name}", "State=UNDRAIN")
        done.append("drained no more")
    return f"{name}: {', '.join(done) or 'nothing to heal; its link has no limits'}"


def preempt(cluster: Cluster, job: str, *, seconds: int = 5) -> str:
    """Preempt a running job: submit one to the most preferred partition that wants all its nodes for ``seconds``.

    Returns the new job's id. ConfigError where the job does not run, or already runs in that partition.
    """
    state = records.require(cluster.directory)
    best = state.settings.partitions[-1].partition(":")[0]
    rows = [line.split() for line in cluster.slurm("squeue", "--noheader", "--format=%i %A %T %P %N").splitlines()]
    found = [row for row in rows if job in row[:2] and row[2] == "RUNNING"]
    if not found or found[0][3] == best:
        where = f"runs in partition {best} already" if found else "does not run"
        raise ConfigError(f"preempt {job}, which {where}", f"a job that runs in a partition before {best}", "squeue")
    options = ["--partition", best, "--nodelist", found[0][4], "--exclusive", "--output", "/dev/null"]
    script = ["--parsable", "--job-name", f"preempt-{job}", "--chdir", "/", "--wrap", f"exec sleep {seconds}"]
    return cluster.slurm("sbatch", *options, *script).strip()
