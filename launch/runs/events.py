"""The event log of a run: state of the run, failures of ranks, and continuation from an earlier checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, counted
from launch.runs.folder import RunFolder, make_numbered, read_json, read_json_lines, write_atomically, writing_into
from launch.runs.process import ENVIRONMENT as HEARTBEAT_DIR
from launch.runs.records import is_record, recent_records

# State of a run by its event log: submissions, saves, ends and problems. Does not import torch.


Events = Sequence[dict[str, Any]]
FEWER_NODES, ALL_NODES = "fewer_nodes", "all_nodes"
"""Names of the events for an attempt on fewer nodes than requested, and for the next attempt on all nodes."""


def select_events(events: Events, *names: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the events that have one of ``names`` and all values of ``fields``, oldest first."""
    wanted = [event for event in events if event["event"] in names]
    return [event for event in wanted if all(event.get(field) == value for field, value in fields.items())]


def last_event(events: Events, *names: str, **fields: Any) -> dict[str, Any]:
    """Return the last event that ``select_events`` selects; an empty dictionary if there is none."""
    return [{}, *select_events(events, *names, **fields)][-1]


def last_index(events: Events, *names: str, **fields: Any) -> int:
    """Return the index of the last event that ``select_events`` selects; -1 if there is none."""
    found = (index for index, event in enumerate(events) if select_events([event], *names, **fields))
    return max(found, default=-1)


def events_since_submission(events: Events) -> list[dict[str, Any]]:
    """Return the events since a user last typed the command of the run. Limits of restarts count only these events."""
    return list(events[last_command(events) :])


def last_command(events: Events) -> int:
    """Return the index of the last submission that a user typed; 0 if there is none.

    A ``submitted`` event of a job that the launcher moved to another partition does not count. If the launcher and an
    agent both recorded the submission of one job, the first of the two events counts.
    """
    last, before = 0, None
    for index, event in enumerate(events):
        if event["event"] == "submitted":
            is_same = before is not None and event.get("job_id") == before.get("job_id")
            is_second = is_same and "by" in {**event, **(before or {})}
            if not event.get("moved") and not is_second:
                last = index
            before = event
    return last


CHANGED = ("resumed_from", "extended")
"""Names of the events of a command that takes a run back to an earlier checkpoint, or gives the run more steps."""


def planned_steps(events: Events) -> int | None:
    """Return the number of steps that the newest attempt planned for the whole run; None if it is not recorded."""
    told = [event["max_steps"] for event in select_events(events, "started") if event.get("max_steps")]
    return int(told[-1]) if told else None


def saves_that_count(events: Events) -> list[dict[str, Any]]:
    """Return the ``saved`` events of checkpoints that still belong to the run, oldest first.

    A command with ``resume_from`` takes the run back to an earlier step. The saves of later steps that were recorded
    before this command are left out.
    """
    found: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "saved":
            found.append(event)
        elif event["event"] == "resumed_from":
            found = [save for save in found if save["step"] is None or save["step"] <= event["step"]]
    return found


def is_finished(events: Events) -> bool:
    """Return whether the newest attempt made the last step of the run.

    False if a later command has extended the run, or taken it back to an earlier checkpoint.
    """
    if last_index(events, *CHANGED) > last_index(events, "started"):
        return False
    numbers = [e["attempt"] for e in events if e.get("attempt") is not None]
    newest = [e for e in events if numbers and e.get("attempt") == max(numbers)]
    ends = [e["cause"] for e in select_events(newest, "attempt_ended")]
    if ends or select_events(events, "agent_started"):
        return bool(ends) and ends[-1] == "finished"
    names = {e["event"] for e in newest}  # of ranks that no agent watched, as with gpt.train
    return "finished" in names and "rank_failed" not in names


def fewer_nodes(events: Events) -> dict[int, dict[str, Any]]:
    """Return attempt -> its event ``fewer_nodes``, for the attempts with fewer nodes than requested.

    The event has the present and the requested number of nodes, and the cause.

    Steps of these attempts take longer, and must not be compared with steps of other attempts.
    """
    return {event["attempt"]: event for event in select_events(events, FEWER_NODES)}


