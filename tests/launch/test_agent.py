"""The agent of a node: forked ranks, the command of the user at events, and secrets that are written nowhere."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from launch.agent.__main__ import event_name, event_variables, on_event
from launch.agent.node import Node, RunContext
from launch.config import ClusterKind, Config, LaunchConfig
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, TINY, environment, is_alive, run, wait_for
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
    code: str, timeout_s: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.record_event("started", attempt=1)
    monkeypatch.setattr("launch.agent.__main__.COMMAND_TIMEOUT_S", timeout_s)
    config = Config(launch=LaunchConfig(poll_s=5.0, on_event=[sys.executable, "-c", code, "a secret"]))
    with on_event(RunContext(folder, Node(0, 1, "process-1-here", False), config)):
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


# Forked ranks are the same as executed ranks, and end with their agent.


PROGRAM = """
import atexit, json, os, random, signal, sys, threading, time

def child():
    print("child of", __name__, flush=True)

def facts():
    streams = [sys.stdin, sys.stdout, sys.stderr]
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path[0], "cwd": os.getcwd(), "env": dict(os.environ),
        "parent": os.getppid(), "leads": os.getpid() == os.getsid(0) == os.getpgid(0), "umask": os.umask(0),
        "signals": {n: str(signal.getsignal(n)) for n in signal.valid_signals()},
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "stdin": sys.stdin.read(),
        "streams": [(s.encoding, s.errors, s.line_buffering) for s in streams],
        "same": [sys.__stdin__ is sys.stdin, sys.__stdout__ is sys.stdout, sys.__stderr__ is sys.stderr],
        "through": [s.write_through for s in streams[1:]],
        "main": [__name__, __spec__ and __spec__.name, sys.modules["__main__"].__file__],
        "loaded": __spec__ is None or "program" in sys.modules,
        "threads": threading.active_count(),
    }

if __name__ == "__main__":
    what = sys.argv[1]
    if what == "facts":
        print(json.dumps(facts()))
    elif what == "shown":
        print(open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[1:])
        print("RANK=7" in open("/proc/self/environ").read().split("\\0"))
    elif what == "chance":
        print(random.random())
    elif what == "status":
        sys.exit(int(sys.argv[2]))
    elif what == "words":
        sys.exit("these words")
    elif what == "raise":
        raise ValueError("a mistake")
    elif what == "interrupt":
        raise KeyboardInterrupt
    elif what == "signal":
        os.kill(os.getpid(), int(sys.argv[2]))
    elif what == "leave":
        atexit.register(print, "at the exit")
        threading.Thread(target=lambda: (time.sleep(0.05), print("from the thread"))).start()
        print("no line", end="")
    elif what == "spawn":
        import multiprocessing
        process = multiprocessing.get_context("spawn").Process(target=child)
        process.start()
        process.join()
    elif what == "sleep":
        print("asleep", flush=True)
        time.sleep(600)
