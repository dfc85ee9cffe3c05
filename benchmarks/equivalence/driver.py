"""Run command lines in one process: import once, then fork for each. ``same_results`` starts it in both checkouts.

    PYTHONPATH=CHECKOUT CHECKOUT/.venv/bin/python benchmarks/equivalence/driver.py JOBS.json

JOBS.json is a list of jobs: ``module``, ``args``, ``cwd``, ``path`` (the PATH), and ``output``, the file into which
the command prints. The last line of that file is the exit status. Uses the standard library only, so that it runs in
either checkout.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


def become(job: dict[str, Any]) -> None:
    """Prepare this forked process for a job: set the current folder, the search paths of modules and programs, and the
    standard streams."""
    os.setsid()
    signal.alarm(job["seconds"])
    os.chdir(job["cwd"])
    os.environ["PATH"] = job["path"]
    sys.path[0] = job["cwd"]
    sys.argv = [job["module"], *job["args"]]
    file = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def run(job: dict[str, Any], names: Path | None = None) -> int:
    """Fork a process that runs the command of a job. Return its exit status.

    Args:
        job: job of JOBS.json.
        names: file in which the process writes the names of the modules that the command has imported; None: the
            process writes no names.
    """
    pid = os.fork()
    if pid == 0:
        become(job)
        try:
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        finally:
            if names is not None:
                names.write_text("\n".join(sorted(sys.modules)))
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:  # killed by its alarm: end what it has started
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return status


def preload(names: list[str]) -> None:
    """Import modules, so that processes that are forked later need not import them."""
    for name in names:
        if not name.endswith("__main__"):
            with suppress(Exception):
                import_module(name)


def main() -> None:
    """Run all jobs of the file. After the first job, import the modules that this job has imported, so that forks for
    later jobs have them."""
    path = Path(sys.argv[1])
    imported = path.with_suffix(".modules")
    for number, job in enumerate(json.loads(path.read_text())):
        status = run(job, None if number else imported)
        if number == 0 and imported.exists():
            preload(imported.read_text().splitlines())
        with Path(job["output"]).open("a") as file:
            file.write(f"exit status {status}\n")


if __name__ == "__main__":
    main()
