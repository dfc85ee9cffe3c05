"""``python -m launch.storm KEY=VALUE...``: a chaos drill compares a run with injected faults with an undisturbed run.

The drill makes the undisturbed run first. The arguments of both runs are those of ``python -m launch``. A finished run
can be used as the undisturbed run: its folder is then the only argument, or follows ``--quiet``. ``--seed`` decides the
faults. The run with faults must end with the same state and samples as the undisturbed run. If the command of the run
with faults ends before this run has finished, the drill starts the command again. ``faults.jsonl`` records the faults.
"""

from __future__ import annotations

import filecmp
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import CommandParser, ConfigError, closest, refusing
from launch.runs.events import FEWER_NODES, is_finished
from launch.runs.find import is_run, plain_console, print_table
from launch.runs.folder import RunFolder, append_json_lines, deny_others_writing, read_json_lines, write_json
from launch.runs.overrides import read_overrides
from launch.runs.records import is_record, read_records, recent_records
from launch.slurm import client as scheduler
from launch.slurm.jobs import SlurmJob, ask_queue, start_launcher
from launch.storm.injection import (
    KINDS,
    MILD,
    SANDBOX,
    SLURM,
    FaultError,
    PlannedFault,
    Site,
    checkpoints,
    files_of,
    inject,
    of_run,
)

GONE_S = 60.0
"""Seconds in which processes and jobs of a run must end after its launcher has ended."""
UNLIMITED = tuple(f"resilience.max_restarts.{cause}" for cause in ("crashed", "node_failed"))
"""Keys for which a drill sets no limit of restarts, unless the user typed a limit.

A drill has more faults than the default limits allow.
"""
LEAVING = ("signalled", "agent_stopped", "attempt_ended", "requeued", "agent_ended")
"""Events of a run that stops.

A checkpoint that was saved before such an event does not show that the next start works.
"""
FELT_S = 180.0
"""Seconds after which a fault without an effect counts as harmless.

With the default timeouts, a silent rank or node counts as lost earlier.
"""
TRIES = 3
"""Largest number of tries to inject a fault. Its target process may just have ended."""
SAME = ("loss", "samples", "tokens", "images")
"""Fields of step records that must be equal in the undisturbed run and in the run with faults, for the same step.

Their values depend only on the training state and the samples.
"""


# The schedule of the faults, and the run with these faults.


def choose_kinds(asked: Sequence[str], has: Collection[str]) -> list[str]:
    """Return the names of the kinds of faults in a drill.

    Args:
        asked: names as typed; empty for all kinds that are possible.
        has: ``SLURM`` if the run of the drill is in Slurm, and ``SANDBOX`` if it is in a sandbox. Some kinds of faults
            need one of them.

    Raises:
        ConfigError: there is no such kind, or the kind needs what the run does not have.
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
    """Return a schedule of ``count`` faults, with all kinds equally often if possible. ``seed`` decides the order.

    A fault does not depend on ``count``, so a longer schedule begins like a shorter schedule. ``ranks`` is the number
    of ranks of the run; ``most_steps`` is the largest number of steps between a save and the next fault.
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
class LastFault:
    """Unix times at which the last fault began (``struck``) and ended (``over``).

    ``ends_attempt`` is True if a fault of this kind always ends an attempt.
    """

    struck: float
    over: float
    ends_attempt: bool = False


class StuckError(RuntimeError):
    """Raised if the run makes no progress any more."""


