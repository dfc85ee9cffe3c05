"""A sharded checkpoint in one process, against torch's own converter; and what is said where there is none."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from gpt.conversion.source import find_source
from gpt.conversion.state_dict import load_model, open_run
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from tests.support.checkpoints import read_weights


@pytest.mark.parametrize(("asked", "step"), [(None, 12), (8, 8)])
def test_the_weights_are_those_that_were_saved(trained: Path, tmp_path: Path, asked: int | None, step: int) -> None:
    config, model = load_model(trained, asked)
    saved = read_weights(trained, step, tmp_path)
    state = model.state_dict()
    assert {f"/model/{name}" for name in state} == {name for name in saved if name.startswith("/model/")}
    assert all(torch.equal(saved[f"/model/{name}"], value) for name, value in state.items())
    assert config.model.n_embd == 64 and not model.training


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shard = next((run / "checkpoints" / "step_00000012").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        _, model = load_model(run)
    assert "step_00000012 is damaged" in caplog.text
    older = read_weights(trained, 8, tmp_path)
    assert torch.equal(model.state_dict()["norm.weight"], older["/model/norm.weight"])
    assert (run / "checkpoints" / "step_00000012").is_dir()
    with pytest.raises(ConfigError, match=r"damaged: step_00000012 \(.* has a wrong checksum"):
        load_model(run, 12)


def test_what_is_not_a_run_with_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match=f"the folder of a sweep(.|\n)*type next: {trained}"):
        load_model(trained.parent)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5 .*\nexpected: one of 8, 12\ntype next: --step 12"):
        load_model(trained, 5)
    shutil.copytree(trained / ".hydra", tmp_path / "new" / ".hydra")
    with pytest.raises(ConfigError, match="no checkpoint in"):
        load_model(tmp_path / "new")


def test_the_run_of_another_program_is_no_damaged_run_of_ours(tmp_path: Path) -> None:
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("workload: {_target_: launch.script.ScriptWorkload}\nscript: {path: train.py}\n")
    with pytest.raises(ConfigError) as refused:
        load_model(tmp_path / "run")
    assert refused.value.found == f"{tmp_path / 'run'}, a run of another program (ScriptWorkload)"
    assert refused.value.fix.startswith(f"python -m launch.logs {tmp_path / 'run'}")
    with pytest.raises(ConfigError, match="a run of another program"):
        find_source(str(tmp_path / "run"))
    config.write_text("workload: {_target_: gpt.workload.GptWorkload}\nmodel: {}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_model(tmp_path / "run")


def test_a_label_is_as_good_as_a_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point, typed in (("cut-1", "seed=1"), ("cut-2", "seed=2")):
        shutil.copytree(trained / ".hydra", tmp_path / "outputs" / "s" / point / ".hydra")
        RunFolder(tmp_path / "outputs" / "s" / point).create_attempt()
        (tmp_path / "outputs" / "s" / point / ".hydra" / "overrides.yaml").write_text(f"[{typed}]")
    monkeypatch.chdir(tmp_path)
    assert open_run("seed=2")[0].path == tmp_path / "outputs" / "s" / "cut-2"
    assert open_run("outputs/s/seed=1")[0].path == tmp_path / "outputs" / "s" / "cut-1"
