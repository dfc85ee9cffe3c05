"""A run as one value, and ``run.json``, which holds it: config, start-up, steps, evaluations, checkpoints, summary.

Owns the shape of that value. It is read from the run folder alone, so it is the same however often the run was
interrupted, and tools that compare runs read it the same way. Torch-free.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import yaml

from gpt.checkpoint import folders
from launch.runs.files import write_json
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records

FORMAT = 1
WARM_UP_STEPS = 5
"""Steps of an attempt that say nothing about speed: caches fill, kernels are chosen, the compiler works."""
SHARE = 0.002
"""Of the wall time that may go into rewriting the file while the run goes on."""


class RunJson:
    """Writes ``run.json`` anew: now, at evaluations, and at the end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._not_before = 0.0
        self._write()

    def write(self, record: StepRecord) -> None:
        """After an evaluation; a long run, whose file takes long to write, waits for a later one."""
        if record.val_loss is not None and time.monotonic() >= self._not_before:
            self._write()

    def close(self) -> None:
        """Write the file for the last time."""
        self._write()

    def _write(self) -> None:
        started = time.monotonic()
        write_json(self._folder.run_json, describe_run(self._folder))
        self._not_before = time.monotonic() + (time.monotonic() - started) / SHARE


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Everything a run folder says about its run, as plain values."""
    records = read_records(folder.metrics(0))
    events = folder.read_events()
    return {
        "format": FORMAT,
        "run": {"name": folder.path.parent.name, "point": folder.point, "path": str(folder.path)},
        "config": yaml.safe_load(folder.config.read_text()) if folder.config.is_file() else None,
        "startup": startup(folder),
        "steps": records,
        "evaluations": [evaluation(record) for record in records if "val_loss" in record],
        "checkpoints": checkpoints(folder, events),
        "summary": summary(folder, records, events),
    }


def startup(folder: RunFolder) -> dict[str, Any] | None:
    """What the newest attempt that came so far told of itself when it started."""
    for attempt in reversed(folder.attempts()):
        if folder.environment(attempt).is_file():
            value: dict[str, Any] = json.loads(folder.environment(attempt).read_bytes())
            return value
    return None


def evaluation(record: dict[str, Any]) -> dict[str, Any]:
    """One evaluation."""
    names = ("step", "attempt", "time", "val_loss", "val_bits_per_byte")
    return {name: record[name] for name in names if name in record}


def checkpoints(folder: RunFolder, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every save, the last one of each step, and whether its files are still kept."""
    kept = set(folders.steps(folder.checkpoints))
    saved = {e["step"]: e for e in events if e["event"] == "saved"}
    names = ("step", "attempt", "time", "seconds")
    return [{name: saved[step][name] for name in names} | {"kept": step in kept} for step in sorted(saved)]


def summary(folder: RunFolder, records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run in a few numbers; what is not known is absent. Speed is a median after the first steps of an attempt."""
    ends = [e["event"] for e in events if e["event"] in ("started", "finished", "stopped", "rank_failed")]
    found: dict[str, Any] = {
        "state": {"started": "running", "rank_failed": "failed"}.get(ends[-1], ends[-1]) if ends else "not started",
        "attempts": len(folder.attempts()),
        "steps": records[-1]["step"] if records else 0,
    }
    if not records:
        return found
    found["loss"] = records[-1]["loss"]
    evaluated = [record for record in records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        found |= {"val_loss": evaluated[-1]["val_loss"]}
        found |= {"best_val_loss": best["val_loss"], "best_val_step": best["step"]}
    for name in ("step_time_s", "tokens_per_s", "tflops_per_s", "mfu_palm", "mfu_causal", "hfu", "data_wait_s"):
        values = [record[name] for record in settled(records) if name in record]
        if values:
            found[name] = statistics.median(values)
    peaks = [record["memory_peak_gib"] for record in records if "memory_peak_gib" in record]
    if peaks:
        found["memory_peak_gib"] = max(peaks)
    return found | {"training_s": sum(record["step_time_s"] for record in records)}


def settled(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records after the first steps of each attempt; all of them where that leaves none."""
    first: dict[int, int] = {}
    for record in records:
        first.setdefault(record["attempt"], record["step"])
    return [r for r in records if r["step"] >= first[r["attempt"]] + WARM_UP_STEPS] or list(records)
