"""A program of one's own: modules that are refused, arguments as they were typed, and packages named as ours."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.script import (
    ScriptConfig,
    ScriptOptions,
    ScriptWorkload,
    Style,
    require_module,
    require_program,
    written_options,
)
from tests.support.commands import ROOT, TIMEOUT_S, environment, python, run
from tests.support.planning import refused

SCRIPT = ["workload=script", "script.path=x.py"]


def config_of(*words: str) -> ScriptConfig:
    config = typed_config(compose_launch([*SCRIPT, *words]))
    assert isinstance(config, ScriptConfig)
    config.validate()
    return config


def arguments(*words: str) -> list[str]:
    """Arguments that the program of these overrides gets on three nodes."""
    config = config_of("nodes=3", *words)
    return list(ScriptWorkload().command(config, RunFolder("/runs/a"), attempt=2).args[2:])


@pytest.mark.parametrize(
    ("typed", "got"),
    [
        ("script.args='--n ${nodes}'", ["--n", "3"]),
        ("script.args='--n=${world_size}'", ["--n=3"]),
        ("script.args='--out ${run_dir}/x-${attempt}'", ["--out", "/runs/a/x-2"]),
        ("script.args=['${nodes}',b]", ["3", "b"]),
        ("script.options.n='${nodes}'", ["--n=3"]),
        ("script.options.n='\\${nodes}'", ["--n=${nodes}"]),
        ("script.options.x='{nodes} of {step:04d}'", ["--x={nodes} of {step:04d}"]),
        ("""script.options.x='{"nodes": [1]}'""", ['--x={"nodes": [1]}']),
    ],
)
def test_values_of_the_run_are_filled_in_and_other_braces_stay(typed: str, got: list[str]) -> None:
    assert arguments(typed) == got


@pytest.mark.parametrize(
    "value",
    [[[1, 2], [3]], [["a b", "c,d"], []], [{"lr": 0.5, "tags": ["x", None]}], ["a", "b c", "d=e"], [1, 2.5, True]],
)
def test_a_program_of_hydra_reads_the_lists_that_were_typed(value: Any) -> None:
    (word,) = written_options({"x": value}, Style.hydra)
    read = OverridesParser.create().parse_override(word)
    assert read.key_or_group == "x" and read.value() == value


def test_lists_in_lists_go_through_to_a_program_of_hydra() -> None:
    assert arguments("script.options.x=[[1,2],[3]]", "script.style=hydra") == ["x=[[1,2],[3]]"]


def test_a_path_with_an_equals_sign_reaches_a_program_of_hydra_as_one_text() -> None:
    folder = "/data/outputs/n/nodes=2,optim.lr=1e-3"
    (word,) = written_options({"hydra": {"run": {"dir": f"{folder}/hydra"}}}, Style.hydra)
    parsed = OverridesParser.create().parse_override(word)
    assert parsed.key_or_group == "hydra.run.dir" and parsed.value() == f"{folder}/hydra"


# Modules that ``python -m`` would not run.


SAYS = "print('ran')\n"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder with packages and modules of each kind, and beside it a zip file and a second folder of a namespace."""
    folder = tmp_path / "work"
    files = {
        "work/alone.py": SAYS,
        "work/whole/__init__.py": "raise SystemExit('imported')\n",  # python -m imports it, the launcher must not
        "work/package/__init__.py": "",
        "work/package/train.py": SAYS,
        "work/package/inner/__init__.py": "",
        "work/package/inner/__main__.py": SAYS,
        "work/space/here.py": SAYS,
        "other/space/there.py": SAYS,
        "other/extended/away.py": SAYS,
        "work/extended/__init__.py": "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n",
    }
    files["other/extended/__init__.py"] = files["work/extended/__init__.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("zipped/__init__.py", "")
        packed.writestr("zipped/train.py", SAYS)
    return folder


RUN_ALL = """
import os, runpy, sys
for name in sys.argv[1:]:
    if not (pid := os.fork()):
        status = 1
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
            status = 0
        finally:
            os._exit(status)
    print(name, not os.waitpid(pid, 0)[1], file=sys.stderr)
"""
"""Program that runs each module in a process of its own, as ``python -m`` does, and prints whether it ran."""


def runs(modules: Sequence[str], workdir: Path, pythonpath: Sequence[str]) -> dict[str, bool]:
    """Return for each module whether Python itself runs it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *modules],
        cwd=workdir,
        env=environment(PYTHONPATH=os.pathsep.join(pythonpath)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    found = [line.rpartition(" ") for line in done.stderr.splitlines()]
    return {name: ran == "True" for name, _, ran in found if name in modules}


MODULES = (
    *("alone", "package.train", "package.inner", "package.inner.__main__", "space.here", "space.there"),
    *("zipped.train", "extended.away"),
    *("aloen", "alone.train", "package", "package.trian", "package.inner.train", "space", "space.nowhere"),
    *("zipped", "zipped.nothere", "nowhere.train", "package.", ".package", "whole.nothere"),
)


def test_a_module_is_refused_where_python_would_not_run_it(workdir: Path) -> None:
    elsewhere = [str(workdir.parent / "other"), str(workdir.parent / "packed.zip")]
    before, accepted, proposed = set(sys.modules), {}, set[str]()
    for module in MODULES:
        script = ScriptOptions(module=module, workdir=str(workdir), env={"PYTHONPATH": os.pathsep.join(elsewhere)})
        accepted[module] = True
        try:
            require_program(script)
        except ConfigError as refusal:
            accepted[module] = False
            assert refusal.found.startswith(f"script.module={module}, ")
            if not refusal.fix.endswith(("MODULE", "FILE")):
                proposed.add(refusal.fix.removeprefix("script.module="))
    assert not {"package", "whole", "space", "zipped", "extended"} & (set(sys.modules) - before)
    ran = runs([*MODULES, *proposed], workdir, elsewhere)
    assert accepted == {module: ran[module] for module in MODULES}
    assert proposed and all(ran[module] for module in proposed)


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("package.trian", "script.module=package.train"),
        ("package.iner", "script.module=package.inner"),
        ("package", "script.module=package.train"),
        ("alone.train", "script.module=alone"),
    ],
)
def test_the_module_that_was_meant_is_proposed(module: str, fix: str, workdir: Path) -> None:
    refusal = refused(require_module, module, workdir)
    assert refusal.fix == fix


def test_nothing_is_refused_that_this_machine_cannot_know(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:
        """As an editable install puts one into ``sys.meta_path``."""

        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
            if name != "mapped":
                return None
            return spec_from_file_location(name, workdir / "package" / "__init__.py")

    refused(require_module, "mapped.train", workdir)
    require_module("mapped.train", workdir, elsewhere=True)  # in an image, or by what cluster.setup sets
    with pytest.raises(ConfigError):
        require_module("package.nothere", workdir, elsewhere=True)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    require_module("mapped.train", workdir)
    script = ScriptOptions(module="later", workdir=str(workdir), env={"PYTHONPATH": "%{run_dir}/code"})
    require_program(script)


def test_the_launcher_refuses_it_before_it_submits(tmp_path: Path) -> None:
    said = run("launch workload=script script.module=launch.stauts cluster=local", cwd=tmp_path, status=2)
    assert "type next: script.module=launch.status\n" in said
    assert list(tmp_path.iterdir()) == []


# A user's project may have a launch.py, a gpt.py, configs/ and slurm/ of its own: ``gpt_launch`` works beside them.


OWN_PACKAGES = """
import sys, time
from pathlib import Path
import configs, gpt, launch, slurm
from gpt_launch import worker

assert {module.MINE for module in (configs, gpt, launch, slurm)} == {"configs", "gpt", "launch", "slurm"}
run = worker.attach()
saved = Path(run.checkpoint_dir, "step.txt") if run.checkpoint_dir else None
first = int(saved.read_text()) if saved and saved.exists() else 0
for step in range(first + 1, int(sys.argv[1]) + 1):
    run.record(step, loss=1 / step, samples=8)
    if len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.2)
    if run.stop_requested():
        if run.rank == 0:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(str(step))
        run.saved(step)
        break
