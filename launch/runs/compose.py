"""Config of a run: composition by Hydra, its files in the run folder, and the choice of the run folder."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, Optional, TypeVar, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launch.errors import ConfigError, free_keys, key, schema_keys
from launch.runs.events import refuse_resume_from
from launch.runs.find import generation
from launch.runs.folder import RunFolder, damaged, unreadable, write_atomically, writing_into
from launch.runs.overrides import (
    NOT_IN_POINT,
    is_within,
    parse_override,
    point_keys,
    point_name,
    read_overrides,
    refuse_value,
    searched_folders,
    set_value,
    structured,
    unknown_option,
)

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

Schema = TypeVar("Schema")
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def register_schema(name: str, schema: type) -> None:
    """Register a schema, a dataclass, with Hydra. The list ``defaults`` of a config file can then contain ``name``."""
    store = ConfigStore.instance()
    known = store.repo.get(f"{name}.yaml")
    if known is None or OmegaConf.get_type(known.node) is not schema:
        store.store(name, structured(schema))


def compose_typed(
    primary: str, schema: type, overrides: Sequence[str], config_dir: Path | None = None, *, with_hydra: bool = False
) -> DictConfig:
    """Return the config that Hydra composes from the file ``primary`` in configs/ and from overrides.

    Hydra composes only the files that overrides choose, and the result is cached. The other overrides set single values
    in a copy of this result. This is 10 times faster than composing again, and most points of a sweep differ only in
    such values.

    Args:
        primary: name of the file; its schema is registered.
        schema: dataclass of the config.
        overrides: overrides as ``check_overrides`` returns them. An override with several values, such as
            ``nodes=1,2``, is allowed only if ``with_hydra`` is True.
        config_dir: folder of the user's own config files; None if there is none.
        with_hydra: True if the result also has Hydra's own keys, under ``hydra``.

    Raises:
        ConfigError: a config file is missing or cannot be read, an override cannot be read or has several values, or a
            value has the wrong type.
    """
    choices, values = [], []
    leaves = {*schema_keys(schema)} - {key.rpartition(".")[0] for key in schema_keys(schema)}
    free = tuple(f"{key}." for key in free_keys(schema))
    for text in overrides:
        override = parse_override(text, schema)
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
        running = tuple(map(str, searched_folders())) if GlobalHydra.instance().is_initialized() else None
        composed = copy.deepcopy(_files(primary, schema, tuple(choices), searched, running, with_hydra))
    except CONFIG_ERRORS as error:
        raise refuse_file_of_config(error) from error
    for override in values:
        set_value(composed, override, schema)
    return composed


@cache
def _files(
    primary: str,
    schema: type,
    choices: tuple[str, ...],
    searched: tuple[str, ...],
    running: tuple[str, ...] | None,
    with_hydra: bool,
) -> DictConfig:
    """Return the config that Hydra composes from ``primary`` and the overrides ``choices``. Callers must copy it.

    Args:
        primary: name of the file.
        schema: dataclass of the config, which only distinguishes entries of the cache.
        choices: overrides that choose files.
        searched: the user's own folders of config files.
        running: None if no Hydra runs in this process; otherwise the folders that it searches.
        with_hydra: True if the result also has Hydra's own keys.
    """
    words = [*choices, *(f"hydra.searchpath=['file://{folder}']" for folder in searched)]
    outside = running is None
    with hydra.initialize_config_module("configs", version_base="1.3") if outside else nullcontext():
        return hydra.compose(primary, words, return_hydra_config=with_hydra)


def refuse_file_of_config(error: BaseException) -> ConfigError:
    """Return a ConfigError for an error that Hydra, OmegaConf or YAML raised about a config file."""
    if isinstance(error, MissingConfigException):
        if error.options:
            group, _, choice = (error.missing_cfg_file or "").rpartition("/")
            return unknown_option(group, choice, error.options)
        found = f"no config {error.missing_cfg_file}"
        return ConfigError(found, "config, the name of the launcher's own", "the same without --config-name")
    # The error names the file, and the key or the line in it.
    text = re.sub(r"(?s)\w+ raised while composing config:\s*(.*?)\s*full_key: (\S+).*", r"\2: \1", str(error))
    found = " ".join(text.split())
    fix = "that file, corrected; python -m launch --info defaults lists the files of a run"
    return ConfigError(found, "config files that Hydra can compose", fix)


# From a composed document to a typed config, and to the files of a run folder.


def make_absolute(nodes: Iterable[tuple[Any, Any]]) -> None:
    """Make paths in a config absolute, in place; null stays null.

    ``nodes`` has, for each path, the container in the config and the key or index of the path in this container.
    """
    for node, name in nodes:
        if not OmegaConf.is_missing(node, name) and node[name] is not None:
            node[name] = str(Path(node[name]).expanduser().absolute())


def to_schema(config: DictConfig, schema: type[Schema]) -> Schema:
    """Return a composed config as an instance of ``schema``. Root keys that ``schema`` does not have are left out.

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
    """Return the config with which the run of a folder was made, as an instance of the dataclass ``schema``.

    Raises:
        ConfigError: the folder has no run, or its config is damaged.
    """
    return stored_as(folder, read_document(folder), schema)


