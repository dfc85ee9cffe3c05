"""Looking after runs from another terminal: status, logs and cancel; and commands run on a login node by ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch import logs, status
from launch.agent.node import start_time
from launch.runs.find import find_runs, suggestion
from launch.runs.folder import RunFolder, append_json_lines
from launch.runs.records import read_records
from launch.slurm.client import JobState
from launch.slurm.follow import news, plain_line, speed_text
from launch.slurm.jobs import LocalQueueEntry, SlurmJob, job_of
from launch.slurm.status import RunStatus, find_run_status, outcome, update_steps
from launch.status import as_dict, status_notes
from tests.launch.test_failures import LONG, start_long_run
from tests.support.commands import call, descendants, ranks_of, run, start_fork, wait_for
from tests.support.planning import refused
from tests.support.runs import make_ssh, names, recorded


def states(*paths: Path, cwd: Path) -> list[dict[str, Any]]:
    """Output of ``launch.status --json``."""
    told = json.loads(run("launch.status --json", *map(str, paths), cwd=cwd))
    assert isinstance(told, list)
    return told


def test_a_run_is_seen_followed_and_cancelled_from_outside(tmp_path: Path) -> None:
    process, folder, _ = start_long_run(tmp_path, begin=start_fork)
    (seen,) = states(folder.path, cwd=tmp_path)
    assert [seen[k] for k in ("state", "nodes", "attempt", "max_steps")] == ["running", 2, 1, 100000]
    assert seen["step"] > 0 and seen["tokens_per_s"] > 0 and seen["eta_s"] > 0 and "failure" not in seen
    assert "running" in run(f"launch.status {folder.path}", cwd=tmp_path)

    following = start_fork(f"launch.logs -f {folder.path}", cwd=tmp_path, log=tmp_path / "followed")
    wait_for(lambda: "from step 0 of" in (tmp_path / "followed").read_text(), "the log of rank 0")
    text = run(f"launch.cancel {folder.path}", cwd=tmp_path)
    step = read_records(folder.metrics(0))[-1]["step"]
    assert f"run: cancelled after step {step}; the last checkpoint is of step {step}" in text
    assert process.wait(timeout=120) == 1 and "run cancelled" in (tmp_path / "log").read_text()
    assert following.wait(timeout=60) == 0
    told = names(folder)
    assert told.count("cancelled") == 1 and told.index("cancelled") < told.index("signalled")
    assert told[-5:] == ["saved", "stopped", "attempt_ended", "decided", "agent_ended"] and told.count("stopped") == 1
    assert [r["state"] for r in states(folder.path, cwd=tmp_path)] == ["cancelled"]
    assert "nothing to cancel, cancelled" in run(f"launch.cancel {folder.path}", cwd=tmp_path)
    assert "all runs are over" in run(f"launch.move {folder.path}", cwd=tmp_path)


@pytest.mark.parametrize(
    ("ago", "step_s", "told", "is_quiet", "has_eta"),
    [
        (40.0, 0.2, None, True, False),
        (8.0, 0.2, None, False, True),  # too soon
        (40.0, 20.0, None, False, True),  # steps take long
        (40.0, 0.2, "attempt_ended", False, False),  # the agents know more
    ],
)
def test_a_run_that_makes_no_steps_is_said_to_before_its_agents_are_sure(
    ago: float, step_s: float, told: str | None, is_quiet: bool, has_eta: bool, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    last = time.time() - ago
    steps = [{"step": n, "attempt": 1, "time": last - (3 - n) * step_s, "step_time_s": step_s} for n in (1, 2, 3)]
    steps[-1]["tokens_per_s"] = 1234.0
    append_json_lines(folder.metrics(0), steps)
    append_json_lines(folder.events, [{"event": "started", "attempt": 1, "time": last - 60}])
    if told is not None:
        folder.record_event(told, attempt=1)
    point = RunStatus(folder, state="running", max_steps=100)
    update_steps(point)
    text = "no step for 4"
    assert (point.quiet_s is not None) is is_quiet
    assert (text in plain_line(point)) is is_quiet and ("ETA" in plain_line(point)) is has_eta
    known = as_dict(point)
    assert ("eta_s" in known) is has_eta
    assert speed_text(known) == "1,234 tokens/s" and "1,234 tokens/s" in plain_line(point)
    assert any(text in note for note in status_notes(known)) is is_quiet
    folder.record_event("save_failed", attempt=1, step=3, cause="No space left on device")
    assert (": No space left on device" in plain_line(point)) is is_quiet


def test_the_waiting_command_has_news_of_restarts_failed_saves_and_damage(tmp_path: Path) -> None:
    event_log: list[dict[str, Any]] = [
        {"event": "submitted", "cluster": "local", "job_id": "7"},
        {"event": "save_failed", "attempt": 1, "step": 5, "cause": "No space left on device"},
        {"event": "verdict", "attempt": 1, "cause": "rank 3 failed first: killed by SIGKILL"},
        {"event": "decided", "attempt": 1, "action": "restart", "cause": "crashed", "reason": "crashed once"},
        {"event": "decided", "attempt": 2, "action": "restart", "cause": "hung", "reason": "hung once"},
        {"event": "head_replaced", "attempt": 3, "cause": "node n1 is lost: silent for 8 s"},
        {"event": "decided", "attempt": 3, "action": "restart", "cause": "node_failed", "reason": "1 of 10"},
        {"event": "checkpoint_set_aside", "attempt": 2, "step": 4, "cause": "step_4 has a wrong checksum"},
        {"event": "code_changed", "attempt": 2, "since": 1, "cause": "train.py"},
    ]
    assert list(news(RunStatus(recorded(RunFolder(tmp_path), *event_log), state="running"))) == [
        "the checkpoint of step 5 could not be written: No space left on device",
        "attempt 1 ended (rank 3 failed first: killed by SIGKILL), restart in place: crashed once",
        "attempt 2 ended (hung), restart in place: hung once",
        "attempt 3 ended (node n1 is lost: silent for 8 s), restart in place: 1 of 10",
        "attempt 2: changed since attempt 1: train.py",
        "damaged and set aside: step_4 has a wrong checksum",
    ]


def test_cancel_now_takes_a_sweep_with_the_points_that_still_wait(tmp_path: Path) -> None:
    words = ["-m", "seed=1,2", *LONG, "name=s"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: list(tmp_path.glob("outputs/s/*/metrics/rank_00000.jsonl")), "the first step")
    told = {r["state"]: RunFolder(r["run_dir"]) for r in states(cwd=tmp_path)}
    assert sorted(told) == ["pending", "running"]
    for pid in ranks_of(descendants(process.pid)).values():
        os.kill(pid, signal.SIGSTOP)  # ranks that cannot save
    text = run("launch.cancel outputs/s --now", cwd=tmp_path)
    assert text.count(": cancelled") == 2, text
    assert process.wait(timeout=120) == 1
    ran = names(told["running"])
    assert "saved" not in ran[ran.index("cancelled") :]
    assert names(told["pending"]) == ["cancelled"]
    assert [r["state"] for r in states(cwd=tmp_path)] == ["cancelled", "cancelled"]


def test_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for point in ("a", "b"):
        RunFolder(tmp_path / "two" / point).create_attempt()
    assert "found: no folder outputs" in call(status.main, status=2)
    assert "found: no run in empty" in call(logs.main, "empty", status=2)
    assert f"type next: {tmp_path / 'two' / 'a'} in place of two" in call(logs.main, "two", status=2)
    detached = run("launch cluster=local launch.detach=true", cwd=tmp_path, status=2)
    assert "found: launch.detach=true with agents that this command starts" in detached
    assert not (tmp_path / "outputs").exists()


def test_where_runs_are_is_said_to_whom_looks_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert suggestion(Path("s")).startswith("python -m launch -m nodes=1,2")
    (tmp_path / "gpt" / "metrics").mkdir(parents=True)  # as in the checkout
    RunFolder(tmp_path / "outputs" / "s" / "default").create_attempt()
    assert [run.path for run in find_runs([Path()])] == [tmp_path / "outputs" / "s" / "default"]
    for word in ("s/t", "t"):
        assert refused(find_runs, [Path(word)]).fix.startswith("python -m launch.status outputs,")
    assert suggestion(Path("s")) == "outputs/s, which is there"


def test_a_log_that_an_attempt_does_not_have_is_refused_followed_or_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a run over two attempts, the second on half of the nodes."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.plan.write_text(json.dumps({"world_size": 4}))
    for size in (4, 2):
        attempt = folder.create_attempt()
        ranks = [{"rank": rank, "node": 0} for rank in range(size)]
        folder.environment(attempt).write_text(json.dumps({"ranks": ranks}))
        folder.log(attempt, size - 1).write_text(f"hello of attempt {attempt}")
        folder.record_event("started", attempt=attempt)
    folder.record_event("finished", attempt=2)
    path = str(folder.path)
    for args, found, fix in (
        (("--rank", "7"), "--rank 7 of a run with 4 ranks\nexpected: 0 to 3\n", "--rank 3"),
        (("--rank", "3", "--attempt", "2"), "no log of rank 3", "--rank 3 --attempt 1"),
        (("--rank", "3", "--attempt", "9"), "no log of rank 3", "--rank 3 --attempt 1"),
        (("--rank", "0"), "no log of rank 0", f"launch.status {path}"),
    ):
        for more in ((), ("-f",)):
            assert logs.main([path, *args, *more]) == 2
            told = capfd.readouterr().err
            assert f"found: {found}" in told and told.rstrip().endswith(fix), told
    assert logs.main([path, "--rank", "3"]) == 0 and "hello of attempt 1" in capfd.readouterr().out


Log = list[dict[str, Any]]
SUBMITTED: dict[str, Any] = {"event": "submitted", "cluster": "slurm", "job_id": "7"}
STARTED, FINISHED, STOPPED = ({"event": name, "attempt": 1} for name in ("started", "finished", "stopped"))
AGAIN, FINISHED_AGAIN = ({"event": name, "attempt": 2} for name in ("started", "finished"))
FAILURE: dict[str, Any] = {"event": "rank_failed", "attempt": 1, "rank": 0, "cause": "x", "log": "y"}
CANCEL: dict[str, Any] = {"event": "cancelled", "job_id": "7"}
START = [SUBMITTED, STARTED]
OUTCOMES: dict[str, list[Log]] = {
    "finished": [
        [*START, FINISHED],
        [*START, CANCEL, FINISHED],
        [*START, FAILURE, AGAIN, FINISHED_AGAIN],
        [*START, CANCEL, STOPPED, SUBMITTED, FINISHED_AGAIN],
    ],
    "failed": [START, [*START, FAILURE], [*START, FAILURE, CANCEL]],
    "stopped": [[*START, STOPPED]],
    "cancelled": [[SUBMITTED, CANCEL], [*START, CANCEL, STOPPED], [*START, CANCEL, FAILURE]],
}
"""Outcome of a run -> event logs that tell it."""


@pytest.mark.parametrize("state", OUTCOMES)
def test_the_event_log_decides_where_the_queue_has_forgotten_the_job(state: str, tmp_path: Path) -> None:
    for number, event_log in enumerate(OUTCOMES[state]):
        point = find_run_status(recorded(RunFolder(tmp_path / str(number)), *event_log))
        assert isinstance(point.job, SlurmJob)
        assert point.job.status({}).phase == "over"
        assert outcome(point.events()) == state, event_log


AGENT = [SUBMITTED, {"event": "agent_started", "job": "7.0", "nodes": 1, "allocated_at": 1.0}, STARTED]
LEFT: dict[str, Any] = {"event": "agent_ended", "job": "7.0", "ended_at": 2.0}
DONE, GIVEN_UP, RESTART, REQUEUE = (
    {"event": "decided", "attempt": 1, "action": action, "cause": cause, "reason": "why"}
    for action, cause in (("stop", "finished"), ("stop", "crashed"), ("restart", "crashed"), ("requeue", "crashed"))
)
ENDED: list[Log] = [
    [*AGENT, FINISHED, DONE, LEFT],
    [*AGENT, FAILURE, GIVEN_UP, LEFT],
    [*AGENT, FAILURE, {"event": "requeue_failed", "cause": "no queue"}, LEFT],
]
OPEN: list[Log] = [
    [*AGENT, FINISHED, DONE],
    [*AGENT, FAILURE, REQUEUE, LEFT],
    [*AGENT, FAILURE, GIVEN_UP, LEFT, {**SUBMITTED, "job_id": "8"}],
    [*AGENT, FAILURE, RESTART, AGAIN, LEFT],
    [*AGENT, GIVEN_UP, {**LEFT, "cause": "killed"}],
]


def test_slurm_is_not_asked_about_runs_whose_event_log_tells_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where no command of Slurm is found, a question is answered with a problem, and the status is 1.
    monkeypatch.setenv("PATH", str(tmp_path))
    for number, event_log in enumerate([*ENDED, *OPEN]):
        folder = recorded(RunFolder(tmp_path / str(number)), *event_log)
        folder.create_attempt()
        ended = event_log in ENDED
        text = call(status.main, folder.path, status=0 if ended else 1)
        assert ("states of Slurm jobs are what their event logs say" in text) is not ended


def test_slurms_states_have_a_phase_and_a_detail() -> None:
    later = JobState("PENDING", "Priority", start="2026-01-02T03:04")
    states = [*map(JobState, ("RUNNING", "COMPLETED", "NODE_FAIL")), JobState("PENDING", "Resources"), later]
    found = [SlurmJob("7_1").status({"7_1": state, "7_2": JobState("RUNNING")}) for state in states]
    assert [(seen.phase, seen.detail) for seen in found] == [
        *(("running", ""), ("over", ""), ("over", "NODE_FAIL")),
        *(("pending", "Resources"), ("pending", "Priority, starts 2026-01-02T03:04")),
    ]
    since = [JobState(state.state, submitted=5.0).since for state in states]
    assert since == [None, None, None, 5.0, 5.0], "only what scancel takes out of the queue may move"


def test_another_process_with_the_id_of_a_local_job_is_neither_its_agents_nor_ended() -> None:
    with subprocess.Popen(["sleep", "600"]) as controller:
        try:
            event = {"cluster": "local", "job_id": str(controller.pid), "host": os.uname().nodename}
            born = str(start_time(controller.pid))
            job = job_of(event | {"pid_started": str(int(born) - 1)})
            assert job.status({}).phase == "over"
            job.kill()
            assert controller.poll() is None
            own = job_of(event | {"pid_started": born})
            assert own.status({}).phase == "running"
            own.kill()
            assert controller.wait(timeout=60) == -signal.SIGTERM
        finally:
            controller.kill()


def test_a_point_waits_only_while_its_launcher_lives(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record_event("submitted", cluster="local", job_id="1", host="elsewhere")
    assert LocalQueueEntry(folder).events_before() is None
    LocalQueueEntry(folder).enter(1)
    assert LocalQueueEntry(folder).events_before() == 1
    assert find_run_status(folder).job is None
    note = folder.path / ".launch" / "waiting"
    host, pid, born, count = note.read_text().split()
    note.write_text(f"{host} {pid} {int(born) + 1} {count}")  # another process under the same id
    assert LocalQueueEntry(folder).events_before() is None
    point = find_run_status(folder)
    assert point.job is not None and point.job.status({}).phase == "unknown"


# Commands on a login node: a real ssh and a real sshd, which serves one connection over a pipe and opens no port.


PROGRAM = Path(sys.executable).with_name("gpt-launch")
CLIENT = """
Host login
  ProxyCommand {sshd} -i -f {folder}/sshd_config
