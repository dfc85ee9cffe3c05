"""Commands that tests fork are what they would be if Python had been started for them."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
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
from tests.support.forking import Job, Server
from tests.support.scripts import LOCAL, write_script


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
