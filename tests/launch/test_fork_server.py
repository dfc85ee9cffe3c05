"""Forked ranks are the same as executed ranks, end with their agent, and run on the CPUs near their GPUs."""

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

from launch.agent.fork_server import cpus_of_ranks, parse_cpus
from launch.agent.node import Node, RunContext
from launch.config.compose import compose_launch, typed_config
from launch.runs.environment import Gpu, visible_gpus
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, environment, is_alive, run, wait_for
from tests.support.runs import LOCAL, printed, write_script

PROGRAM = """
import atexit, json, os, random, signal, sys, threading, time

def child():
    print("child of", __name__, flush=True)

def facts():
    kept = ("/proc/", "/dev/null")
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
             and os.path.exists(f"/proc/self/fd/{fd}")]
    streams = [sys.stdin, sys.stdout, sys.stderr]
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path[0], "cwd": os.getcwd(), "env": dict(os.environ),
        "parent": os.getppid(), "leads": os.getpid() == os.getsid(0) == os.getpgid(0), "umask": os.umask(0),
        "signals": {n: str(signal.getsignal(n)) for n in signal.valid_signals()},
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "stdin": sys.stdin.read(),
        "streams": [(s.encoding, s.errors, s.line_buffering, s.name, s.mode) for s in streams],
        "same": [sys.__stdin__ is sys.stdin, sys.__stdout__ is sys.stdout, sys.__stderr__ is sys.stderr],
        "through": [s.write_through for s in streams[1:]],
        "main": [__name__, __spec__.name, sys.modules["__main__"].__file__, "program" in sys.modules],
        "threads": threading.active_count(), "files": [f for f in files if not f.startswith(kept)],
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
    "large": ("status", "300"),
    "words": ("words",),
    "exception": ("raise",),
    "Ctrl-C": ("interrupt",),
    "SIGTERM": ("signal", "15"),
    "SIGKILL": ("signal", "9"),
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
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
pipe = os.pipe()
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
    assert (facts["parent"], facts["leads"], facts["umask"], facts["files"]) == (told["agent"], True, 0o027, [])
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


NEAR = {"0000:01:00.0": "0-3,8-11", "0000:02:00.0": "0-3,8-11", "0000:81:00.0": "4-7,12-15\n"}
"""FIRST_GPU machine of two sockets with 8 CPUs each, and CPUs near each GPU as Linux lists them."""


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    for bus, cpus in NEAR.items():
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "local_cpulist").write_text(cpus)
    return tmp_path


def gpus(*buses: str | None) -> list[Gpu]:
    return [Gpu(str(index), "H100", None, bus) for index, bus in enumerate(buses)]


FIRST_GPU, SECOND_GPU, THIRD_GPU = NEAR
FIRST, SECOND = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("buses", "ranks", "allowed", "expected"),
    [
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(16), [FIRST, FIRST, SECOND]),
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 2, range(16), [FIRST, FIRST]),
        ((FIRST_GPU, THIRD_GPU), 2, range(6), [[0, 1, 2, 3], [4, 5]]),  # those of the job alone
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(5), [[0, 1, 2, 3], [0, 1, 2, 3], [4]]),
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, [0, 4, 5], None),  # one CPU near two GPUs
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(4), None),  # none near the third
        ((FIRST_GPU, SECOND_GPU), 2, FIRST, None),  # all are near
        ((FIRST_GPU, None, THIRD_GPU), 3, range(16), None),  # Slurm hides which it is
        ((FIRST_GPU, "0000:ff:00.0"), 2, range(16), None),
        ((FIRST_GPU,), 2, range(16), None),
        ((), 1, range(16), None),
    ],
)
def test_each_rank_is_bound_to_the_cpus_near_its_gpu(
    devices: Path, buses: tuple[str | None, ...], ranks: int, allowed: list[int], expected: list[list[int]] | None
) -> None:
    found = cpus_of_ranks(ranks, gpus(*buses), allowed, devices)
    assert (None if found is None else [sorted(cpus) for cpus in found]) == expected


def test_the_driver_gives_the_pci_address_of_a_gpu(tmp_path: Path) -> None:
    for bus in ("0000:01:00.0", "0000:C1:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text("Model: \t NVIDIA H100\nGPU UUID: \t GPU-??\n")
    assert [gpu.bus for gpu in visible_gpus(tmp_path, {})] == ["0000:01:00.0", "0000:c1:00.0"]
    assert [gpu.bus for gpu in visible_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"})] == ["0000:c1:00.0"]


LAST_CPU = """
import launch.agent.fork_server as numa
numa.cpus_of_ranks = lambda ranks, gpus, allowed: [frozenset([max(allowed)])] * ranks
"""
FORK = """
import os, sys
from pathlib import Path
from launch.agent.fork_server import ForkServer
with ForkServer(["where"]) as server:
    server.wait_ready()
    env = {**os.environ, "LAUNCH_CPUS": sys.argv[1]}
    rank = server.start([sys.executable, "-m", "where"], env, str(Path.cwd()), "log")
    assert rank is not None
    sys.exit(rank.wait())
"""
WHERE = "import os\nprint(sorted(os.sched_getaffinity(0)))\n"


@pytest.mark.parametrize("binds", [True, False])
def test_executed_ranks_run_on_their_cpus(tmp_path: Path, binds: bool) -> None:
    """The agent of a machine whose GPUs are all near its last CPU."""
    write_script(tmp_path, WHERE)
    write_script(tmp_path, LAST_CPU, "sitecustomize.py")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    executed = "script.env.OMP_DYNAMIC=false"  # read at the start of a process, so that the rank is not forked
    words = (*LOCAL, "script.path=script.py", "run_dir=run", f"cluster.bind_cpus={binds}", executed)
    run("launch", *words, cwd=tmp_path, PYTHONPATH=path)
    folder, all_cpus = RunFolder(tmp_path / "run"), sorted(os.sched_getaffinity(0))
    expected = all_cpus[-1:] if binds else all_cpus
    assert printed(folder) == f"{expected}\n"
    (told,) = json.loads(folder.environment(1).read_text())["ranks"]
    assert told["cores"] == len(expected) and [*parse_cpus(told["cpus"])] == expected


def test_forked_ranks_run_on_their_cpus(tmp_path: Path) -> None:
    write_script(tmp_path, WHERE, "where.py")
    last = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(last)], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "log").read_text() == f"[{last}]\n"
