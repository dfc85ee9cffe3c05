"""Values that are set in a config which Hydra has composed already, as Hydra sets them. Its own code behind one door.

Which files a config is made of depends on the choices of groups only, and takes most of the time; what differs between
the points of a sweep, or between one command and the next, are mostly values. Hydra has no public way to set them:
``ConfigLoaderImpl._apply_overrides_to_config`` is used, and a test compares it with whole compositions. Nor has
OmegaConf a quick way to copy a config: ``copy.deepcopy`` builds each of some 500 nodes and its metadata by reflection,
which took more than half of the time of a point. Where one of the two fails after an update, this is the file to
change. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Node

AnyNode = TypeVar("AnyNode", bound=Node)


def composed_with(
    texts: Sequence[str], is_group: Callable[[str], bool], compose: Callable[[tuple[str, ...]], DictConfig]
) -> DictConfig:
    """Compose a config, for which ``compose`` is handed the overrides that choose files; values are set in a copy.

    Args:
        texts: overrides in Hydra's grammar. Where one sweeps, all go to ``compose``, and Hydra refuses it there.
        is_group: tells whether a key without dots is a group of files.
        compose: from overrides to a config; of the same overrides it may return the same one again.

    Raises:
        HydraException: an override cannot be parsed, its key is unknown, or its value of the wrong type.
    """
    chosen, values = _split(texts, is_group)
    if any(override.is_sweep_override() for override in values):
        chosen, values = tuple(texts), []
    return _with_values(compose(chosen), values)


def _split(texts: Sequence[str], is_group: Callable[[str], bool]) -> tuple[tuple[str, ...], list[Override]]:
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


def _with_values(composed: DictConfig, values: Sequence[Override]) -> DictConfig:
    """A copy of a composed config with values set in it.

    Raises:
        HydraException: an unknown key, or a value of the wrong type.
    """
    copied = copy_of(composed)
    OmegaConf.set_struct(copied, True)  # as Hydra sets values: a key that is not there is refused
    ConfigLoaderImpl._apply_overrides_to_config(list(values), copied)
    return copied


def copy_of(node: AnyNode, parent: Node | None = None) -> AnyNode:
    """Copy a config as ``copy.deepcopy`` does, node by node, for a root that hangs on no other; values are shared."""
    made: AnyNode = _shallow(node)
    made.__dict__.update(_parent=parent, _flags_cache=None, _metadata=_shallow(node._metadata))
    metadata = made._metadata
    metadata.flags = dict(metadata.flags or {})
    metadata.resolver_cache = defaultdict(dict, {name: dict(told) for name, told in metadata.resolver_cache.items()})
    content = made.__dict__.get("_content")
    if isinstance(content, dict):
        made.__dict__["_content"] = {key: copy_of(inner, made) for key, inner in content.items()}
    elif isinstance(content, list):
        made.__dict__["_content"] = [copy_of(inner, made) for inner in content]
    elif isinstance(content, Node):  # one of several types
        made.__dict__["_content"] = copy_of(content, made)
    return made


def _shallow(value: Any) -> Any:
    """Another object with the same attributes."""
    made = object.__new__(type(value))
    made.__dict__.update(value.__dict__)
    return made


def _sets_a_value(override: Override, is_group: Callable[[str], bool]) -> bool:
    """Tell whether an override takes no part in the choice of files."""
    if override.package is not None or override.is_delete() or override.is_hydra_override():
        return False
    return "." in override.key_or_group or not is_group(override.key_or_group)  # a group has slashes, and no dots
