"""A program that knows nothing of the launcher, interrupted on a real Slurm, ends as if nothing had happened."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import power_cut, preempt
from tests.slurm.test_batch_script import submit_batch_script, wait_for_end
from tests.support.commands import ON_SLURM, start, wait_for
from tests.support.scripts import EXAMPLES, PROGRESS, causes, first_step, printed, printed_loss

pytestmark = pytest.mark.slurm

STEPS = 3000
SCRIPT = [
    "workload=script", f"script.path={EXAMPLES / 'plain_ddp.py'}", f"script.options.steps={STEPS}",
    f"script.max_steps={STEPS}", "script.work_per_step=64", "script.resumes=true", "ranks_per_node=1", PROGRESS,
]  # fmt: skip


class Undisturbed:
    """The plain batch script's run on two nodes, beside which others are disturbed on the other two."""

    def __init__(self, sandbox: Cluster, folder: Path) -> None:
        self.sandbox, self.here, self.out = sandbox, RunFolder(folder / "run"), folder / "out"
        # Nobody else on its nodes: who preempts another run there would preempt it too.
        words = (*SCRIPT, f"run_dir={self.here.path}")
        self.job = submit_batch_script(sandbox, folder, *words, SBATCH_EXCLUSIVE="exclusive")

    @cached_property
    def loss(self) -> float:
        """The last loss, once it has ended."""
        assert wait_for_end(self.sandbox, self.job) == ["COMPLETED"], self.out.read_text()
        text = self.out.read_text()
        assert "2 x 1 = 2 ranks on slurm" in text and "64 samples per step" in text
        assert causes(self.here) == ["finished"]
        hosts = [rank["host"] for rank in json.loads(self.here.environment(1).read_text())["ranks"]]
        assert len(set(hosts)) == 2
        return printed_loss(printed(self.here), STEPS)


@pytest.fixture(scope="module")
def undisturbed(shared_sandbox: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run that every other is compared with; it may still be going on."""
    return Undisturbed(shared_sandbox, tmp_path_factory.mktemp("undisturbed"))


def test_a_preempted_script_is_requeued_and_goes_on_from_its_own_checkpoint(
    sandbox: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    here = RunFolder(tmp_path / "run")
    words = ["nodes=2", *ON_SLURM, *SCRIPT, f"run_dir={here.path}"]
    process = start("launch", *words, cwd=tmp_path, log=tmp_path / "log", **sandbox.env)
    wait_for(lambda: "step 101:" in printed(here) or process.poll() is not None, "a hundred steps")
    (job,) = [str(e["job_id"]) for e in here.read_events() if e["event"] == "submitted"]
    preempt(sandbox, job)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert causes(here) == ["preempted", "finished"]
    assert first_step(printed(here, attempt=2)) > 100
    assert printed_loss(printed(here, attempt=2), STEPS) == undisturbed.loss
    assert "samples/s" in (tmp_path / "log").read_text()


def test_a_spare_takes_the_place_of_a_node_that_loses_power(
    sandbox: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    here = RunFolder(tmp_path / "run")
    words = ["nodes=2", "spare_nodes=1", "resilience.node_timeout_s=5", *ON_SLURM, *SCRIPT, f"run_dir={here.path}"]
    process = start("launch", *words, cwd=tmp_path, log=tmp_path / "log", **sandbox.env)
    wait_for(lambda: "step 101:" in printed(here) or process.poll() is not None, "a hundred steps")
    (members,) = [e for e in here.read_events() if e["event"] == "members"]
    power_cut(sandbox, members["hosts"][1])
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert causes(here) == ["node_failed", "finished"]
    assert [e for e in here.read_events() if e["event"] == "requeued"] == [], "inside the same job"
    ranks = json.loads(here.environment(2).read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == [members["hosts"][0], *members["spares"]]
    assert printed_loss(printed(here, attempt=2), STEPS) == undisturbed.loss
    assert {r["attempt"] for r in read_records(here.metrics(0))} == {1, 2}
