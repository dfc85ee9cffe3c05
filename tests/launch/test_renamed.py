"""Former names of keys are accepted: typed, in a user's files, and in the config of a run that was made with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from gpt.config import TrainConfig
from gpt.config.compose import compose_train
from launch.config import Config
from launch.config.compose import compose_launch, typed_config
from launch.runs.compose import read_config, write_config
from launch.runs.folder import RunFolder
from launch.runs.identity import choose_folder
from launch.runs.overrides import FORMER, in_former_spelling
from tests.support.commands import run

VALUES: dict[str, Any] = {
    "strict": True, "snapshot": True, "spares": 2, "optim.micro_batch": 2, "resilience.stop_grace_s": 77,
    "resilience.frozen_timeout_s": 78, "resilience.hang_timeout_slow_s": 79, "cluster.attainable": 0.4,
    "cluster.links.inside_us": 1.5, "cluster.links.inside_gb_per_s": 300, "cluster.links.between_us": 7.5,
    "cluster.links.between_gb_per_s": 40,
}  # fmt: skip


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("former", FORMER)
def test_a_former_key_that_is_typed_sets_the_new_one(former: str) -> None:
    config = typed_config(compose_launch([f"{former}={VALUES[former]}"]))
    assert value_of(config, FORMER[former]) == VALUES[former]
    assert value_of(config, former) is None


def test_the_command_says_the_new_name_once(tmp_path: Path) -> None:
    text = run("launch", "-m", "nodes=1,2", "spares=1", "cluster=slurm", "dry_run=true", cwd=tmp_path)
    assert text.count("spares is now spare_nodes; the former name is accepted in this release") == 1
    assert "and 1 spare" in text


def test_a_run_made_with_former_keys_is_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    document = compose_train([])
    write_config(folder, document, [])
    older = OmegaConf.load(folder.config)
    del older.optim.max_micro_batch, older.require_same_code
    older.optim.micro_batch, older.strict = 3, True
    folder.config.write_text(OmegaConf.to_yaml(older))
    config = read_config(folder, TrainConfig)
    assert (config.optim.max_micro_batch, config.require_same_code) == (3, True)


def test_the_folder_of_a_command_is_found_under_its_former_spelling(tmp_path: Path) -> None:
    words = ["optim.max_micro_batch=2", "nodes=2"]
    assert [in_former_spelling(word) for word in words] == ["optim.micro_batch=2", "nodes=2"]
    config = Config(name="n", output_dir=str(tmp_path))
    new = choose_folder(config, words, ())
    assert new.point == "nodes=2,optim.max_micro_batch=2"
    made = tmp_path / "n" / "nodes=2,optim.micro_batch=2"
    made.mkdir(parents=True)
    assert choose_folder(config, words, ()).path == made
