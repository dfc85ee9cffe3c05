"""A workload and model parts of somebody else's package, and what is refused of scripts before a start."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from gpt.conversion.state_dict import find_checkpoint, open_run, read_weights
from launch.config import ClusterKind
from launch.plan.plan import make_plan
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import ROOT, TINY, run
from tests.support.planning import config_of, plan, refused
from tests.support.runs import causes, write_script

SCRIPT = ("workload=script", "script.path=train.py")


local_plan = partial(plan, kind=ClusterKind.local)


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["workload=script"], "workload=script without a program", "script.path=train.py"),
        (["workload=script", "script.path=trian.py"], "trian.py, which is no file", "train.py"),
        ([*SCRIPT, "script.module=train"], "script.path and script.module", "the same without script.module"),
        (["workload=script", "script.module=no_such_module.train"], "no no_such_module", "script.workdir=PATH"),
        (["workload=script", "script.command=[no-such-program]"], "no program no-such-program", "script.command="),
        ([*SCRIPT, "script.workdir=nowhere"], "nowhere, which is no folder", "script.workdir=PATH"),
        ([*SCRIPT, "script.python=python9"], "script.python=python9", "script.python=/"),
        ([*SCRIPT, """script.args="--name 'a" """.strip()], "No closing quotation", "script.args="),
        ([*SCRIPT, r"script.progress=loss (?P<loss>[\d.]+)"], "without a group step", "(?P<step>"),
        ([*SCRIPT, r"script.progress=step (?P<step>\d+"], "which is no regular expression", "(?P<step>"),
        ([*SCRIPT, r"script.progress=(?P<step>\d+) (?P<acc>\d+)"], "a group acc", "(?P<step>"),
        ([*SCRIPT, "script.stop_signal=SIGKILL"], "script.stop_signal=SIGKILL", "script.stop_signal=SIG"),
        ([*SCRIPT, "script.resume_args=--resume"], "without script.resumes=true", "script.resumes=true"),
        ([*SCRIPT, "script.unit=words"], "script.unit=words", "script.unit="),
        ([*SCRIPT, "script.pth=train.py"], "unknown key script.pth", "script.path=train.py"),
        ([*SCRIPT, "optim.lr=1"], "optim.lr=1, of the workload gpt", "script.options.NAME=VALUE"),
        (["workload=scirpt"], "workload=scirpt", "workload=script"),
        (["workload._target_=nowhere.Workload"], "No module named 'nowhere'", "workload=script"),
        (["workload._target_=launch.errors.Workload"], "has no attribute 'Workload'", "workload=script"),
        (["workload._target_=launch.runs.folder.Folder"], "has no attribute 'Folder'", "workload=script"),
        (["workload._target_=launch.runs.folder.RunFolder"], "is no launch.workload.Workload", "workload=script"),
        (["workload._target_=launch.workload.Workload"], "has no method command", "workload=script"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_in_three_parts(words: list[str], found: str, fix: str, empty_folder: Path) -> None:
    write_script(empty_folder, "", "train.py")
    refused(local_plan, *words, found=found, fix=fix)
    assert [path.name for path in empty_folder.iterdir()] == ["train.py"]


def test_the_plan_says_what_is_run_and_whether_it_is_started_again(empty_folder: Path) -> None:
    write_script(empty_folder, "", "train.py")
    words = ["nodes=2", *SCRIPT, """script.args='--out "${run_dir}/a b"'""", "script.options.lr=0.1"]
    text = plan_text(local_plan(*words, "script.work_per_step=1024", "script.max_steps=5000"))
    assert "train.py --out '${run_dir}/a b' --lr=0.1" in text
    assert "1,024 samples a step" in text and "5,000" in text
    assert "none: an interrupted script is not started again (script.resumes=true" in text
    assert "from the script's own checkpoint" in plan_text(local_plan(*words, "script.resumes=true"))


def test_options_are_written_as_the_program_reads_them(empty_folder: Path) -> None:
    write_script(empty_folder, "", "train.py")
    options = ("lr=1e-3", "layers=[1,2]", "fast=''", "a=null")
    text = plan_text(local_plan(*SCRIPT, *(f"script.options.{option}" for option in options)))
    assert "--lr=0.001 --layers=1,2 --fast" in text and "--a" not in text
    text = plan_text(local_plan(*SCRIPT, "script.options.model.layers=4", "script.style=hydra"))
    assert "train.py model.layers=4" in text


def typed_commands() -> list[list[str]]:
    """The overrides of every command that the examples and the page on scripts show."""
    texts = [*(ROOT / "examples").glob("*.py"), ROOT / "examples" / "nanogpt.md", ROOT / "docs" / "scripts.md"]
    whole = "\n".join(path.read_text() for path in sorted(texts)).replace("\\\n", " ")
    found = re.findall(r"^ *(?:python -m launch|sbatch slurm/multi_node.sh) ((?:-m )?.*workload=script.*)", whole, re.M)
    return [[word for word in shlex.split(line) if word != "-m"] for line in found]


@pytest.mark.parametrize("words", typed_commands(), ids=" ".join)
def test_commands_of_the_docs_are_planned(words: list[str], empty_folder: Path) -> None:
    for name in ("train.py", "mypackage/train.py"):
        (empty_folder / name).parent.mkdir(exist_ok=True)
        write_script(empty_folder, "", name)
    (empty_folder / "examples").symlink_to(ROOT / "examples")
    words = [re.sub(r"^(nodes=\d+).*", r"\1", word) for word in words]  # of a sweep its first point
    kind = ClusterKind.slurm if "cluster=slurm" in words else ClusterKind.local
    assert make_plan(config_of(*words), words, kind).nodes == (2 if "nodes=2" in words else 1)


def test_all_examples_show_a_command() -> None:
    shown = " ".join(word for words in typed_commands() for word in words)
    assert all(f"script.path=examples/{path.name}" in shown for path in (ROOT / "examples").glob("*.py"))


def blocks_of_the_docs() -> dict[str, str]:
    """The files that docs/workloads.md shows: the text of each code block whose first line is a comment naming it."""
    text = (ROOT / "docs" / "workloads.md").read_text()
    return dict(re.findall(r"```python\n# (counter/\w+\.py)\n(.*?)```", text, re.DOTALL))


def test_a_workload_of_another_package_is_planned_and_run(tmp_path: Path) -> None:
    files = blocks_of_the_docs()
    assert sorted(files) == ["counter/__init__.py", "counter/count.py"]
    (tmp_path / "counter").mkdir()
    for name, text in files.items():
        write_script(tmp_path, text, name)
    words = ["-m", "nodes=2", "cluster=local", "ranks_per_node=1", "workload._target_=counter.Counter", "count_to=5"]
    text = run("launch launch.poll_s=1", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    folder = RunFolder(tmp_path / "outputs" / "counter" / "count_to=5,nodes=2,ranks_per_node=1")
    assert causes(folder) == ["finished"] and "nodes=2" in text
    assert [[r["step"] for r in read_records(folder.metrics(rank))] for rank in (0, 1)] == [[1, 2, 3, 4, 5]] * 2
    text = run("launch fresh=true dry_run=true", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "-m counter.count 5" in text
    text = run("launch count_to=0", *words[:-1], cwd=tmp_path, PYTHONPATH=str(tmp_path), status=2)
    assert "found: count_to=0" in text and "type next: count_to=10" in text


# The example's parts in a run: prepared, trained, resumed, written with, and exported where that goes.


EXAMPLE = ROOT / "examples" / "components"
DOCS = (ROOT / "docs" / "components.md").read_text().replace("\\\n", " ")
PREPARE, TRAIN = (
    shlex.split(re.findall(rf"python -m gpt\.{name} (.+?)\n(?:python|```)", DOCS, re.DOTALL)[0])
    for name in ("prepare", "train")
)
"""Arguments that the docs give for `gpt.prepare` and `gpt.train`."""
SMALL = [*(word for word in TINY if "kv_head" not in word and "max_bytes" not in word), "device=cpu"]


def test_parts_of_ones_own_train_resume_and_write(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "gpt_parts").symlink_to(EXAMPLE / "gpt_parts")  # found where the commands are typed
    monkeypatch.syspath_prepend(str(EXAMPLE))
    words = [*TRAIN, *SMALL, "eval.interval=0", "logging.tensorboard=false"]

    def told(module: str, *arguments: str, status: int = 0) -> str:
        return run(module, *arguments, cwd=empty_folder, status=status)

    assert "sums-" in told("gpt.prepare", *PREPARE, "--workers", "1")
    straight, resumed = ["run_dir=straight", "optim.max_steps=4"], ["run_dir=resumed", "optim.max_steps=4"]
    told("gpt.train", *words, *straight)
    told("gpt.train", *words, *resumed, "checkpoint.interval=2")
    last = find_checkpoint(RunFolder(empty_folder / "resumed"), 4)
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    text = told("gpt.train", *words, *resumed, "checkpoint.interval=2")
    assert "attempt 2, from step 2 of 4" in text
    states = []
    for name in ("straight", "resumed"):
        folder, config = open_run(str(empty_folder / name))
        states.append(read_weights(config, find_checkpoint(folder, 4)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "bit for bit"
    about = json.loads(RunFolder(empty_folder / "resumed").environment(2).read_text())
    built = sum(value.numel() for value in states[0].values())
    assert about["parameters"] == built, "the plan counts what was built"
    assert "6 tokens in" in told("gpt.generate", "resumed", "--prompt", "1+", "--max-new-tokens", "6")
    refused = told("gpt.export", "resumed", "--output", "out", status=2)
    assert "model.norm=gpt_parts.norms:DynamicTanh" in refused and "--format torch" in refused
    assert f"{built:,} parameters" in told("gpt.export", "resumed", "--format", "torch", "--output", "out.pt")
