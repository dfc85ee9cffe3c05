"""The points of a sweep: split without running it, and composed from what they share. Hydra's own code behind one door.

Hydra has no public way to split the overrides of a sweep, nor to set values in a config that is composed already.
``BasicSweeper.split_arguments`` and ``ConfigLoaderImpl._apply_overrides_to_config`` are used, with the parser of
overrides; a test compares them with the installed version. Where it fails after an update, this is the file to change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

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


def compose_points(loader: ConfigLoader, command: DictConfig, points: Sequence[Sequence[str]]) -> Iterator[DictConfig]:
    """Compose the points of a sweep, without Hydra's own keys, each from its overrides.

    Which files a config is made of depends on the choices of groups only. Points that choose alike share that part,
    which takes most of the time, and differ in values that are set in a copy of it.

    Args:
        loader: of the running Hydra.
        command: the config of the whole command.
        points: overrides of each point.
    """
    parser = OverridesParser.create()
    shared: dict[tuple[str, ...], DictConfig] = {}

    @cache  # to list the files of a group Hydra copies its whole search path, and all points have the same keys
    def is_group(key: str) -> bool:
        return "." not in key and bool(loader.get_group_options(key))  # a path of folders, with slashes

    for point in points:
        texts = [str(text) for text in point]
        parsed = parser.parse_overrides(texts)
        values = [override for override in parsed if _is_value(override, is_group)]
        chosen = tuple(text for text, override in zip(texts, parsed, strict=True) if override not in values)
        if chosen not in shared:
            shared[chosen] = _without_hydra(loader.load_sweep_config(command, list(chosen)))
        composed = copy.deepcopy(shared[chosen])
        OmegaConf.set_struct(composed, True)  # as Hydra sets values: a key that is not there is refused
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        OmegaConf.set_struct(composed, None)
        OmegaConf.copy_cache(from_config=command, to_config=composed)
        yield composed


def _is_value(override: Override, is_group: Callable[[str], bool]) -> bool:
    """Tell whether an override sets a value, and so takes no part in the choice of files."""
    if override.package is not None or override.is_delete() or override.is_hydra_override():
        return False
    return not is_group(override.key_or_group)


def _without_hydra(composed: DictConfig) -> DictConfig:
    kept = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    assert isinstance(kept, DictConfig)
    return kept
