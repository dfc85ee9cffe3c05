"""The faults of a chaos drill: one table of kinds, and a function for each kind.

``python -m launch.storm.injection RUN SIGNAL WHAT WHICH`` sends a signal to processes of a run on this host. RUN is the
run folder, and SIGNAL a name such as SIGKILL. WHAT and WHICH choose the processes (``processes_to_signal``). A drill
cannot see the processes of other nodes, and starts this command there by srun. Only processes of this user get the
signal.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from launch.config.compose import workload_of_run
from launch.runs.folder import RunFolder, read_json
from launch.slurm.jobs import SUBMISSION

AGENTS = ({SUBMISSION}, {"gpt_launch", "agent"})
"""Words in the command line of an agent that submitit started, and of an agent that a plain batch script started."""
PATIENCE_S = 120.0
"""Longest wait in seconds for a process to signal, and for the start of a save."""
RESTART_S = 300.0
"""Longest wait in seconds for the next start of a requeued job, and for an answer of a Slurm command."""
BOOKKEEPING = "manifest.json"
"""File in a checkpoint with time and attempt of the save. It differs between runs and is not compared."""
T = TypeVar("T")


class FaultError(RuntimeError):
    """Raised if a fault cannot be injected."""


def wait_or_fail(
    condition: Callable[[], T],
    what: str,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
    *,
    poll_s: float = 0.05,
) -> T:
    """Poll a condition until its value is true, and return the value.

    Args:
        condition: function that returns the value.
        what: name of the condition, for the error message.
        timeout_s: longest wait in seconds.
        is_over: function that returns True to end the wait.
        poll_s: seconds between two polls.

    Raises:
        FaultError: the time is over, or ``is_over`` returned True.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline or is_over():
            raise FaultError(f"{what} did not come")
        time.sleep(poll_s)
    return found


# Processes of a run on this host.


def own_processes() -> list[psutil.Process]:
    """Return all processes of this user on this host. ``info`` of each has command line, environment and parent."""
    found = psutil.process_iter(["cmdline", "environ", "ppid", "uids"])
    return [p for p in found if p.info["cmdline"] and p.info["environ"] and p.info["uids"].real == os.getuid()]


def of_run(run_dir: Path) -> list[psutil.Process]:
    """Return the ranks of a run, and the processes that ranks have started."""
    run, found = str(run_dir), []
    for process in own_processes():
        words, variables = process.info["cmdline"], process.info["environ"]
        if variables.get("LAUNCH_RUN_DIR") == run or ("RANK" in variables and run in words):
            found.append(process)
    return found


def rank_processes(run_dir: Path) -> dict[int, psutil.Process]:
    """Return rank -> its process, for a run on this host. Child processes of ranks are left out."""
    found = of_run(run_dir)
    ranks = {process.pid: process.info["environ"].get("RANK", "") for process in found}
    first = [p for p in found if ranks[p.pid].isdigit() and ranks.get(p.info["ppid"]) != ranks[p.pid]]
    return {int(ranks[process.pid]): process for process in first}


def is_agent(words: Sequence[str]) -> bool:
    """Return whether a command line is that of an agent, or of the srun that starts agents."""
    return any(agent <= {*words} for agent in AGENTS)


def of_job(job: str, program: str, conf: str | None) -> list[psutil.Process]:
    """Return the processes of a Slurm job on this host that are agents or start agents, children first.

    Args:
        job: Slurm's id of the job.
        program: beginning of the program's name: ``srun``, or ``python`` for agents.
        conf: the job's SLURM_CONF, None if it is not set. Jobs of other clusters may have the same ids.
    """
    found = [
        process
        for process in own_processes()
        if Path(process.info["cmdline"][0]).name.startswith(program) and is_agent(process.info["cmdline"])
        if process.info["environ"].get("SLURM_JOB_ID") == job and process.info["environ"].get("SLURM_CONF") == conf
    ]
    pids = {process.pid for process in found}
    # A child may react to the end of its parent.
    return sorted(found, key=lambda process: process.info["ppid"] not in pids)


def processes_to_signal(run_dir: Path, what: str, which: str) -> list[psutil.Process]:
    """Return the processes on this host that a fault signals; empty if there are none.

    Args:
        run_dir: folder of the run.
        what: kind of the processes. ``rank`` is the rank ``which``; ``agent`` is the agent that started this rank.
            ``agents`` are all agents of the job ``which``. ``srun`` is the srun that started the agents of the job,
            with the helper process that would end srun's step.
        which: number of the rank, or Slurm's id of the job.
    """
    if what in ("agents", "srun"):
        return of_job(which, "python" if what == "agents" else "srun", os.environ.get("SLURM_CONF"))
    rank = rank_processes(run_dir).get(int(which))
    with suppress(psutil.NoSuchProcess):
        line = [rank, *rank.parents()] if rank else []
        return [p for p in line if what == "rank" or is_agent(p.cmdline())][:1]
    return []


