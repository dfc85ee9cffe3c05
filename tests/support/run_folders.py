"""Run folders with known numbers, as the training process writes them, and what reports of them say."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.report import ScalingTable, show
from launch.report.table import Row
from launch.runs.folder import RunFolder, append_json_lines, append_lines, write_json
from launch.runs.records import StepRecord


@dataclass
class RunBuilder:
    """Writes one run folder. Times in seconds; each step trains ``global_batch * block_size`` tokens."""

    path: Path
    ranks: int = 1
    nodes: int = 1
    overrides: tuple[str, ...] = ()
    cores: int = 64
    threads: int = 1
    global_batch: int = 16
    block_size: int = 128
    weak_scaling: bool = False
    precision: str = "fp32"
    model: str = "quick_test"
    device: str = "cpu"
    device_name: str = "AMD EPYC 7763"
    strategy: str = "ddp"
    machines: int = 1
    extra_rank: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    """Further entries of the environment record."""
    script: dict[str, Any] | None = None
    """Further entries of a script's environment record, besides its ranks; None for a run of the GPT library."""

    @classmethod
    def of_nodes(cls, sweep: Path, nodes: int, *words: str, **known: Any) -> RunBuilder:
        """Start the point of a sweep on so many nodes of one rank, or of as many ``ranks``."""
        typed = (f"nodes={nodes}", *words)
        return cls(sweep / ",".join(typed), **{"ranks": nodes, "nodes": nodes, "overrides": typed, **known}).attempt()

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path)

    def attempt(self, number: int = 1) -> RunBuilder:
        """Start an attempt: its environment.json, and the overrides of the run."""
        self.run.attempt(number).mkdir(parents=True)
        write_json(self.run.environment(number), self._environment(number) | self.told)
        self.run.overrides.parent.mkdir(exist_ok=True)
        self.run.overrides.write_text(yaml.safe_dump(list(self.overrides)))
        return self

    def steps(
        self, first: int, times: list[float], attempt: int = 1, rank_delay: float = 0.0, **known: Any
    ) -> RunBuilder:
        """Record one step for each of ``times`` on every rank; rank r takes ``r * rank_delay`` longer."""
        per_rank = self.global_batch // self.ranks
        for rank in range(self.ranks):
            for offset, time_s in enumerate(times):
                step = first + offset
                start = (step - 1) * self.global_batch + rank * per_rank
                record = StepRecord(
                    step=step,
                    attempt=attempt,
                    lr=1e-3,
                    grad_norm=1.0,
                    tokens=per_rank * self.block_size,
                    samples=(start, start + per_rank - 1),
                    step_time_s=time_s + rank * rank_delay,
                    **{"loss": 6.0 / step, **known},
                )
                append_json_lines(self.run.metrics(rank), [record.as_dict()])
        return self

    def records(self, times: list[float], ranks: int | None = None, attempt: int = 1, **fields: Any) -> RunBuilder:
        """Record a step of each of ``times`` as a script does, on the first ``ranks``: what is known, and the time."""
        for rank in range(self.ranks if ranks is None else ranks):
            now, records = 1e9, []
            for step, time_s in enumerate(times, start=1):
                now += time_s
                records.append({"step": step, "attempt": attempt, **fields, "time": now})
            append_lines(self.run.metrics(rank), records)
        return self

    def ran(self, seconds: float, attempt: int = 1, since: float = 1e9) -> RunBuilder:
        """Enter the start and the end of an attempt."""
        self.event("started", attempt=attempt, world_size=self.ranks, time=since)
        return self.event("finished", attempt=attempt, time=since + seconds)

    def finished(self, attempt: int = 1, **details: Any) -> RunBuilder:
        return self.event("finished", attempt=attempt, **details)

    def event(self, event: str, **details: Any) -> RunBuilder:
        self.run.record_event(event, **details)
        return self

    def _environment(self, number: int) -> dict[str, Any]:
        known = {
            "attempt": number,
            "time": 1e9,
            "world_size": self.ranks,
            "weak_scaling": self.weak_scaling,
            "ranks": [self._place(rank) for rank in range(self.ranks)],
            "software": {"python": "3.11.7", "torch": "2.13.0"},
        }
        if self.script is not None:
            command = {"workload": "script", "command": ["python", "train.py", "--lr", "0.1"]}
            unknown = dict.fromkeys(("unit", "work_per_step", "max_steps"))
            return {**known, **command, **unknown, "git": {}, **self.script}
        replicate, shard = (1, self.ranks) if self.strategy == "fsdp" else (self.ranks, 1)
        return {
            **known,
            "topology": {"strategy": self.strategy, "dp_replicate": replicate, "dp_shard": shard},
            "global_batch": self.global_batch,
            "micro_batch": self.global_batch // self.ranks,
            "accumulation": 1,
            "block_size": self.block_size,
            "precision": self.precision,
            "model": self.model,
            "parameters": 812544,
            "max_steps": 60,
            "git": {"commit": "0123456789abcdef", "diff_sha256": ""},
        }

    def _place(self, rank: int) -> dict[str, Any]:
        node = rank * self.nodes // self.ranks
        local = rank - min(r for r in range(self.ranks) if r * self.nodes // self.ranks == node)
        place = {
            "rank": rank,
            "local_rank": local,
            "node": node,
            "host": f"n{node + 1}",
            "machine": f"boot-{node % self.machines}",
            "pid": 100 + rank,
            "device": self.device,
            "device_name": self.device_name,
            "cores": self.cores,
            "threads": self.threads,
        }
        return place | {key: value.format(**place) for key, value in self.extra_rank.items()}


def notes_with(table: ScalingTable, *texts: str) -> list[str]:
    """The notes of a report with all these texts."""
    return [note for note in table.notes if all(text in note for text in texts)]


def column(rows: Sequence[Row], name: str) -> list[Any]:
    """A figure of all rows."""
    return [getattr(row, name) for row in rows]


def shown(table: ScalingTable, **console: Any) -> str:
    """A report as a terminal has it."""
    file = io.StringIO()
    show(table, Console(file=file, **console))
    return file.getvalue()


def read_events(folder: Path) -> EventAccumulator:
    """The event files of a folder, as TensorBoard reads them."""
    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """A curve of the event files of a folder."""
    return {point.step: point.value for point in read_events(folder).Scalars(tag)}
