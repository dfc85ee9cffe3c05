"""Versions of Python and torch that this project works with, found by trying them.

    python -m benchmarks.equivalence.matrix                                # all that this machine has
    python -m benchmarks.equivalence.matrix --python 3.12 --torch 2.12.0   # one of them
    PIP_EXTRA_INDEX_URL=... python -m benchmarks.equivalence.matrix        # with a package index that has more builds
    python -m benchmarks.equivalence.matrix --any-build 3.11=2.11.0        # CUDA builds too

Each combination of a Python and a torch version gets its own virtual environment. All packages except torch have the
versions of constraints.txt. In each environment the script runs the commands of the login node, a launch of two nodes,
the quick tests, and the tests of ``SUITE``, which start ranks and launches. It installs a CPU build of torch. Without a
CPU build it skips the combination, and the table says so. With ``--any-build`` it installs a CUDA build instead, which
runs on CPUs as well and has a size of gigabytes. With ``none`` as the version of torch it tries only the commands of
the login node, which load no torch. The script prints a dated table, and deletes each environment after its use.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = ("none", "2.11.0", "2.12.0", "2.13.0")
NEED_TORCH = ("torch", "deepspeed", "accelerate")
SIZE = ("model=gpt2_124m", "optim=gpt2", "nodes=2")
CLUSTER = ("cluster=slurm", "cluster.gpus_per_node=8", "cluster.gpu_name=H100", "launch.check_limits=false")
ON_THE_LOGIN_NODE = (
    ("launch", "--version"),
    ("launch", "-m", "nodes=1,2,4", "dry_run=true"),
    ("launch", *SIZE, "parallel=auto", *CLUSTER, "dry_run=true"),
    ("launch", "workload=script", "script.path=examples/plain_ddp.py", "dry_run=true"),
    ("launch.status", "--help"),
    ("launch.report", "--help"),
    ("slurm.sandbox", "--help"),
)
A_LAUNCH = ("launch", "nodes=2", "optim.max_steps=20")
"""Command line of a run of two nodes on this machine, with agents, ranks, checkpoints and a report."""
SUITE = (
    "tests/model/test_gpt.py",
    "tests/model/test_moe.py",
    "tests/parallel/test_engines.py",
    "tests/training/test_execution.py",
    "tests/training/test_resume.py",
    "tests/checkpoint/test_save.py",
    "tests/launch/test_sweep.py",
)
"""Test files to run in addition to the quick tests. They test what changes between versions of torch: FSDP2, DTensor,
pipelines, the compiler, sharded checkpoints and elastic agents. The last file launches the sweep of the README.
"""
LIMIT_S = 4 * 3600
CLEAN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that commands do not get, because they would add packages of another environment."""


@dataclass(frozen=True)
class Row:
    """Result of one combination of a Python version and a torch version."""

    python: str
    torch: str
    result: str
    versions: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the combinations and print the table. Returns the exit status: 1 if a test or a command fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=pair, metavar="PYTHON=TORCH", help="in place of --python and --torch")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--any-build", action="store_true", help="take CUDA where there is no build for CPUs")
    parser.add_argument(
        "--tests", metavar="WORDS", help="arguments of pytest in place of both runs: --tests='-m quick'"
    )
    options = parser.parse_args(arguments)
    runs = [["-m", "quick"], list(SUITE)] if options.tests is None else [shlex.split(options.tests)]
    rows = []
    for python, torch in options.pairs or itertools.product(options.python, options.torch):
        rows.append(attempt(python, torch, options.any_build, runs))
        print(line(rows[-1]), flush=True)
    text = table(rows)
    if options.output:
        options.output.write_text(text)
    print(f"\n{text}")
    return int(any("failed" in row.result for row in rows))


def pair(words: str) -> tuple[str, str]:
    """Return the Python version and the torch version in text such as 3.12=2.13.0. The torch version is ``none`` if the
    text has none."""
    python, _, torch = words.partition("=")
    return python, torch or "none"


def attempt(python: str, torch: str, any_build: bool, runs: Sequence[Sequence[str]]) -> Row:
    """Return the result of one combination, tried in a virtual environment that is deleted afterwards.

    Args:
        python: version of Python.
        torch: version of torch; ``none`` tries only the commands that need no torch.
        any_build: True also accepts CUDA builds of torch.
        runs: arguments of pytest, for each run of tests.
    """
    interpreter = find_interpreter(python)
    if interpreter is None:
        return Row(python, torch, "not tried: no such interpreter on this machine")
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        venv = Path(folder) / "venv"
        run(str(interpreter), "-m", "venv", str(venv))
        run_python = str(venv / "bin" / "python")
        problem = install(run_python, torch, any_build, Path(folder))
        if problem:
            return Row(python, torch, problem)
        results = [type_commands(run_python, ON_THE_LOGIN_NODE, "of the login node")]
        if torch != "none":
            results.append(type_commands(run_python, [(*A_LAUNCH, f"run_dir={folder}/run")], "that launches"))
            results += [run_tests(run_python, words) for words in runs]
        return Row(python, torch, "; ".join(results), versions(run_python))