def damaged_text(events: Events) -> str | None:
    """Return a text on damaged checkpoints that were set aside since the last submission; None if there are none."""
    found = [event["cause"] for event in select_events(events_since_submission(events), "checkpoint_set_aside")]
    return f"damaged and set aside: {'; '.join(found)}" if found else None


def unread_text(folder: RunFolder) -> str | None:
    """Return a text on the number of lines of the event log that cannot be read; None if all lines can be read."""
    unread = folder.unread_events()
    if not unread:
        return None
    return f"{counted(unread, 'line')} of {folder.events} could not be read; their content is missing here"


def straggling_ranks(events: Events) -> list[dict[str, Any]]:
    """Return the newest ``straggler`` event of each rank that is slow in the newest attempt, by ascending rank."""
    slow: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("started", "attempt_ended", "finished", "stopped"):
            slow.clear()
        elif event["event"] == "straggler":
            slow[event["rank"]] = event
        elif event["event"] == "straggler_ended":
            slow.pop(event["rank"], None)
    return [slow[rank] for rank in sorted(slow)]


def uncopied_text(events: Events) -> str | None:
    """Return a text that says since when, and why, no checkpoint could be copied to ``checkpoint.copy_to``.

    None if the last copy succeeded, or if nothing was copied.
    """
    return _failing_text(events, "no checkpoint could be copied", failure="copy_failed", success="copied")


def unsaved_text(events: Events) -> str | None:
    """Return a text that says since when, and why, no checkpoint could be written; None if the last save succeeded."""
    return _failing_text(events, "no checkpoint could be written", failure="save_failed", success="saved")


def _failing_text(events: Events, what: str, *, failure: str, success: str) -> str | None:
    failed = select_events(events[last_index(events, success) + 1 :], failure)
    if not failed:
        return None
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(failed[0]["time"]))
    return f"{what} since {since} (tried {counted(len(failed), 'time')}): {failed[-1]['cause']}"


def skipped_text(events: Events) -> str | None:
    """Return a text on the skipped steps and the rollbacks of the newest attempt; None if there are none."""
    began = last_index(events, "started") + 1
    told = []
    for name, what, where in (("step_skipped", "steps skipped", "step"), ("rolled_back", "gone back", "to step")):
        found = select_events(events[began:], name)
        if found:
            times, last = counted(len(found), "time"), found[-1]
            told.append(f"{what} {times} in this attempt, last {where} {last['step']}: {last['cause']}")
    return "; ".join(told) or None


# Failures of ranks. One failure makes others: ranks that lose a peer fail as well, which is called an echo here.


ECHO = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connect timeout|recv.*timed? ?out|DistBackendError|"
    r"NCCL|socket.*error|ProcessGroup.*(abort|timeout)|timed out waiting|connectFullMesh|Dist(Network|Store)Error|"
    r"rank .* failed",
    re.IGNORECASE,
)


def record_failure(folder: RunFolder, attempt: int, rank: int, error: BaseException, step: int | None) -> None:
    """Record the failure of this rank in the event log.

    The traceback is left out if another rank of this node has recorded the same one. Thousands of ranks can fail
    together with the same traceback, and every agent reads the whole log. ``step`` is the last step of the rank; None
    if unknown.
    """
    cause = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    same = None if isinstance(error, ConfigError) else same_failure(rank, failure_kind(cause, trace))
    enter_failure(folder, attempt, rank, cause=cause, trace=trace, step=step, same_as=same)


def failure_kind(cause: str, trace: str) -> str:
    """Return a text that is equal for failures of the same kind, of which one traceback is enough.

    The text has the source lines in the traceback ``trace``, and the type of the exception. For all echoes, the word
    ``echo`` replaces the type. ``cause`` is the type and the message of the exception. The message is left out, since
    it may name the rank.
    """
    places = re.findall(r'File "[^"]*", line \d+', trace)
    return "\n".join(["echo" if ECHO.search(cause) else cause.partition(":")[0], *places])


def same_failure(rank: int, kind: str) -> int | None:
    """Return the rank of this node that was first to fail with ``kind`` in this attempt; None if ``rank`` is the first.

    ``kind`` is a text from ``failure_kind``. The first rank creates a marker file in the agent's folder for the
    attempt. If there is no agent, or the file cannot be created, every rank counts as the first.
    """
    if HEARTBEAT_DIR not in os.environ:
        return None
    marker = Path(os.environ[HEARTBEAT_DIR]) / f"failure_{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
    try:
        own = Path(f"{marker}.{rank}")
        own.write_text(str(rank))
        os.link(own, marker)  # atomic, with its content
    except FileExistsError:
        return int(marker.read_text())
    except OSError:  # a full disk, or a folder that is gone
        return None
    return None