def read_document(folder: RunFolder) -> DictConfig:
    """Return the content of ``.hydra/config.yaml``, which is not checked against a schema.

    Raises:
        ConfigError: the folder has no run, or its config is damaged.
    """
    if not folder.config.exists():
        raise ConfigError(f"no {folder.config}", "the folder of a run", "python -m launch, to make one")
    try:
        document = OmegaConf.load(folder.config)  # by its own grammar, in which 1e-4 is a number
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise unreadable(folder.config, error) from error
    if not isinstance(document, DictConfig) or not document:
        raise damaged(folder.config, "it has no keys")
    return document


def stored_as(folder: RunFolder, document: DictConfig, schema: type[Schema]) -> Schema:
    """Return ``document``, the config of a run folder, as an instance of ``schema``.

    Keys that existed only in an earlier version of this project are left out.

    Raises:
        ConfigError: a value is missing or wrong. The error names the file, not a key to type.
    """
    kind: Any = schema
    known, free = schema_keys(kind), tuple(f"{key}." for key in free_keys(kind))
    for path in flatten(cast(Any, OmegaConf.to_container(document))):
        group, _, rest = path.rpartition(".")
        while group and group not in known:  # all keys of a group that is gone
            group, _, rest = group.rpartition(".")
        name = f"{group}.{rest}"
        if group and name not in known and not path.startswith(free):
            with open_dict(document):
                OmegaConf.select(document, group).pop(rest, None)
    try:
        return to_schema(document, schema)
    except ConfigError as error:
        raise damaged(folder.config, error.found) from error


def write_config(folder: RunFolder, config: DictConfig, overrides: Sequence[str]) -> None:
    """Write the files ``.hydra/config.yaml``, with every value resolved, and ``.hydra/overrides.yaml`` of a run.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with writing_into(folder.path):
        write_atomically(folder.config, OmegaConf.to_yaml(config, resolve=True).encode())
        write_atomically(folder.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))).encode())


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one dictionary with dotted keys. ``prefix`` comes before each key."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= flatten(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    return flat


def plain(value: Any) -> str:
    """Return a value as it is typed in an override: ``null`` for None, the name of an Enum."""
    return "null" if value is None else str(getattr(value, "name", value))


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config as one dictionary: dotted key -> value that JSON can hold."""
    flat = flatten(dataclasses.asdict(config))
    return {key: plain(value) if hasattr(value, "name") else value for key, value in flat.items()}


# The keys of every run, and the folder of a run.


@dataclass
class RunConfig:
    """Config of every run, whatever its program and however it is started."""

    name: str = key("run", "Folder under output_dir for the points of one sweep.")
    output_dir: str = key("outputs", "Folder for all runs.")
    run_dir: Optional[str] = key(None, "Folder of this run; null derives it from output_dir, name and the overrides.")
    fresh: bool = key(False, "Start over in a new folder instead of resuming.")
    resume_from: Any = key(
        None,
        "Step of a checkpoint of the existing run from which it resumes, or last for the newest. Later checkpoints"
        " and records are moved aside. Typed again it goes back again.",
    )
    require_same_code: bool = key(
        False, "Refuse to resume if the code or a library has changed since the last attempt, instead of warning."
    )

    def validate(self) -> None:
        """Raise ConfigError if ``name`` cannot name a folder and a job, or ``resume_from`` names no checkpoint."""
        refuse_name(self.name)
        refuse_resume_from(self.resume_from, self.fresh)


