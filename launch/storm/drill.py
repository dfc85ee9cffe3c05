"""One drill: the schedule of its faults, the run with these faults, and the comparison with an undisturbed run.

The drill repeats the run's command whenever the command ends before the run. ``faults.jsonl`` records the faults.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, closest
from launch.report.goodput import measure_goodput
from launch.runs.events import FEWER_NODES, best_interval_s, expected_goodput, is_finished
from launch.runs.files import append_json_lines
from launch.runs.folder import RunFolder
from launch.runs.records import read_records, recent_records
from launch.storm.injection import (
    DAMAGING,
    KINDS,
    MILD,
    FaultError,
    PlannedFault,
    Site,
    checkpoints,
    files_of,
    inject,
)

UNLIMITED = tuple(f"resilience.max_restarts.{cause}" for cause in ("crashed", "hung", "node_failed"))
"""Overrides that lift restart limits in a drill, unless the user typed them.

A drill has more faults than limits allow.
"""
LEAVING = ("signalled", "agent_stopped", "attempt_ended", "requeued", "agent_ended")
"""Events of a run that stops. A checkpoint that was saved by then does not show that the next start works."""
FELT_S = 180.0
"""Seconds within which a fault ends its attempt, if at all. By default, a silent rank or node is given up earlier."""
TRIES = 3
"""Number of tries to inject a fault, whose target process may just have ended."""
SAME = ("loss", "samples", "tokens", "images")
"""Figures of a step that depend only on the state and the samples."""


def choose_kinds(asked: Sequence[str], has: Collection[str]) -> list[str]:
    """Return the names of the kinds of faults in a drill: ``asked``, or by default all possible kinds.

    Args:
        asked: names that were typed.
        has: needs that the drill fulfils, of ``SLURM``, ``SANDBOX``, ``SPARES`` and ``DISK``.

    Raises:
        ConfigError: there is no such kind, or the drill lacks a need of the kind.
    """
    possible = [name for name, kind in KINDS.items() if not kind.needs or kind.needs in has]
    for name in asked:
        if name not in KINDS:
            likely = (closest(name, list(KINDS)) or possible)[0]
            raise ConfigError(f"--kinds {name}", f"some of {', '.join(possible)}", f"--kinds {likely}")
        if name not in possible:
            needs = KINDS[name].needs
            raise ConfigError(f"--kinds {name}, which needs {needs}", f"some of {', '.join(possible)}", needs)
    return list(dict.fromkeys(asked)) or possible


def make_schedule(seed: int, count: int, kinds: Sequence[str], ranks: int, most_steps: int) -> list[PlannedFault]:
    """Draw a schedule of faults: all kinds equally often if possible, in an order that the seed decides.

    The rank, steps and seconds of a fault depend only on its number. So a longer schedule begins like a shorter one.
    """
    shuffle = random.Random(seed)
    order: list[str] = []
    while len(order) < count:
        order += shuffle.sample(list(kinds), len(kinds))
    schedule = []
    for number, kind in enumerate(order[:count], start=1):
        draw = random.Random(f"{seed} {number}")
        rank, steps = draw.randrange(ranks), draw.randint(1, most_steps)
        seconds, salt = draw.choice(KINDS[kind].seconds), draw.randrange(2**31)
        schedule.append(PlannedFault(number, kind, rank, steps, seconds, salt))
    return schedule


@dataclass(frozen=True)
class Interruption:
    """The last fault: Unix times of its start and its end, and whether it ends an attempt."""

    struck: float
    over: float
    ends_attempt: bool = False


class StuckError(RuntimeError):
    """Raised if the run makes no progress any more."""


def start_launcher(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the command of a run with these arguments in its own session. The output goes to ``log``."""
    command = [sys.executable, "-m", "gpt_launch", *words]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )


