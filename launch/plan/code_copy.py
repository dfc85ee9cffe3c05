"""Copy of the code, taken at submission, that a job runs from, however the checkout changes while the job is pending.

The copies are in ``<output_dir>/<name>/.code/<digest>/``, beside the points: one for each state of the code, shared by
all jobs that run it, requeued jobs included. Python finds the packages there because PYTHONPATH names it first.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runs.environment import ORIGIN, ROOT, code_state, describe_code
from launch.runs.files import write_json
from launch.runs.folder import writing_into
from launch.workload import CodeTree

RUNS_FROM = "LAUNCH_CODE"
"""Names the copy to the job, which must not run anything else where the copy is gone."""


@cache
def code(tree: CodeTree) -> dict[str, Any]:
    """The code of a tree, looked at once: all points of a command are compared with the same."""
    return describe_code(tree.root, tree.files)


def place(run_dir: str | Path, tree: CodeTree) -> Path:
    """Path of the code copy of a run, whether it is there or not.

    Raises:
        ConfigError: a process could not be started from there.
    """
    above = Path(run_dir).parent
    if os.pathsep in str(above):
        raise ConfigError(
            f"copy_code=true and {above}, with a {os.pathsep} in it",
            f"a path that PYTHONPATH can hold, where {os.pathsep} stands between two folders",
            f"output_dir=FOLDER without {os.pathsep}, or copy_code=false",
        )
    return above / ".code" / str(code(tree)["sha256"])[:16]


def take(target: Path, tree: CodeTree) -> None:
    """Copy the files of a tree to ``target``, unless they are there already.

    Raises:
        ConfigError: a file changed meanwhile, or there is no place for a copy.
    """
    if target.is_dir():
        return
    with writing_into(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.parent / f".new-{secrets.token_hex(8)}"
        scratch.mkdir()
    try:
        for name, path in tree.files(tree.root):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, scratch / name)
        # First, since it marks a copy: a program's files are told by git in its checkout, and are all files in a copy.
        write_json(scratch / ORIGIN, {"root": str(tree.root), "git": code_state(tree.root)})
        if describe_code(scratch, tree.files)["sha256"] != code(tree)["sha256"]:
            raise ConfigError(
                f"a file under {tree.root} that changed while it was copied",
                "code that stays as it is",
                "the command again",
            )
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def variables(copy: Path) -> dict[str, str]:
    """Environment with which a job runs from ``copy``.

    PYTHONSAFEPATH keeps ``python -m`` from looking into the current folder, which is the checkout, before PYTHONPATH.
    """
    return {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", RUNS_FROM: str(copy)}


def shell_lines(copy: Path) -> list[str]:
    """Shell lines with which a batch script runs from a copy; what PYTHONPATH held before comes after."""
    before = {"PYTHONPATH": "${PYTHONPATH:+:$PYTHONPATH}"}
    return [f"export {name}={shlex.quote(value)}{before.get(name, '')}" for name, value in variables(copy).items()]


@contextmanager
def running_from(copy: Path | None) -> Iterator[None]:
    """Have the processes that are started meanwhile run from ``copy``; with None from where this one does."""
    if copy is None:
        yield
        return
    before = {name: os.environ.get(name) for name in variables(copy)}
    os.environ.update(variables(copy))
    if before["PYTHONPATH"]:
        os.environ["PYTHONPATH"] += os.pathsep + before["PYTHONPATH"]
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def refuse_other_code() -> None:
    """Raise ConfigError if this process was to run from a copy and does not."""
    copy = os.environ.get(RUNS_FROM)
    if copy and Path(copy) != ROOT:
        raise ConfigError(
            f"code from {ROOT} in a job that runs from {copy}",
            "the copy that copy_code=true made at submission",
            "the same command again, which makes a new one",
        )
