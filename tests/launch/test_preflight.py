"""Expected times of a plan, its warnings of saves that take longer than the grace period, and its announcement."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from launch.config import ClusterKind
from launch.plan.plan import Plan
from launch.plan.preflight import (
    add_expected,
    add_warnings,
    expected_text,
    plan_text,
    worst_case_text,
)
from launch.runs.folder import RunFolder, append_json_lines, append_lines
from launch.slurm.limits import SlurmFacts
from tests.support.commands import TINY
from tests.support.doctor_facts import LIMITS
from tests.support.planning import config_of, plan

GPUS = ("cluster.gpus_per_node=8", "optim.global_batch=64", "cluster.gpu_name='NVIDIA H100 80GB HBM3'")


local_plan = partial(plan, "optim.max_steps=100", kind=ClusterKind.local)


def ran(of: Plan, steps: int) -> RunFolder:
    """A run that makes steps of 2 s."""
    folder = RunFolder(of.run_dir)
    records = [{"step": n, "attempt": 1, "step_time_s": 1.5, "time": 1011.0 + 2 * n} for n in range(1, steps + 1)]
    append_lines(folder.metrics(0), records)
    return folder


def test_what_a_run_has_measured_tells_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = local_plan("nodes=2")
    assert add_expected(made) == made, "nothing is known of it"
    own = ran(local_plan("nodes=2", write=True), 70)
    own.record_event("saved", step=60, attempt=1)
    told = add_expected(local_plan("nodes=2"))
    assert told.expected_s == pytest.approx(40 * 2)
    said = "80 s on this machine (measured in this run: 2 s a step; start-up is not counted)"
    assert f"expected    {said}" in plan_text(told)
    assert f"\nexpected: {said}" in worst_case_text([told], [config_of("nodes=2")])
    assert expected_text([told, replace(local_plan("nodes=4"), label="nodes=4")]) == said
    two = [told, replace(told, label="nodes=4", expected_s=100.0)]
    assert expected_text(two).startswith("3 min 00 s on this machine; the longest run, nodes=4, takes 1 min 40 s (")


def test_the_model_of_known_gpus_tells_it_where_no_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan("optim.max_steps=100", "nodes=2", *GPUS)
    step_s = made.promised.step_s
    assert step_s is not None and add_expected(made).expected_s == pytest.approx(100 * step_s)
    text = plan_text(add_expected(made))
    assert f"(estimated: {step_s:.3g} s a step; start-up, evaluation and saving are not counted)" in text
    assert any(line.startswith("  expected") and "GPU-hours, in " in line for line in text.splitlines())
    assert plan("nodes=2", *GPUS[:2]).promised.step_s is None, "of GPUs that nobody names"


def ran_before(folder: RunFolder, save_s: float, step_s: float) -> RunFolder:
    """A run folder with some saves and steps, the last but one of each the slowest."""
    for number, (save, step) in enumerate(((save_s / 2, step_s / 3), (save_s, step_s), (save_s / 4, step_s / 2)), 1):
        folder.record_event("saved", attempt=1, step=number, seconds=save)
        append_json_lines(folder.metrics(0), [{"step": number, "attempt": 1, "step_time_s": step}])
    return folder


# The doctor's recorded cluster: partition low, the default, has GraceTime=10, and KillWait is 5.
RECORDED = SlurmFacts(limits=LIMITS)


def warnings(*words: str, known: SlurmFacts | None = RECORDED) -> tuple[str, ...]:
    return add_warnings(plan(*TINY, *words), config_of("cluster=slurm", *TINY, *words), known).warnings


@pytest.mark.parametrize(
    ("save_s", "step_s", "said"),
    [
        (60.0, 20.0, []),
        (90.0, 20.0, ["resilience.grace_period_s=100", "type resilience.grace_period_s=170"]),  # 1.5 x 110
        (90.0, 45.0, ["=100 and cluster.signal_delay_s=120", "grace_period_s=210 cluster.signal_delay_s=210"]),
    ],
)
def test_a_save_that_takes_longer_than_the_lead_is_warned_about(
    save_s: float, step_s: float, said: list[str], tmp_path: Path
) -> None:
    ran_before(RunFolder(tmp_path / "run"), save_s, step_s)
    found = warnings(f"run_dir={tmp_path / 'run'}", "cluster.partition=short")  # which is never preempted
    assert len(found) == bool(said)
    for words in said:
        assert words in found[0] and f"up to {save_s:g} s" in found[0]


def test_a_partition_that_preempts_sooner_is_warned_about(tmp_path: Path) -> None:
    ran_before(RunFolder(tmp_path / "run"), save_s=14.0, step_s=2.0)
    here = f"run_dir={tmp_path / 'run'}"
    for words in ((here,), (here, "cluster.partition='short,low'")):
        (found,) = warnings(*words)
        assert "a job that partition low preempts has 15 s (GraceTime and KillWait)" in found
    assert warnings(here, "cluster.partition=short") == () and warnings(here, known=None) == ()
    ran_before(RunFolder(tmp_path / "other"), save_s=12.0, step_s=2.0)
    assert warnings(f"run_dir={tmp_path / 'other'}") == ()
