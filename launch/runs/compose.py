"""Conversion between Hydra's documents, typed configs, and the config files of a run folder."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Node
from omegaconf.errors import OmegaConfBaseException

from launch.errors import ConfigError
from launch.runs.files import write_atomically
from launch.runs.folder import RunFolder, damaged, unreadable, writing_into
from launch.runs.refusals import explain, unknown_key
from launch.schema import free_keys, schema_keys

Schema = TypeVar("Schema")


def refuse_unknown(config: DictConfig, schema: type) -> None:
    """Raise ConfigError for a key that ``+key=value`` added and nothing would read."""
    known = set(schema_keys(schema))
    free = {f"{key}." for key in free_keys(schema)}
    for key in dotted_keys(OmegaConf.to_container(config)):
        if key not in known and not any(key.startswith(prefix) for prefix in free):
            raise unknown_key(key, schema, f"{key}={plain(OmegaConf.select(config, key))}")


def make_absolute(nodes: Iterable[tuple[DictConfig, str]]) -> None:
    """Take paths, each given as a node of a document and a key in it, relative to the folder they were typed in."""
    for node, key in nodes:
        if not OmegaConf.is_missing(node, key) and node[key] is not None:
            node[key] = str(Path(node[key]).expanduser().absolute())


def dotted_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of nested dictionaries, groups included; ``hydra`` is Hydra's own."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            yield from dotted_keys(inner, f"{prefix}{key}.")


def register_schema(name: str, schema: type) -> None:
    """Tell Hydra the schema of a config, under the name that a list of defaults has it by.

    Storing takes a fifth of a composition, so it is done again only where another schema has the name.
    """
    store = ConfigStore.instance()
    known = store.repo.get(f"{name}.yaml")
    if known is None or OmegaConf.get_type(known.node) is not schema:
        store.store(name, schema)
    # Hydra copies its sources for each composition, and with them the one store that there is: a tenth of the time.
    # What it loads from the store it copies once more.
    vars(store).setdefault("__deepcopy__", lambda memo: store)


@cache
def structured(schema: type) -> DictConfig:
    """The schema as OmegaConf takes it, made once: it takes as long as reading a config."""
    made: DictConfig = OmegaConf.structured(schema)
    return made


def to_schema(config: DictConfig, schema: type[Schema]) -> Schema:
    """The plain dataclass that travels further. Keys of ``config`` that ``schema`` does not have are left out.

    Raises:
        ConfigError: a value is missing, or of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, schema))]
    try:
        if OmegaConf.get_type(config) is schema and set(map(str, config)) <= set(names):
            # Composed over this schema: its values have their types already, and a merge would copy them all twice.
            composed = OmegaConf.to_object(config)
            assert isinstance(composed, schema)
            return composed
        known = OmegaConf.masked_copy(config, [name for name in names if name in config])
        merged = OmegaConf.merge(structured(cast(Any, schema)), known)  # merge copies its first argument
        assert isinstance(merged, DictConfig)
        value = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain(error, schema) from error
    assert isinstance(value, schema)
    return value


def read_config(folder: RunFolder, schema: type[Schema]) -> Schema:
    """The config a run folder was made with.

    Raises:
        ConfigError: the folder holds no run, or its config is damaged.
    """
    return stored_as(folder, read_document(folder), schema)


def read_document(folder: RunFolder) -> DictConfig:
    """Return the document in ``.hydra/config.yaml`` without a schema.

    Raises:
        ConfigError: the folder holds no run, or its config is damaged.
    """
    if not folder.config.exists():
        raise ConfigError(f"no {folder.config}", "the folder of a run", "python -m launch, to make one")
    try:
        document = OmegaConf.load(folder.config)  # by its own grammar, in which 1e-4 is a number
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise unreadable(folder.config, error) from error
    if not isinstance(document, DictConfig) or not document:
        raise damaged(folder.config, "it holds no keys")
    return document


def stored_as(folder: RunFolder, document: DictConfig, schema: type[Schema]) -> Schema:
    """Read the document of a run folder as ``schema``. Raises ConfigError that names the file, not a key to type."""
    try:
        return to_schema(document, schema)
    except ConfigError as error:
        raise damaged(folder.config, error.found) from error


def write_config(folder: RunFolder, config: DictConfig, overrides: Sequence[str]) -> None:
    """Write Hydra's own files: ``.hydra/config.yaml`` with every value resolved, and ``.hydra/overrides.yaml``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with writing_into(folder.path):
        write_atomically(folder.config, OmegaConf.to_yaml(config, resolve=True).encode())
        write_atomically(folder.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))).encode())


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def plain(value: Any) -> str:
    """``value`` as one would type it in an override."""
    return "null" if value is None else str(getattr(value, "name", value))


def plain_config(config: Any) -> dict[str, Any]:
    """The config by dotted keys, as plain values that JSON can hold."""
    flat = flatten(dataclasses.asdict(config))
    return {key: plain(value) if hasattr(value, "name") else value for key, value in flat.items()}


# Values that are set in a config which Hydra has composed already, as Hydra sets them. Its own code behind one door.


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
    """Return whether an override takes no part in the choice of files."""
    if override.package is not None or override.is_delete() or override.is_hydra_override():
        return False
    return "." in override.key_or_group or not is_group(override.key_or_group)  # a group has slashes, and no dots
