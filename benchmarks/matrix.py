"""Versions of Python and torch that this project works with, found by trying them: ``python benchmarks/matrix.py``.

    python benchmarks/matrix.py                                             # all, as far as they are on this machine
    python benchmarks/matrix.py --python 3.12 --torch 2.12.0                # one of them
    PIP_EXTRA_INDEX_URL=... python benchmarks/matrix.py                     # with a package index that has more builds

Each combination gets a virtual environment of its own, with the constraints but for torch, and runs the quick tests of
the checkout. torch is installed as a build for CPUs only: a combination without one is left out in words, rather than
with gigabytes of CUDA. ``none`` in place of a version of torch tries the commands of the login node, which load no
torch. The result is a table with its date; the environments are deleted afterwards.
"""

from __future__ import annotations

import argparse
import datetime
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

ROOT = Path(__file__).resolve().parents[1]
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
LIMIT_S = 3600
CLEAN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables by which another environment would get in."""


@dataclass(frozen=True)
class Row:
    """Result of one combination."""

    python: str
    torch: str
    result: str
    versions: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the combinations and print the table; 1 where a test or a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--tests", default="-m quick", metavar="WORDS", help="arguments of pytest: --tests='-m quick'")
    options = parser.parse_args(arguments)
    rows = []
    for python in options.python:
        for torch in options.torch:
            rows.append(attempt(python, torch, shlex.split(options.tests)))
            print(line(rows[-1]), flush=True)
    text = table(rows)
    if options.output:
        options.output.write_text(text)
    print(f"\n{text}")
    return int(any("failed" in row.result for row in rows))


def attempt(python: str, torch: str, tests: Sequence[str]) -> Row:
    """Try one combination in an environment that is deleted afterwards."""
    interpreter = find_interpreter(python)
    if interpreter is None:
        return Row(python, torch, "not tried: no such interpreter on this machine")
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        venv = Path(folder) / "venv"
        run(str(interpreter), "-m", "venv", str(venv))
        run_python = str(venv / "bin" / "python")
        problem = install(run_python, torch, Path(folder))
        if problem:
            return Row(python, torch, problem)
        result = login_node(run_python) if torch == "none" else quick_tests(run_python, tests)
        return Row(python, torch, result, versions(run_python))


def find_interpreter(version: str) -> Path | None:
    """The newest interpreter of a version such as 3.12: this one, of pyenv's, or on the PATH."""
    if platform.python_version().startswith(f"{version}."):
        return Path(sys.executable)
    places = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    number = re.compile(r"versions/\d+\.\d+\.(\d+)/")
    pyenv = sorted((p for p in places if number.search(str(p))), key=lambda p: int(number.findall(str(p))[0]))
    found = shutil.which(f"python{version}")
    return pyenv[-1] if pyenv else Path(found) if found else None


def install(python: str, torch: str, folder: Path) -> str:
    """Install torch and what the project needs; what stood against it, or an empty string."""
    pip = (python, "-m", "pip", "install", "-q", "--prefer-binary")
    if torch != "none":
        done = run(*pip, "--only-binary=torch", f"torch=={torch}+cpu", check=False)
        if done.returncode:
            return "not tried: no build for CPUs in the package index"
    needed, constraints = folder / "needed.txt", folder / "constraints.txt"
    needed.write_text("\n".join(requirements(torch != "none")) + "\n")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(text for text in lines if not text.startswith("torch==")) + "\n")
    done = run(*pip, "-c", str(constraints), "-r", str(needed), check=False)
    if done.returncode:
        return f"failed: {last_line(done)}"
    return ""


def requirements(with_torch: bool) -> Iterator[str]:
    """Requirements of setup.cfg: with the tests, or without all that needs torch."""
    text = (ROOT / "setup.cfg").read_text()
    keys = ("install_requires", "test") if with_torch else ("install_requires",)
    for key in keys:
        (block,) = re.findall(rf"^{key} =\n((?:    .*\n|#.*\n)+)", text, re.MULTILINE)
        for word in (found.strip() for found in block.splitlines()):
            name = re.split(r"[<>=\[]", word)[0]
            if not word.startswith("#") and name != "torch" and (with_torch or name not in NEED_TORCH):
                yield word


def login_node(python: str) -> str:
    """Type the commands of the login node."""
    for command in ON_THE_LOGIN_NODE:
        done = run(python, "-m", *command, check=False)
        if done.returncode:
            return f"failed: python -m {' '.join(command)}: {last_line(done)}"
    return f"{len(ON_THE_LOGIN_NODE)} commands of the login node passed"


def quick_tests(python: str, tests: Sequence[str]) -> str:
    """Run the tests that start no process."""
    done = run(python, "-m", "pytest", "-n", "0", "-q", *tests, check=False)
    return last_line(done).strip("= ")


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, with the packages of its own environment only."""
    environment = {key: value for key, value in os.environ.items() if key not in CLEAN}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=check, timeout=LIMIT_S, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line with text that a command has printed."""
    return next((text.strip() for text in reversed(done.stdout.splitlines()) if text.strip()), "")


def versions(python: str) -> str:
    """Versions as they were installed."""
    names = "('torch', 'numpy', 'hydra-core', 'deepspeed')"
    code = f"""
import platform
from importlib import metadata
found = [f"{{name}} {{metadata.version(name)}}" for name in {names} if any(metadata.distributions(name=name))]
print(", ".join([f"Python {{platform.python_version()}}", *found]))
"""
    return last_line(run(python, "-c", code, check=False))


def line(row: Row) -> str:
    """A row of the table."""
    return f"| {row.python} | {row.torch} | {row.result} | {row.versions} |"


def table(rows: Sequence[Row]) -> str:
    """The table, with what it was made of."""
    commit = run("git", "describe", "--always", "--dirty", check=False).stdout.strip()
    head = [
        "# Versions that were tried",
        "",
        f"`python benchmarks/matrix.py`, commit {commit}, {datetime.date.today()}, {platform.platform()}.",
        "torch only as a build for CPUs; `none` is a login node, whose commands load no torch.",
        "",
        "| Python | torch | result | versions |",
        "|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*head, *map(line, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
