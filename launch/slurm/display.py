"""Progress of submitted points on the terminal, as bars or as plain lines, until all of them end.

The loop also starts the next local point. ``launch.plan.placement`` decides when a pending job moves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from launch.plan.preflight import record_submitted
from launch.runs.records import throughput
from launch.slurm.client import SlurmError
from launch.slurm.failover import PlacementFailover
from launch.slurm.handles import LocalQueueEntry, SlurmJob
from launch.slurm.status import RunStatus, poll
from launch.slurm.stop import Stop
from launch.slurm.submit import start_local

POLL_S = 0.5
PLAIN_LINE_S = 10.0


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def state_text(point: RunStatus) -> str:
    """The state, and why where that is known; of a run that continues with fewer nodes, with how many."""
    fewer = point.fewer_nodes() if point.state == "running" else None
    on = "" if fewer is None else f"{fewer['nodes']} of {fewer['asked']} nodes"
    told = ", ".join(part for part in (point.detail, on) if part)
    return f"{point.state} ({told})" if told else point.state


def progress_text(point: RunStatus) -> str:
    """Throughput, loss and ETA of a point, as far as they are known."""
    known = []
    old = f" {duration(point.stale_s)} ago" if point.stale_s is not None else ""
    if (speed := throughput(point.latest)) is not None:
        known.append(f"{speed[0]:>9,.{0 if speed[0] >= 100 else 1}f} {speed[1]}/s{old}")
    if point.latest.get("loss") is not None:
        known.append(f"loss {point.latest['loss']:.4f}")
    if point.quiet_s is not None:
        known.append(quiet_text(point.quiet_s))
    elif point.eta_s and not point.is_over:
        known.append(f"ETA {duration(point.eta_s)}")
    return "  ".join(known)


def quiet_text(seconds: float) -> str:
    """Possible reasons why a run makes no step for long, until its agents are sure of one."""
    return f"no step for {seconds:.0f} s: an evaluation, a checkpoint, a hang, or a lost node"


def step_text(point: RunStatus) -> str:
    """``step 20/60``, as far as steps are known; nothing of a program that tells none."""
    step, total = point.latest.get("step"), point.max_steps
    if total is None:
        return "" if step is None else f"step {step}"
    return f"step {step or 0}/{total}"


def plain_line(point: RunStatus) -> str:
    """One point as a line of text."""
    steps = step_text(point)
    head = f"{point.name:<24} {state_text(point):<9}" + (f" {steps}" if steps else "")
    return f"{head}  {progress_text(point)}".rstrip()


class Display:
    """Bars on a terminal; elsewhere a line whenever a state changes, and every few seconds while steps are made."""

    def __init__(self, console: Console, points: Sequence[RunStatus]) -> None:
        self._console = console
        self._tasks: dict[int, TaskID] = {}
        self._shown: dict[int, tuple[str, int, float]] = {}
        self._told: set[tuple[int, int]] = set()
        self._advice: dict[int, str] = {}
        self._problem = False
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.fields[state]:<9}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[progress]}"),
                console=console,
            )
            for point in points:
                self._tasks[id(point)] = self._bars.add_task(
                    point.name, total=point.max_steps, state="pending", progress=""
                )
            self._bars.start()

    def show(self, point: RunStatus) -> None:
        """Show ``point`` as it is now."""
        self._show_changes(point)
        self._show_advice(point)
        step = int(point.latest.get("step", 0))
        if self._bars is not None:
            task, progress = self._tasks[id(point)], progress_text(point)
            self._bars.update(task, completed=step, state=state_text(point), progress=progress)
            return
        state, last_step, at = self._shown.get(id(point), ("", -1, 0.0))
        moved = step != last_step and time.monotonic() - at >= PLAIN_LINE_S
        seen = f"{state_text(point)}{' without steps' if point.quiet_s is not None else ''}"
        if seen != state or moved:
            self._shown[id(point)] = (seen, step, time.monotonic())
            self._console.print(plain_line(point), highlight=False, soft_wrap=True)

    def _show_changes(self, point: RunStatus) -> None:
        """Say once what an attempt runs on that the one before it did not, unless the submission has said so."""
        for event in point.events():
            change = f"changed since attempt {event.get('since')}: {event.get('cause')}"
            known = point.plan is not None and any(change in warning for warning in point.plan.warnings)
            key = (id(point), event.get("attempt", 0))
            if event["event"] == "code_changed" and not known and key not in self._told:
                self._told.add(key)
                text = f"warning: {point.name}, attempt {event['attempt']}: {change}"
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show_advice(self, point: RunStatus) -> None:
        """Say once for each reason that waiting will not start a point, and what will."""
        text = point.advice
        if text and text != self._advice.get(id(point)):
            self._console.print(f"warning: {point.name}: {text}", highlight=False, markup=False, soft_wrap=True)
        self._advice[id(point)] = text

    def show_problem(self, problem: SlurmError | None) -> None:
        """Say once that Slurm does not answer, and once that it does again."""
        if problem is not None and not self._problem:
            self._console.print(
                f"{problem}\nthe jobs go on; asking again until Slurm answers", highlight=False, markup=False
            )
        elif problem is None and self._problem:
            self._console.print("Slurm answers again", highlight=False)
        self._problem = problem is not None

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()


def watch(points: Sequence[RunStatus], console: Console, slurm_poll_s: float) -> None:
    """Follow the points to their end, starting local ones one after another; ask Slurm every ``slurm_poll_s``.

    A Slurm that does not answer is asked again: its jobs go on without us.
    """
    display, failover = Display(console, points), PlacementFailover(console)
    try:
        while watched := [point for point in points if not point.is_over]:
            start_next_local(watched)
            display.show_problem(poll(watched, retries=1) or failover.step(watched))
            for point in watched:
                display.show(point)
            time.sleep(poll_s(watched, slurm_poll_s))
    finally:
        display.close()


def poll_s(points: Sequence[RunStatus], slurm_poll_s: float) -> float:
    """Seconds between two polls of points: longer where a controller that many share has to be asked."""
    return slurm_poll_s if all(isinstance(point.job, SlurmJob) for point in points) else POLL_S


def start_next_local(points: Sequence[RunStatus]) -> None:
    """Start the next local point once the one before is over: side by side they would measure each other."""
    local = [p for p in points if p.plan is not None and p.plan.cluster == "local" and not p.is_over]
    if any(p.job is not None for p in local):
        return
    for point in local:
        LocalQueueEntry(point.folder).leave()
        if is_cancelled(point):
            point.state = "cancelled"
            continue
        assert point.plan is not None
        point.job = start_local(point.plan)
        point.state = "running"
        record_submitted(point.plan, point.job.job_id, pid_started=point.job.started)
        if is_cancelled(point):  # in the moment of its start
            Stop(point).push()
        return


def is_cancelled(point: RunStatus) -> bool:
    """Return whether somebody has cancelled the point since it was planned."""
    return any(e["event"] == "cancelled" for e in point.events())
