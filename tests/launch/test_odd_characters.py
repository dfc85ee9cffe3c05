"""Names, paths and arguments with characters that mean something to a shell: they stay what they are."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.agent.ranks import START_RANK
from launch.slurm.jobs import sbatch_text
from tests.support.planning import directives, plan

ODD = """it's $(touch pwned) `touch pwned` "a=b,c"; é * # -x"""


def test_names_and_paths_in_a_batch_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bash reads the script, with ``srun`` a function that tells its arguments."""
    monkeypatch.chdir(tmp_path)
    quoted = '"{}"'.format(ODD.replace('"', '\\"'))
    words = [f"name={quoted}", f"output_dir={quoted}", f"cluster.account={quoted}", f"++cluster.srun_args=[{quoted}]"]
    made = plan(*words, "copy_code=true")
    folder = tmp_path / ODD / ODD
    assert Path(made.run_dir).parent == folder
    text = sbatch_text([made])
    assert {directives(text)[name] for name in ("job-name", "account")} == {shlex.quote(ODD)}
    assert directives(text)["output"] == shlex.quote(f"{folder}/.submitit/slurm/%j_0_log.out")
    told = r"""srun() { printf '%s\0' "$PYTHONPATH" "$@"; }"""
    done = subprocess.run(
        ["bash", "-c", f"{told}\n{text}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0 and done.stderr == ""
    path, *args = done.stdout.split("\0")[:-1]
    assert path == made.code and Path(path).parent == folder / ".code"
    logs = f"{folder}/.submitit/slurm/%j_%t_log"
    assert args[1:5] == ["--output", f"{logs}.out", "--error", f"{logs}.err"]
    assert args[5:6] == [ODD] and args[-1] == str(folder / ".submitit" / "slurm")
    assert list(tmp_path.iterdir()) == []


def test_arguments_and_folders_of_ranks(tmp_path: Path) -> None:
    workdir, logs = tmp_path / ODD, tmp_path / f"logs of {ODD}"
    for folder in (workdir, logs):
        folder.mkdir()
    args = (ODD, "$HOME", "a\nb", "--", "-n", "", "x=1,2")
    words = ("/bin/sh", "-c", START_RANK, "sh", workdir, logs, "/usr/bin/printf", r"%s\0", os.fspath(workdir), *args)
    subprocess.run(words, env={"RANK": "3"}, check=True)
    assert (logs / "rank_00003.log").read_text().split("\0")[:-1] == [str(workdir), *args]
    assert sorted(tmp_path.iterdir()) == sorted([workdir, logs]) and not list(workdir.iterdir())
