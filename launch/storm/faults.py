"""The faults of a drill: their kinds, the seeded schedule, and how each is brought about."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, closest
from launch.runs.folder import RunFolder
from launch.storm import processes
from launch.storm.verdict import checkpoints, files_of

# The faults of a drill: their kinds, where each can be had, and the seeded schedule.


SLURM, SANDBOX, DISK = (
    "Slurm",
    "a sandbox (--sandbox DIR)",
    "a filesystem of the drill's own (--disk FOLDER, or --disk-mib N without Slurm)",
)
SPARES = "a sandbox and a spare node (--sandbox DIR, spare_nodes=1)"
"""Needs of a kind of fault."""
EARLY_PREEMPTIONS = 3
REBOOTS = (2.0, 3.0, 8.0, 14.0)
"""Seconds without power: all but the last are over before Slurm calls the node down, and srun ends the step then."""
OUTAGES = (2.0, 8.0, 40.0)
"""Seconds without a sign of life: a moment, less than ``resilience.node_timeout_s``, and more."""
ABSENCES = (20.0, 75.0, 300.0)
"""Seconds without a controller."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    what: str
    """Description for people; ``{seconds}`` and ``{rank}`` are filled in."""
    needs: str = ""
    seconds: tuple[float, ...] = (0.0,)
    """Time that it may last; the schedule chooses."""
    damages: bool = False
    """True where it spoils the newest checkpoint, so that there has to be an older one."""
    ends_attempt: bool = True
    """False where a run may go on undisturbed."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("sigkill_rank", "SIGKILL to rank {rank}"),
        Kind("sigterm_rank", "SIGTERM to rank {rank}, by which all ranks save and leave"),
        Kind("sigstop_rank", "SIGSTOP to rank {rank}, until the launcher finds it"),
        Kind("sigkill_agent", "SIGKILL to the agent of rank {rank}"),
        Kind(
            "sigstop_agent", "SIGSTOP to the agent of rank {rank}, for {seconds:g} s", "", OUTAGES, ends_attempt=False
        ),
        Kind("kill_in_save", "SIGKILL to rank {rank} as soon as something new is in the folder of checkpoints"),
        Kind("truncate", "the newest checkpoint's largest file cut to half, and SIGKILL to rank {rank}", damages=True),
        Kind("flip_bit", "one bit of the newest checkpoint flipped, and SIGKILL to rank {rank}", damages=True),
        Kind("full_disk", "the disk of the run full for {seconds:g} s", DISK, (2.0, 5.0), ends_attempt=False),
        Kind("requeue", "scontrol requeue", SLURM),
        Kind(
            "kill_srun",
            "SIGKILL to the batch script's srun and its helper: the step goes on",
            SLURM,
            ends_attempt=False,
        ),
        Kind("kill_srun_alone", "SIGKILL to the batch script's srun, whose helper then ends the step", SLURM),
        Kind("preempt", "a job that preempts this one", SANDBOX),
        Kind(
            "preempt_early", f"{EARLY_PREEMPTIONS} preemptions, each before the start before has made a step", SANDBOX
        ),
        Kind("power_cut", "the node of rank {rank} without power for {seconds:g} s", SANDBOX, REBOOTS),
        Kind(
            "power_cut_spare",
            "the idle spare node without power for {seconds:g} s",
            SPARES,
            REBOOTS,
            ends_attempt=False,
        ),
        Kind("freeze", "the node of rank {rank} frozen for {seconds:g} s", SANDBOX, OUTAGES, ends_attempt=False),
        Kind(
            "cut_link", "the node of rank {rank} without a link for {seconds:g} s", SANDBOX, OUTAGES, ends_attempt=False
        ),
        Kind("stop_controller", "no slurmctld for {seconds:g} s, and the agents told to leave", SANDBOX, ABSENCES),
    )
}


@dataclass(frozen=True)
class PlannedFault:
    """One fault of a schedule."""

    number: int
    kind: str
    rank: int
    after_steps: int
    """Steps that the run makes, after it has recovered from the fault before, until this one comes."""
    seconds: float
    salt: int
    """Chooses what the kind leaves open, as which bit is flipped."""

    @property
    def text(self) -> str:
        """The fault for people."""
        return KINDS[self.kind].what.format(rank=self.rank, seconds=self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def choose_kinds(asked: Sequence[str], has: Collection[str]) -> list[str]:
    """Names of the kinds of a drill; by default all that can be had.

    Args:
        asked: names that were typed; none for all.
        has: what there is of ``SLURM``, ``SANDBOX`` and ``DISK``.

    Raises:
        ConfigError: there is no such kind, or it needs what is not there.
    """
    possible = [kind.name for kind in KINDS.values() if not kind.needs or kind.needs in has]
    for name in asked:
        if name not in KINDS:
            likely = (closest(name, list(KINDS)) or possible)[0]
            raise ConfigError(f"--kinds {name}", f"some of {', '.join(possible)}", f"--kinds {likely}")
        if name not in possible:
            needs = KINDS[name].needs
            raise ConfigError(f"--kinds {name}, which needs {needs}", f"some of {', '.join(possible)}", f"{needs}")
    return list(dict.fromkeys(asked)) or possible


def make_schedule(seed: int, count: int, kinds: Sequence[str], ranks: int, most_steps: int) -> list[PlannedFault]:
    """Draw a schedule: all kinds equally often, as far as the number goes, in an order that the seed decides."""
    shuffle = random.Random(seed)
    order: list[str] = []
    while len(order) < count:
        order += shuffle.sample(list(kinds), len(kinds))
    return [
        _draw(random.Random(f"{seed} {number}"), number, kind, ranks, most_steps)
        for number, kind in enumerate(order[:count], start=1)
    ]


def _draw(draw: random.Random, number: int, kind: str, ranks: int, most_steps: int) -> PlannedFault:
    """Draw what a fault's number alone decides, so that a longer schedule begins as a shorter one."""
    return PlannedFault(
        number,
        kind,
        rank=draw.randrange(ranks),
        after_steps=draw.randint(1, most_steps),
        seconds=draw.choice(KINDS[kind].seconds),
        salt=draw.randrange(2**31),
    )


