"""Facts about the end of an attempt: what each rank did last, by event log, stacks, step records and dumps."""

from __future__ import annotations

import io
import itertools
import linecache
import math
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.runs.environment import DUMP_PREFIX, dumped_ranks
from launch.runs.events import Events, events_since_submission, first_failure, select_events
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.runs.tracebacks import exceptions_in

# Stacks and tracebacks as text -> frames.


FRAME = re.compile(r'^ +File "([^"]+)", line (\d+)(,?) in (\S+)', re.MULTILINE)
LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3[^/]*/|^<|/launch/(worker|agent)/")
"""Pattern of the paths of files that are not the user's program."""
COLLECTIVE = re.compile(r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$")


@dataclass(frozen=True)
class Frame:
    """One line of a stack: file, line number and function."""

    file: str
    line: int
    function: str


def parse_stack(text: str) -> list[Frame]:
    """Return the frames of the thread that shows the cause, innermost first; empty if the text has no stack.

    In stacks of faulthandler, this is the main thread, which comes last; after a crash, the thread that crashed. In a
    Python traceback, it is the last exception.
    """
    block = next((one.stack for one in reversed(exceptions_in(text))), text)
    if "(most recent call first)" in text:
        crashed = text.partition("Fatal Python error")[2].partition("Current thread")[2].partition("\n\n")[0]
        block = crashed or text.rpartition("(most recent call first)")[2]
    found = FRAME.findall(block)
    frames = [Frame(file, int(line), function) for file, line, _, function in found]
    return frames[::-1] if any(comma for *_, comma, _ in found) else frames


# One rank, or a cause that has no rank.


@dataclass(frozen=True)
class RankFacts:
    """Facts about one rank at the end of an attempt. Most fields are those of an event of the rank."""

    source: Path
    """File with the evidence."""
    rank: int | None = None
    """Number of the rank; None for the facts of a host, or of the run as a whole."""
    host: str = ""
    step: int | None = None
    """Number of steps that the rank had done; None if not known."""
    cause: str = ""
    """Failure of the rank; empty if it did not fail."""
    traceback: str = ""
    """Traceback, stacks, or end of the log."""
    echo: bool = False
    """True if the rank failed because it lost another rank."""
    hung: bool = False
    left: bool = False
    """True if the rank left with exit status 0 while other ranks worked."""
    since: float = math.inf
    """Time of the last progress of a hung rank, Unix seconds."""
    state: str = ""
    """State of the process, and kernel function and file in which it waits, as ``S pipe_read pipe:[7]``."""
    dump: Mapping[str, Any] = field(default_factory=dict)
    """Last collective in torch's flight recorder, as ``read_dump`` returns it. Empty without a dump."""

    @cached_property
    def frames(self) -> list[Frame]:
        """Frames of the thread that shows the cause, innermost first; empty if the rank gave no stack."""
        return parse_stack(self.traceback)

    @cached_property
    def said(self) -> str:
        """Text on why the rank failed, in which the rules of a verdict search for patterns.

        The first line is the cause. Then each exception of the failure has a line: the word ``raised``, its class and
        its message. For an exception that the program was handling when it raised another one, the first word is
        ``handled``. The line of an AssertionError also has the source line of the failed assertion. A rank that hung,
        was killed or exited with a status has no lines of exceptions.
        """
        lines = [self.cause]
        if not self.hung and not self.cause.startswith(("killed", "exit")):
            for one in exceptions_in(self.traceback):
                code = one.stack.rstrip("\n ^~").rpartition("\n")[2] if one.line.startswith("AssertionError") else ""
                lines.append(f"{'handled' if one.is_handled else 'raised'} {one.text}{code}")
        return "\n".join(lines)

    @property
    def file(self) -> str:
        """Path of the file for which the process waits; empty if not known, or if it is no file."""
        found = re.search(r" (/(?!dev/).*)", self.state)
        return found[1] if found else ""

    @property
    def own(self) -> Frame | None:
        """Innermost frame in the user's program, else the innermost frame of all; None if the rank gave no stack."""
        return next((frame for frame in self.frames if not LIBRARY.search(frame.file)), next(iter(self.frames), None))

    @property
    def place(self) -> str:
        """File and line of the user's program, such as train.py:88; empty if not known."""
        return "" if self.own is None else f"{Path(self.own.file).name}:{self.own.line}"

    @property
    def code(self) -> str:
        """Source text of the innermost line of the stack; empty if it is not known."""
        return linecache.getline(self.frames[0].file, self.frames[0].line).strip() if self.frames else ""

    @property
    def collective(self) -> str:
        """Name of the collective in which the rank waits; empty if the rank waits in none."""
        if self.cause.startswith(("stopped", "frozen")):
            return ""
        inside = [frame.function for frame in self.frames if COLLECTIVE.search(frame.file)]
        if inside:
            return inside[-1]
        if not self.frames:
            return "" if self.dump.get("done", True) else str(self.dump["name"])
        if ".wait(" in self.code and self.own == self.frames[0]:  # Python's own waits have a frame of their own
            return "an asynchronous collective"
        # DDP reduces gradients inside the backward pass.
        in_backward = self.frames[0].function == "_engine_run_backward" and not self.state.startswith("R")
        return "backward" if in_backward else ""

    @property
    def activity(self) -> str:
        """Lines of text on the last activity of the rank, which rules search for patterns.

        The lines are: the cause; ``state`` and the process state; ``at`` and the source text of the innermost line of
        the stack; ``in`` and the file of each frame.
        """
        code = [f"at {self.code}"] if self.frames else []
        return "\n".join([self.cause, f"state {self.state}", *code, *(f"in {frame.file}" for frame in self.frames)])

    @property
    def who(self) -> str:
        """Rank and host as text."""
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    @property
    def waits_in(self) -> str:
        """Collective, place, group and step at which the rank waits, as text."""
        at = f" ({self.place})" if self.place else ""
        group = f" of group {self.dump['group']}" if self.dump else ""
        return f"{self.collective}{at}{group}" + (f" since step {self.step}" if self.step is not None else "")


# Flight recorder of torch: the last collectives of a rank.


class _Plain(pickle.Unpickler):
    """Unpickler of numbers, texts and containers. A pickle with anything else is refused, because it could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a dump of the flight recorder")


MOST_DUMPS = 64
"""Largest number of dumps that are read, because each may have 20,000 collectives."""


def read_dump(path: Path) -> dict[str, Any]:
    """Return the last collective in a dump of torch's flight recorder; empty if the dump cannot be read.

    The keys are ``name`` and ``group`` of the collective, ``seq``, its number in the group, ``sizes`` of the input
    tensors, and ``done``, True if the collective is completed.
    """
    try:
        last = max(_Plain(io.BytesIO(path.read_bytes())).load()["entries"], key=lambda entry: int(entry["record_id"]))
        return {
            "name": last["profiling_name"].partition(":")[2],
            "group": last["process_group"][1],
            "seq": last["collective_seq_id"],
            "sizes": last["input_sizes"],
            "done": last["state"] == "completed",
        }
    except (OSError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError):
        return {}


# All facts.


OWN_CAUSE = re.compile(
    r"^raised (?!RuntimeError|torch\.|Dist).*(connect|Errno 32|timed out)|No space left|out of memory|Cannot allocate",
    re.IGNORECASE | re.MULTILINE,
)
"""Pattern that ``RankFacts.said`` contains if a rank failed for its own reason, not only because it lost another rank.
"""


@dataclass(frozen=True)
class AttemptFacts:
    """Facts about the newest attempt of a run."""

    folder: RunFolder
    attempt: int
    events: Events
    """Events of the attempt, and events since the last submission that belong to no attempt."""
    ranks: Sequence[RankFacts]
    """Ranks that failed, hung, left early or gave stacks, by number."""
    first: RankFacts | None
    """Rank that failed first. A rank that only lost another rank counts only if no rank failed for another reason.

    None without a failure.
    """

    @cached_property
    def waiting(self) -> list[RankFacts]:
        """Ranks that wait in a collective, or whose wait in one has failed."""
        return [rank for rank in self.ranks if rank.collective]

    @cached_property
    def others(self) -> list[RankFacts]:
        """Ranks that are not in a collective, longest silence first. The other ranks probably wait for them.

        A rank is one of these if its stack shows a place outside of collectives. A rank without a stack is one if its
        process is stopped or frozen, or waits in the kernel (state D). Ranks that failed only because they lost another
        rank are left out.

        If there are no such ranks, the result has ranks that wait in a collective behind the others: their last
        collective in the flight recorder comes before that of another rank in the same group.
        """
        silent = re.compile(r"stopped|frozen.*\nstate [SD] .*free?z|.*\nstate D")  # these cannot give a stack
        able = [rank for rank in self.ranks if rank.frames or silent.match(rank.activity)]
        busy = [rank for rank in able if not rank.collective and not rank.echo]
        seqs = [(rank.dump["group"], rank.dump["seq"], rank) for rank in self.waiting if rank.dump]
        behind = [rank for group, seq, rank in seqs if any(g == group and s > seq for g, s, _ in seqs)]
        return sorted(busy or behind, key=lambda rank: rank.since)

    @cached_property
    def not_finite(self) -> RankFacts | None:
        """Rank and step of the first record with a loss or gradient norm that is not finite; None if there is none."""
        bad = [
            RankFacts(self.folder.metrics(rank), rank, step=record["step"])
            for rank in self.folder.metric_ranks()
            for record in read_records(self.folder.metrics(rank))
            if record["attempt"] == self.attempt
            and not all(math.isfinite(record.get(name) or 0.0) for name in ("loss", "grad_norm"))
        ]
        return min(bad, key=lambda one: (one.step, one.rank), default=None)

    def evidence(self) -> list[tuple[str, Path]]:
        """Return the facts as sentences, each with the file that shows it."""
        log, told = self.folder.events, []
        for rank in self.ranks:
            own = rank.own
            parts = (
                rank.cause.partition("\n")[0] or ("left with exit status 0" if rank.left else "was working"),
                "an echo" if rank.echo else "",
                "" if rank.step is None else f"step {rank.step}",
                f"in {own.function}, {own.file}:{own.line}" if own else "",
                f"process state {rank.state}" if rank.state else "",
                f"flight recorder {rank.dump}" if rank.dump else "",
            )
            told.append((f"{rank.who}: {'; '.join(filter(None, parts))}", rank.source))
        for event in select_events(self.events, *TELLING):
            told.append((f"{event['event']}: {event.get('cause', event.get('rank'))}", log))
        for before, after in itertools.pairwise(self.events):
            if after["time"] < before["time"] - CLOCK_S:
                told.append((f"a clock jumped, or clocks of hosts differ, at the event {after['event']}", log))
        return told


JOB = "job"
"""Name of an event that no event log has: the end of the job. Its cause is the state of the job in Slurm."""
TELLING = (
    "node_lost",
    "node_sick",
    "step_skipped",
    "replicas_differ",
    "start_refused",
    "attempt_ended",
    "straggler",
    JOB,
)
"""Names of events that are evidence. The evidence shows the cause of such an event; if it has no cause, its rank."""
CLOCK_S = 5.0
"""Seconds by which an event may be earlier than the event before it, because clocks of hosts differ."""


def read_facts(folder: RunFolder, more: Events = ()) -> AttemptFacts:
    """Return the facts about the newest attempt of a run.

    Args:
        folder: folder of the run.
        more: events that the event log does not have: ``job_event``, and ``stacks`` of ranks that run now.
    """
    attempt = max(folder.attempts(), default=0)
    events = [e for e in events_since_submission(folder.read_events()) if e.get("attempt") in (None, attempt)]
    events += more
    failed = select_events(events, "rank_failed")
    traces = {(e.get("host"), e["rank"]): e.get("traceback", "") for e in failed}
    # A rank that failed in the same way as another rank of its host has no traceback of its own.
    failed = [e | {"traceback": traces.get((e.get("host"), e.get("same_as", e["rank"])), "")} for e in failed]
    known = [*select_events(events, "rank_left", "stacks"), *reversed(failed)]
    found = {event["rank"]: _rank_facts(folder, attempt, event) for event in known}
    for rank in dumped_ranks(folder.attempt(attempt))[:MOST_DUMPS]:
        one = found.get(rank) or _rank_facts(folder, attempt, {"rank": rank})
        found[rank] = replace(one, dump=read_dump(folder.attempt(attempt) / f"{DUMP_PREFIX}{rank}"))
    first = first_failure(events, attempt)
    ranks = [found[rank] for rank in sorted(found)]
    return AttemptFacts(folder, attempt, events, ranks, None if first is None else found[first["rank"]])


def job_event(state: str) -> dict[str, Any]:
    """Return an event for the end of a job. ``state`` is Slurm's name of the job's last state."""
    return {"event": JOB, "time": time.time(), "cause": state}


def _rank_facts(folder: RunFolder, attempt: int, event: Mapping[str, Any]) -> RankFacts:
    """Return the facts that an event contains about its rank."""
    names = {one.name for one in fields(RankFacts)}
    one = RankFacts(
        folder.log(attempt, event["rank"]), **{k: v for k, v in event.items() if k in names and v is not None}
    )
    # The event only has the words of a lost connection: it may be one of the program's own, or torch may say why.
    return replace(one, echo=False) if one.echo and OWN_CAUSE.search(one.said) else one
