"""A whole sandbox, for tests and the command line: start, status, end, and faults of its nodes."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from launch.errors import ConfigError
from slurm.sandbox.nodes import CableLimits, SandboxNode, assign_addresses, delete
from slurm.sandbox.state import (
    PROGRAMS,
    SandboxError,
    SandboxState,
    Settings,
    check_settings,
    default_directory,
    end,
    load_state,
    locked,
    opened,
    require_packages,
    require_state,
    run_program,
    wait_until,
    why_no_namespaces,
)

TEMPLATES = Path(__file__).with_name("templates")
"""Folder of templates of Slurm's files. A template has the name of its file in the folder ``etc`` of a sandbox."""
SAVE_S = 120.0
"""Seconds that slurmctld has to save its state before it is killed.

A busy machine takes more than some seconds. If slurmctld is killed too early, it forgets its latest jobs.
"""


def replaced(ours: list[str], theirs: Sequence[str], separator: str = " ") -> str:
    """Return KEY=VALUE texts as one text, joined by ``separator``.

    A text in ``theirs`` replaces the text in ``ours`` that has the same key. Other texts in ``theirs`` are added. Upper
    and lower case of a key are not distinguished.
    """
    return separator.join({text.partition("=")[0].lower(): text for text in (*ours, *theirs)}.values())


def write_files(state: SandboxState) -> None:
    """Create the folders and files of a sandbox: configuration, key, device files, and folders for the daemons."""
    for name in ("etc", "munge", "log", "run", "controller", "spool", "gpu"):
        (state.directory / name).mkdir(mode=0o755)
    gpus = [state.directory / "gpu" / f"nvidia{index}" for index in range(state.settings.gpus_per_node)]
    for gpu in gpus:
        gpu.symlink_to("/dev/null")
    for template in TEMPLATES.iterdir():
        file = state.slurm_conf.with_name(template.name)
        file.touch(mode=0o755)  # Slurm runs the epilog.
        file.write_text(filled(template.name, state, gpus=gpus))
    key = state.directory / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))


def filled(name: str, state: SandboxState, **known: Any) -> str:
    """Return the text of a file from the template ``name``. ``known`` has further values for the template."""
    template = jinja2.Template((TEMPLATES / name).read_text(), trim_blocks=True, keep_trailing_newline=True)
    known |= {"state": state, "settings": state.settings, "user": getpass.getuser()}
    text = template.render(known, replaced=replaced)
    if name != "slurm.conf":
        return text
    general, _, rest = text.partition("# Nodes")
    lines = [line for line in general.splitlines() if not line.startswith("#")]
    return replaced(lines, state.settings.slurm_conf, "\n") + f"\n# Nodes{rest}"


def start_munged(state: SandboxState) -> None:
    """Start munged and wait until it answers."""
    place, log = state.munge_socket.parent, state.directory / "log" / "munged.log"

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(state.munge_socket)) == 0

    # --force, because other users may be able to write to a sandbox's directory, as in /tmp.
    command = f"munged --foreground --force --socket={state.munge_socket} --key-file={place}/key --log-file={log}"
    command += f" --pid-file={state.directory}/run/munged.pid --seed-file={place}/seed"
    state.start("munged", command.split())
    state.wait_ready("munged", answers)


def start_controller(state: SandboxState) -> None:
    """Start slurmctld, with its own host name."""
    script = 'hostname ctl && mount --bind "$1" /etc/hosts && exec slurmctld -D'
    hosts = str(state.slurm_conf.with_name("hosts"))
    state.start("slurmctld", ["sh", "-c", script, "sh", hosts], inside="unshare --uts --mount")


def clear(state: SandboxState) -> None:
    """End all processes of a sandbox, and remove its bridge and folder. The sandbox may be half built or crashed."""
    for name in state.nodes:
        SandboxNode(state, name).switch_off()
    for daemon in ("slurmctld", "munged"):
        end(state.find(daemon), grace_s=5.0)
    for name in state.nodes:
        node = SandboxNode(state, name)
        delete(node.cable)
        delete(node.delay_ends[1])
    delete(state.bridge)
    shutil.rmtree(state.directory)


@dataclass(frozen=True)
class SlurmState:
    """State of a node in Slurm: its short name, with a * if the node does not answer, and the reason of a drain."""

    word: str = "unknown"
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word

    @property
    def is_drained(self) -> bool:
        """True if the node gets no more jobs until an operator resumes it."""
        return self.word.startswith(("drain", "drng"))


@dataclass(frozen=True)
class NodeStatus:
    """State of a node: ``slurm`` as Slurm reports it, the other fields as found in the processes and cables."""

    name: str
    address: str
    power: bool
    link: bool
    frozen: bool
    slurm: SlurmState


