"""The chaos drill: a run under faults of many kinds ends as a quiet one, and nothing else is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.storm import __main__ as drill
from launch.storm import injection
from launch.storm.__main__ import LastFault, choose_kinds, first_save, make_schedule
from launch.storm.injection import KINDS, SANDBOX, SLURM, Site
from tests.support.commands import ROOT, run, start_fork, wait_for
from tests.support.planning import refused
from tests.support.runs import LOCAL

LOCAL_KINDS = [name for name, kind in KINDS.items() if not kind.needs]
PROGRAM = ROOT / "tests" / "support" / "programs" / "checkpointing.py"


def words(steps: int, step_s: float, calm: str = "") -> list[str]:
    program = [f"script.path={PROGRAM}", f"script.args='{steps} 20 {step_s} {calm}'", "script.resumes=true", "nodes=2"]
    timeouts = ["resilience.heartbeat_timeout_s=5", "resilience.node_timeout_s=10"]
    return [*LOCAL, *program, *timeouts, f"script.env.PYTHONPATH={ROOT}", "launch.poll_s=0.5"]


def is_complete(faults: Path) -> bool:
    return len(faults.read_text().splitlines()) == len(LOCAL_KINDS)


def test_a_run_under_a_storm_ends_as_a_quiet_one(tmp_path: Path) -> None:
    out = tmp_path / "drill"
    options = ["--faults", str(len(LOCAL_KINDS)), "--seed", "10", "--output", str(out), "--most-steps", "10"]
    log = tmp_path / "log"
    # The quiet run, and the run after its last fault, are quick. Between faults the steps are slow: a busy machine
    # notices a frozen agent late, and the run must not end before the next fault.
    calm = tmp_path / "calm"
    calm.touch()
    process = start_fork("launch.storm", *options, *words(6000, 0.03, str(calm)), cwd=tmp_path, log=log)
    wait_for(lambda: (out / "stormy").exists() or process.poll() is not None, "the start of the stormy run", 300)
    calm.unlink()
    faults = out / "faults.jsonl"
    # A dozen starts of a run, one after another.
    wait_for(lambda: process.poll() is not None or (faults.exists() and is_complete(faults)), "the last fault", 900)
    calm.touch()
    assert process.wait(timeout=300) == 0, log.read_text()
    text = log.read_text()
    found = json.loads((out / "verdict.json").read_text())
    assert found["passed"] and found["wrong"] == [] and "passed: as the quiet run, bit for bit" in text
    assert sorted(fault["kind"] for fault in found["faults"]) == sorted(LOCAL_KINDS)
    assert found["attempts"] > 5
    assert {cost["road"] for cost in found["recoveries"]} >= {"in place", "typed again"}
    for cost in found["recoveries"]:
        parts = [cost[part] for part in ("noticed_s", "started_s", "first_step_s", "again_s")]
        assert cost["road"] == "undisturbed" or sum(parts) == pytest.approx(cost["total_s"])
    # What differs is found, whatever it is.
    quiet, stormy = RunFolder(out / "quiet"), RunFolder(out / "stormy")
    last = injection.checkpoints(stormy)[0]
    (last / "rank_1.json").write_text("other")
    assert list(drill.differing_state(quiet, stormy)) == [f"{last.name}/rank_1.json differs"]
    metrics = stormy.metrics(1)
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(line for line in lines if json.loads(line)["step"] != 7) + "\n")
    assert list(drill.differing_steps(quiet, stormy)) == ["rank 1: steps [7] are missing"]


def test_the_same_seed_plans_the_same_faults_and_all_kinds_equally_often() -> None:
    kinds = choose_kinds([], [])
    assert kinds == LOCAL_KINDS and len(choose_kinds([], [SLURM, SANDBOX])) == len(KINDS) >= 10
    plan = make_schedule(7, 2 * len(kinds) + 1, kinds, 4, 9)
    assert (
        plan == make_schedule(7, 2 * len(kinds) + 1, kinds, 4, 9) != make_schedule(8, 2 * len(kinds) + 1, kinds, 4, 9)
    )
    assert plan[:3] == make_schedule(7, 3, kinds, 4, 9)
    assert {name: sum(fault.kind == name for fault in plan[:-1]) for name in kinds} == dict.fromkeys(kinds, 2)
    assert {fault.rank for fault in plan} <= set(range(4)) and all(1 <= fault.after_steps <= 9 for fault in plan)


def test_a_kind_that_cannot_be_had_is_refused() -> None:
    for asked, fix in (("power_cut", "a sandbox"), ("requeue", "Slurm"), ("sigkil", "--kinds sigkill")):
        assert "sigkill_rank" in refused(choose_kinds, [asked], [], fix=fix).expected


def test_a_drill_that_is_refused_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for options, found in (
        (["--output", "full", *words(20, 0)], "which has files"),
        (["--quiet", "run", *words(20, 0)], "which has not finished"),
        (["--sandbox", "nowhere", *words(20, 0)], "which is not there"),
    ):
        text = run("launch.storm", *options, cwd=tmp_path, status=2)
        assert found in text and "type next: " in text
    text = run("launch.storm --dry-run --faults 3 --seed 1", *words(20, 0), cwd=tmp_path)
    planned = make_schedule(1, 3, LOCAL_KINDS, 2, 20)
    assert [line.split(";")[0] for line in text.splitlines()] == [f"{f.number}. {f.kind}: {f.text}" for f in planned]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_processes_of_other_users_and_of_other_runs_are_not_found(tmp_path: Path) -> None:
    env = {"LAUNCH_RUN_DIR": str(tmp_path), "RANK": "0"}
    sleep = ["sleep", "1000"]
    stranger = subprocess.Popen(sleep, env=env, user=65534, start_new_session=True)
    other = subprocess.Popen(sleep, env={**env, "LAUNCH_RUN_DIR": f"{tmp_path}2"}, start_new_session=True)
    own = subprocess.Popen(sleep, env={**env, "RANK": "1"}, start_new_session=True)
    theirs = tmp_path / "theirs" / "etc" / "slurm.conf"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    os.chown(theirs, 65534, -1)
    assert "another user's" in run("launch.storm --sandbox theirs", *words(20, 0), cwd=tmp_path, status=2)
    try:
        assert {rank: process.pid for rank, process in injection.rank_processes(tmp_path).items()} == {1: own.pid}
        command = [sys.executable, "-m", "launch.storm.injection", str(tmp_path), "SIGKILL", "rank", "1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert own.wait(60) == -signal.SIGKILL
        assert stranger.poll() is None and other.poll() is None and injection.of_run(tmp_path) == []
    finally:
        for process in (stranger, other, own):
            process.kill()
            process.wait()


def test_the_next_fault_waits_for_a_start_that_goes_on_after_the_last() -> None:
    def event(name: str, at: float, **fields: int) -> dict[str, float | int | str]:
        return {"event": name, "time": at, **fields}

    struck = LastFault(struck=10.0, over=12.0, ends_attempt=True)
    undisturbed = [event("saved", 9, step=20), event("saved", 11, step=40), event("saved", 13, step=60)]
    assert first_save(undisturbed, struck, 14.0) is None  # the blow has not been felt yet
    assert first_save(undisturbed, struck, 1000.0) == 60  # nor will it ever
    assert first_save(undisturbed, LastFault(10.0, 12.0), 14.0) == 60
    leaving = [event("signalled", 10.5), event("saved", 11, step=33), event("attempt_ended", 13)]
    assert first_save(leaving, struck, 14.0) is None  # what it saved on its way out
    assert first_save([*leaving, event("agent_ended", 14), event("saved", 20, step=40)], struck, 21.0) == 40
    assert (
        first_save([event("attempt_ended", 11), event("saved", 11.5, step=1)], struck, 12.0) is None
    )  # it still lasts


def test_a_fault_meets_a_rank_that_there_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    site = Site(folder)
    assert site.running_rank(3) == 3
    for size, rank in ((4, 3), (2, 1), (4, 3)):
        folder.record_event("started", world_size=size)
        assert site.running_rank(3) == rank


def test_what_a_fault_cost_is_made_of() -> None:
    def step(at: float, number: int, attempt: int) -> dict[str, float]:
        return {"time": at, "step": number, "attempt": attempt}

    events = [
        {"event": "started", "time": 0.5},
        {"event": "attempt_ended", "time": 4.0, "cause": "crashed"},
        {"event": "started", "time": 7.0},
    ]
    records = [step(1, 1, 1), step(2, 2, 1), step(3, 3, 1), step(9, 3, 2), step(10, 4, 2)]
    records += [step(12.1, 5, 2), step(20, 6, 2), step(20.1, 7, 2)]
    faults = [{"kind": "sigkill_rank", "time": 3.5}, {"kind": "sigstop_agent", "time": 12.0}]
    assert drill.recoveries(faults, events, records) == [
        drill.Recovery("sigkill_rank", "in place", 6.5, 0.5, 3.0, 2.0, 1.0),
        drill.Recovery("sigstop_agent", "undisturbed", pytest.approx(7.9)),  # its longest pause
    ]
    lost = {"event": "fewer_nodes", "time": 5.0, "attempt": 2, "nodes": 1, "asked": 2, "hosts": ["n1"], "cause": "lost"}
    (smaller, _) = drill.recoveries(faults, [*events[:2], lost, events[2]], records)
    assert smaller == drill.Recovery("sigkill_rank", "fewer nodes", 6.5, 0.5, 3.0, 2.0, 1.0)
