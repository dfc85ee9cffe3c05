"""A sandbox as a whole: up, down, and its state. The Python interface for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from launch.errors import ConfigError
from slurm.sandbox import configuration, network, node, processes
from slurm.sandbox import node as accounting
from slurm.sandbox import processes as packages
from slurm.sandbox import state as records
from slurm.sandbox.processes import SandboxError, run, wait_until
from slurm.sandbox.state import Settings, State, check, default_directory, directory_tag

# Taking a sandbox away, whole or half-built or crashed: its processes, its bridge, its directory, and nothing else.


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


# A sandbox as a whole: up, down, and what it looks like. The Python interface for tests.


@dataclass(frozen=True)
class SlurmState:
    """State of a node as Slurm tells it: its short word, with a * where it is silent, and why it is out of service."""

    word: str = "unknown"
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word

    @property
    def is_drained(self) -> bool:
        """True where it gets no more jobs until somebody resumes it."""
        return self.word.startswith(("drain", "drng"))

    @property
    def is_in_service(self) -> bool:
        """True where it answers and may have jobs."""
        out = self.is_drained or self.word.startswith(("down", "fail", "inval", "unk"))
        return not out and not self.word.endswith("*")


@dataclass(frozen=True)
class NodeStatus:
    """One node as it is: ``slurm`` as Slurm has it, the rest as the machine shows it."""

    name: str
    address: str
    port: int
    power: bool
    link: bool
    frozen: bool
    slurm: SlurmState

    @property
    def is_sound(self) -> bool:
        """True if there is nothing to heal, but for limits on its cable."""
        return self.power and self.link and not self.frozen and self.slurm.is_in_service


SAVE_S = 120.0
"""Time that slurmctld has to save its state where it is asked to end: on a busy machine it takes more than seconds, and
one that is killed meanwhile may have forgotten its latest jobs."""


class Cluster:
    """A sandbox in a directory; started with up(), or found again where another process started it."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(os.path.realpath(directory or default_directory()))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def env(self) -> dict[str, str]:
        """Variables to add to an environment so that sbatch, squeue, srun and the like speak to this sandbox."""
        return {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}

    @property
    def option(self) -> str:
        """Arguments of a command of the sandbox so that it means this one: `` --dir DIR``, nothing for the default."""
        return "" if self.directory == Cluster().directory else f" --dir {self.directory}"

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes, in order; ConfigError where the sandbox is not up."""
        return list(records.require(self.directory).nodes)

    def slurm(self, *args: str, timeout_s: float = 30.0) -> str:
        """Run a Slurm command against this sandbox, as a user would, and return what it printed; SandboxError."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return run(args, timeout_s=timeout_s, env={**clean, **self.env})

    def up(self, settings: Settings | None = None, *, timeout_s: float = 60.0) -> State:
        """Start the sandbox and wait until every node is idle.

        Clears the remains of one that crashed here. Raises ConfigError for what cannot work or is up already, and
        SandboxError, with the end of the daemons' logs and nothing left behind, where the start fails.
        """
        settings = settings or Settings()
        check(settings, self.directory)
        packages.require(packages.EVERYWHERE | (packages.WITH_ACCOUNTING if settings.accounting else {}))
        with records.locked(self.directory, create=True):
            self._clear_remains()
            state = self._new_state(settings)
            try:
                self._start(state, timeout_s)
            except BaseException as error:
                told = log_tails(state)
                clear(state)
                if isinstance(error, SandboxError):
                    raise SandboxError(f"{error}\n{told}".strip()) from error
                raise
        return state

    def _clear_remains(self) -> None:
        old = records.load(self.directory)
        if old is None:
            if any(self.directory.iterdir()):
                raise ConfigError(
                    found=f"{self.directory} holds files that are no sandbox's",
                    expected="a directory that is empty, or not there yet",
                    fix=f"--dir {self.directory / 'slurm-sandbox'}",
                )
            return
        if old.started and old.processes["slurmctld"].alive():
            raise ConfigError(
                found=f"a sandbox is up in {self.directory} already, with {len(old.nodes)} nodes",
                expected="to use that one, or another directory for a second",
                fix=f"export SLURM_CONF={old.slurm_conf}, which uses it; or python -m slurm.sandbox down{self.option}, "
                "and up again",
            )
        clear(old)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _new_state(self, settings: Settings) -> State:
        why = "asked for with --no-namespaces"
        if settings.namespaces:
            packages.require(packages.WITH_NAMESPACES)
            why = packages.why_no_namespaces(f"ssb{directory_tag(self.directory)}") or ""
        return State(self.directory, settings, "one-host" if why else "namespaces", why)

    def _start(self, state: State, timeout_s: float) -> None:
        state.save()
        (network.build if state.mode == "namespaces" else network.build_on_one_host)(state)
        accounting.place(state)
        _write_files(state)
        state.save()
        if not state.settings.join:
            _start_munged(state)
        accounting.start(state)
        accounting.enter(state, self.slurm)
        _start_controller(state)
        for name in state.nodes:
            node.switch_on(state, name)
        self._wait_started(state, timeout_s)
        state.started = True
        state.save()

    def _wait_started(self, state: State, timeout_s: float) -> None:
        def all_idle() -> bool:
            ended = [name for name, process in state.processes.items() if not process.alive()]
            if ended:
                raise SandboxError(f"{', '.join(ended)} ended instead of running on")
            return self._all_idle(set(state.nodes)) and accounting.is_known(state, self.slurm)

        wait_until(all_idle, timeout_s=timeout_s, what=self._nodes_in_words)

    def _all_idle(self, names: set[str]) -> bool:
        return {name for name, said in self.slurm_states().items() if said.word == "idle"} == names

    def _nodes_in_words(self) -> str:
        states = self.slurm_states()
        said = ", ".join(f"{name} {state}" for name, state in states.items())
        drained = [name for name, state in states.items() if state.is_drained]
        fix = f"; to resume: python -m slurm.sandbox heal{self.option} {' '.join(drained)}" if drained else ""
        return f"{len(self.nodes)} idle nodes; Slurm says {said or 'nothing'}{fix}"

    def wait_idle(self, *, timeout_s: float = 60.0) -> None:
        """Wait until every node is idle and answers; SandboxError with what Slurm says where that does not come."""
        names = set(self.nodes)
        wait_until(lambda: self._all_idle(names), timeout_s=timeout_s, what=self._nodes_in_words)

    def slurm_states(self) -> dict[str, SlurmState]:
        """Return the state of each node; empty where no controller answers."""
        try:
            lines = self.slurm("sinfo", "--Node", "--noheader", "--format=%N %t %E").splitlines()
        except SandboxError:
            return {}
        rows = [line.split(maxsplit=2) for line in lines]
        return {name: SlurmState(word, "" if reason == "none" else reason) for name, word, reason in rows}

    def status(self) -> list[NodeStatus]:
        """Every node as it is; ConfigError where the sandbox is not up."""
        state = records.require(self.directory)
        said = self.slurm_states()
        one_host = state.mode == "one-host"
        return [
            NodeStatus(
                name=name,
                address=at.address,
                port=at.port,
                power=node.is_on(state, name),
                link=one_host or network.link_is_up(state, name),
                frozen=not one_host and node.is_frozen(state, name),
                slurm=said.get(name, SlurmState()),
            )
            for name, at in state.nodes.items()
        ]

    def stop_controller(self) -> None:
        """End slurmctld, as an upgrade does: nodes and jobs go on, and nobody answers. Nothing where it is off."""
        with records.locked(self.directory):
            processes.end(records.require(self.directory).processes["slurmctld"], grace_s=SAVE_S)

    def start_controller(self) -> None:
        """Start slurmctld again, from its saved state; nothing where it runs."""
        with records.locked(self.directory):
            state = records.require(self.directory)
            if not state.processes["slurmctld"].alive():
                _start_controller(state)

    def down(self) -> bool:
        """End everything the sandbox started and remove its directory; whether there was anything to end."""
        with records.locked(self.directory) as there:
            state = records.load(self.directory) if there else None
            if state is None:
                return False
            clear(state)
            return True