# The faults themselves: signals, damaged files, a full disk, Slurm's commands, and the sandbox by its command line.


SRUN_S = 300.0
REQUEUE_S = 300.0
"""Time that a preempted job has to start again, where the cluster has nothing else to do."""
POLL_S = 0.05
FILLER = "filler"
BLOCK = 4096


class FaultError(RuntimeError):
    """A fault that could not be brought about."""


@dataclass
class Site:
    """A run, and where it is."""

    folder: RunFolder
    is_slurm: bool = False
    sandbox: Path | None = None
    """Directory of the sandbox it runs on: its processes are this machine's."""
    disk: Path | None = None
    """Filesystem of the drill's own that the run writes into."""
    is_over: Callable[[], bool] = lambda: False
    """Tells whether the run has ended, so that nothing is waited for any more."""
    struck: float | None = None
    """Unix time of the first blow of the fault that is being brought about."""

    def strike(self) -> None:
        """Note that the next thing that is done hurts."""
        self.struck = self.struck or time.time()

    @property
    def job(self) -> str:
        """Slurm's id of the run's job."""
        return str([e for e in self.folder.read_events() if e["event"] == "submitted"][-1]["job_id"])

    def host_of(self, rank: int) -> str:
        """Node of a rank in the newest attempt that has told where its ranks are."""
        for attempt in reversed(self.folder.attempts()):
            with suppress(OSError, ValueError):
                ranks = json.loads(self.folder.environment(attempt).read_text())["ranks"]
                return str(next(entry["host"] for entry in ranks if entry["rank"] == rank))
        raise FaultError("no attempt has told where its ranks are")

    def running_rank(self, rank: int) -> int:
        """Return a rank that there is: ``rank``, or another where the run continues with fewer nodes than planned."""
        sizes = [e["world_size"] for e in self.folder.read_events() if e["event"] == "started" and e.get("world_size")]
        return rank % sizes[-1] if sizes else rank

    def spare(self) -> str:
        """Node of the job that stands by.

        Raises:
            FaultError: all take part, as after one of them was lost.
        """
        told = [e for e in self.folder.read_events() if e["event"] in ("agent_started", "members")][-1]
        if not told.get("spares"):
            raise FaultError("no spare node is left")
        return str(told["spares"][0])

    def spare_after_requeue(self) -> str:
        """Node of the job that stands by, in its next start where none is left in this one.

        Raises:
            FaultError: there is none then either.
        """
        with suppress(FaultError):
            return self.spare()
        count, deadline = self.starts_of_agents(), time.monotonic() + REQUEUE_S
        run_command(["scontrol", "requeue", self.job])
        self.wait_for_agents(count)
        while time.monotonic() < deadline and not self.is_over():
            with suppress(FaultError):
                return self.spare()
            time.sleep(POLL_S)
        return self.spare()

    def starts_of_agents(self) -> int:
        """Number of starts of the job so far in which its agents have begun."""
        return sum(event["event"] == "agent_started" for event in self.folder.read_events())

    def wait_for_agents(self, starts: int) -> None:
        """Wait until the agents have begun in more than so many starts of the job.

        Raises:
            FaultError: they have not.
        """
        deadline = time.monotonic() + REQUEUE_S
        while self.starts_of_agents() <= starts:
            if time.monotonic() > deadline or self.is_over():
                raise FaultError(f"job {self.job} did not start again")
            time.sleep(POLL_S)

    def send(self, number: signal.Signals, what: str, rank: int, *, in_save: bool = False) -> str:
        """Signal a rank, or its agent, wherever it is; returns what was done.

        Raises:
            FaultError: there is no such process.
        """
        if self.is_slurm and self.sandbox is None:
            self._signal_by_srun(self.host_of(rank), number, what, str(rank), in_save=in_save)
            return f"{number.name} to the {what} of rank {rank} by srun"
        pid = processes.find(self.folder.path, what, rank, self.is_over)
        if pid is None or (in_save and not processes.wait_for_save(self.folder.path, self.is_over)):
            raise FaultError(f"no {what} {rank} to signal")
        if in_save:  # the rank may be another process by now
            pid = processes.find(self.folder.path, what, rank, self.is_over)
        self.strike()
        if pid is None or not processes.send(pid, number):
            raise FaultError(f"{what} {rank} had ended")
        return f"{number.name} to process {pid}"

    def stop_agent(self, rank: int, seconds: float) -> str:
        """Stop the agent of a rank, and continue that process itself: the rank may be under another agent by then."""
        if self.is_slurm and self.sandbox is None:
            host, job = self.host_of(rank), self.job
            self._signal_by_srun(host, signal.SIGSTOP, "agent", str(rank), in_save=False)
            time.sleep(seconds)
            with suppress(FaultError):  # its node may have been given up meanwhile, and the job be elsewhere
                self._signal_by_srun(host, signal.SIGCONT, "agents", job, in_save=False)
            return f"SIGSTOP to the agent of rank {rank} by srun"
        pid = processes.find(self.folder.path, "agent", rank, self.is_over)
        self.strike()
        if pid is None or not processes.send(pid, signal.SIGSTOP):
            raise FaultError(f"no agent {rank} to stop")
        time.sleep(seconds)
        processes.send(pid, signal.SIGCONT)
        return f"SIGSTOP to process {pid}"

    def _signal_by_srun(self, host: str, number: signal.Signals, what: str, which: str, *, in_save: bool) -> None:
        place = ["--overlap", f"--jobid={self.job}", "--nodes=1", "--ntasks=1", f"--nodelist={host}"]
        program = [
            sys.executable,
            "-m",
            "gpt_launch",
            "launch.storm.processes",
            str(self.folder.path),
            number.name,
            what,
            which,
        ]
        self.strike()
        run_command(["srun", *place, *program, *(["--in-save"] if in_save else [])])

    def kill_srun(self, *, alone: bool) -> str:
        """Kill the srun of the batch script, and the helper that would end its step unless ``alone``.

        A start of the job whose srun was killed before has none left: then that of the next start is killed.
        """
        try:
            return self._kill_srun(alone=alone)
        except FaultError:
            count = self.starts_of_agents()
            self.strike()
            run_command(["scontrol", "requeue", self.job])
            self.wait_for_agents(count)
            return f"scontrol requeue {self.job}; {self._kill_srun(alone=alone)}"

    def _kill_srun(self, *, alone: bool) -> str:
        what = "srun_alone" if alone else "srun"
        if self.sandbox is None:
            self._signal_by_srun(self.host_of(0), signal.SIGKILL, what, self.job, in_save=False)
            return f"{what} of the batch script killed, by srun"
        if not processes.of_job(self.job, "srun", os.environ.get("SLURM_CONF")):
            raise FaultError(f"no srun of job {self.job}")
        self.strike()
        done = processes.kill_srun(self.job, alone=alone)
        return f"SIGKILL to {', '.join(map(str, done))}"

    def ask_sandbox(self, *words: str) -> str:
        """Do one command of the sandbox's command line; returns what it said."""
        self.strike()
        return run_command([sys.executable, "-m", "gpt_launch", "slurm.sandbox", *words, "--dir", str(self.sandbox)])