class Cluster:
    """A sandbox in a folder, started by ``up`` of this process or of another.

    with Cluster(Path("/tmp/mine")) as cluster:
        cluster.up(Settings(nodes=2))
        cluster.slurm("srun", "--nodes=2", "hostname")
        power_cut(cluster, "n2")
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(os.path.realpath(directory or default_directory()))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which sbatch, squeue, srun and others use this sandbox."""
        return {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}

    @property
    def option(self) -> str:
        """Option that selects this sandbox in a command: `` --dir DIR``; empty for the default folder."""
        return "" if self.directory == Cluster().directory else f" --dir {self.directory}"

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes in order. Raises ConfigError if the sandbox is not up."""
        return list(require_state(self.directory).nodes)

    def slurm(self, *args: str, timeout_s: float = 30.0) -> str:
        """Run a Slurm command on this sandbox, as a user does, and return its output.

        Raises SandboxError if the command fails, or takes more than ``timeout_s`` seconds.
        """
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return run_program(args, timeout_s=timeout_s, env={**clean, **self.env})

    def up(self, settings: Settings | None = None, *, timeout_s: float = 60.0) -> SandboxState:
        """Start the sandbox and wait until every node is idle, for at most ``timeout_s`` seconds.

        Remains of a crashed sandbox in this directory are removed first.

        Raises:
            ConfigError: the settings cannot work, or a sandbox is up here already.
            SandboxError: the start failed. The message has the end of the daemons' logs, and nothing is left behind.
        """
        settings = settings or Settings()
        check_settings(settings, self.directory)
        require_packages(PROGRAMS)
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory):
            self._clear_remains()
            state = SandboxState(self.directory, settings)
            if why := why_no_namespaces(state.bridge):
                expected = "root, on a kernel that allows namespaces and bridges: each node is a host of its own"
                raise ConfigError(f"no namespaces for the nodes: {why}", expected, "the same command as root")
            try:
                self._start(state, timeout_s)
            except BaseException as error:
                if isinstance(error, SandboxError):
                    logs = sorted((self.directory / "log").glob("*.out"))
                    tails = [f"{log.name}: {log.read_text(errors='replace')[-500:]}\n" for log in logs]
                    error.args = (f"{error}\n{''.join(tails)}",)
                clear(state)
                raise
        return state

    def _clear_remains(self) -> None:
        old = load_state(self.directory)
        if old is None:
            if any(self.directory.iterdir()):
                raise ConfigError(
                    found=f"{self.directory} has files that belong to no sandbox",
                    expected="a directory that is empty, or does not exist yet",
                    fix=f"--dir {self.directory / 'slurm-sandbox'}",
                )
            return
        if old.started and old.find("slurmctld"):
            down = f"python -m slurm.sandbox down{self.option}"
            raise ConfigError(
                found=f"a sandbox is up in {self.directory} already, with {len(old.nodes)} nodes",
                expected="to use that one, or another directory for a second",
                fix=f"export SLURM_CONF={old.slurm_conf}, which uses it; or {down}, and up again",
            )
        clear(old)
        self.directory.mkdir(parents=True)

    def _start(self, state: SandboxState, timeout_s: float) -> None:
        state.save()
        assign_addresses(state)
        write_files(state)
        state.save()
        start_munged(state)
        start_controller(state)
        for node in state.nodes:
            SandboxNode(state, node).switch_on()
        self.wait_idle(timeout_s=timeout_s)
        state.started = True
        state.save()

    def wait_idle(self, *, timeout_s: float = 60.0) -> None:
        """Wait until every node is idle and answers.

        Raises:
            SandboxError: a daemon has ended, or ``timeout_s`` seconds have passed. The message has Slurm's states of
                the nodes.
        """
        states: dict[str, SlurmState] = {}

        def is_idle() -> bool:
            state = require_state(self.directory)
            if ended := [name for name in state.processes if not state.find(name)]:
                raise SandboxError(f"{', '.join(ended)} ended instead of running on")
            states.update(self.slurm_states())
            return {name for name, known in states.items() if known.word == "idle"} == {*state.nodes}

        def what() -> str:
            said = ", ".join(f"{name} {state}" for name, state in states.items())
            drained = [name for name, state in states.items() if state.is_drained]
            fix = f"; to resume: python -m slurm.sandbox heal{self.option} {' '.join(drained)}" if drained else ""
            return f"{len(self.nodes)} idle nodes; Slurm says {said or 'nothing'}{fix}"

        wait_until(is_idle, timeout_s=timeout_s, what=what)

    def slurm_states(self) -> dict[str, SlurmState]:
        """Return node -> its state in Slurm; empty if no controller answers."""
        try:
            lines = self.slurm("sinfo", "--Node", "--noheader", "--format=%N %t %E").splitlines()
        except SandboxError:
            return {}
        rows = [line.split(maxsplit=2) for line in lines]
        return {name: SlurmState(word, "" if reason == "none" else reason) for name, word, reason in rows}

    def status(self) -> list[NodeStatus]:
        """Return the state of every node. Raises ConfigError if the sandbox is not up."""
        state, known = require_state(self.directory), self.slurm_states()
        return [
            NodeStatus(
                name=name,
                address=address,
                power=state.find(name) is not None,
                link=SandboxNode(state, name).link_is_up,
                frozen=SandboxNode(state, name).is_frozen,
                slurm=known.get(name, SlurmState()),
            )
            for name, address in state.nodes.items()
        ]

    def down(self) -> bool:
        """End all processes of the sandbox and remove its folder. Returns False if there was no sandbox."""
        if not self.directory.is_dir():
            return False
        with locked(self.directory):
            state = load_state(self.directory)
            if state is not None:
                clear(state)
            return state is not None

    def stop_controller(self) -> None:
        """End slurmctld as an upgrade does: nodes and jobs continue, but no command is answered."""
        with opened(self.directory) as state:
            end(state.find("slurmctld"), grace_s=SAVE_S)

    def start_controller(self) -> None:
        """Start slurmctld again from its saved state. Does nothing if slurmctld runs."""
        with opened(self.directory) as state:
            if not state.find("slurmctld"):
                start_controller(state)


# Deliberate faults of a node: power, cables, hangs. Each function returns a sentence about the fault.


@contextlib.contextmanager
def _node(cluster: Cluster, fault: str, name: str) -> Iterator[SandboxNode]:
    """Lock the sandbox during a ``with`` block, and yield its node ``name``. ``fault`` is the name of the command.

    Raises ConfigError if there is no such node, or if it is off; only ``heal`` accepts a node that is off.
    """
    with opened(cluster.directory) as state:
        if name not in state.nodes:
            names = ", ".join(state.nodes)
            fix = f"python -m slurm.sandbox {fault} NODE{cluster.option}, with one of {names}"
            raise ConfigError(f"{fault} {name}, and there is no such node", f"one of {names}", fix)
        if fault != "heal" and not state.find(name):
            fix = f"python -m slurm.sandbox heal {name}"
            raise ConfigError(f"{fault} {name}, which is off", "a node that is on", fix)
        yield SandboxNode(state, name)


def power_cut(cluster: Cluster, name: str) -> str:
    """Cut the power of a node. Its cable is cut before its processes end, so no other node gets a message.

    Returns a text on the fault for people.
    """
    with _node(cluster, "power-cut", name) as node:
        node.set_link(up=False)
        node.switch_off()
    return f"{name} has no power"


def cut_link(cluster: Cluster, name: str) -> str:
    """Cut the cable of a node. All processes of the node continue. Returns a text on the fault for people."""
    with _node(cluster, "cut-link", name) as node:
        node.set_link(up=False)
    return f"{name} has no link, and its processes run on"


def freeze(cluster: Cluster, name: str) -> str:
    """Stop every process of a node. Its kernel still acknowledges packets. Returns a text on the fault for people."""
    with _node(cluster, "freeze", name) as node:
        node.set_frozen(frozen=True)
    return f"the processes of {name} are stopped, and its link is up"


def link(cluster: Cluster, name: str, **limits: float | None) -> str:
    """Limit the cable of a node, equally in both directions. ``limits`` are fields of ``CableLimits``.

    Fields that are not given, or None, have no limit. Returns a text on the limits for people.
    """
    given = CableLimits(**limits)
    with _node(cluster, "link", name) as node:
        node.limit(given)
    return f"the link of {name}, each direction: {given}"


def heal(cluster: Cluster, name: str) -> str:
    """Undo all faults of a node: power, stopped processes, and cable. Then resume the node in Slurm.

    Returns a text on what was undone for people.

    A node that Slurm itself has drained, for example after a step that Slurm could not end, is also resumed.
    """
    done = []
    with _node(cluster, "heal", name) as node:
        if not node.state.find(name):
            node.switch_on()
            done.append("switched on")
        else:
            done += [] if node.link_is_up else ["link up again"]
            done += ["processes continue"] if node.is_frozen else []
            node.set_link(up=True)
            node.limit(CableLimits())
            node.set_frozen(frozen=False)
            node.register_again()
    if cluster.slurm_states().get(name, SlurmState()).is_drained:
        cluster.slurm("scontrol", "update", f"NodeName={name}", "State=UNDRAIN")
        done.append("drained no more")
    return f"{name}: {', '.join(done) or 'nothing to heal; its link has no limits'}"


def preempt(cluster: Cluster, job: str, *, seconds: int = 5) -> str:
    """Submit a job that preempts the running job ``job``.

    The new job takes the nodes of ``job`` for ``seconds`` seconds. It is in the last partition, which preempts all
    others.

    Returns the id of the new job. Raises ConfigError if ``job`` does not run, or is already in the last partition.
    """
    best = require_state(cluster.directory).settings.partitions[-1].partition(":")[0]
    rows = [line.split() for line in cluster.slurm("squeue", "--noheader", "--format=%i %A %T %P %N").splitlines()]
    found = [row for row in rows if job in row[:2] and row[2] == "RUNNING"]
    if not found or found[0][3] == best:
        where = f"runs in partition {best} already" if found else "does not run"
        raise ConfigError(f"preempt {job}, which {where}", f"a job that runs in a partition before {best}", "squeue")
    options = f"--parsable --partition {best} --nodelist {found[0][4]} --exclusive --output /dev/null --chdir /"
    wrap = ["--job-name", f"preempt-{job}", "--wrap", f"exec sleep {seconds}"]
    return cluster.slurm("sbatch", *options.split(), *wrap).strip()