def _write_files(state: State) -> None:
    """Lay out the sandbox's directory: configuration, key, device files, and room for the daemons."""
    for name in ("etc", "munge", "log", "run", "controller", "spool", "gpu"):
        (state.directory / name).mkdir(mode=0o755)
    etc = state.slurm_conf.parent
    (etc / "slurm.conf").write_text(configuration.slurm_conf(state))
    (etc / "gres.conf").write_text(configuration.gres_conf(state))
    (etc / "hosts").write_text(configuration.hosts(state))
    epilog = configuration.epilog_file(state)
    epilog.write_text(configuration.EPILOG)
    epilog.chmod(0o755)
    key = state.directory / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    for path in configuration.gpu_files(state):
        # slurmd wants a device file, which only root may make, but a link to one is as good.
        path.symlink_to("/dev/null")


def _start_munged(state: State) -> None:
    place = state.munge_socket.parent
    # --force, because the directory of a sandbox may be one that others can write to, as /tmp is.
    command = ["munged", "--foreground", "--force", f"--socket={state.munge_socket}", f"--key-file={place}/key"]
    command += [f"--log-file={state.directory}/log/munged.log", f"--pid-file={state.directory}/run/munged.pid"]
    command += [f"--seed-file={place}/seed"]
    processes.start(command, log=state.log("munged"), env=node.environment(state), record=partial(state.own, "munged"))
    wait_until(lambda: _answers(state.munge_socket), timeout_s=20.0, what="munged to answer")


def _start_controller(state: State) -> None:
    command, inside = ["slurmctld", "-D"], []
    if state.mode == "namespaces":
        inside = ["unshare", "--uts", "--mount"]
        script = 'hostname ctl && mount --bind "$1" /etc/hosts && exec slurmctld -D'
        command = ["sh", "-c", script, "sh", str(state.slurm_conf.with_name("hosts"))]
    env, log, record = node.environment(state), state.log("slurmctld"), partial(state.own, "slurmctld")
    processes.start(command, log=log, env=env, record=record, inside=inside)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