def find_interpreter(version: str) -> Path | None:
    """Return the newest interpreter of a version such as 3.12: this interpreter, one of pyenv, or one on the PATH.
    None: this machine has none.
    """
    if platform.python_version().startswith(f"{version}."):
        return Path(sys.executable)
    places = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    number = re.compile(r"versions/\d+\.\d+\.(\d+)/")
    pyenv = sorted((p for p in places if number.search(str(p))), key=lambda p: int(number.findall(str(p))[0]))
    found = shutil.which(f"python{version}")
    return pyenv[-1] if pyenv else Path(found) if found else None


def install(python: str, torch: str, any_build: bool, folder: Path) -> str:
    """Install torch and the packages that the project needs. Return an empty string, or the reason why this fails.

    Args:
        python: path of the interpreter of a virtual environment.
        torch: version of torch; ``none`` installs no torch.
        any_build: True also accepts a CUDA build of torch.
        folder: folder for temporary files.
    """
    # Of torch's modules a tenth is ever imported, and Python compiles those as it imports them.
    pip = (python, "-m", "pip", "install", "-q", "--prefer-binary", "--no-compile")
    builds = [f"torch=={torch}+cpu"] + [f"torch=={torch}"] * any_build
    if torch != "none" and all(run(*pip, "--only-binary=torch", one, check=False).returncode for one in builds):
        return f"not tried: no build {'' if any_build else 'for CPUs '}in the package index"
    needed, constraints = folder / "needed.txt", folder / "constraints.txt"
    needed.write_text("\n".join(requirements(torch != "none")) + "\n")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(text for text in lines if not text.startswith("torch==")) + "\n")
    done = run(*pip, "-c", str(constraints), "-r", str(needed), check=False)
    if done.returncode:
        return f"failed: {last_line(done)}"
    return ""


def requirements(with_torch: bool) -> Iterator[str]:
    """Yield the requirements in setup.cfg. With torch, also those of the tests; without torch, only packages that do
    not need torch.
    """
    text = (ROOT / "setup.cfg").read_text()
    keys = ("install_requires", "test") if with_torch else ("install_requires",)
    for key in keys:
        (block,) = re.findall(rf"^{key} =\n((?:    .*\n|#.*\n)+)", text, re.MULTILINE)
        for word in (found.strip() for found in block.splitlines()):
            name = re.split(r"[<>=\[]", word)[0]
            if not word.startswith("#") and name != "torch" and (with_torch or name not in NEED_TORCH):
                yield word


def type_commands(python: str, commands: Sequence[Sequence[str]], kind: str) -> str:
    """Run ``python -m COMMAND`` for one command after another, until one fails. Return as text the failure, or that
    all commands passed.

    Args:
        python: path of the interpreter.
        commands: words after ``-m`` of each command.
        kind: words after "commands" in the text, such as ``of the login node``.
    """
    for command in commands:
        done = run(python, "-m", *command, check=False)
        if done.returncode:
            return f"failed: python -m {' '.join(command)}: {last_line(done)}"
    return f"{len(commands)} command{'s' if len(commands) > 1 else ''} {kind} passed"


def run_tests(python: str, words: Sequence[str]) -> str:
    """Run tests of this checkout and return pytest's last line. Failures are printed to standard error.

    ``words`` are further arguments of pytest, such as files and ``-k NAME``.
    """
    done = run(python, "-m", "pytest", "-q", "-n", "2", *words, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr, flush=True)
    return last_line(done).strip("= ")


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in this checkout, with the packages of the command's own environment only. Return the finished
    process, with its output as text.

    Raises:
        CalledProcessError: the command fails, and ``check`` is True.
        TimeoutExpired: the command takes longer than ``LIMIT_S`` seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key not in CLEAN}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=check, timeout=LIMIT_S, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command has printed and that is not blank."""
    return next((text.strip() for text in reversed(done.stdout.splitlines()) if text.strip()), "")


def versions(python: str) -> str:
    """Return the versions of Python and of the most important packages as text."""
    names = "('torch', 'numpy', 'hydra-core', 'deepspeed')"
    code = f"""
import platform
from importlib import metadata
found = [f"{{name}} {{metadata.version(name)}}" for name in {names} if any(metadata.distributions(name=name))]
print(", ".join([f"Python {{platform.python_version()}}", *found]))
"""
    return last_line(run(python, "-c", code, check=False))


def line(row: Row) -> str:
    """Return a row as a line of the Markdown table."""
    return f"| {row.python} | {row.torch} | {row.result} | {row.versions} |"


def table(rows: Sequence[Row]) -> str:
    """Return the page: the table, the commit, the date and the platform."""
    commit = run("git", "describe", "--always", "--dirty", check=False).stdout.strip()
    head = [
        "# Versions that were tried",
        "",
        f"`python -m benchmarks.equivalence.matrix`, commit {commit}, {datetime.date.today()}, {platform.platform()}.",
        "`none` is a login node, whose commands load no torch. A build for CPUs says so (`+cpu`); the others are those",
        "with CUDA, run on CPUs over gloo. With torch: the commands, a launch of two nodes, and tests.",
        "",
        "| Python | torch | result | versions |",
        "|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*head, *map(line, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
