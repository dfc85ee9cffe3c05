"""Refusal of a script that cannot start, as far as the login node can tell. Torch-free."""

from __future__ import annotations

import glob
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.errors import ConfigError
from launch.runs.ranges import closest
from launch.runs.wrong_values import in_shell, quoted
from launch.script.options import ScriptOptions


def require_program(script: ScriptOptions) -> None:
    """Raise ConfigError where the program is not there, as far as this machine can tell."""
    if script.workdir is not None and not Path(script.workdir).is_dir():
        raise ConfigError(f"script.workdir={script.workdir}, which is no folder", "a folder", "script.workdir=PATH")
    if script.python is not None and shutil.which(script.python) is None:
        raise ConfigError(
            f"script.python={script.python}, which cannot be run", "an interpreter", f"script.python={sys.executable}"
        )
    if script.path is not None and not Path(script.path).is_file():
        folder = Path(script.path).parent
        there = [path.name for path in folder.glob("*.py")] if folder.is_dir() else []
        likely = closest(Path(script.path).name, there) or sorted(there)[:3]
        raise ConfigError(
            f"script.path={script.path}, which is no file",
            f"a script{', such as ' + ', '.join(likely) if likely else ''}",
            f"script.path={folder / likely[0] if likely else 'train.py'}",
        )
    if script.module is not None and script.python is None:
        top, workdir = script.module.partition(".")[0], Path(script.workdir or ".")
        inside = (workdir / top).is_dir() or (workdir / f"{top}.py").is_file()
        if not inside and importlib.util.find_spec(top) is None:
            raise ConfigError(
                f"script.module={script.module}, and there is no {top} in {workdir} nor among the installed packages",
                "a module that python -m finds from script.workdir",
                "script.workdir=PATH of the folder it lies in, or script.path=FILE",
            )
    if script.command is not None:
        program = str(script.command[0])
        found = shutil.which(program, path=os.pathsep.join([str(script.workdir), os.environ.get("PATH", "")]))
        local = Path(script.workdir or ".") / program
        if found is None and not os.access(local, os.X_OK):
            raise ConfigError(
                f"script.command={shlex.join(map(str, script.command))}, and no program {program}",
                "a program on the PATH, or in script.workdir",
                command_like([str(word) for word in script.command], Path(script.workdir or ".")),
            )


def command_like(command: Sequence[str], workdir: Path) -> str:
    """Write a command anew with the program that is spelt most like the one that is not there; else an example."""
    program = command[0]
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if Path(folder).is_dir()]
    there = {entry.name for folder in folders for entry in folder.glob(f"{glob.escape(program[:1])}*")}
    local = {f"./{path.name}" for path in workdir.iterdir() if path.is_file() and os.access(path, os.X_OK)}
    likely = closest(program, there | local)
    if not likely:
        return "'script.command=[./train,--fast]'"
    return in_shell("script.command", f"[{','.join(map(quoted, [likely[0], *command[1:]]))}]")