"""


def make_project(folder: Path) -> Path:
    """Write a project that uses all four names of the packages, with a script that imports them; return its folder."""
    for package in ("configs", "slurm"):
        (folder / package).mkdir(parents=True)
    for name, file in {name: f"{name}.py" for name in ("launch", "gpt")}.items():
        (folder / file).write_text(f"MINE = {name!r}\n")
    for name in ("configs", "slurm"):
        (folder / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    (folder / "train.py").write_text(OWN_PACKAGES)
    return folder


def point(project: Path, nodes: int) -> RunFolder:
    """Return the run folder of the sweep's point with so many nodes, which its other arguments name too."""
    [found] = (project / "outputs" / "mine").glob(f"nodes={nodes}*")
    return RunFolder(found)


def gpt_launch(project: Path, *args: str, status: int = 0) -> str:
    """Run ``gpt-launch`` in the project, as one types it; return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("PYTHONSAFEPATH", None)  # the working directory comes first on sys.path, as for a user
    done = subprocess.run(
        [sys.executable, "-m", "gpt_launch", *args], cwd=project, env=environment, text=True, capture_output=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def test_a_sweep_of_a_script_status_and_report(project: Path) -> None:
    words = ("workload=script", "script.path=train.py", "script.args=[5]", "name=mine", "launch.report_files=[md]")
    assert "Sweep 1: nodes=1,2" in gpt_launch(project, "-m", "nodes=1,2", *words)
    assert [r["step"] for r in read_records(point(project, 2).metrics(0))] == [1, 2, 3, 4, 5], (
        "worker, beside a launch.py"
    )
    status = gpt_launch(project, "status", "outputs")
    assert status.count("finished") == 2
    refused = gpt_launch(project, "status", "nowhere", status=2)
    assert "type next: gpt-launch status outputs" in refused, "python -m launch would run the project's launch.py"
    assert "nodes=2" in gpt_launch(project, "report", "outputs/mine")
    assert gpt_launch(project, "cancel", "--help").startswith("usage: gpt-launch cancel")


def test_the_gpt_is_the_project_s_own(project: Path) -> None:
    words = ("model=tiny_116k", "optim.max_steps=2", "data.max_bytes=200000", "name=own", "launch.report_files=[md]")
    gpt_launch(project, *words)
    [metrics] = (project / "outputs" / "own").glob("*/metrics")
    assert [r["step"] for r in read_records(RunFolder(metrics.parent).metrics(0))] == [1, 2]
    assert "whole" in gpt_launch(project, "verify", "outputs")


WORKING = """
import sys
from pathlib import Path

Path(sys.argv[1]).write_text(str(Path.cwd()))
"""


def test_a_program_works_in_a_folder_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WORKING)
    words = "workload=script script.path=train.py script.args=[result.txt] name=own cluster=local nodes=1"
    run("launch", *words.split(), "script.workdir=${run_dir}/files", "launch.report_files=[]", cwd=tmp_path)
    [result] = (tmp_path / "outputs" / "own").glob("*/files/result.txt")
    assert Path(result.read_text()) == result.parent.resolve()


def test_gpt_launch_worker_is_launch_worker_without_a_launch_py(tmp_path: Path) -> None:
    code = "from gpt_launch import worker; import launch.worker; assert worker is launch.worker"
    python(code, cwd=tmp_path)
