"""What ranks run: code that changes between attempts or is copied, and containers by pyxis or Apptainer."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.config import ClusterKind
from launch.config.cluster import ContainerRuntime
from launch.config.compose import workload_of
from launch.doctor.findings import check_container, container_problem
from launch.plan import placement as container
from launch.plan.placement import agent_words, copy_code
from launch.runs.environment import PACKAGES, changes, code_state, describe_code
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, write_json
from launch.runs.records import read_records
from launch.slurm.checks import Level
from launch.slurm.jobs import sbatch_text
from tests.support.commands import ROOT, TINY, descendants, ranks_of, run, start, start_fork, wait_for
from tests.support.doctor_facts import FACTS
from tests.support.planning import config_of, plan, refused
from tests.support.runs import causes, paced, write_program


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Our packages in a folder of their own, to be changed."""
    for package in PACKAGES:
        # With what is compiled already, but for files that another process is about to rename.
        shutil.copytree(ROOT / package, tmp_path / "checkout" / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    return tmp_path / "checkout"


def edit(checkout: Path, text: str) -> None:
    path = checkout / "gpt" / "parallel" / "engine.py"
    path.write_text(path.read_text() + text)


def environment(folder: RunFolder, attempt: int) -> Any:
    return json.loads(folder.environment(attempt).read_text())


def test_each_changed_file_is_named(checkout: Path) -> None:
    before = {"code": describe_code(checkout), "git": {"commit": "a" * 40}}
    edit(checkout, "# changed\n")
    (checkout / "gpt" / "new.py").write_text("")
    (checkout / "configs" / "optim" / "quick.yaml").unlink()
    (checkout / "gpt" / "notes.txt").write_text("no code")
    now = {"code": describe_code(checkout), "git": {"commit": "b" * 40}}
    assert changes(before, now) == [
        "configs/optim/quick.yaml removed, gpt/new.py added, gpt/parallel/engine.py changed "
        "(commit aaaaaaaaaaaa -> bbbbbbbbbbbb)"
    ]
    assert changes(now, {**now, "git": {"commit": "c" * 40}}) == [], "a commit that touches none of the files"


def test_changed_libraries_are_named_and_unknown_ones_are_not() -> None:
    before = {"software": {"python": "3.11.2", "torch": "2.12.0", "cuda": "12.8", "deepspeed": "0.19.8"}}
    now = {"software": {"python": "3.11.2", "torch": "2.13.0"}, "code": {"files": {}}}
    assert changes(before, now) == ["deepspeed 0.19.8 -> not installed", "torch 2.12.0 -> 2.13.0"]


def test_a_copy_has_the_same_files_and_commit(tmp_path: Path) -> None:
    target, config = tmp_path / "copy", config_of("cluster=slurm", *TINY)
    tree = workload_of(config).code(config)
    copy_code(target, tree)
    copy_code(target, tree)
    copied, original = describe_code(target), describe_code()
    assert (copied["sha256"], copied["files"]) == (original["sha256"], original["files"])
    assert copied["is_snapshot"] and not original["is_snapshot"]
    assert code_state(target) == code_state()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"], "nothing half-made is left"


def test_changed_code_gives_a_warning_or_a_refusal(checkout: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = [*TINY, "optim.max_steps=2", "eval.interval=0", f"run_dir={folder.path}"]
    there = {"cwd": tmp_path, "PYTHONPATH": str(checkout)}
    run("gpt.train", *words, **there)
    assert environment(folder, 1)["code"]["root"] == str(checkout)
    folder.record_event("attempt_ended", attempt=1, cause="node_failed")  # so that there is something to go on with
    edit(checkout, "# changed\n")
    text = run("launch launch.report_files=[md]", *words, **there)
    assert text.count("changed since attempt 1: gpt/parallel/engine.py changed") == 1, text
    assert "changed since attempt 1: gpt/parallel/engine.py changed" in folder.log(2, 0).read_text()
    changed = select_events(folder.read_events(), "code_changed")
    assert [(e["attempt"], e["since"], e["cause"]) for e in changed] == [(2, 1, "gpt/parallel/engine.py changed")]
    edit(checkout, "# and again\n")
    write_json(folder.environment(2), {**environment(folder, 2), "git": {"commit": "a" * 40}})
    text = run("launch require_same_code=true", *words, status=2, **there)
    assert "since attempt 2 of" in text and "git checkout aaaaaaaaaaaa, require_same_code=false to continue" in text
    assert folder.attempts() == [1, 2]
    text = run("gpt.train require_same_code=true", *words, status=2, **there)  # torchrun's road has no login node
    assert "gpt/parallel/engine.py changed" in text


@pytest.mark.parametrize("words", [["copy_code=true"], []], ids=["snapshot", "checkout"])
def test_a_run_with_a_copy_of_its_code_survives_an_edit(words: list[str], checkout: Path, tmp_path: Path) -> None:
    folder, (_, hurry) = RunFolder(tmp_path / "outputs" / "run"), paced(tmp_path)
    every = [*TINY, "optim.max_steps=20", "eval.interval=0", "checkpoint.interval=5", "require_same_code=true", *words]
    every.append("launch.report_files=[md]")
    extra = {"PYTHONPATH": f"{checkout}{os.pathsep}{tmp_path / 'paced'}", "HURRY": str(hurry)}
    # A copy takes the place of the folder that was typed in, which an interpreter imports from as it starts.
    begin = start if words else start_fork
    process = begin("launch", *every, f"run_dir={folder.path}", cwd=checkout, log=tmp_path / "log", **extra)
    wait_for(lambda: len(read_records(folder.metrics(0))) > 6 or process.poll() is not None, "a checkpoint")
    edit(checkout, "raise RuntimeError('half an edit')\n" if words else "print('changed')\n")
    os.kill(ranks_of(descendants(process.pid))[0], signal.SIGKILL)
    hurry.touch()
    status = process.wait(timeout=200)
    text = (tmp_path / "log").read_text()
    if words:
        assert status == 0 and causes(folder) == ["crashed", "finished"], text
        copy = environment(folder, 2)["code"]
        assert copy["is_snapshot"] and Path(copy["root"]).parent == tmp_path / "outputs" / ".code"
        assert copy == environment(folder, 1)["code"]
    else:
        assert status == 1 and causes(folder) == ["crashed", "refused"], text
        assert "as require_same_code=true demands" in text and "Traceback" not in text
        assert "changed" in folder.log(2, 0).read_text().split("\n"), "ranks run what they are said to run"


def test_the_batch_script_sets_the_copy_after_the_setup_lines() -> None:
    copied = plan("copy_code=true", 'cluster.setup=["export PYTHONPATH=/site"]', "name=a name")
    lines = sbatch_text([copied]).split("# setup\n")[1].splitlines()
    assert copied.code is not None and copied.code.endswith(f"/a name/.code/{describe_code()['sha256'][:16]}")
    path = f"export PYTHONPATH='{copied.code}'${{PYTHONPATH:+:$PYTHONPATH}}"
    assert lines[1:4] == ["export PYTHONPATH=/site", path, "export PYTHONSAFEPATH=1"]


MOUNTS = 'cluster.container_mounts=["/data","/scratch/me:/scratch:ro"]'


@pytest.fixture(autouse=True)
def without_slurm_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies on this machine decides on no text of a test."""
    monkeypatch.setattr(container, "SLURM_PATHS", ())
    monkeypatch.chdir(tmp_path)


def in_container(runtime: str, *words: str) -> list[str]:
    return [f"cluster.container_runtime={runtime}", "cluster.container=/images/gpt.sif", "name=n", MOUNTS, *words]


def command_of(text: str) -> list[str]:
    """Words of the line of a batch script that starts the agents."""
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    return shlex.split(line)


def test_pyxis_gets_options_of_srun(tmp_path: Path) -> None:
    text = sbatch_text([plan(*in_container("pyxis"))])
    words = command_of(text)
    runs = tmp_path / "outputs" / "n"
    assert " ".join(words[words.index("--container-image=/images/gpt.sif") :]) == (
        "--container-image=/images/gpt.sif "
        f"--container-mounts=/data:/data,/scratch/me:/scratch:ro,{tmp_path}:{tmp_path},{runs}:{runs} "
        f"--container-workdir={tmp_path} python3 -u -m submitit.core._submit {runs}/.submitit/slurm"
    )
    assert f"{shlex.quote(sys.executable)} -m gpt_launch launch.agent.after_step" in text, "outside, where Slurm is"


@pytest.mark.parametrize(("gpus", "nv"), [(8, " --nv"), (0, "")])
def test_apptainer_is_started_by_srun(gpus: int, nv: str, tmp_path: Path) -> None:
    words = command_of(sbatch_text([plan(*in_container("apptainer", f"cluster.gpus_per_node={gpus}"))]))
    runs = tmp_path / "outputs" / "n"
    assert " ".join(words[words.index("apptainer") :]) == (
        f"apptainer exec{nv} --pwd {tmp_path} --bind /data:/data --bind /scratch/me:/scratch:ro "
        f"--bind {tmp_path}:{tmp_path} --bind {runs}:{runs} "
        f"/images/gpt.sif python3 -u -m submitit.core._submit {runs}/.submitit/slurm"
    )


def test_apptainer_runs_the_agent(tmp_path: Path) -> None:
    """With a program in the place of Apptainer that runs what stands behind the image."""
    text = '#!/bin/sh\nwhile [ "$1" != /images/gpt.sif ]; do shift; done\nshift\nexec "$@"\n'
    program = write_program(tmp_path / "bin" / "apptainer", text)
    cluster = config_of("cluster=slurm", *in_container("apptainer")).cluster
    words = agent_words(replace(cluster, python=sys.executable), tmp_path, tmp_path / "none")
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"found: no {tmp_path / 'none'}" in done.stderr


def test_incomplete_container_settings_and_what_only_slurm_has_are_refused() -> None:
    for words, found in (
        (["cluster.container=x.sif"], "container_runtime=null"),
        (["cluster.container_runtime=pyxis"], "container=null"),
        (in_container("pyxis", 'cluster.container_mounts=["data"]'), "'data'"),
        (in_container("pyxis", 'cluster.container_mounts=["/a,b"]'), "'/a,b'"),
        (in_container("pyxis", 'cluster.container_mounts=["/a:/b:exec"]'), "'/a:/b:exec'"),
    ):
        refused(plan, *words, found=found)
    local = partial(plan, kind=ClusterKind.local)
    refused(local, *in_container("apptainer"), found="with agents on this machine")
    for spares in ("spare_nodes=1", "spare_jobs=1"):
        words = ("nodes=2", "resilience.min_nodes=1", spares)
        refused(local, *words, found=f"{spares} with agents on this machine", fix="cluster=slurm")


def test_the_doctor_looks_for_the_image_and_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("cluster=slurm", *in_container("apptainer"))
    assert container_problem(config.cluster) == "there is no image /images/gpt.sif"
    image = tmp_path / "gpt.sif"
    image.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster = replace(config.cluster, container=str(image))
    assert container_problem(cluster) == "apptainer is not on the PATH"
    assert "srun" in container_problem(replace(cluster, container_runtime=ContainerRuntime.pyxis))
    (bad,) = check_container(replace(FACTS, container_problem="there is no image"), config)
    (good,) = check_container(FACTS, config)
    assert (bad.level, good.level) == (Level.warning, Level.ok)
    assert list(check_container(FACTS, config_of("cluster=slurm"))) == []