def wait_for_processes(
    run_dir: Path, what: str, which: str, *, in_save: bool = False, is_over: Callable[[], bool] = lambda: False
) -> list[psutil.Process]:
    """Wait for processes to signal, and return the processes. With ``in_save``, also wait for the start of a save.

    ``what`` and ``which`` are those of ``processes_to_signal``. Raises FaultError if no process appears, if no save
    starts, or if ``is_over`` returns True.
    """
    found = partial(processes_to_signal, run_dir, what, which)
    processes = wait_or_fail(found, f"{what} {which}", 0.0 if what == "srun" else PATIENCE_S, is_over)
    if in_save:
        folder = RunFolder(run_dir).checkpoints
        before = set(folder.glob("*"))
        wait_or_fail(lambda: set(folder.glob("*")) - before, "a save", PATIENCE_S, is_over, poll_s=0.001)
        processes = found()  # The rank may be another process by now.
    return processes


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> list[int]:
    """Send the signal ``number`` to processes. Returns the ids of the processes that still ran and got the signal."""
    sent = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent.append(process.pid)
    return sent


def main(run_dir: str, number: str, what: str, which: str, in_save: str = "") -> int:
    """Send a signal to processes of a run on this host. Returns the exit status: 0, or 1 if there are none.

    The arguments are those of the command line, as ``Site.by_srun`` writes them. ``number`` is the name of the signal,
    such as SIGKILL; a text in ``in_save`` means to wait for a save first.
    """
    try:
        found = wait_for_processes(Path(run_dir), what, which, in_save=bool(in_save))
    except FaultError:
        return 1
    return 0 if send(found, signal.Signals[number]) else 1


# The run that faults are made for.


