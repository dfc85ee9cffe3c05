"""Endings of runs in words: why a point did not finish, and which log to read on. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from launch.jobs.handles import agent_logs
from launch.jobs.status import RunStatus, is_silent
from launch.runs.failures import failure_text
from launch.runs.unwritten import is_full


def show_progress_problems(points: Sequence[RunStatus], console: Console) -> None:
    """Say where ``script.progress`` did not find what it was meant to."""
    for point in points:
        causes = [event["cause"] for event in point.events() if event["event"].startswith("progress_")]
        for cause in dict.fromkeys(causes):
            console.print(f"warning: {point.name}: {cause}", highlight=False, markup=False)


def explain(point: RunStatus) -> str:
    """Explain why a point did not finish, and name the log to read on."""
    failure = point.failure() if point.state == "failed" else None
    head = f"{point.name} {point.state}" + (f" ({point.detail})" if point.detail else "")
    if point.state == "failed" and is_full(point.folder.path):
        lacks = "has no room: its event log may lack the last events; make room there before the same command"
        head = f"the filesystem of {point.folder.path} {lacks}\n{head}"
    why = point.why_not_restarted()
    last = f"\nnot started again: {why}" if why is not None else ""
    refusal = point.start_refusal()
    if refusal is not None:  # of a start after the attempt that failed
        return f"{head}:\n{refusal}{last}"
    if failure is not None:
        return f"{head}: {failure_text(failure)}{last}"
    if last:
        return f"{head}{last}"
    logs = agent_logs(point.folder.path, point.job, 0)[::-1] if point.job is not None else []
    log = next((log for log in logs if log.is_file() and log.stat().st_size), None)
    if log is not None and point.state == "failed":
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        return f"{head}; the first agent's last words ({log}):\n{lines}"
    if point.state == "failed" and not is_silent(point):
        return f"{head}; nothing was recorded in {point.folder.path}"
    if point.state == "placement_timeout":
        return f"{head}; the same command submits it again"
    return head
