"""From arguments to typed configs: of one run, and of each point of a sweep."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, flag_override

import configs
from launch.config import NOT_IN_POINT, Config
from launch.errors import ConfigError, closest
from launch.runs import compose
from launch.runs.compose import composed_with
from launch.runs.folder import RunFolder, damaged
from launch.runs.identity import RunConfig
from launch.runs.overrides import (
    append_groups,
    config_groups,
    typed_key,
    typed_value,
)
from launch.runs.refusals import CONFIG_ERRORS, explain
from launch.schema import free_keys, schema_keys
from launch.workload import BEFORE_WORKLOADS, Workload, load_workload

CONFIGS = Path(configs.__file__).parent
SCRIPT = "script"
"""Option of the group ``workload`` for a program of the user's own, and the group of its keys."""
CUSTOM = "custom"
"""Option of the group ``workload`` for a class that was typed as ``workload._target_``."""


def require_folder(flag: str, path: str) -> Path:
    """Folder of the user's own config files, given with ``flag``.

    Raises:
        ConfigError: it is not there.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        expected = "a folder laid out as configs/ is, such as FOLDER/cluster/mysite.yaml"
        raise ConfigError(f"{flag} {path}, which is no folder", expected, f"{flag} FOLDER")
    return folder


def prepare_overrides(overrides: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """Return the typed overrides as Hydra needs them.

    ``workload._target_=X`` alone means the option of the group that adds no other keys. Keys of the user's choice, such
    as ``script.options.lr``, need no plus. A value that would mean something to Hydra's grammar, such as a regular
    expression, is quoted where its workload asks for it.
    """
    args = append_groups(overrides)
    if typed_value(args, "workload._target_") is not None and typed_value(args, "workload") is None:
        args.append(f"workload={CUSTOM}")
    workload = load_workload(target_of(args, config_dir))
    refuse_script_keys(args, workload)
    refuse_foreign_keys(args, workload)
    free = tuple(f"{key}." for key in (*free_keys(Config), *free_keys(workload.schema)))
    prepared = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if equals and key in workload.raw_keys and value[:1] not in ("'", '"') and value != "null":
            escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
            arg = f"{key}='{escaped}'"
        elif free and (key.startswith(free) or (f"{key}." in free and value.startswith("{"))):
            arg = f"++{arg}"
        prepared.append(arg)
    return prepared


def refuse_script_keys(overrides: Sequence[str], workload: Workload) -> None:
    """Raise ConfigError if keys of a script are typed without ``workload=script``; proposes keys that it has."""
    typed = [arg for arg in overrides if typed_key(arg).partition(".")[0] == SCRIPT]
    if not typed or SCRIPT in schema_keys(workload.schema):
        return
    schema = schema_of(target_of([f"workload={SCRIPT}"]))
    known, free = list(schema_keys(schema)), tuple(f"{key}." for key in free_keys(schema))
    meant = []
    for arg in typed:
        key, equals, value = arg.lstrip("+").partition("=")
        parts = key.split(".")
        group = f"{SCRIPT}.{parts[1]}" if len(parts) > 1 else ""
        if key not in known and not key.startswith(free) and (alike := closest(group, known)):
            key = ".".join([alike[0], *parts[2:]])
        meant.append(f"{key}{equals}{value}")
    raise ConfigError(
        f"{', '.join(typed)}, of another workload than {workload.name}",
        "workload=script, which launches a program of your own",
        shlex.join([f"workload={SCRIPT}", *meant]),
    )


def refuse_foreign_keys(overrides: Sequence[str], workload: Workload) -> None:
    """Raise ConfigError if keys of another workload are typed; proposes them as options of a script."""
    known = {key for key in schema_keys(schema_of(target_of([]))) if "." not in key} - {*schema_keys(Config)}
    own = {*schema_keys(workload.schema)}
    typed = [arg for arg in overrides if "=" in arg and typed_key(arg).partition(".")[0] in known - own]
    ours = {f"+experiment={path.stem}" for path in (CONFIGS / "experiment").glob("*.yaml")}  # all of the default one
    presets = [] if workload.name == default_workload() else [arg.lstrip("+") for arg in overrides if arg in ours]
    if not typed and not presets:
        return
    fixes = [f"the same without {' '.join([*typed, *presets])}"]
    if SCRIPT in own and not presets:
        named = [(typed_key(arg).rpartition(".")[2], arg.partition("=")[2]) for arg in typed]
        fixes.insert(0, shlex.join(f"{SCRIPT}.options.{name}={value}" for name, value in named))
    raise ConfigError(
        f"{', '.join([*typed, *presets])}, of the workload {default_workload()}, with workload={workload.name}",
        "options of the program's own, or keys that every workload has",
        " in its place, or ".join(fixes),
    )


def typed_form(override: str) -> str:
    """An override as it was typed, without the plus signs that ``prepare_overrides`` added."""
    return override.removeprefix("++")


def target_of(overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """Dotted path of the workload that arguments name, or of the default one.

    Args:
        overrides: as typed.
        config_dir: folder of the user's own config files, searched too.

    Raises:
        ConfigError: there is no such option of the group ``workload``.
    """
    typed = typed_value(overrides, "workload._target_")
    if typed is not None:
        return typed.strip("'\"")
    name = typed_value(overrides, "workload") or default_workload()
    folders = [folder for folder in (CONFIGS, config_dir) if folder is not None]
    for folder in folders:
        path = folder / "workload" / f"{name}.yaml"
        if path.is_file():
            return str(yaml.safe_load(path.read_text())["workload"]["_target_"])
    options = sorted(path.stem for folder in folders for path in (folder / "workload").glob("*.yaml"))
    fitting = [option for option in options if option != CUSTOM]
    likely = (closest(name, fitting) or fitting)[0]
    raise ConfigError(
        f"workload={name}",
        f"one of {', '.join(fitting)}, or a class of yours",
        f"workload={likely}, or workload._target_=PACKAGE.MODULE.CLASS",
    )


@cache
def default_workload() -> str:
    """Return the option of the group ``workload`` in configs/config.yaml."""
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    return next(entry["workload"] for entry in defaults if isinstance(entry, dict) and "workload" in entry)


@cache
def schema_of(target: str) -> type[Config]:
    """Return the dataclass of a whole config: the keys of the launcher and those of a workload, both at the root."""
    schema = load_workload(target).schema
    # The base that comes first decides on a default: a workload's own default for a key of every run is said again.
    inherited = {entry.name: entry.default for entry in dataclasses.fields(RunConfig)}
    own = [
        (entry.name, entry.type, dataclasses.field(default=entry.default))
        for entry in dataclasses.fields(schema)
        if entry.name in inherited and entry.default != inherited[entry.name]
    ]
    return cast(type[Config], dataclasses.make_dataclass("Config", own, bases=(Config, schema)))


def workload_of(config: Config | DictConfig) -> Workload:
    """The workload of a config."""
    return load_workload(config.workload._target_)


def register(overrides: Sequence[str], config_dir: Path | None = None) -> type[Config]:
    """Register with Hydra the schema for these arguments, over which it composes ``configs/config.yaml``."""
    schema = schema_of(target_of(overrides, config_dir))
    compose.register_schema("launch_schema", schema)
    return schema


def compose_launch(
    overrides: Sequence[str], config_dir: Path | None = None, *, return_hydra_config: bool = False
) -> DictConfig:
    """Compose ``configs/config.yaml`` without a Hydra run, or once more inside one: then its search path holds.

    Args:
        overrides: as typed.
        config_dir: folder of the user's own config files, searched too.
        return_hydra_config: with the keys of Hydra itself.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    args = prepare_overrides(overrides, config_dir)
    schema = register(args, config_dir)
    inside = GlobalHydra.instance().is_initialized()
    if not inside and config_dir is None and not return_hydra_config:
        # Our own files do not change: another composition in this process differs in values only.
        with suppress(*CONFIG_ERRORS):  # to be explained by what follows
            return composed_with(args, config_groups().__contains__, partial(_composed, target_of(args)))
    searched = [] if config_dir is None else [f"hydra.searchpath=['file://{config_dir}']"]
    with nullcontext() if inside else initialize_config_module("configs", version_base="1.3"):
        try:
            return hydra_compose("config", [*args, *searched], return_hydra_config)
        except CONFIG_ERRORS as error:
            raise explain(error, schema, args) from error


