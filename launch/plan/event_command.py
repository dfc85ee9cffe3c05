"""Refusal of a ``launch.on_event`` that no agent could run, as far as the login node can tell."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from shlex import quote

from launch.config import Config
from launch.errors import ConfigError


def refuse_missing_command(config: Config) -> None:
    """Raise ConfigError where the program of ``launch.on_event`` is not there, or cannot be run.

    In a container the agent has other programs than this machine, which are not looked for.
    """
    command = config.launch.on_event_command
    if not command or config.cluster.container is not None or shutil.which(command[0]) is not None:
        return
    program, here = command[0], Path(command[0]).absolute()
    found = f"launch.on_event, and no program {program} on the PATH"
    fix = "launch.on_event=PATH"
    if here.is_file() and os.access(here, os.X_OK):  # named as one of the PATH, and lies here
        fix = quote(f"launch.on_event=[{','.join([str(here), *command[1:]])}]")
    elif here.is_file():
        found, fix = f"launch.on_event={program}, a file that is not executable", f"chmod +x {quote(str(here))}"
    elif os.sep in program:
        found = f"launch.on_event={program}, which is no file"
    raise ConfigError(
        found, "a program on the PATH, or the path of one that the nodes see too", f"{fix}, or launch.on_event=null"
    )
