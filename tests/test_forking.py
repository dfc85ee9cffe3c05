"""Commands that tests fork are what they would be if Python had been started for them."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from launch.agent.workers import entrypoint
from launch.workload import RankCommand
from tests.support import forking
from tests.support.commands import environment, fork_server, run
from tests.support.forking import Job


def asked(*words: str, env: dict[str, str], cwd: Path, **more: Any) -> tuple[Job | None, str | None]:
    """What ``Popen(words)`` comes to."""
    parameters = dict.fromkeys(signature(subprocess.Popen._execute_child).parameters)  # type: ignore[attr-defined]
    return forking._job_of({**parameters, "pass_fds": (), "args": words, "env": env, "cwd": cwd, **more})


def test_a_rank_is_forked_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment(RANK="3")
    monkeypatch.setattr(os, "environ", env)
    program, words = entrypoint(RankCommand(args=(sys.executable, "-m", "gpt.train", "--run", "a b")), tmp_path)
    job, log = asked(program, *words, env=env, cwd=tmp_path, start_new_session=True)
    assert job is not None and log == str(tmp_path / "rank_00003.log")
    assert (job.module, job.words, job.own_session) == ("gpt.train", ("--run", "a b"), True)


def test_what_would_import_something_else_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment()
    monkeypatch.setattr(os, "environ", env)
    command = (sys.executable, "-m", "gpt.train")
    assert asked(*command, env=env, cwd=tmp_path)[0] is not None
    assert asked(*command, env={**env, "PYTHONPATH": "elsewhere"}, cwd=tmp_path)[0] is None
    assert asked(*command, env={**env, "OMP_NUM_THREADS": "2"}, cwd=tmp_path)[0] is None
    assert asked(*command, env=env, cwd=tmp_path, preexec_fn=print)[0] is None
    assert asked("true", env=env, cwd=tmp_path)[0] is None
    (tmp_path / "gpt").mkdir()
    assert asked(*command, env=env, cwd=tmp_path)[0] is None


def test_exit_status_and_output_are_those_of_the_command(tmp_path: Path) -> None:
    assert fork_server().takes(Job("gpt.train", (), str(tmp_path), environment()))
    assert "type next: optim.lr=VALUE" in run("gpt.train", "optim.lrr=1", cwd=tmp_path, status=2)
    assert run("gpt.generate", "--help", cwd=tmp_path).startswith("usage: python -m gpt.generate")
    assert list(tmp_path.iterdir()) == []
