"""The files around the code hold together: requirements, constraints, setup.cfg, versions tried, and the workflow."""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from benchmarks.equivalence import matrix
from tests.support.commands import ROOT

LOCKS = ("requirements.lock", "requirements-cuda.lock")
LOCKED_EXTRAS = ("data", "hf", "wandb", "gpu", "remote", "float8")


def pins(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package that a requirements file pins."""
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / name).read_text(), flags=re.IGNORECASE)
    found = (re.match(r"([\w.\-]+)==(\S+)", block) for block in blocks)
    hashes = (len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)) for block in blocks)
    return {canonicalize_name(m[1]): (m[2], number) for m, number in zip(found, hashes) if m}


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def requirements(text: str) -> dict[str, Requirement]:
    """Requirements of a key of setup.cfg, by name."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def test_what_is_installed_by_hashes_is_what_the_tests_ran_with(setup: ConfigParser) -> None:
    rest, cuda = (pins(name) for name in LOCKS)
    assert "torch" in cuda and not rest.keys() & cuda.keys()
    assert {"torchao", "nvidia-ml-py"} <= rest.keys(), "the same for every build of torch"
    locked = rest | cuda
    assert all(number > 0 for _, number in locked.values())
    extras = setup["options.extras_require"]
    needed = requirements("\n".join([setup["options"]["install_requires"], *(extras[name] for name in LOCKED_EXTRAS)]))
    for name, requirement in needed.items():
        assert requirement.specifier.contains(locked[name][0]), f"{requirement} and {locked[name][0]} locked: .ci/lock"
    constrained = pins("constraints.txt")
    assert {name: v for name, (v, _) in locked.items() if name in constrained} == {
        name: v for name, (v, _) in constrained.items() if name in locked
    }, "run .ci/lock after a change of constraints.txt"


def test_no_file_of_requirements_says_where_packages_come_from() -> None:
    texts = "".join((ROOT / name).read_text() for name in (*LOCKS, "constraints.txt"))
    assert "://" not in texts and "-index" not in texts and "find-links" not in texts


def test_every_extra_is_pinned(setup: ConfigParser) -> None:
    constrained = pins("constraints.txt")
    named = set(chain.from_iterable(requirements(text) for text in setup["options.extras_require"].values()))
    assert named <= constrained.keys()


def test_the_workflow_runs_the_checks_of_this_project() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert workflow["permissions"] == {"contents": "read"}


def test_the_matrix_installs_what_setup_cfg_says(setup: ConfigParser) -> None:
    login, whole = (requirements("\n".join(matrix.requirements(with_torch))) for with_torch in (False, True))
    needed = requirements(setup["options"]["install_requires"]).keys()
    assert login.keys() == needed - {"torch", "deepspeed"}
    assert whole.keys() == needed - {"torch"} | requirements(setup["options.extras_require"]["test"]).keys()


def test_the_matrix_finds_interpreters_and_leaves_out_others() -> None:
    here = ".".join(map(str, sys.version_info[:2]))
    assert matrix.find_interpreter(here) == Path(sys.executable)
    assert matrix.attempt("2.1", "none", False, ()).result == "not tried: no such interpreter on this machine"


def test_the_matrix_is_told_which_pairs_to_try() -> None:
    assert [matrix.pair(words) for words in ("3.12=2.13.0", "3.13")] == [("3.12", "2.13.0"), ("3.13", "none")]
    assert all((ROOT / path).is_file() for path in matrix.SUITE)


def test_no_version_that_is_accepted_has_failed(setup: ConfigParser) -> None:
    table = (ROOT / "benchmarks" / "equivalence" / "matrix.md").read_text()
    rows = re.findall(r"^\| (3\.\d+) \| (\S+) \| (.*?) \|", table, re.MULTILINE)
    accepted = SpecifierSet(setup["options"]["python_requires"])
    assert rows
    assert not any("failed" in result for python, _, result in rows if accepted.contains(f"{python}.1"))


def test_ranks_of_a_benchmark_can_import_what_they_run() -> None:
    """Functions and classes of a script's own ``__main__`` cannot be unpickled by the processes that it starts."""
    scripts = [path for path in (ROOT / "benchmarks").rglob("*.py") if "run_distributed(" in path.read_text()]
    started = [path for path in scripts if '__name__ == "__main__"' in path.read_text()]
    assert started
    for path in started:
        assert f"sys.exit({path.stem}.main())" in path.read_text(), path
