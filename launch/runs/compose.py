"""Composition of a config by Hydra, and the config files of a run folder."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launch.errors import ConfigError
from launch.runs.files import write_atomically
from launch.runs.folder import RunFolder, damaged, unreadable, writing_into
from launch.runs.overrides import parse, refuse_value, searched_folders, set_value, structured, unknown_option
from launch.schema import free_keys, schema_keys

Schema = TypeVar("Schema")
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def register_schema(name: str, schema: type) -> None:
    """Register the schema of a config with Hydra, by the name that a list of defaults uses."""
    store = ConfigStore.instance()
    known = store.repo.get(f"{name}.yaml")
    if known is None or OmegaConf.get_type(known.node) is not schema:
        store.store(name, structured(schema))


def compose_typed(
    primary: str, schema: type, overrides: Sequence[str], config_dir: Path | None = None, *, with_hydra: bool = False
) -> DictConfig:
    """Compose a file of configs/ with overrides that ``check_overrides`` returned.

    Hydra chooses the files, once for equal choices: the 100 points of a sweep mostly differ in values. The values are
    set in a copy, which is 10 times faster.

    Args:
        primary: name of the file; its schema is registered.
        schema: of the config.
        overrides: without sweeps.
        config_dir: folder of the user's own config files.
        with_hydra: with Hydra's own keys, under ``hydra``.

    Raises:
        ConfigError: a config file is missing, cannot be read, or has a value of the wrong type.
    """
    choices, values = [], []
    leaves = {*schema_keys(schema)} - {key.rpartition(".")[0] for key in schema_keys(schema)}
    free = tuple(f"{key}." for key in free_keys(schema))
    for text in overrides:
        override = parse(text, schema)
        if override.is_sweep_override() and not with_hydra:
            found = f"{text.lstrip('+')}, several values"
            raise ConfigError(
                found, "one value; python -m launch -m sweeps over several", f"python -m launch -m {text}"
            )
        name = override.key_or_group
        if override.is_delete() or override.is_sweep_override() or not (name in leaves or name.startswith(free)):
            choices.append(text)
        else:
            values.append(override)
    searched = (str(config_dir),) if config_dir is not None else ()
    try:
        composed = copy.deepcopy(_files(primary, schema, tuple(choices), searched, _running(), with_hydra))
    except CONFIG_ERRORS as error:
        raise refuse_file_of_config(error, schema) from error
    for override in values:
        set_value(composed, override, schema)
    return composed


def _running() -> tuple[str, ...] | None:
    """Return the folders that the running Hydra searches; None if none is running."""
    return tuple(map(str, searched_folders())) if GlobalHydra.instance().is_initialized() else None


@cache
def _files(
    primary: str,
    schema: type,
    choices: tuple[str, ...],
    searched: tuple[str, ...],
    running: tuple[str, ...] | None,
    with_hydra: bool,
) -> DictConfig:
    """Compose the files of a config, over the schema that is registered."""
    words = [*choices, *(f"hydra.searchpath=['file://{folder}']" for folder in searched)]
    outside = running is None
    with hydra.initialize_config_module("configs", version_base="1.3") if outside else nullcontext():
        return hydra.compose(primary, words, return_hydra_config=with_hydra)


def refuse_file_of_config(error: BaseException, schema: type) -> ConfigError:
    """Return the refusal for an error of Hydra in config files."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return unknown_option(group, choice, error.options)
    if isinstance(error, MissingConfigException):
        found = f"no config {error.missing_cfg_file}"
        return ConfigError(found, "config, the name of the launcher's own", "the same without --config-name")
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
        found = f"{where}, which is no YAML: {getattr(error, 'problem', None) or error}"
        return ConfigError(found, "KEY: VALUE on each line, with every bracket and quote closed", "the same command")
    first = str(error).strip().splitlines()[0]
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    wrong = next((one for one in chain if isinstance(one, OmegaConfBaseException) and one.full_key), None)
    file = re.match(r"In '([^']+)': ", first)  # the one place where Hydra names the file
    if wrong is None or file is None:
        return ConfigError(first, "config files that Hydra can compose", "python -m launch --info defaults")
    refusal = refuse_value(wrong, schema)
    fix = f"{refusal.fix.replace('=', ': ', 1)} in that file"
    return ConfigError(f"{refusal.found} in {file[1]}.yaml", refusal.expected, fix)


# From a composed document to a typed config, and to the files of a run folder.


def make_absolute(nodes: Iterable[tuple[DictConfig, str]]) -> None:
    """Make paths absolute, each given as a node of a document and a key in it."""
    for node, key in nodes:
        if not OmegaConf.is_missing(node, key) and node[key] is not None:
            node[key] = str(Path(node[key]).expanduser().absolute())


def to_schema(config: DictConfig, schema: type[Schema]) -> Schema:
    """Return a document as a plain dataclass. Keys at the root that ``schema`` does not have are left out.

    Raises:
        ConfigError: a value is missing, or of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, schema))]
    try:
        if OmegaConf.get_type(config) is not schema or not set(map(str, config)) <= set(names):
            known = OmegaConf.masked_copy(config, [name for name in names if name in config])
            config = cast(DictConfig, OmegaConf.merge(structured(cast(Any, schema)), known))
        value = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise refuse_value(error, cast(type, schema)) from error
    assert isinstance(value, schema)
    return value


def read_config(folder: RunFolder, schema: type[Schema]) -> Schema:
    """Return the config that a run folder was made with.

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
    """Return the document of a run folder as ``schema``, without keys that an earlier version had.

    Raises:
        ConfigError: a value is missing or wrong. The error names the file, not a key to type.
    """
    kind: Any = schema
    known, free = schema_keys(kind), tuple(f"{key}." for key in free_keys(kind))
    for key in flatten(cast(Any, OmegaConf.to_container(document))):
        group, _, name = key.rpartition(".")
        if group in known and key not in known and not key.startswith(free):
            with open_dict(document):
                del OmegaConf.select(document, group)[name]
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
    """Return nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def plain(value: Any) -> str:
    """Return a value as one types it in an override."""
    return "null" if value is None else str(getattr(value, "name", value))


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config by dotted keys, with values that JSON can hold."""
    flat = flatten(dataclasses.asdict(config))
    return {key: plain(value) if hasattr(value, "name") else value for key, value in flat.items()}