@dataclass
class Drill:
    """A run with faults, from its first submission to its end.

    Attributes:
        words: overrides of the run.
        site: the run's folder, and whether the run is in Slurm or in a sandbox.
        out: folder of the drill.
        patience_s: seconds without an event after which the run is stuck.
        say: function that prints a line.
        typed: number of times that the drill has started the command.
        faults: faults so far, each with its time.
    """

    words: Sequence[str]
    site: Site
    out: Path
    patience_s: float
    say: Callable[[str], None]
    typed: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        typed = {word.lstrip("+~").partition("=")[0] for word in self.words}
        lifted = [f"{key}=null" for key in UNLIMITED if key not in typed]
        self.words = [*self.words, *lifted, f"run_dir={self.site.folder.path}"]
        self.site.is_over = lambda: self._process is None or self._process.poll() is not None

    def run(self, schedule: Sequence[PlannedFault]) -> bool:
        """Start the run, inject the faults of a schedule, and wait for the end. Returns whether all faults were
        injected.

        Raises:
            StuckError: the run makes no progress any more.
        """
        try:
            last, tries, left = LastFault(0.0, 0.0), 0, list(schedule)
            while left and self._wait_recovered(left[0], last):
                fault = left[0]
                try:
                    done = inject(fault, self.site)
                except FaultError as error:  # Its process may just have ended.
                    tries += 1
                    if tries > TRIES:
                        raise StuckError(f"{fault.kind}: {error}") from error
                    last = LastFault(time.time(), time.time())
                    continue
                tries, now = 0, time.time()
                last = LastFault(self.site.struck or now, now, fault.kind not in MILD)
                self.faults.append({"time": last.struck, "done": done, **asdict(left.pop(0))})
                append_json_lines(self.out / "faults.jsonl", self.faults[-1:])
                self.say(f"{fault.number}. {fault.kind}: {done}")
            self._wait(self._is_finished, "the end of the run")
            return not left
        finally:
            self._end()

    def _wait_recovered(self, fault: PlannedFault, last: LastFault) -> bool:
        """Wait until the run has saved after the last fault, and then has made ``fault.after_steps`` more steps.

        ``fault`` is the next fault. If it damages the newest checkpoint, also wait until there is an older one. Returns
        True if ``fault`` can be injected, False if the run has finished.
        """

        def has_recovered() -> bool:
            saved = first_save(self.site.folder.read_events(), last, time.time())
            newest = recent_records(self.site.folder.metrics(0))
            if saved is None or not newest or newest[-1]["step"] < saved + fault.after_steps:
                return False
            # An older checkpoint has to take the place of a damaged one.
            return fault.kind != "flip_bit" or len(checkpoints(self.site.folder)) > 1

        self._wait(lambda: has_recovered() or self._is_finished(), f"the recovery before fault {fault.number}")
        return not self._is_finished()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, and repeat the command if it ends before the run.

        Raises StuckError after ``patience_s`` seconds without a new event, or after too many repetitions. ``what``
        names the condition in the message.
        """
        deadline, before = time.monotonic() + self.patience_s, -1
        while not condition():
            if self.site.is_over() and not self._is_finished():
                self.typed += 1
                log = self.out / "launch.log"
                if self.typed > 2 * len(self.faults) + 3:
                    raise StuckError(f"the command was typed {self.typed - 1} times; see {log}")
                self._process = start_launcher(self.words, log)
            count = len(self.site.folder.read_events())
            if count != before:
                deadline, before = time.monotonic() + self.patience_s, count
            if time.monotonic() > deadline:
                raise StuckError(f"nothing happened for {self.patience_s:g} s while waiting for {what}")
            time.sleep(0.1)

    def _is_finished(self) -> bool:
        return is_finished(self.site.folder.read_events())

    def _end(self) -> None:
        """Wait for the launcher of a finished run; cancel an unfinished run."""
        if self._process is None:
            return
        if not self._is_finished():
            command = [sys.executable, "-m", "gpt_launch", "cancel", "--now", str(self.site.folder.path)]
            subprocess.run(command, capture_output=True, check=False)
        try:
            self._process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def first_save(events: Sequence[Mapping[str, Any]], last: LastFault, now: float) -> int | None:
    """Return the step of the first checkpoint that shows that the run works again after a fault; None without one.

    A checkpoint that an attempt saves while it stops does not count, because the next fault would hit a run that is
    leaving. If faults of this kind end an attempt, no checkpoint counts before the event log shows that end. If all
    agents were killed, only the event of the next start shows it. Without such an event, the fault counts as harmless
    after ``FELT_S`` seconds, and any later checkpoint counts.

    Args:
        events: the event log.
        last: the fault.
        now: present Unix time in seconds.
    """
    later = [event for event in events if event["time"] > last.struck]
    felt = any(event["event"] in ("attempt_ended", "started") for event in later)
    if last.ends_attempt and not felt and now - last.over < FELT_S:
        return None
    since = max(last.over, *(event["time"] for event in later if event["event"] in LEAVING), 0.0)
    return next((event["step"] for event in later if event["event"] == "saved" and event["time"] > since), None)


# The verdict: final state and samples, and the cost of each fault.


def differing_state(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield the differences between the final checkpoints of the undisturbed run (``quiet``) and of the run with faults
    (``stormy``), as texts.
    """
    newest = [checkpoints(run)[:1] for run in (quiet, stormy)]
    if [] in newest:
        yield "no final checkpoint"
        return
    one, other = ({str(path.relative_to(last.parent)): path for path in files_of(last)} for (last,) in newest)
    if not one:
        yield "the final checkpoint has no file to compare"
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            yield f"{name} is not in both"
        elif not filecmp.cmp(one[name], other[name], shallow=False):
            yield f"{name} differs"


