"""The points of a sweep, without running it: Hydra's own sweeper behind one door.

Hydra has no public way to split the overrides of a sweep. ``BasicSweeper.split_arguments`` is used, with the parser of
overrides; a test compares them with the installed version. Where it fails after an update, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config import Config
from launch.config.compose import compose_launch
from launch.runs.explain import CONFIG_ERRORS, explain


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """Split the overrides of a sweep into those of each point, in the order in which Hydra would run them.

    Raises:
        ConfigError: they cannot be parsed, or name no config.
    """
    try:
        parser = OverridesParser.create()
        typed = parser.parse_overrides(list(overrides))
        fixed = [text for text, parsed in zip(overrides, typed, strict=True) if not parsed.is_sweep_override()]
        compose_launch(fixed)  # registers the schema, and explains what is wrong
        with initialize_config_module("configs", version_base="1.3"):
            params = compose("config", overrides=fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
        swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        return [list(point) for batch in BasicSweeper.split_arguments([*swept, *typed], None) for point in batch]
    except CONFIG_ERRORS as error:
        raise explain(error, Config) from error
