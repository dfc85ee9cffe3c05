"""A program that knows nothing of the launcher, interrupted on a real Slurm, ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import power_cut, preempt
from tests.slurm.test_batch_script import submit_batch_script, wait_for_end
from tests.support.scripts import EXAMPLES, PROGRESS, causes, first_step, printed, printed_loss
from tests.support.storm import StormyRun

pytestmark = pytest.mark.slurm

STEPS = 300
SCRIPT = [
    "workload=script", f"script.path={EXAMPLES / 'plain_ddp.py'}", f"script.options.steps={STEPS}",
    f"script.max_steps={STEPS}", "script.work_per_step=64", "script.resumes=true", "ranks_per_node=1", PROGRESS,
]  # fmt: skip
SLOW_TERMINAL = """
import builtins, os, time
plainly = builtins.print
def slowly(*words, **options):
    plainly(*words, **options)
    if not os.path.exists(os.environ["HURRY"]):
        time.sleep(0.2)
builtins.print = slowly
"""
"""Has the unchanged example wait after each line, so that faults find it before it is done."""


def test_a_plain_script_is_requeued_after_preemption_and_goes_on_with_a_spare_after_a_power_cut(
    sandbox: Cluster, tmp_path: Path
) -> None:
    # Undisturbed, by the plain batch script.
    whole, out = RunFolder(tmp_path / "whole"), tmp_path / "out"
    alone = submit_batch_script(sandbox, tmp_path, *SCRIPT, f"run_dir={whole.path}")
    assert wait_for_end(sandbox, alone) == ["COMPLETED"], out.read_text()
    assert "2 x 1 = 2 ranks on slurm" in out.read_text() and "64 samples per step" in out.read_text()
    assert causes(whole) == ["finished"]
    assert len({rank["host"] for rank in json.loads(whole.environment(1).read_text())["ranks"]}) == 2

    (tmp_path / "sitecustomize.py").write_text(SLOW_TERMINAL)
    hurry = tmp_path / "hurry"
    slowly = [f"script.env.PYTHONPATH={tmp_path}", f"script.env.HURRY={hurry}"]
    storm = StormyRun(sandbox, tmp_path, *SCRIPT, *slowly, "spare_nodes=1", "resilience.node_timeout_s=5")
    here = storm.folder
    storm.wait(lambda: "step 51:" in printed(here), "its first checkpoint")
    preempt(sandbox, storm.job)
    storm.wait(lambda: "step 101:" in printed(here, attempt=2), "the next checkpoint")
    members = storm.of("members")[-1]
    power_cut(sandbox, members["hosts"][1])
    storm.wait(lambda: printed(here, attempt=3), "the spare")
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, storm.log.read_text()
    assert causes(here) == ["preempted", "node_failed", "finished"]
    assert len(storm.of("requeued")) == 1, "for the preemption; the spare comes inside the same job"
    ranks = json.loads(here.environment(3).read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == [members["hosts"][0], *members["spares"]]
    assert first_step(printed(here, attempt=2)) > 50 and first_step(printed(here, attempt=3)) > 100
    assert printed_loss(printed(here, attempt=3), STEPS) == printed_loss(printed(whole), STEPS)
    assert "samples/s" in storm.log.read_text()
    assert {r["attempt"] for r in read_records(here.metrics(0))} == {1, 2, 3}