def differing_steps(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield a line for each rank whose step records differ between the undisturbed run and the run with faults.

    Steps are missing, surplus, or have a different loss or different samples.
    """
    for rank in sorted({*quiet.metric_ranks(), *stormy.metric_ranks()}):
        one, other = ({r["step"]: r for r in read_records(run.metrics(rank))} for run in (quiet, stormy))
        missing, more = sorted(one.keys() - other), sorted(other.keys() - one)
        if missing or more:
            yield f"rank {rank}: steps {missing[:3] or more[:3]} are {'missing' if missing else 'too many'}"
        both = sorted(one.keys() & other)
        if wrong := [step for step in both if any(one[step].get(f) != other[step].get(f) for f in SAME)]:
            yield f"rank {rank}: {len(wrong)} steps with another loss or other samples, the first is {wrong[0]}"
    if not quiet.metric_ranks():
        yield "no step records: the program does not record its steps (run.record of launch.worker)"


@dataclass(frozen=True)
class Recovery:
    """Cost of one fault: the time until the first step that the run had not made before, and the parts of this time.

    If no attempt ended before this step, the cost is the longest pause between two steps. The pauses from the fault to
    the next fault, or to the next end of an attempt, are compared.
    """

    kind: str
    road: str
    """Way in which the run continued after the fault.

    ``undisturbed``: no attempt ended. ``in place``: the agents restarted the ranks on the same hosts. ``spare``: the
    hosts changed. ``fewer nodes``: without the lost nodes. ``requeue``: Slurm requeued the job. ``typed again``: the
    drill repeated the command.
    """
    total_s: float
    """Seconds from the fault to the first new step; for ``undisturbed``, the longest pause between two steps."""
    noticed_s: float = 0.0
    """Seconds from the fault to the end of the attempt in the event log, or until the command was repeated."""
    started_s: float = 0.0
    """Seconds from the end of the attempt to the start of the ranks."""
    first_step_s: float = 0.0
    """Seconds from the start of the ranks to the first step."""
    again_s: float = 0.0
    """Seconds in which the run repeated steps that it had made before the fault."""


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
    for fault, until in zip(faults, [*(fault["time"] for fault in faults[1:]), math.inf], strict=True):
        at = fault["time"]
        before = [record for record in records if record["time"] <= at]
        done, last = (max((record[key] for record in before), default=0) for key in ("step", "attempt"))
        # If all agents were killed, no event shows the end of the attempt, but the repeated command does.
        ended = [event for event in events if event["event"] in ("attempt_ended", "submitted")]
        ends = [event["time"] for event in ended if at <= event["time"] < until and event.get("cause") != "finished"]
        newer = [record for record in records if at < record["time"] < until and record["step"] > done]
        times = sorted(record["time"] for record in newer if not ends or record["attempt"] > last)
        if not times:
            continue
        if not ends or ends[0] > times[0]:
            steps = [at, *(moment for moment in times if not ends or moment < ends[0])]
            pause = max(later - earlier for earlier, later in itertools.pairwise(steps))
            found.append(Recovery(fault["kind"], "undisturbed", pause))
            continue
        end, first_new = ends[0], times[0]
        begun = [event["time"] for event in events if event["event"] == "started" and end <= event["time"] <= first_new]
        first = min(record["time"] for record in records if record["time"] > end and record["attempt"] > last)
        start = begun[-1] if begun else first
        parts = (end - at, start - end, max(0.0, first - start), max(0.0, first_new - first))
        found.append(Recovery(fault["kind"], _road(events, end, first_new), first_new - at, *parts))
    return found


def _road(events: Sequence[Mapping[str, Any]], end: float, until: float) -> str:
    """Return how the run continued after an attempt: a value of ``Recovery.road``.

    ``end`` is the Unix time when the attempt ended. ``until`` is the Unix time of the first new step after it.
    """
    names = {event["event"] for event in events if end <= event["time"] <= until}
    for name, road in (("submitted", "typed again"), ("requeued", "requeue"), (FEWER_NODES, "fewer nodes")):
        if name in names:
            return road
    hosts = [event["hosts"] for event in events if event["event"] == "members" and event["time"] <= until][-2:]
    return "spare" if len(hosts) == 2 and hosts[0] != hosts[1] else "in place"


# The command.


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a drill; with ``--dry-run``, only list its faults.

    Returns the exit status: 0 if the run survived or was not started, 1 if it did not survive, 2 if the drill was
    refused.
    """
    args = _parser().parse_args(arguments)
    deny_others_writing()
    # Also ends the drill's run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = plain_console()
    words, quiet = _words_and_quiet(args.words, args.quiet)
    if args.sandbox is not None:
        conf = args.sandbox.absolute() / "etc" / "slurm.conf"
        if not conf.exists() or conf.stat().st_uid != os.getuid():
            why = "another user's" if conf.exists() else "not there"
            found, expected = f"{conf}, which is {why}", "a sandbox of your own: a drill changes nothing else"
            raise ConfigError(found, expected, f"ls -ld {args.sandbox}")
        os.environ["SLURM_CONF"] = str(conf)
    config = typed_config(compose_launch(words))
    config.validate()
    kind = config.cluster.kind
    is_slurm = kind is ClusterKind.slurm or (kind is ClusterKind.auto and scheduler.controller_problem() is None)
    has = [] if not is_slurm else [SLURM] if args.sandbox is None else [SLURM, SANDBOX]
    kinds = choose_kinds(args.kinds, has)
    schedule = make_schedule(args.seed, args.faults, kinds, config.world_size, args.most_steps)
    if args.dry_run:
        for fault in schedule:
            steps = f"{fault.after_steps} steps after the run has saved again"
            console.print(f"{fault.number}. {fault.kind}: {fault.text}; {steps}")
        return 0
    out = (args.output or Path("outputs") / "storm" / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    if out.exists() and any(out.iterdir()):
        expected = "a new folder, as a drill changes no other run"
        raise ConfigError(f"{out}, which has files", expected, "--output FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    site = Site(RunFolder(out / "stormy"), is_slurm, args.sandbox and args.sandbox.absolute())
    if quiet is None:
        quiet, log = RunFolder(out / "quiet"), out / "quiet.log"
        console.print(f"the quiet run: {quiet.path}")
        start_launcher([*words, f"run_dir={quiet.path}"], log).wait()
        if not is_finished(quiet.read_events()):
            raise ConfigError("a quiet run that does not finish", "a run that works", f"cat {log}")
    console.print(f"the stormy run: {site.folder.path}, {len(schedule)} faults of {len(kinds)} kinds, seed {args.seed}")
    drill = Drill(words, site, out, args.patience_s, console.print)
    wrong = []
    try:
        if not drill.run(schedule):
            count = f"{len(drill.faults)} of {len(schedule)} faults"
            wrong.append(f"{count} came before the run was done: it needs more steps")
    except StuckError as error:
        wrong.append(str(error))
    verdict = _judge(quiet, site, drill, wrong)
    write_json(out / "verdict.json", verdict)
    _show(verdict, console)
    console.print(f"wrote {out / 'verdict.json'}")
    return 0 if verdict["passed"] else 1


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m launch.storm",
        description="A chaos drill: one run under seeded faults, which must end bit for bit as a quiet one.",
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="WORD", help="as after python -m launch; or a finished run's folder")
    add("--faults", type=int, default=10, metavar="N", help="number of faults (%(default)s)")
    add("--seed", type=int, default=0, help="the same seed plans the same faults (%(default)s)")
    add("--kinds", type=lambda text: text.split(","), default=[], metavar="KIND,...", help="kinds of faults (all)")
    add("--most-steps", type=int, default=20, metavar="N", help="between a save and a fault (%(default)s)")
    add("--quiet", type=Path, metavar="FOLDER", help="a finished run to compare with; else the drill makes one")
    add("--output", type=Path, metavar="FOLDER", help="a new folder (outputs/storm/TIME)")
    add("--sandbox", type=Path, metavar="DIR", help="the sandbox that the run is submitted to")
    add(
        "--patience-s",
        type=float,
        default=900.0,
        help="seconds without an event after which the run is stuck (%(default)s)",
    )
    add("--dry-run", action="store_true", help="list the faults, and change nothing")
    return parser


def _words_and_quiet(words: Sequence[str], quiet: Path | None) -> tuple[list[str], RunFolder | None]:
    """Return the overrides of the drill, and the finished undisturbed run; None if the drill must make one.

    Args:
        words: overrides as typed, or only the folder of a finished run.
        quiet: folder of the undisturbed run that was typed after ``--quiet``; None without this option.

    Raises:
        ConfigError: the run of that folder has not finished.
    """
    if len(words) == 1 and is_run(Path(words[0])):
        quiet, words = Path(words[0]), read_overrides(RunFolder(Path(words[0]).absolute()))
    words = [word for word in words if not word.startswith("run_dir=")]
    folder = None if quiet is None else RunFolder(quiet.absolute())
    if folder and not is_finished(folder.read_events()):
        fix = f"python -m launch.status {quiet}, or no --quiet: the drill makes one"
        raise ConfigError(f"{quiet}, which has not finished", "a finished run to compare with", fix)
    return words, folder


def _judge(quiet: RunFolder, site: Site, drill: Drill, wrong: list[str]) -> dict[str, Any]:
    """Return the content of ``verdict.json``.

    ``quiet`` is the undisturbed run; ``wrong`` has errors that the drill has found so far.
    """
    run, events = site.folder, site.folder.read_events()
    wrong = [*wrong, *(differing_state(quiet, run) if is_finished(events) else ["the run has not finished"])]
    wrong += [*differing_steps(quiet, run), *_remains(site)]
    records = [record for record in read_json_lines(run.metrics(0)) if is_record(record) and "time" in record]
    return {
        "passed": not wrong,
        "wrong": wrong,
        "faults": drill.faults,
        "typed": drill.typed,
        "attempts": len(run.attempts()),
        "recoveries": [asdict(cost) for cost in recoveries(drill.faults, events, records)],
        "quiet": str(quiet.path),
        "run": str(run.path),
    }


def _remains(site: Site) -> list[str]:
    """Return a line for each process that the run has left on this host, and for a job that has not ended."""
    deadline = time.monotonic() + GONE_S
    while (left := of_run(site.folder.path)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.2)
    wrong = [f"process {process.pid} is left: {' '.join(process.info['cmdline'])[:100]}" for process in left]
    if site.is_slurm:
        job = SlurmJob(site.job)
        while (status := job.status(ask_queue([job]))).phase != "over" and time.monotonic() < deadline:
            time.sleep(1.0)
        wrong += [f"job {site.job} is {status.state}"] if status.phase != "over" else []
    return wrong


def _show(verdict: dict[str, Any], console: Console) -> None:
    """Print the verdict, and the median cost of the faults by kind and by the way in which the run continued."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cost in verdict["recoveries"]:
        groups[cost["kind"], cost["road"]].append(cost["total_s"])
    rows = [[*of, str(len(took)), f"{statistics.median(took):.2f}"] for of, took in sorted(groups.items())]
    print_table(console, ("kind", "road", "faults", "seconds to a new step"), rows, left=("kind", "road"))
    console.print(f"{len(verdict['faults'])} faults, {verdict['attempts']} attempts, typed {verdict['typed']} times")
    for line in verdict["wrong"]:
        console.print(f"wrong: {line}")
    console.print("passed: as the quiet run, bit for bit" if verdict["passed"] else "not passed")


if __name__ == "__main__":
    sys.exit(main())
