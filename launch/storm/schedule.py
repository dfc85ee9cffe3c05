"""The faults of a drill: their kinds, where each can be had, and the seeded schedule.

Pure functions: the same seed, number and kinds give the same schedule. Must not know how a fault is brought about.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.errors import ConfigError
from launch.runs.ranges import closest

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
