"""TODO launch.config.compose."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from launch.config import Config
from launch.runs import compose
from launch.runs.compose import CONFIG_ERRORS


def compose_launch(overrides: Sequence[str]) -> DictConfig:
    """Compose ``configs/config.yaml`` without a Hydra run."""
    ConfigStore.instance().store("launch_schema", Config)
    with initialize_config_module("configs", version_base="1.3"):
        try:
            return hydra_compose("config", overrides=list(overrides))
        except CONFIG_ERRORS as error:
            raise compose.explain(error, Config) from error
