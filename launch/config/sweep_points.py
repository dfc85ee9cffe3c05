"""The points of a sweep: split without running it, and composed from what they share. Hydra's own code behind one door.

Hydra has no public way to split the overrides of a sweep. ``BasicSweeper.split_arguments`` is used, with the parser of
overrides; a test compares it with the installed version. Where it fails after an update, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, flag_override

from launch.config import Config
from launch.config.compose import compose_launch, prepare_overrides
from launch.runs.explain import CONFIG_ERRORS, explain
from launch.runs.values import composed_with


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


def compose_points(loader: ConfigLoader, command: DictConfig, points: Sequence[Sequence[str]]) -> Iterator[DictConfig]:
    """Compose the points of a sweep, without Hydra's own keys, each from its overrides.

    Which files a config is made of depends on the choices of groups only. Points that choose alike share that part,
    which takes most of the time, and differ in values that are set in a copy of it.

    Args:
        loader: of the running Hydra.
        command: the config of the whole command.
        points: overrides of each point.
    """

    @cache  # to list the files of a group Hydra copies its whole search path, and all points have the same keys
    def is_group(key: str) -> bool:
        return bool(loader.get_group_options(key))

    @cache
    def files_of(chosen: tuple[str, ...]) -> DictConfig:
        return _without_hydra(loader.load_sweep_config(command, list(chosen)))

    for point in points:
        composed = composed_with([str(text) for text in point], is_group, files_of)
        OmegaConf.set_struct(composed, None)
        OmegaConf.copy_cache(from_config=command, to_config=composed)
        yield composed


def _without_hydra(composed: DictConfig) -> DictConfig:
    """Take Hydra's own keys out. The rest stays typed by its schema, and needs no merge with it (``to_schema``)."""
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed
