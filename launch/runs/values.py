"""Values that are set in a config which Hydra has composed already, as Hydra sets them. Its own code behind one door.

Which files a config is made of depends on the choices of groups only, and takes most of the time; what differs between
the points of a sweep, or between one command and the next, are mostly values. Hydra has no public way to set them:
``ConfigLoaderImpl._apply_overrides_to_config`` is used, and a test compares it with whole compositions. Where that
fails after an update, this is the file to change. Torch-free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


def split_values(texts: Sequence[str], is_group: Callable[[str], bool]) -> tuple[tuple[str, ...], list[Override]]:
    """Split overrides into those that choose files, as typed, and those that set values, parsed.

    Args:
        texts: overrides in Hydra's grammar.
        is_group: tells whether a key without dots is a group of files.

    Raises:
        HydraException: one of them cannot be parsed.
    """
    parsed = OverridesParser.create().parse_overrides(list(texts))
    values = [override for override in parsed if _sets_a_value(override, is_group)]
    return tuple(text for text, override in zip(texts, parsed, strict=True) if override not in values), values


def with_values(composed: DictConfig, values: Sequence[Override]) -> DictConfig:
    """A copy of a composed config with values set in it.

    Raises:
        HydraException: an unknown key, or a value of the wrong type.
    """
    copied = copy.deepcopy(composed)
    OmegaConf.set_struct(copied, True)  # as Hydra sets values: a key that is not there is refused
    ConfigLoaderImpl._apply_overrides_to_config(list(values), copied)
    return copied


def _sets_a_value(override: Override, is_group: Callable[[str], bool]) -> bool:
    """Tell whether an override takes no part in the choice of files."""
    if override.package is not None or override.is_delete() or override.is_hydra_override():
        return False
    return "." in override.key_or_group or not is_group(override.key_or_group)  # a group has slashes, and no dots