"""

SAME = {
    "facts": ("facts",),
    "shown": ("shown",),
    "three": ("status", "3"),
    "words": ("words",),
    "exception": ("raise",),
    "Ctrl-C": ("interrupt",),
    "SIGTERM": ("signal", "15"),
    "threads": ("leave",),
    "spawn": ("spawn",),
}
"""Arguments of the program, by what they are about."""

AGENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from launch.agent.fork_server import ForkServer

def start(server, name, *words, **changed):
    args = (sys.executable, *changed.pop("program", ("-m", "program")), *words)
    env = {**os.environ, "RANK": "7", "PYTHONUNBUFFERED": "1", **changed}
    env.pop("GONE")
    if server is not None:
        return server.start(args, env, os.getcwd(), name)
    with open(name, "ab") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(args, env=env, start_new_session=True, **streams)

def end(process, name):
    return process and [process.wait(timeout=60), Path(name).read_text(), process.poll()]

os.umask(0o027)
os.environ["GONE"] = "only the agent's"
signal.signal(signal.SIGTERM, lambda *args: None)
told = {"agent": os.getpid(), "forked": {}, "executed": {}}
with ForkServer(("program",)) as server:
    server.wait_ready()
    for name, words in json.loads(sys.argv[1]).items():
        for how, by in ("forked", server), ("executed", None):
            for kind, program in ("module", ("-m", "program")), ("file", ("scripts/program.py",)):
                log = f"{how} {kind} {name}"
                told[how][f"{kind} {name}"] = end(start(by, log, *words, program=program), log)
    told["missing"] = [end(start(by, f"{how} missing", "x", program=("-m", "absent")), f"{how} missing")
                       for how, by in (("forked", server), ("executed", None))]
    chances = [end(start(server, f"chance {i}", "chance"), f"chance {i}")[1] for i in range(2)]
    told["chances differ"] = chances[0] != chances[1]
    told["other start"] = [start(server, "never", "status", "0", OMP_NUM_THREADS="64"),
                           server.start(("sh", "-c", "true"), dict(os.environ), os.getcwd(), "never"),
                           server.start((sys.executable, "-m", "program"), dict(os.environ), "/", "never")]
    with ForkServer(("program",)) as late:
        late.wait_ready(lambda: True)
        told["called off"] = start(late, "never", "status", "0"), late.pid is None
    told["before the log"] = end(start(server, "no folder/log", "status", "0"), "x")
with ForkServer(("program",)) as server:
    server.wait_ready()
    rank = start(server, "survivor", "sleep")
    os.kill(server.pid, signal.SIGKILL)
    told["after the server"] = start(server, "never", "status", "0"), server.pid
    os.kill(rank.pid, signal.SIGUSR2)
    told["survivor"] = end(rank, "survivor")
for name in ("absent", "threaded"):
    with ForkServer((name,)) as server:
        server.wait_ready()
        told[name] = server.pid
with ForkServer(("program",)) as server:
    server.wait_ready()
    rank = start(server, "orphan", "sleep")
    while "asleep" not in Path("orphan").read_text():
        time.sleep(0.01)
    told["family"] = [server.pid, rank.pid]
    print(json.dumps(told), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Findings of an agent about its ranks before it was killed, and what it printed."""
    folder = tmp_path_factory.mktemp("fork server")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "program.py").write_text(PROGRAM)
    (folder / "threaded.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=[600]).start()"
    )
    (folder / "agent.py").write_text(AGENT)
    done = subprocess.run(
        [sys.executable, "-m", "agent", json.dumps(SAME)],
        cwd=folder,
        env=environment(PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return {**json.loads(done.stdout), "printed": done.stderr}


@pytest.mark.parametrize("kind", ["module", "file"])
@pytest.mark.parametrize("what", SAME)
def test_a_forked_rank_behaves_like_an_executed_rank(what: str, kind: str, told: dict[str, Any]) -> None:
    forked, executed = told["forked"][f"{kind} {what}"], told["executed"][f"{kind} {what}"]
    assert executed[0] or executed[1], "nothing to compare"
    assert forked == executed


def test_a_forked_rank_is_a_child_of_the_agent_in_its_own_session(told: dict[str, Any]) -> None:
    facts = json.loads(told["forked"]["module facts"][1])
    assert (facts["parent"], facts["leads"], facts["umask"]) == (told["agent"], True, 0o027)
    assert "GONE" not in facts["env"]
    assert told["chances differ"]


def test_a_rank_that_cannot_be_forked_is_executed(told: dict[str, Any]) -> None:
    assert told["other start"] == [None] * 3
    for reason in ("OMP_NUM_THREADS", "sh -c is neither", "in /"):
        assert f"is executed, not forked: {reason}" in told["printed"]
    assert told["called off"] == [None, False], "a server that is not ready is not waited for"
    assert told["missing"][0] == told["missing"][1] and told["missing"][0][0] == 1


def test_a_rank_outlives_the_server_and_the_next_rank_is_executed(told: dict[str, Any]) -> None:
    assert told["after the server"] == [None, None]
    assert told["survivor"][0] == -signal.SIGUSR2
    assert "ranks are executed, not forked; the fork server: it is gone" in told["printed"]


def test_a_server_that_cannot_fork_ranks_gives_the_reason(told: dict[str, Any]) -> None:
    assert told["before the log"] is told["absent"] is told["threaded"] is None
    for reason in ("FileNotFoundError", "No module named 'absent'", "an import has started threads (Thread-1"):
        assert reason in told["printed"]


def test_server_and_ranks_die_with_the_agent(told: dict[str, Any]) -> None:
    wait_for(lambda: not any(is_alive(pid) for pid in told["family"]), "the end of server and rank", 60)


@pytest.mark.parametrize(
    ("words", "is_there"),
    [
        ([], True),
        (["resilience.engine=exec"], False),
        (["workload=script", "script.command=[true]"], False),
    ],
    ids=["gpt", "switched off", "script"],
)
def test_only_runs_with_modules_to_preload_have_a_server(
    words: list[str], is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.agent import ranks as workers

    monkeypatch.setattr(workers.threading, "active_count", lambda: 1)  # pytest's own threads are no agent's
    monkeypatch.setattr(workers, "ForkServer", lambda preload, code: nullcontext((preload, code)))
    config = typed_config(compose_launch([*words, f"run_dir={tmp_path}"]))
    node = Node(0, 1, "job", is_slurm=False)
    with workers.fork_server(RunContext(RunFolder(tmp_path), node, config)) as server:
        assert (server is not None) == is_there
