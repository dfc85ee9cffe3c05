"""Expected times of a plan, its warnings of saves that take longer than the grace period, and its announcement."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import Plan, make_plan, write_run
from launch.plan.preflight import (
    add_expected,
    add_warnings,
    announce_plans,
    expected_text,
    plain_console,
    plan_text,
    worst_case_text,
)
from launch.runs.files import append_json_lines, write_json
from launch.runs.folder import RunFolder
from launch.runs.records import append_records
from launch.slurm.limits import SlurmFacts
from tests.launch.test_dry_run import plan
from tests.support.commands import TINY
from tests.support.doctor_facts import LIMITS

GPUS = ("cluster=slurm", "cluster.gpus_per_node=8", "optim.global_batch=64", "cluster.gpu_name='NVIDIA H100 80GB HBM3'")


def long_plan(*words: str, write: bool = False) -> Plan:
    words = (*words[:1], "optim.max_steps=100", *words[1:])
    composed = compose_launch(words)
    kind = ClusterKind.slurm if "cluster=slurm" in words else ClusterKind.local
    made = make_plan(typed_config(composed), words, kind)
    if write:
        write_run(made, composed, words)
    return made


def ran(of: Plan, steps: int) -> RunFolder:
    """A run that makes steps of 2 s."""
    folder = RunFolder(of.run_dir)
    records = [{"step": n, "attempt": 1, "step_time_s": 1.5, "time": 1011.0 + 2 * n} for n in range(1, steps + 1)]
    append_records(folder.metrics(0), records)
    return folder


def test_an_earlier_run_of_the_same_kind_tells_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = long_plan("nodes=2")
    assert add_expected(made) == made, "nothing is known of it"
    for other in ("nodes=1", "nodes=2 seed=2 optim.global_batch=32", "nodes=2 model.n_layer=2"):
        ran(long_plan(*other.split(), write=True), 100)
    assert add_expected(made) == made, "neither of other nodes nor of another batch or model"
    ran(long_plan("nodes=2", "optim.lr=0.01", write=True), 100)
    told = add_expected(made)
    assert told.expected_s == pytest.approx(100 * 2)
    by = "by the 2 s a step of nodes=2,optim.lr=0.01, without start-up"
    said = f"3 min 20 s on this machine, {by}"
    assert f"expected    {said}" in plan_text(told)
    assert f"; expected: {said}" in worst_case_text([told], [typed_config(compose_launch(["nodes=2"]))])

    own = ran(long_plan("nodes=2", write=True), 70)
    own.record_event("saved", step=60, attempt=1)
    again = add_expected(long_plan("nodes=2"))
    assert again.expected_s == pytest.approx(40 * 2)
    assert again.expected_by == "the 2 s a step of this run, without start-up"
    some = expected_text([replace(again, label="nodes=2"), replace(long_plan("nodes=4"), label="nodes=4")])
    assert some.startswith("80 s on this machine, by the 2 s")


def test_the_model_of_known_gpus_tells_it_where_no_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = long_plan("nodes=2", *GPUS)
    step_s = made.promised.step_s
    assert step_s is not None and add_expected(made).expected_s == pytest.approx(100 * step_s)
    text = plan_text(add_expected(made))
    assert f"by an estimate of {step_s:.3g} s a step, without start-up, evaluation and saving" in text
    assert any(line.startswith("  expected") and "GPU-hours, " in line for line in text.splitlines())
    assert long_plan("nodes=2", *GPUS[:3]).promised.step_s is None, "of GPUs that nobody names"


@pytest.mark.parametrize(("ran_on", "said"), [("local", ""), ("slurm", " (on slurm, and so not compared with")])
def test_a_finished_point_of_another_cluster_is_announced_with_its_cluster(
    ran_on: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made = replace(long_plan("nodes=2", write=True), finished=True)
    RunFolder(made.run_dir).record_event("submitted", cluster=ran_on, job_id="7")
    text = StringIO()
    announce_plans([made], [typed_config(compose_launch(["nodes=2"]))], plain_console(file=text))
    assert f"finished already, and not submitted: {made.title}{said or ' (fresh=true'}" in text.getvalue()
    assert ("points on local" in text.getvalue()) is bool(said)


# The doctor's recorded cluster: partition low, the default, has GraceTime=10, and KillWait is 5.
RECORDED = SlurmFacts(limits=LIMITS)


def ran_before(folder: RunFolder, save_s: float, step_s: float) -> RunFolder:
    """A run folder with some saves and steps, the last but one of each the slowest."""
    for number, (save, step) in enumerate(((save_s / 2, step_s / 3), (save_s, step_s), (save_s / 4, step_s / 2)), 1):
        folder.record_event("saved", attempt=1, step=number, seconds=save)
        append_json_lines(folder.metrics(0), [{"step": number, "attempt": 1, "step_time_s": step}])
    return folder


def warnings(*words: str, known: SlurmFacts | None = RECORDED) -> tuple[str, ...]:
    config = typed_config(compose_launch(["cluster=slurm", *TINY, *words]))
    return add_warnings(plan(*TINY, *words), config, known).warnings


HERE = ("cluster.partition=short", "checkpoint.interval=7")  # a partition that is never preempted


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
    found = warnings(f"run_dir={tmp_path / 'run'}", *HERE)
    assert len(found) == bool(said)
    for words in said:
        assert words in found[0] and "checkpoint.interval=7" in found[0] and f"up to {save_s:g} s" in found[0]


def test_another_point_of_the_sweep_tells_where_the_model_is_the_same(tmp_path: Path) -> None:
    other = ran_before(RunFolder(tmp_path / "other"), save_s=500.0, step_s=1.0)
    write_json(other.plan, plan(*TINY, f"run_dir={other.path}").as_dict())
    found = warnings(f"run_dir={tmp_path / 'new'}", *HERE)
    assert len(found) == 1 and str(other.path) in found[0]
    assert warnings(f"run_dir={tmp_path / 'new'}", *HERE, "model.n_embd=128") == ()
    ran_before(RunFolder(tmp_path / "own"), save_s=5.0, step_s=1.0)
    assert warnings(f"run_dir={tmp_path / 'own'}", *HERE) == (), "what the run itself has measured is better"


def test_a_partition_that_preempts_sooner_is_warned_about(tmp_path: Path) -> None:
    ran_before(RunFolder(tmp_path / "run"), save_s=14.0, step_s=2.0)
    here = f"run_dir={tmp_path / 'run'}"
    for words in ((here,), (here, "cluster.partition='short,low'")):
        (found,) = warnings(*words)
        assert "partition low gives a preempted job 15 s (GraceTime and KillWait)" in found
    assert warnings(here, "cluster.partition=short") == () and warnings(here, known=None) == ()
    assert warnings(here, known=SlurmFacts(limits=None)) == ()
    ran_before(RunFolder(tmp_path / "other"), save_s=12.0, step_s=2.0)
    assert warnings(f"run_dir={tmp_path / 'other'}") == ()
