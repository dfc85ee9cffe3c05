"""Refusal of a script that cannot start, as far as the login node can tell. Torch-free."""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.errors import ConfigError
from launch.runs.ranges import closest
from launch.runs.wrong_values import in_shell, quoted
from launch.script.arguments import PLACEHOLDER
from launch.script.module import require_module
from launch.script.options import ScriptOptions


def require_program(script: ScriptOptions, *, elsewhere: bool = False) -> None:
    """Raise ConfigError where the program is not there, as far as this machine can tell.

    Args:
        script: the keys of the program.
        elsewhere: the ranks may have search paths, or packages, that this machine does not know.
    """
    if script.workdir is not None and not Path(script.workdir).is_dir():
        raise ConfigError(f"script.workdir={script.workdir}, which is no folder", "a folder", "script.workdir=PATH")
    if script.python is not None and shutil.which(script.python) is None:
        raise ConfigError(
            f"script.python={script.python}, which cannot be run", "an interpreter", f"script.python={sys.executable}"
        )
    if script.path is not None and not Path(script.path).is_file():
        is_folder = Path(script.path).is_dir()
        folder = Path(script.path) if is_folder else Path(script.path).parent
        there = [path.name for path in folder.glob("*.py")] if folder.is_dir() else []
        likely = closest(Path(script.path).name, there) or sorted(there)[:3]
        raise ConfigError(
            f"script.path={script.path}, which is {'a folder' if is_folder else 'no file'}",
            f"a script{', such as ' + ', '.join(likely) if likely else ''}",
            f"script.path={folder / likely[0] if likely else 'train.py'}",
        )
    if script.module is not None and script.python is None:
        pythonpath = (script.env.get("PYTHONPATH") or "").split(os.pathsep)
        unsettled = any(PLACEHOLDER.search(folder) for folder in pythonpath)
        folders = [folder for folder in pythonpath if folder]
        require_module(script.module, Path(script.workdir or "."), folders, elsewhere=elsewhere or unsettled)
    if script.command is not None:
        require_command([str(word) for word in script.command], Path(script.workdir or "."))


def require_command(command: Sequence[str], workdir: Path) -> None:
    """Raise ConfigError where the program of a command is not there, or cannot be executed."""
    program, local = command[0], workdir / command[0]
    if shutil.which(program, path=os.pathsep.join([str(workdir), os.environ.get("PATH", "")])):
        return
    if local.is_file() and os.access(local, os.X_OK):
        return
    typed = f"script.command={shlex.join(command)}"
    if local.is_dir():
        raise ConfigError(f"{typed}, and {program} is a folder", "a program", command_like(command, workdir))
    if local.is_file():
        expected = "a program that its owner may execute, or an interpreter before it"
        raise ConfigError(f"{typed}, and {program} is not executable", expected, f"chmod +x {shlex.quote(str(local))}")
    expected = "a program on the PATH, or in script.workdir"
    raise ConfigError(f"{typed}, and no program {program}", expected, command_like(command, workdir))


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