def run_command(words: list[str]) -> str:
    """Run a command to its end; returns what it printed.

    Raises:
        FaultError: it failed.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SRUN_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"{' '.join(words)}: no answer in {SRUN_S:g} s") from error
    if done.returncode:
        raise FaultError(f"{' '.join(words)}: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout.strip().partition("\n")[0]


def inject(fault: PlannedFault, site: Site) -> str:
    """Bring a fault about, and undo what lasts for some seconds; returns what was done.

    Raises:
        FaultError: it could not be.
    """
    site.struck = None
    return FAULTS[fault.kind](replace(fault, rank=site.running_rank(fault.rank)), site)


def _signal(number: signal.Signals, what: str) -> Callable[[PlannedFault, Site], str]:
    return lambda fault, site: site.send(number, what, fault.rank)


def _stop_agent(fault: PlannedFault, site: Site) -> str:
    return site.stop_agent(fault.rank, fault.seconds)


def _kill_in_save(fault: PlannedFault, site: Site) -> str:
    return site.send(signal.SIGKILL, "rank", fault.rank, in_save=True)


def _damage(fault: PlannedFault, site: Site) -> str:
    """Spoil the newest checkpoint and kill a rank, so that the next start meets it."""
    draw = random.Random(fault.salt)
    newest = checkpoints(site.folder)[0]
    files = [path for path in files_of(newest) if path.stat().st_size]
    if not files:
        raise FaultError(f"{newest} has no file to damage")
    if fault.kind == "truncate":
        path = max(files, key=lambda path: path.stat().st_size)
        size = path.stat().st_size // 2
        with path.open("r+b") as file:
            file.truncate(size)
        done = f"{newest.name}/{path.name} cut to {size} bytes"
    else:
        path = draw.choice(files)
        at = draw.randrange(8 * path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(at // 8)
            byte = file.read(1)[0] ^ (1 << at % 8)
            file.seek(at // 8)
            file.write(bytes([byte]))
        done = f"bit {at} of {newest.name}/{path.name} flipped"
    return f"{done}; {site.send(signal.SIGKILL, 'rank', fault.rank)}"


def _full_disk(fault: PlannedFault, site: Site) -> str:
    assert site.disk is not None
    filler = site.disk / FILLER
    site.strike()
    try:
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(BLOCK)):
                pass
        size = filler.stat().st_size
        time.sleep(fault.seconds)
    finally:
        filler.unlink(missing_ok=True)
    return f"{size / 2**20:.1f} MiB taken for {fault.seconds:g} s"


def _requeue(fault: PlannedFault, site: Site) -> str:
    site.strike()
    run_command(["scontrol", "requeue", site.job])
    return f"scontrol requeue {site.job}"


def _preempt_early(fault: PlannedFault, site: Site) -> str:
    """Preempt some starts of the job, one after another, each as soon as Slurm has started it."""
    jobs: list[str] = []
    for left in reversed(range(EARLY_PREEMPTIONS)):
        count = site.starts_of_agents()
        jobs.append(site.ask_sandbox("preempt", site.job, "--seconds", "1"))
        if left:
            site.wait_for_agents(count)
    return f"jobs {', '.join(jobs)}"


def _node_fault(command: str, *, of_spare: bool = False) -> Callable[[PlannedFault, Site], str]:
    def inject_and_heal(fault: PlannedFault, site: Site) -> str:
        host = site.spare_after_requeue() if of_spare else site.host_of(fault.rank)
        try:
            done = site.ask_sandbox(command, host)
            time.sleep(fault.seconds)
        finally:
            site.ask_sandbox("heal", host)
        return f"{done}, for {fault.seconds:g} s"

    return inject_and_heal


def _stop_controller(fault: PlannedFault, site: Site) -> str:
    done = site.ask_sandbox("stop-controller")
    try:
        with suppress(FaultError):
            site.send(signal.SIGTERM, "agent", 0)  # which then asks who sent it, and gets no answer
        time.sleep(fault.seconds)
    finally:
        site.ask_sandbox("start-controller")
    return f"{done}, for {fault.seconds:g} s"


FAULTS: dict[str, Callable[[PlannedFault, Site], str]] = {
    "sigkill_rank": _signal(signal.SIGKILL, "rank"),
    "sigterm_rank": _signal(signal.SIGTERM, "rank"),
    "sigstop_rank": _signal(signal.SIGSTOP, "rank"),
    "sigkill_agent": _signal(signal.SIGKILL, "agent"),
    "sigstop_agent": _stop_agent,
    "kill_in_save": _kill_in_save,
    "truncate": _damage,
    "flip_bit": _damage,
    "full_disk": _full_disk,
    "requeue": _requeue,
    "kill_srun": lambda fault, site: site.kill_srun(alone=False),
    "kill_srun_alone": lambda fault, site: site.kill_srun(alone=True),
    "preempt": lambda fault, site: site.ask_sandbox("preempt", site.job, "--seconds", "1"),
    "preempt_early": _preempt_early,
    "power_cut": _node_fault("power-cut"),
    "power_cut_spare": _node_fault("power-cut", of_spare=True),
    "freeze": _node_fault("freeze"),
    "cut_link": _node_fault("cut-link"),
    "stop_controller": _stop_controller,
}
assert FAULTS.keys() == KINDS.keys()


def require_own(path: Path, what: str) -> Path:
    """Return a folder that is this user's.

    Raises:
        ConfigError: it is not there, or somebody else's.
    """
    if not path.exists() or path.stat().st_uid != os.getuid():
        why = "another user's" if path.exists() else "not there"
        raise ConfigError(
            f"{path}, which is {why}", f"{what} of your own: a drill touches nothing else", f"ls -ld {path}"
        )
    return path
