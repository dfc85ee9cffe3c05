"""The one way to run a program of the system: with a timeout, and with its own words in the error.

Owns the search path and the error type of everything that goes wrong at run time. Must not know Slurm.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

# Debian keeps daemons and network tools here, and leaves these out of an ordinary user's PATH.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class SandboxError(RuntimeError):
    """Something on this machine did not do what the sandbox needs; the message ends with what that something said."""


def search_path() -> str:
    """The user's PATH, followed by the directories of system programs."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_DIRECTORIES])


def clean_environment(**extra: str) -> dict[str, str]:
    """An environment for daemons: nothing of the caller's, so a sandbox started inside a job behaves like any other."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TZ") if name in os.environ}
    return {**kept, "PATH": search_path(), **extra}


def run(
    args: Sequence[str], *, timeout_s: float = 30.0, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> str:
    """Run a program to its end and return what it printed.

    Raises SandboxError where it is missing, takes longer than ``timeout_s``, or ends with a status other than 0.
    """
    shown = " ".join(args)
    environment = dict(env) if env is not None else {**os.environ, "PATH": search_path()}
    try:
        done = subprocess.run(
            list(args), capture_output=True, text=True, timeout=timeout_s, env=environment, input=stdin, check=False
        )
    except FileNotFoundError as error:
        raise SandboxError(f"{args[0]}: not found in {environment.get('PATH', '')}") from error
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"`{shown}` did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip() or "it printed nothing"
        raise SandboxError(f"`{shown}` ended with status {done.returncode}: {words}")
    return done.stdout


def succeeds(args: Sequence[str], *, timeout_s: float = 30.0) -> bool:
    """True where a program can be run and ends with status 0."""
    try:
        run(args, timeout_s=timeout_s)
    except SandboxError:
        return False
    return True


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, what: str | Callable[[], str], interval_s: float = 0.05
) -> None:
    """Poll until the condition holds; SandboxError naming ``what`` (text, or a function for it) after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"waited {timeout_s:g} s in vain for {what if isinstance(what, str) else what()}")
        time.sleep(interval_s)