def checkpoints(folder: RunFolder) -> list[Path]:
    """Return the paths of the checkpoints from which a run can resume, newest first.

    Paths with a hidden name are unfinished checkpoints, and are left out.
    """
    listed = workload_of_run(folder).checkpoints(folder)
    if listed is not None:
        return [each.path for each in listed if each.step is not None]
    found = [path for path in folder.checkpoints.glob("*") if not path.name.startswith(".")]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that must be equal in two runs: all except hidden files and the manifest."""
    if checkpoint.is_file():
        return [checkpoint]
    found = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path for path in found if not path.name.startswith(".") and path.name != BOOKKEEPING)


@dataclass
class Site:
    """The run that a drill disturbs: its folder, and whether the run is in Slurm or in a sandbox."""

    folder: RunFolder
    is_slurm: bool = False
    sandbox: Path | None = None
    """Directory of the run's sandbox, whose processes are on this machine; None without a sandbox."""
    is_over: Callable[[], bool] = lambda: False
    """Function that returns True if the run has ended."""
    struck: float | None = None
    """Unix time at which the current fault began to act; None before that."""

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Return the events of the run with these names, oldest first."""
        return [event for event in self.folder.read_events() if event["event"] in names]

    @property
    def job(self) -> str:
        """Slurm's id of the run's job."""
        return str(self.events("submitted")[-1]["job_id"])

    def host_of(self, rank: int) -> str:
        """Return the host name of a rank's node in the newest attempt that has recorded its ranks.

        Raises FaultError if none has.
        """
        for attempt in reversed(self.folder.attempts()):
            for entry in read_json(self.folder.environment(attempt)).get("ranks", ()):
                if entry["rank"] == rank:
                    return str(entry["host"])
        raise FaultError("no attempt has recorded the nodes of its ranks")

    def running_rank(self, rank: int) -> int:
        """Return ``rank`` modulo the present number of ranks, so that the result is a rank that runs."""
        sizes = [event["world_size"] for event in self.events("started") if event.get("world_size")]
        return rank % sizes[-1] if sizes else rank

    def command(self, *words: str) -> str:
        """Run a command that causes the fault. ``words`` are the program and its arguments.

        The first call for a fault sets ``struck``. Returns the first line of the output. Raises FaultError if the
        command fails.
        """
        self.struck = self.struck or time.time()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=RESTART_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise FaultError(str(error)) from error
        if done.returncode:
            raise FaultError(f"{' '.join(words)}: {(done.stdout + done.stderr).strip()[-300:]}")
        return done.stdout.strip().partition("\n")[0]

    def in_sandbox(self, *words: str) -> str:
        """Run ``python -m slurm.sandbox`` with these arguments. Returns the first line of its output.

        Raises FaultError if the command fails.
        """
        return self.command(sys.executable, "-m", "gpt_launch", "slurm.sandbox", *words, "--dir", str(self.sandbox))

    def by_srun(self, host: str, number: signal.Signals, what: str, which: str, *options: str) -> str:
        """Send a signal to processes on another node by srun. Returns a text that names the signal and the processes.

        ``what`` and ``which`` choose the processes as in ``processes_to_signal``. ``options`` are further arguments of
        this module's command: ``in_save`` or nothing. Raises FaultError if the command fails.
        """
        place = ["--overlap", f"--jobid={self.job}", "--nodes=1", "--ntasks=1", f"--nodelist={host}"]
        program = ["gpt_launch", "launch.storm.injection", str(self.folder.path), number.name, what, which]
        self.command("srun", *place, sys.executable, "-m", *program, *options)
        return f"{number.name} to {what} {which} by srun"

    def signal(
        self, number: signal.Signals, what: str, rank: int = 0, *, seconds: float = 0.0, in_save: bool = False
    ) -> str:
        """Send a signal to processes of a run on any node. Returns a text that names the signal and the processes.

        Args:
            number: the signal.
            what: kind of processes, as for ``processes_to_signal``.
            rank: number of the rank for ``rank`` and ``agent``. On a real Slurm cluster, all processes are on the node
                of this rank.
            seconds: seconds after which SIGSTOP is undone; 0 for never.
            in_save: True to wait until a save begins.

        Raises:
            FaultError: there are no such processes.
        """
        which = str(rank) if what in ("rank", "agent") else self.job
        if self.is_slurm and self.sandbox is None:
            host, job = self.host_of(rank), self.job
            done = self.by_srun(host, number, what, which, *(["in_save"] if in_save else []))
            if seconds:
                time.sleep(seconds)
                with suppress(FaultError):  # The node may have been given up, and the job may run elsewhere.
                    self.by_srun(host, signal.SIGCONT, "agents", job)
            return done
        found = wait_for_processes(self.folder.path, what, which, in_save=in_save, is_over=self.is_over)
        self.struck = self.struck or time.time()
        sent = send(found, number)
        if not sent:
            raise FaultError(f"{what} {which} had ended")
        if seconds:
            time.sleep(seconds)
            send(found, signal.SIGCONT)
        return f"{number.name} to {', '.join(map(str, sent))}"


# The faults. Each function returns a text about its action.


def _signal_rank(number: signal.Signals, what: str = "rank", *, in_save: bool = False) -> Inject:
    return lambda fault, site: site.signal(number, what, fault.rank, seconds=fault.seconds, in_save=in_save)


def _flip_bit(fault: PlannedFault, site: Site) -> str:
    """Flip a bit of the newest checkpoint and kill a rank, so that the next start reads the damaged checkpoint.

    Returns a description of the injection, as all functions of ``KINDS`` do.
    """
    draw = random.Random(fault.salt)
    newest = checkpoints(site.folder)[0]
    files = [path for path in files_of(newest) if path.stat().st_size]
    if not files:
        raise FaultError(f"{newest} has no file to damage")
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    killed = site.signal(signal.SIGKILL, "rank", fault.rank)
    return f"bit {bit} of {newest.name}/{path.name} flipped; {killed}"


def _requeue(fault: PlannedFault, site: Site) -> str:
    site.command("scontrol", "requeue", site.job)
    return f"scontrol requeue {site.job}"


def _kill_srun(fault: PlannedFault, site: Site) -> str:
    """Kill the srun of the batch script. Returns a description of the injection.

    If the srun of this start of the job has already ended, requeue the job and kill the srun of its next start.
    """
    with suppress(FaultError):
        return site.signal(signal.SIGKILL, "srun")
    count = len(site.events("agent_started"))
    done = _requeue(fault, site)
    what = f"another start of job {site.job}"
    wait_or_fail(lambda: len(site.events("agent_started")) > count, what, RESTART_S, site.is_over)
    return f"{done}; {site.signal(signal.SIGKILL, 'srun')}"


def _in_sandbox(fault: PlannedFault, site: Site) -> str:
    """Inject a fault by a command of the sandbox, and undo the fault after ``fault.seconds``.

    The fault hits Slurm's controller, the head node (kinds in ``OF_HEAD``), or else the node of ``fault.rank``. Returns
    a description of the injection.
    """
    host = [] if fault.kind == "stop_controller" else [site.host_of(0 if fault.kind in OF_HEAD else fault.rank)]
    try:
        done = site.in_sandbox(fault.kind.removesuffix("_head").replace("_", "-"), *host)
        if not host:
            with suppress(FaultError):
                # Slurm then queries the sender of the request, and gets no answer.
                site.signal(signal.SIGTERM, "agent")
        time.sleep(fault.seconds)
    finally:
        site.in_sandbox("heal" if host else "start-controller", *host)
    return f"{done}, for {fault.seconds:g} s"


SLURM, SANDBOX = "Slurm", "a sandbox (--sandbox DIR)"
"""Texts for ``Kind.needs``: what a run needs so that a kind of fault can hit it."""
REBOOTS = (2.0, 3.0, 8.0, 14.0)
"""Durations of a power cut in seconds. The duration of a fault is chosen from these values.

