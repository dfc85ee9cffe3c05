"""The helpers of tests: forked commands are as if Python had been started for them, and no rank is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import distributed, forked
from tests.support.commands import (
    ROOT,
    environment,
    fork_server,
    is_alive,
    library_server,
    run,
    shared_servers,
    wait_for,
)
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.forking import ForkedProcess, Job, Server
from tests.support.runs import LOCAL, write_script


def asked(*words: str, env: dict[str, str], cwd: Path, **more: Any) -> Job | None:
    """Job that ``Popen(words)`` is taken for, None where it is started."""
    parameters = dict.fromkeys(signature(subprocess.Popen._execute_child).parameters)  # type: ignore[attr-defined]
    return forked._job_of({**parameters, "pass_fds": (), "args": words, "env": env, "cwd": cwd, **more})


def test_what_would_import_something_else_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment()
    monkeypatch.setattr(os, "environ", env)
    command = (sys.executable, "-m", "gpt.train")
    assert asked(*command, env=env, cwd=tmp_path) is not None
    assert asked(*command, env={**env, "PYTHONPATH": "elsewhere"}, cwd=tmp_path) is None
    assert asked(*command, env={**env, "OMP_NUM_THREADS": "2"}, cwd=tmp_path) is None
    assert asked(*command, env=env, cwd=tmp_path, preexec_fn=print) is None
    assert asked("true", env=env, cwd=tmp_path) is None
    (tmp_path / "gpt").mkdir()
    assert asked(*command, env=env, cwd=tmp_path) is None


def test_exit_status_and_output_are_those_of_the_command(tmp_path: Path) -> None:
    assert fork_server().takes(Job("gpt.train", (), str(tmp_path), environment()))
    assert "type next: optim.lr=1" in run("gpt.train", "optim.lrr=1", cwd=tmp_path, status=2)
    assert run("gpt.generate", "--help", cwd=tmp_path).startswith("usage: python -m gpt.generate")
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = """
import os, sys, first
print(__file__, first.__file__, sys.path[:2], "torch" in sys.modules, "launch" in sys.modules, sys.told)
"""


def test_what_imports_from_elsewhere_is_forked_of_libraries_alone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    for name, text in (
        ("gpt/__init__.py", ""),
        ("gpt/look.py", ELSEWHERE),
        ("there/first.py", ""),
        ("there/sitecustomize.py", "import sys\nsys.told = 'of the site'"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    job = Job("gpt.look", (), str(tmp_path), environment(PYTHONPATH=str(there)))
    assert not fork_server().takes(job) and library_server().takes(job)
    paths = [str(tmp_path), str(there)]
    expected = f"{tmp_path / 'gpt/look.py'} {there / 'first.py'} {paths} True False of the site\n"
    assert run("gpt.look", cwd=tmp_path, PYTHONPATH=str(there)) == expected


LOOKING = """
import os, sys
import beside
print(__name__, __file__, sys.argv, sys.path[0], beside.__file__, os.getcwd(), os.getppid() == int(sys.argv[1]))
print("torch" in sys.modules, flush=True)
sys.exit("ends so")
"""


def test_a_rank_of_a_script_is_forked_as_if_it_had_been_executed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    write_script(tmp_path, "", "theirs/beside.py")
    script = write_script(tmp_path, LOOKING, "theirs/looking.py")
    words = ["workload=script", "script.path=theirs/looking.py", "script.args=0 a", "run_dir=run"]
    text = run("launch", *LOCAL, *words, cwd=tmp_path, status=1)
    said, preloaded, *last = (tmp_path / "run/attempts/0001/logs/rank_00000.log").read_text().splitlines()
    beside = script.parent / "beside.py"
    assert said == f"__main__ {script} {[str(script), '0', 'a']} {script.parent} {beside} {tmp_path} False"
    assert preloaded == "True", "it was executed"
    assert last == ["ends so"] and "ends so" in text


def test_servers_are_one_for_all_who_ask(tmp_path: Path) -> None:
    file = write_script(tmp_path, "import os; print(os.getppid())")
    job = Job(str(file), (), str(tmp_path), environment(), is_file=True)
    address, env = shared_servers()
    for server in (fork_server(), Server.at(address, env).importing(["tests.support.preload_commands"])):
        assert server.start(job, tmp_path / "log").wait(60) == 0
    parents = (tmp_path / "log").read_text().splitlines()
    assert len(parents) == 2 and len({*parents}) == 1
    assert str(os.getpid()) not in parents


STARTING = """
import os, sys
from tests.support.forking import Root
root = Root(dict(os.environ))
print(root._process.pid, flush=True)
sys.stdin.read()
"""


def test_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    command, env = [sys.executable, "-c", STARTING], environment(TMPDIR=str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        assert is_alive(server)
        process.kill()
    wait_for(lambda: not is_alive(server), "the end of the server")


def all_reduce(rank: int, world_size: int, start: int) -> tuple[int, float, str]:
    total = torch.tensor(float(start + rank))
    dist.all_reduce(total)
    return os.getpid(), total.item(), os.environ["RANK"]


def misbehave(rank: int, world_size: int, how: str) -> Any:
    if rank == 1:
        if how == "raise":
            raise ValueError("the cause")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    dist.barrier()


def test_results_come_by_rank_from_processes_of_their_own() -> None:
    results = run_distributed(all_reduce, 2, 10)
    assert [r[1:] for r in results] == [(21.0, "0"), (21.0, "1")]
    assert len({os.getpid(), *(r[0] for r in results)}) == 3


@pytest.mark.parametrize(
    ("how", "timeout_s", "message"),
    [("raise", 60, "ValueError: the cause"), ("die", 60, "died of SIGKILL"), ("hang", 3, "no answer in time")],
)
def test_the_rank_that_failed_is_named_and_none_is_left(
    how: str, timeout_s: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ForkedProcess] = []
    start = distributed._start
    monkeypatch.setattr(distributed, "_start", lambda *args: started.append(start(*args)) or started[-1])
    with pytest.raises(RankFailedError, match=message) as failure:
        run_distributed(misbehave, 2, how, timeout_s=timeout_s)
    assert failure.value.rank == (1 if how != "hang" else failure.value.rank)
    assert len({process.pid for process in started}) == 2
    wait_for(lambda: not any(is_alive(process.pid) for process in started), "the end of all ranks")


def stay_imported(rank: int, world_size: int) -> bool:
    return "wave" in sys.modules


def test_what_a_test_imports_for_its_ranks_is_there_and_for_no_others() -> None:
    assert run_distributed(stay_imported, 2, imports=("wave",)) == [True, True]
    assert run_distributed(stay_imported, 1) == [False]
