"""The file ``run.json``: a whole run in one value, with config, startup, steps, evaluations, checkpoints and summary.

The file depends only on the run folder. So interruptions do not change it, and all tools read a run alike. Imports no
torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gpt import checkpoint as folders
from launch.runs.events import saves_that_count
from launch.runs.folder import RunFolder, read_json, read_mapping, write_json
from launch.runs.records import StepRecord, read_records

FORMAT = 1
WARM_UP_STEPS = 5
"""Number of first steps of an attempt that are left out of its speed: they fill caches, choose kernels and compile."""


class RunJson:
    """Writer of ``run.json``, which is written at the start and at the end of an attempt."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.close()

    def write(self, record: StepRecord) -> None:
        """Do nothing: the file is written at the end of the attempt, with this record."""

    def close(self) -> None:
        """Write the file."""
        write_json(self._folder.run_json, describe_run(self._folder))


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return everything that a run folder records about its run, as plain values."""
    records = read_records(folder.metrics(0))
    events = folder.read_events()
    evaluation = ("step", "attempt", "time", "val_loss", "val_bits_per_byte")
    kept = set(folders.steps(folder.checkpoints))
    saved = {event["step"]: event for event in saves_that_count(events)}  # a repeated step counts one time
    return {
        "format": FORMAT,
        "run": {"name": folder.path.parent.name, "point": folder.point, "path": str(folder.path)},
        "config": read_mapping(folder.config) if folder.config.exists() else None,
        "startup": read_startup(folder),
        "steps": records,
        "evaluations": [
            {name: record[name] for name in evaluation if name in record} for record in records if "val_loss" in record
        ],
        "checkpoints": [
            {name: saved[step][name] for name in ("step", "attempt", "time", "seconds")} | {"kept": step in kept}
            for step in sorted(saved)
        ],
        "summary": summarize(folder, records, events),
    }


def read_startup(folder: RunFolder) -> dict[str, Any] | None:
    """Return the environment that the newest attempt recorded at its start; None if no attempt recorded one."""
    for attempt in reversed(folder.attempts()):
        known = read_json(folder.environment(attempt))
        if known:
            return known
    return None


def summarize(folder: RunFolder, records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a summary of a run in a few numbers. Unknown values are left out. Speeds are medians without the
    warm-up steps."""
    ends = [e["event"] for e in events if e["event"] in ("started", "finished", "stopped", "rank_failed")]
    found: dict[str, Any] = {
        "state": {"started": "running", "rank_failed": "failed"}.get(ends[-1], ends[-1]) if ends else "not started",
        "attempts": len(folder.attempts()),
        "steps": records[-1]["step"] if records else 0,
    }
    if not records:
        return found
    found |= {name: records[-1][name] for name in ("loss", "skipped_steps") if name in records[-1]}
    evaluated = [record for record in records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        found |= {
            "val_loss": evaluated[-1]["val_loss"],
            "best_val_loss": best["val_loss"],
            "best_val_step": best["step"],
        }
    # Speeds without the warm-up steps of each attempt; with them if no other steps remain.
    first: dict[int, int] = {}
    for record in records:
        first.setdefault(record["attempt"], record["step"])
    steady = [one for one in records if one["step"] >= first[one["attempt"]] + WARM_UP_STEPS] or records
    shares = ("mfu_palm", "mfu_bf16", "mfu_causal", "hfu")
    for name in ("step_time_s", "tokens_per_s", "tflops_per_s", *shares, "data_wait_s"):
        values = [record[name] for record in steady if name in record]
        if values:
            found[name] = statistics.median(values)
    peaks = [record["memory_peak_gib"] for record in records if "memory_peak_gib" in record]
    if peaks:
        found["memory_peak_gib"] = max(peaks)
    return found | {"training_s": sum(record["step_time_s"] for record in records)}