@cache
def _composed(target: str, chosen: tuple[str, ...]) -> DictConfig:
    """Compose our own files over the schema that is registered, which is that of the workload ``target``."""
    with initialize_config_module("configs", version_base="1.3"):
        return hydra_compose("config", list(chosen))


def typed_config(document: DictConfig) -> Config:
    """The typed config of a composed document, whose paths become absolute.

    Raises:
        ConfigError: an unknown key, or a value that is missing or of the wrong type.
    """
    schema = schema_of(document.workload._target_)
    load_workload(document.workload._target_).make_paths_absolute(document)
    compose.make_absolute([(document.cluster, "network")])
    compose.refuse_unknown(document, schema)
    return compose.to_schema(document, schema)


def read_point(folder: RunFolder) -> Config:
    """The config that a run folder was made with, with all keys of its workload.

    Raises:
        ConfigError: the folder holds no run, or its config is damaged.
    """
    loaded = compose.read_document(folder)
    return compose.stored_as(folder, loaded, schema_of(_target_in(folder, loaded)))


def workload_of_run(folder: RunFolder) -> Workload:
    """The workload of a run folder, also of one that ``gpt.train`` made without the launcher.

    Raises:
        ConfigError: the folder holds no run, or its config is damaged.
    """
    return load_workload(_target_in(folder, compose.read_document(folder)))


def _target_in(folder: RunFolder, loaded: DictConfig) -> str:
    if "workload" not in loaded:
        loaded.workload = {"_target_": BEFORE_WORKLOADS}
    target = loaded.workload.get("_target_") if isinstance(loaded.workload, DictConfig) else None
    if not isinstance(target, str):
        raise damaged(folder.config, "it names no workload")
    return target


def default_grace_period_s() -> float:
    """Return resilience.grace_period_s of the default configuration, for a run whose own cannot be read."""
    return float(yaml.safe_load((CONFIGS / "resilience" / "default.yaml").read_text())["grace_period_s"])


def not_in_point(workload: Workload) -> tuple[str, ...]:
    """Keys that do not enter the name of a run folder."""
    return (*NOT_IN_POINT, *workload.not_in_point)


# The points of a sweep: split without running it, and composed with shared parts. Private calls of Hydra are here.


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
