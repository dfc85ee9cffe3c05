"""What a run used of its request, from the files that its ranks and agents have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.measured import usage_file, usage_text
from launch.runs.records import RecordWriter
from tests.support.runs import recorded

ENDED = (
    {"event": "submitted", "cluster": "slurm", "job_id": "7"},
    {"event": "agent_started", "job": "slurm-7-0-0", "allocated_at": 0.0, "limit_s": 3600.0},
    {"event": "finished", "attempt": 1},
    {"event": "agent_ended", "job": "slurm-7-0-0", "ended_at": 3000.0},
)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_fullest_gpu_counts_and_proposes_no_request(has_gpu: bool, tmp_path: Path) -> None:
    """Rank 1 peaks above rank 0, whose allocator has reserved more; without a GPU the same figures are of RAM."""
    folder = recorded(RunFolder(tmp_path), *ENDED)
    folder.create_attempt()
    usage_file(folder, 1, 0).parent.mkdir()
    usage_file(folder, 1, 0).write_text('{"memory_gib": 3, "memory_given_gib": 4, "cpus": 3, "cpus_given": 4}')
    ranks = [{"rank": rank, **({"memory_gib": 80.0} if has_gpu else {})} for rank in (0, 1)]
    folder.environment(1).write_text(json.dumps({"ranks": ranks}))
    for rank, peak in ((0, 20.0), (1, 30.5)):
        record = {"step": 1, "attempt": 1, "memory_peak_gib": peak, "memory_reserved_gib": 24.0 if has_gpu else None}
        writer = RecordWriter(folder.metrics(rank))
        writer.put(record)
        writer.flush()
    gpu = "30.5 of 80 GiB of memory on the fullest GPU, " if has_gpu else ""
    assert usage_text(folder) == f"used 3 of 4 GiB of memory on a node, 3 of 4 CPUs on average, {gpu}50 of 60 min"