def enter_failure(
    folder: RunFolder, attempt: int, rank: int, *, cause: str, trace: str, step: int | None = None, **more: Any
) -> None:
    """Record the event ``rank_failed`` for a rank of this host in the event log.

    Args:
        folder: the run folder.
        attempt: number of the attempt.
        rank: number of the rank.
        cause: cause of the failure, one line.
        trace: traceback, or the end of the rank's log.
        step: last step of the rank; None if unknown.
        more: further fields of the event; those that are None are left out. A hung rank has ``hung=True`` and
            ``since``, the Unix time of its last progress. ``same_as`` is the rank of this host that has recorded the
            same traceback. The event then names that rank in place of the traceback.
    """
    more = {name: value for name, value in more.items() if value is not None}
    if cause.startswith(f"{ConfigError.__name__}: found:"):
        trace = ""  # The text of a refusal suffices.
    elif "same_as" in more:
        trace = f"as rank {more['same_as']} of this host, which has the traceback; this rank's is in its log"
    folder.record_event(
        "rank_failed",
        attempt=attempt,
        rank=rank,
        host=socket.gethostname(),
        step=step,
        cause=cause,
        traceback=trace,
        log=str(folder.log(attempt, rank)),
        echo=bool(ECHO.search(cause)),
        **more,
    )


def first_failure(events: Events, attempt: int) -> dict[str, Any] | None:
    """Return the event of the first failure in an attempt; None if no rank failed.

    An echo, the failure of a rank that only lost another rank, is returned only if there is no other failure. Of
    several hung ranks, the rank with the earliest last progress failed first: the other ranks waited for this rank.
    """
    failures = select_events(events, "rank_failed", attempt=attempt)
    first = min(failures, key=lambda e: (bool(e.get("echo")), e.get("since", e["time"])), default=None)
    if first is None or "same_as" not in first:
        return first
    # The rank with the traceback may have recorded its failure later.
    of_host = [e for e in failures if e["host"] == first["host"] and "same_as" not in e]
    return next((e for e in of_host if e["rank"] == first["same_as"]), first)


def failure_text(failure: dict[str, Any]) -> str:
    """Return a ``rank_failed`` event as text for people: rank, host, cause, traceback and path of the log."""
    step = f" after step {failure['step']}" if failure.get("step") is not None else ""
    head = f"rank {failure['rank']} on {failure['host']} failed first{step}: {failure['cause']}"
    trace = str(failure.get("traceback") or "").rstrip()
    return "\n".join(part for part in (head, trace, f"log: {failure['log']}") if part)


# Best interval between checkpoints where nodes fail, and the share of the time that is left for steps.
#
# Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); J. T. Daly,
# "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), to first order: its
# further terms matter only where a save takes a large part of the time between failures.


def best_interval_s(save_s: float, between_failures_s: float) -> float:
    """Return the seconds of computing between two saves that lose the least time: ``sqrt(2 C M)`` (Young 1974).

    Args:
        save_s: seconds for which a save stops the steps (C).
        between_failures_s: mean time between failures, seconds (M).
    """
    return math.sqrt(2 * save_s * between_failures_s)


def expected_goodput(save_s: float, interval_s: float, restart_s: float, between_failures_s: float) -> float:
    """Return the share (0 to 1) of the time that is spent on steps that are kept.

    Each interval costs a save. Each failure costs a restart and half an interval, with at most one failure in an
    interval (Daly 2006).

    Args:
        save_s: seconds for which a save stops the steps.
        interval_s: seconds of computing between two saves.
        restart_s: seconds from a failure to the next step.
        between_failures_s: mean time between failures, seconds.
    """
    cycle = interval_s + save_s
    lost = (restart_s + cycle / 2) / between_failures_s
    return (interval_s / cycle if cycle else 1.0) * max(0.0, 1 - lost)