UNUSABLE = re.compile(r"[%\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that a run's path and name cannot have.

Slurm and submitit replace ``%j`` by the number of a job, and read a backslash as an escape; a line break would end a
line of the batch script.
"""


def refuse_name(name: str) -> None:
    """Raise ConfigError unless ``name`` can name a single folder under output_dir, and a job."""
    usable = UNUSABLE.sub("_", name).replace("/", "_").lstrip("-")
    if name != usable or name in ("", ".", ".."):
        raise ConfigError(
            f"name={name!r}",
            "the name of one folder under output_dir, and of the job: no slash, backslash, % or control character in "
            "it, and no dash before it",
            f"name={shlex.quote(usable.strip('._') or 'run')}",
        )


def choose_folder(
    config: RunConfig, overrides: Sequence[str], not_in_point: Sequence[str], length: Sequence[str] = ()
) -> RunFolder:
    """Return the folder of a run: ``run_dir``, or ``<output_dir>/<name>/<point>``.

    With ``fresh``, the folder is a new one: ``<point>~2``, ``<point>~3``, ... Without ``fresh``, it is the newest
    existing folder of this run, so the same command continues where the last command stopped. If the run has no folder
    yet and ``resume_from`` is typed, the folder of a run is returned that differs only in its number of steps. If there
    is no such run either, the folder does not exist yet.

    Args:
        config: config of the run; its keys ``run_dir``, ``output_dir``, ``name``, ``fresh`` and ``resume_from`` count.
        overrides: overrides of the run, as typed.
        not_in_point: keys that do not distinguish runs.
        length: keys that set the number of steps.

    Raises:
        ConfigError: Slurm cannot use the path; a file is in the way; or ``resume_from`` is typed, and several runs
            differ only in their number of steps.
    """
    folder = newest_folder(config, overrides, not_in_point)
    if config.resume_from is None or config.run_dir is not None or folder.config.exists():
        return folder
    return folder_of_other_length(folder, overrides, (*not_in_point, *length)) or folder


def folder_of_other_length(folder: RunFolder, overrides: Sequence[str], exclude: Sequence[str]) -> RunFolder | None:
    """Return the run in the parent folder of ``folder`` whose overrides differ only in the keys ``exclude``.

    If the run has several folders (``<point>~2``), return the newest. None if there is no such run.

    Raises:
        ConfigError: there are several such runs, or a file of overrides is damaged.
    """
    exclude = (*exclude, *NOT_IN_POINT)  # a rank also searches, and its command has no keys of the launcher
    wanted = point_keys(overrides, exclude)
    newest: dict[str, RunFolder] = {}
    for other in map(RunFolder, sorted(folder.path.parent.glob("*"), key=number_of)):
        if other.overrides.exists() and point_keys(read_overrides(other), exclude) == wanted:
            newest[other.point.removesuffix(generation(other.point))] = other
    if len(newest) > 1:
        raise ConfigError(
            f"several runs of this point, of different lengths: {', '.join(run.point for run in newest.values())}",
            "the folder of the run to continue",
            shlex.quote(f'run_dir="{next(iter(newest.values())).path}"'),
        )
    return next(iter(newest.values()), None)


def number_of(path: Path) -> int:
    """Return the number of a run folder among the folders of its point: 1 for the first, 2 for ``<point>~2``."""
    return int(generation(path.name).removeprefix("~") or 1)


def newest_folder(config: RunConfig, overrides: Sequence[str], not_in_point: Sequence[str]) -> RunFolder:
    """Return the newest existing folder of a run. If the run has no folder yet, return the first: ``<point>``.

    With ``fresh`` in ``config``, return the next new folder: ``<point>~2`` if ``<point>`` exists. No folder is created.
    ``overrides`` name the point, without those of the keys in ``not_in_point``.

    Raises:
        ConfigError: Slurm cannot use the path, or this user may not create or use such a folder.
    """
    above = Path(config.output_dir).expanduser() / config.name  # a ~ in the name is part of it
    own = above / point_name(overrides, not_in_point)
    base = (own if config.run_dir is None else Path(config.run_dir).expanduser()).absolute()
    if found := UNUSABLE.search(str(base)):
        raise ConfigError(
            f"{found[0]!r} in the run's path {str(base)!r}",
            "a path without %, backslash and control characters, which mean something else in a batch script",
            "output_dir=FOLDER, or run_dir=FOLDER, with another path",
        )
    numbers = [1] if base.exists() else []
    numbers += [number_of(path) for path in base.parent.glob(f"{escape(base.name)}~*") if path.is_dir()]
    number = max(numbers, default=0) + (1 if config.fresh else 0)
    folder = base if number <= 1 else base.with_name(f"{base.name}~{number}")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    is_of_kernel = there.parts[1:2] in (("proc",), ("sys",))  # os.access says that root may write here
    if not there.is_dir() or (there != folder and (is_of_kernel or not os.access(there, os.W_OK | os.X_OK))):
        expected = "a folder for the run, in one in which this user may create others"
        raise ConfigError(
            f"{folder}, which cannot be created in {there}", expected, "output_dir=FOLDER, or run_dir=FOLDER"
        )
    return RunFolder(folder)


def refuse_other_run(folder: RunFolder, config: Any, schema: type, resumable: Sequence[str]) -> None:
    """Raise ConfigError if ``folder`` already has a run that ``config`` cannot continue.

    This is a run with other settings, or a run whose attempts or checkpoints are there, but not its config.

    Args:
        folder: folder of the run.
        config: config of this command.
        schema: dataclass whose fields are compared; ``config`` has them all.
        resumable: keys, or groups of keys, that may change between the attempts of one run.
    """
    if not folder.config.exists():
        left = [path.name for path in (folder.path / "attempts", folder.checkpoints) if path.exists()]
        if not left:
            return
        raise ConfigError(
            f"{folder.path} with {' and '.join(left)} of a run, but no {folder.config.relative_to(folder.path)}",
            "the config of that run, to continue the run",
            "fresh=true, for a new folder next to it; or the file from a backup",
        )
    values = dataclasses.asdict(config)
    there = flatten(dataclasses.asdict(read_config(folder, schema)))
    here = flatten({field.name: values[field.name] for field in dataclasses.fields(schema)})
    changed = [key for key in here if here[key] != there.get(key) and not is_within(key, resumable)]
    # With auto a run continues with the value that was chosen when it began.
    changed = [key for key in changed if not (isinstance(here[key], Enum) and here[key].name == "auto")]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder.path} has a run with {key}={plain(there.get(key))}, and now {key}={plain(here[key])}",
            "the same settings, to continue that run",
            f"fresh=true, for a new folder next to it (or {key}={plain(there.get(key))}, to continue)",
        )
