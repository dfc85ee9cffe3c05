"""The points of a sweep, without running it: Hydra's own sweeper behind one door.

Hydra has no public way to split the overrides of a sweep. ``BasicSweeper.split_arguments`` is used, with the parser of
overrides; a test compares them with the installed version. Where it fails after an update, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config import Config
from launch.config.compose import compose_launch, prepare_overrides
from launch.runs.explain import CONFIG_ERRORS, explain


def sweep_points(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Split the overrides of a sweep into those of each point, in the order in which Hydra would run them.

    Args:
        overrides: as typed.
        config_dir: folder of the user's own config files, searched too.

    Raises:
        ConfigError: they cannot be parsed, or name no config.
    """
    try:
        parser = OverridesParser.create()
        parser.parse_overrides(list(overrides))  # refused in the words that were typed
        prepared = prepare_overrides(overrides, config_dir)
        typed = parser.parse_overrides(prepared)
        fixed = [text for text, parsed in zip(prepared, typed, strict=True) if not parsed.is_sweep_override()]
        composed = compose_launch(fixed, config_dir, return_hydra_config=True)
        params = composed.hydra.sweeper.get("params") or {}
        swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        return [list(point) for batch in BasicSweeper.split_arguments([*swept, *typed], None) for point in batch]
    except CONFIG_ERRORS as error:
        raise explain(error, Config, overrides) from error
