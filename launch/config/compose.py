"""Configs as ``Config`` objects, from the overrides that a user types: for one run, and for each run of a sweep."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import cast

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

import configs
from launch.config import Config
from launch.errors import ConfigError, closest, schema_keys
from launch.runs import compose
from launch.runs.compose import RunConfig
from launch.runs.folder import RunFolder, damaged
from launch.runs.overrides import (
    NOT_IN_POINT,
    check_overrides,
    parse_override,
    searched_folders,
    typed_key,
    typed_value,
)
from launch.workload import BEFORE_WORKLOADS, Workload, load_workload

CONFIGS = Path(configs.__file__).parent
SCRIPT = "script"
"""Value of ``workload`` that launches a user's own program: ``workload=script``."""
CUSTOM = "custom"
"""Value of ``workload`` that launches the program of a class of the user, which ``workload._target_`` names."""


def require_config_dir(path: str | None) -> Path | None:
    """Return the absolute path of the folder that the option ``--config-dir`` names; None if the option is absent.

    Raises:
        ConfigError: the folder does not exist.
    """
    folder = None if path is None else Path(path).expanduser().absolute()
    if folder and not folder.is_dir():
        expected = "a folder laid out as configs/ is, such as FOLDER/cluster/mysite.yaml"
        raise ConfigError(f"--config-dir {path}, which is no folder", expected, "--config-dir FOLDER")
    return folder