Host away
  ProxyCommand false
"""


@pytest.fixture
def login(tmp_path: Path) -> Path:
    """The home of a login node called ``login``. Its ``bin`` has the ssh that reaches it with a key made for it."""
    if not PROGRAM.exists():
        pytest.skip("needs an installed gpt-launch")
    return make_ssh(tmp_path / "login", CLIENT)


def test_a_command_runs_on_a_login_node_with_the_code_of_this_folder(login: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", login / "project"
    (here / "inner").mkdir(parents=True)
    (here / "inner" / "part.py").write_text("WORD = 'it runs'\n")
    (here / "train.py").write_text("import os\nfrom inner.part import WORD\nprint(WORD, 'in', os.getcwd())\n")
    command = partial(run, cwd=here, PATH=f"{login / 'bin'}:{os.environ['PATH']}")
    words = ("workload=script", "script.path=train.py", "cluster=local", "launch.report_files=[md,csv]")
    on = f"launch.on=ssh:login:{there}"

    for wrong, said in (
        ("launch.on=ssh:away", "type next: ssh away mkdir -p launch/here-"),
        ("launch.on=login", "expected: ssh:LOGIN or ssh:LOGIN:FOLDER"),
        (on, "no program gpt-launch there"),
    ):
        assert said in command("launch", wrong, *words, status=2)
        assert [path.name for path in here.iterdir() if path.name != "__pycache__"] == ["inner", "train.py"]

    (there / ".venv" / "bin").mkdir(parents=True)
    (there / ".venv" / "bin" / "gpt-launch").symlink_to(PROGRAM)
    text = command("launch", on, "nodes=1", *words)
    assert f"copied 2 files to login:{there}" in text and "finished" in text
    run_folder = there / "outputs" / "train" / "nodes=1"
    assert f"it runs in {there}" in (run_folder / "attempts" / "0001" / "logs" / "rank_00000.log").read_text()
    assert "finished" in (here / "outputs" / "train" / "nodes=1" / "summary.md").read_text()
    assert not (here / "outputs" / "train" / "nodes=1" / "events.jsonl").exists()

    status = command("gpt_launch", "status", "outputs/train", LAUNCH_ON=f"ssh:login:{there}")
    assert "nodes=1" in status and "finished" in status
    logs = command("gpt_launch", "logs", on, "outputs/train/nodes=1")
    assert f"it runs in {there}" in logs
    refused = command("gpt_launch", "report", on, "outputs/nothing", status=2)
    assert refused.startswith("found: no folder outputs/nothing") and "files of reports" not in refused