# A checkpoint on disk, as a workload lists it for ``launch.verify`` and ``resume_from``.


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk, and the function that verifies it."""

    path: Path
    step: int | None
    """Step from which a run would resume; None if no run would load the checkpoint."""
    size: int
    """Number of bytes that ``find_damage`` reads."""
    find_damage: Callable[[Callable[[int], None]], tuple[str, ...] | None]
    """Function that reads the checkpoint and returns one line for each damage; None if the checkpoint was deleted.

    While it reads, the function calls its argument with the number of bytes of each read.
    """


# A run that continues from an earlier checkpoint, or beyond its end.


LAST = "last"
"""Value of ``resume_from`` that means the newest checkpoint."""


@dataclass(frozen=True)
class Continuation:
    """How a command continues an existing run."""

    back_to: int | None = None
    """Step of the earlier checkpoint from which the run continues; None for its newest checkpoint."""
    last: int | None = None
    """Last step that the run had made before it goes back to ``back_to``; None if the run does not go back.

    The records of the steps after ``back_to`` are moved aside.
    """
    extends: int | None = None
    """Number of steps at which the run had finished, if the command gives the run more steps; otherwise None."""

    def text(self, max_steps: int | None) -> str:
        """Return a text on the continuation for people; "" if the run continues where it stopped.

        ``max_steps`` is the requested number of steps of the whole run; None if not known.
        """
        parts = []
        if self.back_to is not None:
            kept = f"; steps {self.back_to + 1} to {self.last} are kept in aside/" if self.last else ""
            parts.append(f"back to the checkpoint of step {self.back_to}{kept}")
        if self.extends is not None:
            parts.append(f"on to step {max_steps}, after it was finished at step {self.extends}")
        return ", and ".join(parts)


def refuse_resume_from(value: Any, fresh: bool) -> None:
    """Raise ConfigError if ``resume_from`` names no checkpoint, or is typed with ``fresh=true``."""
    if value is None:
        return
    if value != LAST and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        expected = "the step of a checkpoint, or last for the newest one"
        raise ConfigError(f"resume_from={value}", expected, "resume_from=last")
    if fresh:
        raise ConfigError(
            f"resume_from={value} with fresh=true",
            "a run that continues from a checkpoint, or one that begins in a new folder",
            f"resume_from={value} alone; or fresh=true init_from=RUN_DIR, for a new run with the weights of another",
        )


def plan_continuation(
    folder: RunFolder, resume_from: Any, max_steps: int | None, saved: Iterable[SavedCheckpoint]
) -> Continuation:
    """Return how a command would continue the run of a folder. Changes nothing.

    Args:
        folder: folder of the run; may be missing if ``resume_from`` is None.
        resume_from: step of a checkpoint, ``last`` for the newest, or None to continue where the run stopped.
        max_steps: requested steps of the whole run; None if they are not known.
        saved: checkpoints of the run; read only if needed.

    Raises:
        ConfigError: the checkpoint does not exist, or the run has made more steps than requested.
    """
    events = folder.read_events()
    before = planned_steps(events)
    is_longer = max_steps is not None and before is not None and max_steps > before
    extends = before if is_longer and is_finished(events) else None
    checkpoints = [] if resume_from is None else list(saved)
    last = last_step(folder, checkpoints)
    back_to = last if resume_from is None else find_step(folder, resume_from, checkpoints)
    if max_steps is not None and max_steps < back_to:
        raise ConfigError(
            f"{folder.path} has made {back_to} steps, and {max_steps} are requested now",
            f"at least {back_to} steps in all, or a checkpoint that is not beyond them to go back to",
            f"optim.max_steps={back_to}, or resume_from=STEP with a step up to {max_steps}, or fresh=true",
        )
    return Continuation(back_to, last, extends) if back_to < last else Continuation(extends=extends)


def find_step(folder: RunFolder, resume_from: Any, saved: Sequence[SavedCheckpoint]) -> int:
    """Return the step of the checkpoint in ``saved`` that ``resume_from`` names by its step, or by ``last``.

    Raises:
        ConfigError: the run has no checkpoint, or none of that step.
    """
    steps = sorted(one.step for one in saved if one.step is not None)
    if not steps:
        found = f"resume_from={resume_from}, and {folder.path} has no checkpoint"
        expected = "the folder of a run that has saved; python -m launch.status lists the runs"
        raise ConfigError(found, expected, "run_dir=FOLDER, or the same without resume_from")
    if resume_from == LAST:
        return steps[-1]
    if resume_from not in steps:
        near = min(steps, key=lambda step: (abs(step - resume_from), step))
        raise ConfigError(
            f"resume_from={resume_from}, and {folder.path} has no checkpoint of that step",
            f"one of its checkpoints: {', '.join(map(str, steps))}",
            f"resume_from={near}",
        )
    return int(resume_from)


def last_step(folder: RunFolder, saved: Iterable[SavedCheckpoint]) -> int:
    """Return the last step of a run, from its step records and checkpoints; 0 if there are none."""
    recorded = [record["step"] for record in recent_records(folder.metrics(0))]
    return max([*recorded, *(one.step for one in saved if one.step is not None)], default=0)


def apply_continuation(
    folder: RunFolder, goes_on: Continuation, max_steps: int | None, saved: Iterable[SavedCheckpoint]
) -> None:
    """Record how a run continues, and move later records and checkpoints into the folder ``aside``. Deletes nothing.

    Call this function only while no process works on the run. If the process is killed, the same command completes the
    work.

    Args:
        folder: folder of the run.
        goes_on: how the run continues, from ``plan_continuation``.
        max_steps: requested steps of the whole run; None if they are not known.
        saved: checkpoints of the run.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with writing_into(folder.path):
        if goes_on.back_to is not None:
            number = make_numbered(folder.aside)
            # First, so that a finished run no longer counts as finished.
            folder.record_event("resumed_from", step=goes_on.back_to, last=goes_on.last, aside=f"aside/{number.name}")
            set_records_aside(folder, goes_on.back_to, number)
            later = [one for one in saved if one.step is not None and one.step > goes_on.back_to]
            for one in sorted(later, key=lambda one: -(one.step or 0)):  # newest first, so that no gap appears
                (number / folder.checkpoints.name).mkdir(parents=True, exist_ok=True)
                if one.path.exists():  # else an interrupted command has moved it
                    one.path.rename(number / folder.checkpoints.name / one.path.name)
        if goes_on.extends is not None:
            folder.record_event("extended", step=goes_on.extends, max_steps=max_steps)