class Drill:
    """A run with faults, from its first submission to its end."""

    def __init__(
        self, words: Sequence[str], site: Site, out: Path, patience_s: float, say: Callable[[str], None]
    ) -> None:
        self._site = site
        self._run = site.folder
        self._out = out
        self._patience_s = patience_s
        self._say = say
        typed = {word.lstrip("+~").partition("=")[0] for word in words}
        lifted = [f"{key}=null" for key in UNLIMITED if key not in typed]
        self._words = [*words, *lifted, f"run_dir={self._run.path}"]
        self._process: subprocess.Popen[bytes] | None = None
        self.typed = 0
        """Number of times that the drill has started the command."""
        self.faults: list[dict[str, Any]] = []
        """Faults so far, each with its time."""
        site.is_over = lambda: self._process is None or self._process.poll() is not None

    def run(self, schedule: Sequence[PlannedFault]) -> bool:
        """Take the run through the faults of a schedule to its end. Returns True if all faults were made.

        Raises:
            StuckError: the run makes no progress any more.
        """
        try:
            last, tries, left = Interruption(0.0, 0.0), 0, list(schedule)
            while left and self._wait_recovered(left[0], last):
                fault = left[0]
                try:
                    done = inject(fault, self._site)
                except FaultError as error:
                    tries += 1
                    if tries > TRIES:
                        raise StuckError(f"{fault.kind}: {error}") from error
                    last = Interruption(time.time(), time.time())
                    left.insert(1, left.pop(0))  # A killed srun only returns with the next start of the job.
                    continue
                tries, now = 0, time.time()
                last = Interruption(self._site.struck or now, now, fault.kind not in MILD)
                self.faults.append({"time": last.struck, "done": done, **asdict(fault)})
                append_json_lines(self._out / "faults.jsonl", self.faults[-1:])
                self._say(f"{fault.number}. {fault.kind}: {done}")
                left.pop(0)
            self._wait(self._is_finished, "the end of the run")
            return not left
        finally:
            self._end()

    def _wait_recovered(self, fault: PlannedFault, last: Interruption) -> bool:
        """Wait until the run has saved after the last fault and made more steps; False if it has finished."""

        def has_recovered() -> bool:
            saved = first_save(self._run.read_events(), last, time.time())
            newest = recent_records(self._run.metrics(0))
            if saved is None or not newest or newest[-1]["step"] < saved + fault.after_steps:
                return False
            return fault.kind not in DAMAGING or len(checkpoints(self._run)) > 1

        self._wait(lambda: has_recovered() or self._is_finished(), f"the recovery before fault {fault.number}")
        return not self._is_finished()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, and repeat the command if it ends before the run."""
        deadline, before = time.monotonic() + self._patience_s, -1
        while not condition():
            if self._site.is_over() and not self._is_finished():
                self.typed += 1
                log = self._out / "launch.log"
                if self.typed > 2 * len(self.faults) + 3:
                    raise StuckError(f"the command was typed {self.typed - 1} times; see {log}")
                self._process = start_launcher(self._words, log)
            count = len(self._run.read_events())
            if count != before:
                deadline, before = time.monotonic() + self._patience_s, count
            if time.monotonic() > deadline:
                raise StuckError(f"nothing happened for {self._patience_s:g} s while waiting for {what}")
            time.sleep(0.1)

    def _is_finished(self) -> bool:
        return is_finished(self._run.read_events())

    def _end(self) -> None:
        """Wait for the launcher of a finished run; cancel an unfinished run."""
        if self._process is None:
            return
        if self._is_finished():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience_s)
        if self._process.poll() is None:
            command = [sys.executable, "-m", "gpt_launch", "cancel", "--now", str(self._run.path)]
            subprocess.run(command, capture_output=True, check=False)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def first_save(events: Sequence[Mapping[str, Any]], last: Interruption, now: float) -> int | None:
    """Return the step of the first checkpoint after a fault by the resumed attempt; None if there is none yet.

    A checkpoint that an attempt saves while it stops does not count: the next fault would hit a run that is leaving. If
    all agents were killed, no event shows the end of the attempt, but the event of the next start does. After
    ``FELT_S`` seconds without an effect, the fault counts as harmless, and any checkpoint counts.
    """
    later = [event for event in events if event["time"] > last.struck]
    felt = any(event["event"] in ("attempt_ended", "started") for event in later)
    if last.ends_attempt and not felt and now - last.over < FELT_S:
        return None
    since = max(last.over, *(event["time"] for event in later if event["event"] in LEAVING), 0.0)
    return next((event["step"] for event in later if event["event"] == "saved" and event["time"] > since), None)


# The verdict: final state, samples, and goodput, compared with the prediction of Young and Daly.


def sums_of(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 sum of each state file of a checkpoint: path -> sum."""
    sums = {}
    for path in files_of(checkpoint):
        with path.open("rb") as file:
            sums[str(path.relative_to(checkpoint.parent))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def differing_state(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield the differences between the final checkpoints of two runs."""
    last = [next(iter(checkpoints(run)), None) for run in (quiet, stormy)]
    if last[0] is None or last[1] is None:
        yield "no final checkpoint"
        return
    one, other = sums_of(last[0]), sums_of(last[1])
    if not one:
        yield f"{last[0]} has no file to compare"
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"{name} differs" if name in one and name in other else f"{name} is not in both"


def differing_steps(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield a line for each step of a rank that is missing, surplus, or used other samples than the undisturbed run."""
    for rank in sorted({*quiet.metric_ranks(), *stormy.metric_ranks()}):
        one, other = ({r["step"]: r for r in read_records(run.metrics(rank))} for run in (quiet, stormy))
        missing, more = sorted(one.keys() - other), sorted(other.keys() - one)
        if missing or more:
            yield f"rank {rank}: steps {missing[:3] or more[:3]} are {'missing' if missing else 'too many'}"
        wrong = [
            step for step in sorted(one.keys() & other) if any(one[step].get(f) != other[step].get(f) for f in SAME)
        ]
        if wrong:
            yield f"rank {rank}: {len(wrong)} steps with another loss or other samples, the first is {wrong[0]}"
    if not quiet.metric_ranks():
        yield "no step records: the program does not record its steps (run.record of launch.worker)"


@dataclass(frozen=True)
class Prediction:
    """Goodput by Young and Daly's first-order model. All times are in seconds."""

    save_s: float
    interval_s: float
    """Computing time between two saves in seconds."""
    restart_s: float
    """Time from a fault to the next step in seconds."""
    between_faults_s: float

    @property
    def goodput(self) -> float:
        """Share of the time in steps that count."""
        return expected_goodput(self.save_s, self.interval_s, self.restart_s, self.between_faults_s)

    @property
    def best_interval_s(self) -> float:
        """Interval between saves in seconds with the best goodput (Young 1974)."""
        return best_interval_s(self.save_s, self.between_faults_s)

    def as_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return {**asdict(self), "goodput": self.goodput, "best_interval_s": self.best_interval_s}


@dataclass(frozen=True)
class Measurement:
    """Goodput of a run with faults, and its prediction from the run's own figures."""

    goodput: float
    after_start: float
    """Goodput without the first start, which the model does not cover."""
    seconds: Mapping[str, float]
    """Seconds by part of ``launch.report.goodput.PARTS``."""
    predicted: Prediction


def measure(stormy: RunFolder, faults: Sequence[Mapping[str, Any]]) -> Measurement | None:
    """Measure the goodput of a run with faults; None if it has too few figures.

    The prediction uses saves and steps until the last fault: later the run may continue for long at another speed.
    """
    events = stormy.read_events()
    goodput = measure_goodput(stormy, events)
    until = max((fault["time"] for fault in faults), default=0.0)
    saved = [event for event in events if event["event"] == "saved" and event["time"] <= until]
    records = [record for record in read_records(stormy.metrics(0)) if record.get("time", math.inf) <= until]
    times = [record["step_time_s"] for record in records if "step_time_s" in record]
    if goodput is None or not times or len(saved) < 2 or not faults:
        return None
    seconds = goodput.seconds
    allocated = goodput.total_s - seconds.get("waiting", 0.0)
    if allocated <= 0:
        return None
    saves = [float(event.get("seconds", 0.0)) for event in saved]
    steps = sorted({int(event["step"]) for event in saved})
    apart = statistics.median([b - a for a, b in itertools.pairwise(steps)] or [steps[-1]])
    restart_s = sum(seconds.get(part, 0.0) for part in ("restarts", "restore", "shutdown")) / len(faults)
    interval_s = apart * statistics.median(times)
    predicted = Prediction(statistics.mean(saves), interval_s, restart_s, allocated / len(faults))
    steps_s, start_s = seconds.get("steps", 0.0), seconds.get("start", 0.0)
    return Measurement(goodput.goodput, steps_s / (allocated - start_s), seconds, predicted)


@dataclass(frozen=True)
class Recovery:
    """Cost of one fault: seconds until the first new step, and their parts.

    If the fault ended no attempt, the cost is the longest pause between two steps until the next fault.
    """

    kind: str
    road: str
    """Way in which the run continued: undisturbed, in place, spare, fewer nodes, requeue, or typed again."""
    total_s: float
    noticed_s: float = 0.0
    """Seconds from the fault to the end of the attempt in the event log, or until the command was repeated."""
    started_s: float = 0.0
    """Seconds from the end of the attempt to the start of the ranks."""
    first_step_s: float = 0.0
    """Seconds from the start of the ranks to the first step."""
    again_s: float = 0.0
    """Seconds of repeated steps."""


def recoveries(
    faults: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[Recovery]:
    """Return the cost of each fault after which the run made a new step before the next fault.

    Args:
        faults: ``kind`` and ``time`` of each fault, oldest first.
        events: the event log.
        records: all step records of rank 0 with their ``time``, including repeated steps.
    """
    found = []
    for number, fault in enumerate(faults):
        at = fault["time"]
        until = faults[number + 1]["time"] if number + 1 < len(faults) else math.inf
        done = max((r["step"] for r in records if r["time"] <= at), default=0)
        last = max((r["attempt"] for r in records if r["time"] <= at), default=0)
        # If all agents were killed, no event shows the end of the attempt, but the repeated command does.
        ends = [e for e in events if e["event"] in ("attempt_ended", "submitted") and at <= e["time"] < until]
        ends = [e for e in ends if e.get("cause") != "finished"]
        newer = [r for r in records if at < r["time"] < until and r["step"] > done]
        if ends:
            newer = [r for r in newer if r["attempt"] > last]
        if not newer:
            continue
        first_new = min(r["time"] for r in newer)
        if not ends or ends[0]["time"] > first_new:
            times = [at, *sorted(r["time"] for r in newer if not ends or r["time"] < ends[0]["time"])]
            pause = max(later - earlier for earlier, later in itertools.pairwise(times))
            found.append(Recovery(fault["kind"], "undisturbed", pause))
            continue
        begun = [e["time"] for e in events if e["event"] == "started" and ends[0]["time"] <= e["time"] <= first_new]
        first = min(r["time"] for r in records if r["time"] > ends[0]["time"] and r["attempt"] > last)
        start = begun[-1] if begun else first
        parts = (ends[0]["time"] - at, start - ends[0]["time"], max(0.0, first - start), max(0.0, first_new - first))
        found.append(Recovery(fault["kind"], _road(events, ends[0], first_new), first_new - at, *parts))
    return found


def _road(events: Sequence[Mapping[str, Any]], end: Mapping[str, Any], until: float) -> str:
    """Return how the run continued after the end of an attempt."""
    after = [e for e in events if end["time"] <= e["time"] <= until]
    if any(e["event"] == "submitted" for e in after):
        return "typed again"
    if any(e["event"] == "requeued" for e in after):
        return "requeue"
    if any(e["event"] == FEWER_NODES for e in after):
        return "fewer nodes"
    hosts = [e["hosts"] for e in events if e["event"] == "members" and e["time"] <= until][-2:]
    return "spare" if len(hosts) == 2 and hosts[0] != hosts[1] else "in place"
