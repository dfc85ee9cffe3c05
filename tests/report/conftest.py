"""Run folders with known numbers, as the training process writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from launch.runs.files import append_json_lines, write_json
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, append_records

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server --window-size=1400,1000"
)


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
    script: dict[str, Any] | None = None
    """Further entries of a script's environment record, besides its ranks; None for a run of the GPT library."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path)

    def attempt(self, number: int = 1) -> RunBuilder:
        """Start an attempt: its environment.json, and the overrides of the run."""
        self.run.attempt(number).mkdir(parents=True)
        write_json(self.run.environment(number), self._environment(number))
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
            append_records(self.run.metrics(rank), records)
        return self

    def ran(self, seconds: float, attempt: int = 1, since: float = 1e9) -> RunBuilder:
        """Enter the start and the end of an attempt."""
        self.event("started", attempt=attempt, world_size=self.ranks, time=since)
        return self.event("finished", attempt=attempt, time=since + seconds)

    def event(self, event: str, **details: Any) -> RunBuilder:
        self.run.record_event(event, **details)
        return self

    def _environment(self, number: int) -> dict[str, Any]:
        if self.script is not None:
            return {
                "attempt": number,
                "time": 1e9,
                "workload": "script",
                "command": ["python", "train.py", "--lr", "0.1"],
                "world_size": self.ranks,
                "ranks": [self._place(rank) for rank in range(self.ranks)],
                "software": {"python": "3.11.7", "torch": "2.13.0"},
                "git": {},
                "unit": None,
                "work_per_step": None,
                "weak_scaling": False,
                "max_steps": None,
                **self.script,
            }
        accumulation, per_rank = 1, self.global_batch // self.ranks
        replicate, shard = (1, self.ranks) if self.strategy == "fsdp" else (self.ranks, 1)
        return {
            "attempt": number,
            "time": 1e9,
            "world_size": self.ranks,
            "topology": {"strategy": self.strategy, "dp_replicate": replicate, "dp_shard": shard},
            "global_batch": self.global_batch,
            "micro_batch": per_rank,
            "accumulation": accumulation,
            "weak_scaling": self.weak_scaling,
            "block_size": self.block_size,
            "precision": self.precision,
            "model": self.model,
            "parameters": 812544,
            "max_steps": 60,
            "ranks": [self._place(rank) for rank in range(self.ranks)],
            "software": {"python": "3.11.7", "torch": "2.13.0"},
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


@pytest.fixture(scope="session")
def make_run() -> type[RunBuilder]:
    """The builder of run folders."""
    return RunBuilder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three points of 1, 2 and 4 ranks, 2048 tokens a step, with medians of 1.0, 0.52 and 0.32 s; the last one crowded.

    The first five steps of each take ten times as long and belong to the warm-up.
    """
    folder = tmp_path / "quick_test"
    for nodes, median in ((1, 1.0), (2, 0.52), (4, 0.32)):
        builder = RunBuilder(folder / f"nodes={nodes}", nodes, nodes, (f"nodes={nodes}",), cores=2)
        spread = [median * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
        builder.attempt().steps(1, [10 * median] * 5 + spread).event("finished", attempt=1)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium, started once."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or chromedriver on this machine: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