def prepare_overrides(overrides: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """Check each typed override, and return the overrides in Hydra's grammar.

    ``workload._target_=X`` without ``workload`` adds ``workload=custom``. A value that Hydra's grammar would
    interpret, such as a regular expression, is quoted if its key is in ``Workload.raw_keys``. ``config_dir`` is the
    folder of the user's own config files; None if there is none.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    args = list(overrides)
    if typed_value(args, "workload._target_") is not None and typed_value(args, "workload") is None:
        args.append(f"workload={CUSTOM}")
    target = target_of(args, config_dir)
    workload = load_workload(target)
    refuse_other_workload(args, workload)
    for index, arg in enumerate(args):
        key, _, value = arg.partition("=")
        if key in workload.raw_keys and value[:1] not in ("'", '"') and value != "null":
            escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
            args[index] = f"{key}='{escaped}'"
    folders = [config_dir] if config_dir is not None else searched_folders()
    return check_overrides(args, schema_of(target), folders)


def refuse_other_workload(overrides: Sequence[str], workload: Workload) -> None:
    """Raise ConfigError if a typed key is not a key of ``workload``, the launched workload, but of another workload.

    ``experiment=NAME`` is a key of the default workload if NAME is a preset of this project, because presets set keys
    of the default workload.
    """
    is_default = workload.name == default_workload()
    other = SCRIPT if is_default else default_workload()
    try:
        keys = schema_keys(schema_of(target_of([f"workload={other}"])))
    except ConfigError:  # The libraries of the other workload are not installed.
        return
    foreign = {*keys} - {*schema_keys(workload.schema), *schema_keys(Config)}
    if not is_default and (CONFIGS / "experiment" / f"{typed_value(overrides, 'experiment')}.yaml").is_file():
        foreign.add("experiment")
    if is_default:
        foreign.add("like")
    typed = [arg for arg in overrides if "=" in arg and typed_key(arg).partition(".")[0] in foreign]
    if not typed:
        return
    fix = f"the same without {' '.join(typed)}; options of your program are script.options.NAME=VALUE"
    raise ConfigError(
        f"{', '.join(typed)}, of the workload {other}, with workload={workload.name}",
        "keys of the workload that is launched",
        shlex.join([f"workload={other}", *typed]) if is_default else fix,
    )


def typed_form(override: str) -> str:
    """Return an override without the two plus signs before its key, which ``prepare_overrides`` may have added."""
    return override.removeprefix("++")


def target_of(overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """Return the dotted path of the workload's class that the overrides name, or that of the default workload.

    Args:
        overrides: overrides as typed.
        config_dir: folder of the user's own config files; None if there is none.

    Raises:
        ConfigError: there is no such option of the group ``workload``.
    """
    typed = typed_value(overrides, "workload._target_")
    if typed is not None:
        return typed.strip("'\"")
    name = typed_value(overrides, "workload") or default_workload()
    folders = [CONFIGS, *([config_dir] if config_dir is not None else searched_folders())]
    for folder in folders:
        path = folder / "workload" / f"{name}.yaml"
        if path.is_file():
            return _target_in_file(path)
    options = sorted(path.stem for folder in folders for path in (folder / "workload").glob("*.yaml"))
    fitting = [option for option in options if option != CUSTOM]
    likely = (closest(name, fitting) or fitting)[0]
    raise ConfigError(
        f"workload={name}",
        f"one of {', '.join(fitting)}, or a class of yours",
        f"workload={likely}, or workload._target_=PACKAGE.MODULE.CLASS",
    )


@cache
def _target_in_file(path: Path) -> str:
    """Return ``workload._target_`` of a config file. Raises ConfigError if the file does not contain it."""
    try:
        with path.open() as file:
            return str(yaml.safe_load(file)["workload"]["_target_"])
    except yaml.YAMLError as error:
        raise compose.refuse_file_of_config(error) from error
    except (KeyError, TypeError) as error:
        fix = "workload: {_target_: PACKAGE.MODULE.CLASS} in that file"
        raise ConfigError(f"{path} without workload._target_", "the dotted path of a class", fix) from error


@cache
def default_workload() -> str:
    """Return the name of the default workload, from configs/config.yaml."""
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    return next(entry["workload"] for entry in defaults if isinstance(entry, dict) and "workload" in entry)


@cache
def schema_of(target: str) -> type[Config]:
    """Return the dataclass of a whole config: the keys of the launcher and of a workload, both at the root.

    ``target`` is the dotted path of the workload's class.

    Raises:
        ConfigError: the path cannot be imported, or is no workload.
    """
    schema = load_workload(target).schema
    # The first base decides on a default. So a workload's own default for a launcher key is set again.
    inherited = {entry.name: entry.default for entry in dataclasses.fields(RunConfig)}
    own = [
        (entry.name, entry.type, dataclasses.field(default=entry.default))
        for entry in dataclasses.fields(schema)
        if entry.name in inherited and entry.default != inherited[entry.name]
    ]
    return cast(type[Config], dataclasses.make_dataclass("Config", own, bases=(Config, schema)))


def workload_of(config: Config | DictConfig) -> Workload:
    """Return the workload that a config names.

    Raises:
        ConfigError: the class cannot be imported, or is no workload.
    """
    return load_workload(config.workload._target_)


def register(overrides: Sequence[str], config_dir: Path | None = None) -> type[Config]:
    """Register the schema of the config with Hydra, and return the schema. The overrides name the workload.

    ``config_dir`` is the folder of the user's own config files; None if there is none.

    Raises:
        ConfigError: there is no such workload, or its class cannot be imported.
    """
    schema = schema_of(target_of(overrides, config_dir))
    compose.register_schema("launch_schema", schema)
    return schema


def compose_launch(
    overrides: Sequence[str], config_dir: Path | None = None, *, with_hydra: bool = False, primary: str = "config"
) -> DictConfig:
    """Return the composed config of one run. Inside a run of Hydra, its config search path is used.

        config = typed_config(compose_launch(["nodes=2", "model=gpt2_124m"]))

    Args:
        overrides: overrides as typed.
        config_dir: folder of the user's own config files; None if there is none.
        with_hydra: True to include the keys of Hydra itself.
        primary: name of the config file.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    args = prepare_overrides(overrides, config_dir)
    schema = register(args, config_dir)
    return compose.compose_typed(primary, schema, args, config_dir, with_hydra=with_hydra)


def typed_config(document: DictConfig) -> Config:
    """Return a composed config as a ``Config`` object. Its paths become absolute.

    Raises:
        ConfigError: an unknown key, or a value that is missing or of the wrong type.
    """
    schema = schema_of(document.workload._target_)
    load_workload(document.workload._target_).make_paths_absolute(document)
    compose.make_absolute([(document.cluster, "network")])
    return compose.to_schema(document, schema)


def read_point(folder: RunFolder) -> Config:
    """Return the config of an existing run folder, with all keys of its workload.

    Raises:
        ConfigError: the folder has no run, or its config is damaged.
    """
    loaded = compose.read_document(folder)
    return compose.stored_as(folder, loaded, schema_of(_target_in(folder, loaded)))


def workload_of_run(folder: RunFolder) -> Workload:
    """Return the workload of a run folder. ``gpt.train`` may have made the folder, without the launcher.

    Raises:
        ConfigError: the folder has no run, or its config is damaged.
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
    """Return the default of resilience.grace_period_s in seconds, for a run whose config is unreadable."""
    return float(yaml.safe_load((CONFIGS / "resilience" / "default.yaml").read_text())["grace_period_s"])


def not_in_point(workload: Workload) -> tuple[str, ...]:
    """Return the keys that do not become part of the name of a run folder: keys of the launcher and of ``workload``."""
    return (*NOT_IN_POINT, *workload.not_in_point)


def sweep_points(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Return the overrides of each point of a sweep, in Hydra's order of the points.

    Args:
        overrides: overrides as typed.
        config_dir: folder of the user's own config files; None if there is none.

    Raises:
        ConfigError: an override cannot be read, or chooses a config that does not exist.
    """
    prepared = prepare_overrides(overrides, config_dir)
    typed = [parse_override(text, Config) for text in prepared]
    fixed = [text for text, override in zip(prepared, typed, strict=True) if not override.is_sweep_override()]
    params = compose_launch(fixed, config_dir, with_hydra=True).hydra.sweeper.get("params") or {}
    in_files = [parse_override(f"{key}={value}", Config) for key, value in params.items()]
    return BasicSweeper.split_arguments([*in_files, *typed], max_batch_size=None)[0]
