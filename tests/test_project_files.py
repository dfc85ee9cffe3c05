"""The files around the code hold together: requirements, versions, workflow; and private parts of libraries."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Callable
from configparser import ConfigParser
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from benchmarks.equivalence import matrix
from launch.agent.after_step import submitted_run_dirs
from launch.agent.node import Node
from launch.slurm import jobs
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
    last = {name: [step["run"] for step in job["steps"] if "run" in step][-1] for name, job in workflow["jobs"].items()}
    assert last == {"quick": "python -m pytest -m quick", "checks": ".ci/run"}
    assert last["quick"] in (ROOT / "CONTRIBUTING.md").read_text(), "as it is typed"
    assert workflow["permissions"] == {"contents": "read"}


def test_uv_finds_every_field_that_setup_cfg_has(setup: ConfigParser) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"python_requires": "requires-python", "install_requires": "dependencies", "long_description": "readme"}
    there = {named.get(key, key) for key in (*setup["metadata"], *setup["options"])} & {
        *("version", "description", "readme", "license", "classifiers", "requires-python", "dependencies"),
    }
    assert {*project["dynamic"]} == there | {"optional-dependencies", "scripts"}
    assert project["name"] == setup["metadata"]["name"]


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


# Private parts of libraries that this project leans on, each behind one module, are as that module expects them.


TAKEN = ("command", "folder", "map_count", "job_name", "partition", "time", "nodes", "ntasks_per_node", "cpus_per_task")
TAKEN += ("gpus_per_node", "qos", "setup", "mem", "signal_delay_s", "comment", "constraint", "exclude", "account")
TAKEN += ("gres", "array_parallelism", "additional_parameters", "srun_args", "teardown")
"""Parameters that ``launch.plan.placement.slurm_resources`` may ask for, and that ``launch.slurm.jobs`` adds."""


def changed(library: str, what: str, module: str) -> str:
    return f"{what} of {library} {version(library)} is not what {module} expects: compare it, and change {module}"


def check_parameters(function: Callable[..., Any], names: tuple[str, ...], message: str) -> None:
    there = inspect.signature(function).parameters
    missing = [name for name in names if name not in there]
    assert not missing, f"{message} (no parameter {', '.join(missing)})"


def test_submitit_writes_the_batch_script_from_the_same_parameters() -> None:
    from submitit.slurm import slurm

    message = changed("submitit", "slurm.slurm._make_sbatch_string", "launch/slurm/jobs.py")
    assert hasattr(slurm, "_make_sbatch_string"), message
    check_parameters(slurm._make_sbatch_string, TAKEN, message)
    needed = [p for p in inspect.signature(slurm._make_sbatch_string).parameters.values() if p.default is p.empty]
    assert [p.name for p in needed] == ["command", "folder"], f"{message} (more is required than command and folder)"
    text = slurm._make_sbatch_string(command="python x", folder="jobs/%j", nodes=2, additional_parameters={"a_b": True})
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in text and "#SBATCH --a-b\n" in text, message


def test_submitit_runs_the_same_modules_and_keeps_the_process_of_a_local_job() -> None:
    from submitit.local.local import LocalJob

    found, what = importlib.util.find_spec(jobs.SUBMISSION), f"module {jobs.SUBMISSION}"
    assert found is not None, changed("submitit", what, "launch/slurm/jobs.py")
    source = inspect.getsource(LocalJob)
    assert "self._process" in source, changed("submitit", "LocalJob._process", "launch/slurm/jobs.py")


def test_submitit_keeps_the_run_folder_where_the_batch_script_looks_for_it(tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission, JobPaths

    folder, node = tmp_path, Node(0, 2, "slurm-9-0-0", is_slurm=True, slurm_job="7_1")
    pickle = JobPaths(folder, "7_1").submitted_pickle
    DelayedSubmission(os.fspath, "the/run").dump(pickle)
    assert submitted_run_dirs(str(folder), node) == ["the/run"], changed(
        "submitit", "its pickle of a job", "launch/agent/after_step.py"
    )


def test_torch_says_whether_cuda_was_initialized_before_a_fork() -> None:
    import torch

    assert callable(torch.cuda._is_in_bad_fork), changed("torch", "cuda._is_in_bad_fork", "launch/agent/fork_server.py")


def test_ddp_has_the_setting_for_its_step_measurements() -> None:
    from torch.nn.parallel import DistributedDataParallel

    name = "_set_ddp_runtime_logging_sample_rate"
    message = changed("torch", f"nn.parallel.DistributedDataParallel.{name}", "gpt/parallel/ddp.py")
    assert hasattr(DistributedDataParallel, name), message
    assert list(inspect.signature(getattr(DistributedDataParallel, name)).parameters) == ["self", "sample_rate"], (
        message
    )


def test_muon_orthogonalizes_one_matrix_in_a_function_of_its_own() -> None:
    from torch.optim import _muon

    message = changed("torch", "optim._muon", "gpt/parallel/optimizer.py")
    named = {"_zeropower_via_newtonschulz": ["grad", "ns_coefficients", "ns_steps", "eps"]}
    named["_adjust_lr"] = ["lr", "adjust_lr_fn", "param_shape"]
    for name, parameters in named.items():
        assert list(inspect.signature(getattr(_muon, name)).parameters) == parameters, f"{message} ({name})"
    assert isinstance(_muon.EPS, float), message


def test_adamw_steps_a_group_without_tensors() -> None:
    from torch.optim import adam

    for function in (adam._fused_adam, adam._multi_tensor_adam):
        source = inspect.getsource(function)
        assert "if len(params) == 0:" in source or "if not params:" in source, changed(
            "torch", f"optim.adam.{function.__name__}", "gpt/parallel/optimizer.py"
        )