Only the last one is so long that Slurm marks the node as down, after which srun ends the step.
"""
OUTAGES = (2.0, 8.0, 40.0)
"""Seconds for which a node sends no message: a moment, less than ``resilience.node_timeout_s``, and more than that."""
ABSENCES = (20.0, 75.0, 300.0)
"""Seconds for which Slurm's controller does not run. The duration of a fault is chosen from these values."""
OF_HEAD = ("power_cut_head",)
"""Kinds of faults that hit the head node, which is the node of rank 0, whatever the rank of the fault."""
MILD = {"sigstop_agent", "kill_srun", "freeze", "cut_link"}
"""Kinds of faults that need not end an attempt."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault: description for people, function, need, and durations in seconds to choose from."""

    what: str
    inject: Inject
    needs: str = ""
    seconds: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class PlannedFault:
    """One fault of a schedule. The fault hits ``rank``, or the node of that rank, and lasts for ``seconds``."""

    number: int
    kind: str
    rank: int
    after_steps: int
    """Number of steps from the first checkpoint after the previous fault to this fault."""
    seconds: float
    salt: int
    """Random number for further choices, such as which bit is flipped."""

    @property
    def text(self) -> str:
        """Description of the fault for people."""
        return KINDS[self.kind].what.format(rank=self.rank, seconds=self.seconds)


Inject = Callable[[PlannedFault, Site], str]
KINDS = {
    "sigkill_rank": Kind("SIGKILL to rank {rank}", _signal_rank(signal.SIGKILL)),
    "sigterm_rank": Kind("SIGTERM to rank {rank}, by which all ranks save and leave", _signal_rank(signal.SIGTERM)),
    "sigstop_rank": Kind("SIGSTOP to rank {rank}, until the launcher finds it", _signal_rank(signal.SIGSTOP)),
    "sigkill_agent": Kind("SIGKILL to the agent of rank {rank}", _signal_rank(signal.SIGKILL, "agent")),
    "sigstop_agent": Kind(
        "SIGSTOP to the agent of rank {rank}, for {seconds:g} s", _signal_rank(signal.SIGSTOP, "agent"), "", OUTAGES
    ),
    "kill_in_save": Kind(
        "SIGKILL to rank {rank} as soon as a new entry is in the folder of checkpoints",
        _signal_rank(signal.SIGKILL, in_save=True),
    ),
    "flip_bit": Kind("one bit of the newest checkpoint flipped, and SIGKILL to rank {rank}", _flip_bit),
    "requeue": Kind("scontrol requeue", _requeue, SLURM),
    "kill_srun": Kind("SIGKILL to the batch script's srun and its helper: the step runs on", _kill_srun, SLURM),
    "preempt": Kind(
        "a job that preempts this one", lambda fault, site: site.in_sandbox("preempt", site.job, "--seconds=1"), SANDBOX
    ),
    "power_cut": Kind("the node of rank {rank} without power for {seconds:g} s", _in_sandbox, SANDBOX, REBOOTS),
    "power_cut_head": Kind("the head node without power for {seconds:g} s", _in_sandbox, SANDBOX, REBOOTS),
    "freeze": Kind("the node of rank {rank} frozen for {seconds:g} s", _in_sandbox, SANDBOX, OUTAGES),
    "cut_link": Kind("the node of rank {rank} without a link for {seconds:g} s", _in_sandbox, SANDBOX, OUTAGES),
    "stop_controller": Kind(
        "no slurmctld for {seconds:g} s, and SIGTERM to the agents", _in_sandbox, SANDBOX, ABSENCES
    ),
}


def inject(fault: PlannedFault, site: Site) -> str:
    """Inject a fault, and undo it after ``fault.seconds``. Returns a description of the injection.

    If the run now has fewer ranks than ``fault.rank``, another rank is used.

    Raises:
        FaultError: the fault cannot be injected.
    """
    site.struck = None
    return KINDS[fault.kind].inject(replace(fault, rank=site.running_rank(fault.rank)), site)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