def set_records_aside(folder: RunFolder, step: int, aside: Path) -> None:
    """Move the step records after ``step`` of all ranks into ``aside``."""
    for rank in folder.metric_ranks():
        path = folder.metrics(rank)
        kept: list[dict[str, Any]] = []
        later: list[dict[str, Any]] = []
        for line in read_json_lines(path):
            (later if is_record(line) and line["step"] > step else kept).append(line)
        if later:
            for target, lines in ((aside / path.parent.name / path.name, later), (path, kept)):
                write_atomically(target, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def aside_records(folder: RunFolder, rank: int) -> list[Path]:
    """Return the files with step records of a rank that were moved aside, oldest first."""
    return sorted(folder.aside.glob(f"[0-9]*/{folder.metrics(rank).parent.name}/{folder.metrics(rank).name}"))


def refuse_alive(folder: RunFolder) -> None:
    """Raise ConfigError if ranks of the newest attempt run on this machine.

    Ranks that ``gpt.train`` started have no launcher and are in no queue, so they are found by their processes. Ranks
    on other machines are not found.
    """
    import psutil  # a rank imports this module, and its Python may have the standard library alone

    attempt = max(folder.attempts(), default=0)
    ends = ("finished", "stopped", "rank_failed", "attempt_ended")
    if not attempt or select_events(folder.read_events(), *ends, attempt=attempt):
        return
    known = read_json(folder.environment(attempt))
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for rank in known.get("ranks", ()):
        if rank.get("machine") != here or not psutil.pid_exists(rank.get("pid") or -1):
            continue
        with suppress(psutil.NoSuchProcess):
            # A PID may be used again: the rank began before the record was written.
            if psutil.Process(rank["pid"]).create_time() <= float(known.get("time", 0.0)) + 1.0:
                raise ConfigError(
                    f"{folder.path} is being worked on by process {rank['pid']}, rank {rank.get('rank')} of attempt "
                    f"{attempt}",
                    "a run that nothing works on, before it goes back to an earlier checkpoint",
                    f"kill {rank['pid']}, which has it save and leave; then the same command",
                )
