"""Refusal of folders in which somebody else could change what a job runs.

A job loads submitit's pickle, and reads its config, as its user: whoever can write there runs code as that user. Owns
the rules for folders that are there already; new ones are never writable by others (``launch.runs.files``).
"""

from __future__ import annotations

import stat
from pathlib import Path
from shlex import quote

from launch.errors import ConfigError

JOBS = ".submitit"
"""Folder beside the points with submitit's pickles and the agents' logs."""
SLURM_JOBS = "slurm"
"""Folder in it for those of Slurm's jobs, whose numbers may be those of processes here."""
ELSEWHERE = "on-"
"""Beginning of the folder in it for those of another cluster's jobs, before the name of the cluster."""


def refuse_exposed(run_dir: Path) -> None:
    """Raise ConfigError where others can put something into the folders that a job of ``run_dir`` reads.

    Pickles are code, so nobody else may write beside them, the group included. In the folder of the run, and the one
    above, a group may share its work; a sticky bit (as /tmp has it) keeps what is there from being replaced.
    """
    jobs = run_dir.parent / JOBS
    for folder in (jobs, jobs / SLURM_JOBS, *jobs.glob(f"{ELSEWHERE}*")):
        refuse_writable(folder, stat.S_IWGRP | stat.S_IWOTH)
    refuse_writable(run_dir, stat.S_IWOTH)
    refuse_writable(run_dir.parent, stat.S_IWOTH, unless=stat.S_ISVTX)


def refuse_writable(folder: Path, bits: int, unless: int = 0) -> None:
    """Raise ConfigError where a folder is there and has one of the mode ``bits``, and none of ``unless``."""
    try:
        mode = folder.stat().st_mode
    except OSError:  # not there; or not to be looked at, which is told when it is written to
        return
    if mode & bits and not mode & unless:
        raise ConfigError(
            f"{folder} with mode {stat.S_IMODE(mode):04o}: others can change in it what your jobs run",
            "a folder that nobody else can write to",
            f"chmod -R go-w {quote(str(folder))}, or output_dir=FOLDER for another one",
        )
