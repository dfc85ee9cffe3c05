"""The agent of a node: the command of the user at events, and secrets that are written nowhere."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from launch.agent.__main__ import event_name, event_variables, run_at_events
from launch.config import ClusterKind, Config, LaunchConfig
from launch.plan.plan import make_plan
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run
from tests.support.planning import config_of, refused
from tests.support.runs import LOCAL, write_script

WRITE = """
import os, sys
with open(sys.argv[1], "a") as file:
    print(os.environ["LAUNCH_EVENT"], os.environ["LAUNCH_EVENT_JSON"], file=file)
"""


CRASHES_ONCE = """
import os, pathlib, sys
mark = pathlib.Path(os.environ["LAUNCH_RUN_DIR"], "mark")
if os.environ["RANK"] == "0" and not mark.exists():
    mark.touch()
    sys.exit("broken")
"""


def test_each_event_has_a_name_or_none() -> None:
    decided = {"event": "decided", "time": 1.0, "reason": ""}
    names = {
        "finished": {"action": "stop", "cause": "finished"},
        "stopped": {"action": "stop", "cause": "cancelled"},
        "failed": {"action": "stop", "cause": "crashed"},
        "restarted": {"action": "restart", "cause": "node_failed"},
    }
    assert {name: event_name({**decided, **details}) for name, details in names.items()} == {n: n for n in names}
    assert event_name({**decided, "action": "requeue", "cause": "preempted"}) is None, "requeued is an event of its own"
    assert event_name({"event": "requeued", "time": 1.0}) == "requeued"
    assert event_name({"event": "saved", "time": 1.0}) is None
    failed = {"event": "copy_failed", "time": 1.0, "step": 5, "cause": "no route to host"}
    assert event_name({**failed, "failures": 1}) == "copy_failed"
    assert event_name({**failed, "failures": 2}) is None, "once for each time that a store is away"


def test_an_unknown_field_of_an_event_is_an_empty_variable(tmp_path: Path) -> None:
    event = {"event": "node_lost", "time": 5.0, "host": "n3", "cause": "silent", "attempt": 2}
    known = event_variables(RunFolder(tmp_path), "node_lost", event)
    assert (known["LAUNCH_EVENT_HOST"], known["LAUNCH_ATTEMPT"], known["LAUNCH_EVENT_STEP"]) == ("n3", "2", "")
    assert json.loads(known["LAUNCH_EVENT_JSON"]) == event


@pytest.mark.parametrize(
    ("code", "timeout_s", "said"),
    [
        ("import sys; print('a token'); sys.exit(3)", 60.0, "left with 3"),
        ("import time; time.sleep(600)", 1.0, "was killed, after 1 s"),
    ],
)
def test_a_failed_or_hung_command_is_recorded_without_its_output(
    code: str, timeout_s: float, said: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.record_event("started", attempt=1)
    with run_at_events(folder, [sys.executable, "-c", code, "a secret"], timeout_s):
        folder.record_event("node_lost", host="n3")
    failed = select_events(folder.read_events(), "on_event_failed")
    assert [event["of"] for event in failed] == ["node_lost"], "what came before is history"
    text = folder.events.read_text()
    assert said in text and "secret" not in text and "token" not in text
    assert stat.S_IMODE((folder.path / ".launch" / "on_event.log").stat().st_mode) == 0o600


def test_an_empty_or_malformed_command_is_refused() -> None:
    for bad in ("", "'open", 0):
        refused(Config(launch=LaunchConfig(poll_s=5.0, on_event=bad)).validate, found="launch.on_event=")


def test_a_missing_program_is_refused_before_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.sh").touch()
    (tmp_path / "notify.sh").touch(mode=0o755)

    def planned(command: object) -> None:
        config = config_of()
        config.launch.on_event = command
        make_plan(config, [], ClusterKind.local)

    for command, found, fix in (
        ("no-such-program --quiet", "no program no-such-program on the PATH", "/no-such-program, or"),
        ("/no/such/notify.sh", "no program /no/such/notify.sh on the PATH", "launch.on_event="),
        ("./plain.sh", "no program ./plain.sh", "launch.on_event=/PATH/OF/plain.sh, or"),
        (["notify.sh", "--quiet"], "no program notify.sh", "launch.on_event=/PATH/OF/notify.sh, or"),
    ):
        assert "nodes" in refused(planned, command, found=found, fix=fix).expected
    planned(f"{sys.executable} -c pass")
    planned("./notify.sh")
    assert not (tmp_path / "outputs").exists()


def test_agents_run_the_command_after_a_failure_and_at_the_end(tmp_path: Path) -> None:
    """Ranks that crash once, on two agents of this machine."""
    script, notify = write_script(tmp_path, CRASHES_ONCE), write_script(tmp_path, WRITE, "notify.py")
    words = (*LOCAL, "nodes=2", f"script.path={script}", "script.resumes=true", "run_dir=run")
    run("launch", *words, f'launch.on_event="{sys.executable} {notify} {tmp_path}/told"', cwd=tmp_path)
    told = [line.split()[0] for line in (tmp_path / "told").read_text().splitlines()]
    assert told == ["started", "restarted", "started", "finished"]


SECRET = "hunter2-0b5e9c"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "NCCL_SECRET", "OMP_PASSWORD")
"""Some begin as variables do that are recorded."""
FAILING = "from launch import worker\nrun = worker.attach()\nrun.record(1, loss=1.0)\nraise RuntimeError('broken')\n"


@pytest.mark.parametrize("workload", ["gpt", "script"])
def test_no_secret_of_the_environment_is_written_to_a_file(workload: str, tmp_path: Path) -> None:
    """A run that finishes, with checkpoints, and one that fails, with a traceback in its event log."""
    secrets = {name: f"{SECRET}-{name}" for name in NAMES}
    words = [*TINY, "cluster=local", "nodes=1", "optim.max_steps=2", "eval.interval=0", "logging.tensorboard=true"]
    if workload == "script":
        words = [*LOCAL, "nodes=1", f"script.path={write_script(tmp_path, FAILING)}"]
    out = tmp_path / "out"
    status = int(workload == "script")
    text = run(f"launch run_dir={out / 'run'}", *words, cwd=tmp_path, status=status, **secrets)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in out.glob("*") if path.name.startswith(("scaling", "Scaling", "summary", "sweep"))]
    written = {path: path.read_bytes() for path in files}
    assert {"environment.json", "events.jsonl", "plan.json"} <= {path.name for path in files}
    assert [path for path in files if ".submitit" in path.parts], "submitit's pickles are looked through too"
    assert [str(path) for path, content in written.items() if SECRET.encode() in content] == []
    assert SECRET not in text
    (endpoint,) = (out / "run" / ".launch").glob("*.json")
    token = json.loads(endpoint.read_text())["token"].encode()
    assert [path for path, content in written.items() if token in content] == [endpoint]
