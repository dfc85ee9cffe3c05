"""Forked ranks are the same as executed ranks, and end with their agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from launch.agent.node import Node, RunContext
from launch.config.compose import compose_launch, typed_config
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, environment, is_alive, wait_for

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
        "main": [__name__, __spec__.name, sys.modules["__main__"].__file__, "program" in sys.modules],
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
    args = (sys.executable, "-m", *(changed.pop("program", None) or ("program", *words)))
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
            told[how][name] = end(start(by, f"{how} {name}", *words), f"{how} {name}")
    told["missing"] = [end(start(by, f"{how} missing", program=("absent", "x")), f"{how} missing")
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
    rank.send_signal(signal.SIGUSR2)
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


@pytest.mark.parametrize("what", SAME)
def test_a_forked_rank_behaves_like_an_executed_rank(what: str, told: dict[str, Any]) -> None:
    forked, executed = told["forked"][what], told["executed"][what]
    assert executed[0] or executed[1], "nothing to compare"
    assert forked == executed


def test_a_forked_rank_is_a_child_of_the_agent_in_its_own_session(told: dict[str, Any]) -> None:
    facts = json.loads(told["forked"]["facts"][1])
    assert (facts["parent"], facts["leads"], facts["umask"]) == (told["agent"], True, 0o027)
    assert "GONE" not in facts["env"]
    assert told["chances differ"]


def test_a_rank_that_cannot_be_forked_is_executed(told: dict[str, Any]) -> None:
    assert told["other start"] == [None] * 3
    for reason in ("OMP_NUM_THREADS", "not python -m", "in /"):
        assert f"is executed, not forked: {reason}\n" in told["printed"]
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
        (["resilience.fork_ranks=false"], False),
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
