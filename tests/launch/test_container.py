"""Containers: the words of srun for pyxis and Apptainer, in the batch text of the launcher and of a script alike."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config import ClusterKind
from launch.config.cluster import ContainerRuntime
from launch.config.compose import compose_launch, typed_config
from launch.doctor.machine import check_container, container_problem
from launch.errors import ConfigError
from launch.plan import placement as container
from launch.plan.placement import agent_words
from launch.plan.plan import make_plan
from launch.slurm.facts import Level
from launch.slurm.jobs import sbatch_text
from tests.launch.test_dry_run import plan
from tests.support.doctor_facts import FACTS

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


def test_pyxis_is_told_by_options_of_srun(tmp_path: Path) -> None:
    text = sbatch_text([plan(*in_container("pyxis"))])
    words = command_of(text)
    runs = tmp_path / "outputs" / "n"
    assert words[words.index("--container-image=/images/gpt.sif") :] == [
        "--container-image=/images/gpt.sif",
        f"--container-mounts=/data:/data,/scratch/me:/scratch:ro,{tmp_path}:{tmp_path},{runs}:{runs}",
        f"--container-workdir={tmp_path}",
        *("python3", "-u", "-m", "submitit.core._submit", str(runs / ".submitit" / "slurm")),
    ]
    assert f"{shlex.quote(sys.executable)} -m gpt_launch launch.agent.after_step" in text, "outside, where Slurm is"


@pytest.mark.parametrize(("gpus", "nv"), [(8, ["--nv"]), (0, [])])
def test_apptainer_is_started_by_srun(gpus: int, nv: list[str], tmp_path: Path) -> None:
    words = command_of(sbatch_text([plan(*in_container("apptainer", f"cluster.gpus_per_node={gpus}"))]))
    runs = tmp_path / "outputs" / "n"
    assert words[words.index("apptainer") :] == [
        *("apptainer", "exec", *nv, "--pwd", str(tmp_path)),
        *("--bind", "/data:/data", "--bind", "/scratch/me:/scratch:ro"),
        *("--bind", f"{tmp_path}:{tmp_path}", "--bind", f"{runs}:{runs}"),
        *("/images/gpt.sif", "python3", "-u", "-m", "submitit.core._submit", str(runs / ".submitit" / "slurm")),
    ]


def test_a_batch_script_starts_its_agents_by_the_same_words(tmp_path: Path) -> None:
    cluster = typed_config(compose_launch(["cluster=slurm", *in_container("apptainer")])).cluster
    words = agent_words(cluster, tmp_path, tmp_path / "outputs" / "n" / "p")
    assert words[:2] == ["apptainer", "exec"]
    assert words[-5:] == ["python3", "-m", "gpt_launch", "agent", str(tmp_path / "outputs" / "n" / "p")]
    plain = replace(cluster, container=None, container_runtime=None)
    assert agent_words(plain, tmp_path, tmp_path / "p") == ["python", "-m", "gpt_launch", "agent", str(tmp_path / "p")]


def test_the_words_of_apptainer_end_in_the_agent(tmp_path: Path) -> None:
    """With a program in the place of Apptainer that runs what stands behind the image."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nwhile [ "$1" != /images/gpt.sif ]; do shift; done\nshift\nexec "$@"\n')
    program.chmod(0o755)
    cluster = typed_config(compose_launch(["cluster=slurm", *in_container("apptainer")])).cluster
    words = agent_words(replace(cluster, container_python=sys.executable), tmp_path, tmp_path / "none")
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"found: no {tmp_path / 'none'}" in done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["cluster.container=x.sif"], "container_runtime=null"),
        (["cluster.container_runtime=pyxis"], "container=null"),
        (in_container("pyxis", 'cluster.container_mounts=["data"]'), "'data'"),
        (in_container("pyxis", 'cluster.container_mounts=["/a,b"]'), "'/a,b'"),
        (in_container("pyxis", 'cluster.container_mounts=["/a:/b:exec"]'), "'/a:/b:exec'"),
    ],
)
def test_what_makes_no_container_is_refused(words: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        plan(*words)


def test_a_container_of_agents_on_this_machine_is_refused() -> None:
    words = ["cluster=local", *in_container("apptainer")]
    with pytest.raises(ConfigError, match="with agents on this machine"):
        make_plan(typed_config(compose_launch(words)), words, ClusterKind.local)


def test_the_doctor_looks_for_the_image_and_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = typed_config(compose_launch(["cluster=slurm", *in_container("apptainer")]))
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
    assert list(check_container(FACTS, typed_config(compose_launch(["cluster=slurm"])))) == []
