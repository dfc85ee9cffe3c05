"""Shows how submitted points go on, and waits for their end.

Owns the progress bars of a terminal and the plain lines where there is none. Reads run folders and asks the jobs for
their state; decides nothing but when a point is over.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from gpt.failure import first_failure
from gpt.run_folder import RunFolder
from launch.submit import Job, LocalRun

POLL_S = 0.5
SLURM_POLL_S = 5.0
PLAIN_LINE_S = 10.0
TAIL_BYTES = 16384
RECENT = 20  # steps the ETA is made from


@dataclass
class Point:
    """One submitted point and what was last seen of it."""

    job: Job
    state: str = "queued"
    attempts_before: int = 0
    """Attempts there were before this submission: their records are history."""
    events_before: int = 0
    """Events there were before this submission."""
    latest: dict[str, Any] = field(default_factory=dict)
    eta_s: float | None = None
    shown: tuple[str, int] = ("", -1)
    shown_at: float = 0.0

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.job.plan.run_dir)

    def events(self) -> list[dict[str, Any]]:
        """What the ledger says since this submission."""
        return self.folder.read_events()[self.events_before :]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("finished", "failed", "stopped")


def new_point(job: Job) -> Point:
    """A point that is about to be submitted."""
    folder = RunFolder(job.plan.run_dir)
    return Point(job, attempts_before=max(folder.attempts(), default=0), events_before=len(folder.read_events()))


def recent_records(path: Path) -> list[dict[str, Any]]:
    """The last step records of a rank, without reading the whole file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the first line may be cut, the last one may be half written
            continue
    return records[-RECENT:]


def look(point: Point) -> None:
    """Bring ``point`` up to date from its job and its folder."""
    job_state = point.job.state()
    records = recent_records(point.folder.metrics(0))
    new = [r for r in records if r["attempt"] > point.attempts_before]
    if new:
        point.latest = new[-1]
        left = point.job.plan.max_steps - point.latest["step"]
        point.eta_s = left * statistics.median(r["step_time_s"] for r in new)
    point.state = verdict(point) if job_state == "over" else job_state


def verdict(point: Point) -> str:
    """How a point whose job is over ended: its ledger says so, and silence is a failure."""
    events = point.events()
    attempts = [e["attempt"] for e in events if "attempt" in e]
    if attempts and first_failure(events, max(attempts)):
        return "failed"
    names = {e["event"] for e in events}
    return "finished" if "finished" in names else "stopped" if names & {"stopped", "agent_stopped"} else "failed"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def status_words(point: Point) -> str:
    """tokens/s, loss and ETA of a point, as far as they are known."""
    if not point.latest:
        return ""
    words = f"{point.latest['tokens_per_s']:>9,.0f} tokens/s  loss {point.latest['loss']:.4f}"
    if point.eta_s and not point.is_over:
        words += f"  ETA {duration(point.eta_s)}"
    return words


def plain_line(point: Point) -> str:
    """One point as a line of text."""
    step = point.latest.get("step", 0)
    return f"{point.job.plan.point:<24} {point.state:<9} step {step}/{point.job.plan.max_steps}  {status_words(point)}".rstrip()


class Display:
    """Bars on a terminal; elsewhere a line whenever a state changes, and every few seconds while steps are made."""

    def __init__(self, console: Console, points: Sequence[Point]) -> None:
        self._console = console
        self._tasks: dict[int, TaskID] = {}
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.fields[state]:<9}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                console=console,
            )
            for point in points:
                plan = point.job.plan
                self._tasks[id(point)] = self._bars.add_task(plan.point, total=plan.max_steps, state="queued", words="")
            self._bars.start()

    def show(self, point: Point) -> None:
        """Show ``point`` as it is now."""
        step = int(point.latest.get("step", 0))
        if self._bars is not None:
            self._bars.update(self._tasks[id(point)], completed=step, state=point.state, words=status_words(point))
            return
        changed = point.state != point.shown[0]
        moved = step != point.shown[1] and time.monotonic() - point.shown_at >= PLAIN_LINE_S
        if changed or moved:
            point.shown, point.shown_at = (point.state, step), time.monotonic()
            self._console.print(plain_line(point), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()


def watch(points: Sequence[Point], console: Console) -> None:
    """Follow the points to their end, starting local ones one after another."""
    display = Display(console, points)
    try:
        while any(not point.is_over for point in points):
            for point in points:
                if not point.is_over:
                    look(point)
                display.show(point)
            start_next_local(points)
            local = any(isinstance(p.job, LocalRun) for p in points if not p.is_over)
            time.sleep(POLL_S if local else SLURM_POLL_S)
    finally:
        display.close()


def start_next_local(points: Sequence[Point]) -> None:
    """Start the next local point once the one before is over: side by side they would measure each other."""
    local = [p for p in points if isinstance(p.job, LocalRun)]
    if any(p.state == "running" for p in local):
        return
    for point in local:
        if not point.is_over and isinstance(point.job, LocalRun):
            point.job.start()
            record_submitted(point)
            point.state = "running"
            return


def record_submitted(point: Point) -> None:
    """Enter the submission into the ledger."""
    plan = point.job.plan
    point.folder.record_event(
        "submitted", cluster=plan.cluster, job_id=point.job.job_id, host=os.uname().nodename, nodes=plan.nodes
    )


def stop_all(points: Sequence[Point], console: Console) -> None:
    """After Ctrl-C: ask every job to save and leave and wait for it; a second Ctrl-C ends them at once."""
    console.print("stopping: the runs save a checkpoint and leave; Ctrl-C again ends them now", highlight=False)
    for point in points:
        if isinstance(point.job, LocalRun) and point.job.job_id is None:
            point.state = "stopped"
        elif not point.is_over:
            point.job.stop()
    try:
        wait_until_over(points)
    except KeyboardInterrupt:
        for point in points:
            if not point.is_over:
                point.job.kill()
        wait_until_over(points)
    for point in points:
        console.print(plain_line(point), highlight=False, soft_wrap=True)


def wait_until_over(points: Sequence[Point]) -> None:
    """Wait for the end of every job."""
    while any(not point.is_over for point in points):
        for point in points:
            if not point.is_over:
                look(point)
        time.sleep(POLL_S)
