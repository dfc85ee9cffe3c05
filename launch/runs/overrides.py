"""Overrides: ``KEY=VALUE`` as typed, the check of each against a schema, and the name that they give a run.

The check comes before Hydra composes a file, because Hydra's own errors name neither the key nor the override to type
next.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.errors import ConfigError, closest, free_keys, key_types, list_elements, schema_keys
from launch.runs.folder import RunFolder, damaged, read_strictly

if TYPE_CHECKING:
    # Only functions that parse overrides import Hydra, so that a report, which reads text, does not wait for it.
    from hydra.core.override_parser.types import Override

# Overrides as text.


def typed_key(override: str) -> str:
    """Return the key of an override, such as ``nodes`` for ``++nodes=2``."""
    return override.split("=", 1)[0].lstrip("+~")


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """Return the value in the last override of ``key``; None if no override has this key."""
    values = [override.split("=", 1)[1] for override in overrides if "=" in override and typed_key(override) == key]
    return values[-1] if values else None


def without_key(overrides: Iterable[str], key: str) -> list[str]:
    """Return the overrides without those of ``key``."""
    return [override for override in overrides if typed_key(override) != key]


def is_within(key: str, groups: Iterable[str]) -> bool:
    """Return whether ``groups`` contains ``key`` or a group of ``key``, such as ``cluster`` for ``cluster.network``."""
    return f"{key}.".startswith(tuple(f"{group}." for group in groups))


PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Pattern of values that need no quotes, neither in Hydra's grammar of overrides nor in a shell."""


def quoted(value: str) -> str:
    """Return a value as Hydra's grammar of overrides accepts it, in quotes if it needs them."""
    if PLAIN.fullmatch(value):
        return value
    bare = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{bare}"'


def in_shell(key: str, value: str) -> str:
    """Return an override as a user types it into a shell, in quotes if it needs them."""
    return f"{key}={value}" if PLAIN.fullmatch(value) else shlex.quote(f"{key}={value}")


def read_overrides(folder: RunFolder) -> tuple[str, ...]:
    """Return the overrides of the run of a folder; empty if the folder has no file of overrides.

    Raises:
        ConfigError: the file is damaged.
    """
    if not folder.overrides.exists():
        return ()
    found = read_strictly(folder.overrides)
    if not isinstance(found, list):  # of a run without overrides it is an empty list
        raise damaged(folder.overrides, "it is empty" if not found else "it has no list")
    return tuple(str(override) for override in found)


# The name of a run.


PLACE_KEYS = ("output_dir", "name", "run_dir", "fresh", "resume_from", "require_same_code")
"""Keys that choose the place of a run's files. They do not change the results of the run."""
LAUNCHER_KEYS = (
    *("workload", "nodes", "ranks_per_node", "spare_nodes", "spare_jobs", "dry_run", "copy_code"),
    *("launch", "cluster", "resilience", "budget", "objective", "objective_of"),
)
"""Keys that exist only in configs of the launcher."""
NOT_IN_POINT = (*PLACE_KEYS, *(key for key in LAUNCHER_KEYS if key not in ("nodes", "ranks_per_node")), "hydra")
"""Keys that are not part of the name of a run's folder, because they only set where and how the run is submitted."""
RANK_VALUES = (
    *("nodes", "ranks_per_node", "world_size", "run_dir", "checkpoint_dir", "attempt", "name"),
    *("newest", "newest_step", "rank", "local_rank", "coordinator"),
)
"""Names that ``${...}`` in the arguments of a program can have. The values are known only when a rank starts."""
NOTHING_TYPED = "default"
"""Name of the folder of a run without overrides."""
NAME_LIMIT = 120  # a folder name holds 255 bytes on common filesystems; leaves room for suffixes


def point_keys(overrides: Iterable[str], exclude: Collection[str]) -> frozenset[str]:
    """Return the overrides that identify a point. If this function returns the same for two points, they are one run.

    Args:
        overrides: overrides as typed.
        exclude: keys, or groups of keys, that do not distinguish runs.
    """
    # A plus before a key is for Hydra, and does not change the run.
    return frozenset(o.lstrip("+") for o in overrides if not is_within(typed_key(o), exclude))


def point_name(overrides: Iterable[str], exclude: Collection[str]) -> str:
    """Return the name of a point. The same overrides in any order give the same name.

    Overrides of the keys, or groups of keys, in ``exclude`` are left out. If characters have to be replaced or cut off
    for a folder name, a hash of the original name is appended.
    """
    kept = [o.lstrip("+") for o in overrides if point_keys([o], exclude)]
    exact = ",".join(sorted(kept)) or NOTHING_TYPED
    name = re.sub(r"[^A-Za-z0-9_=.,+~-]", "_", exact)
    if name == exact and len(name) <= NAME_LIMIT and not name.startswith("."):
        return name
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[:NAME_LIMIT].lstrip('.')}-{digest}"


# The check of overrides against a schema.


SWEEPS = ("CHOICE_SWEEP", "SIMPLE_CHOICE_SWEEP", "RANGE_SWEEP")
"""Names of Hydra's kinds of sweeps that list their values.

In a search (``interval``), a sweeper chooses values later.
"""


@cache
def config_groups() -> frozenset[str]:
    """Return the names of the folders in configs/, such as ``model``. A config has at most one file of each folder."""
    return frozenset(folder.name for folder in files("configs").iterdir() if folder.is_dir())


@cache
def structured(schema: type) -> DictConfig:
    """Return a schema, a dataclass, as a config of OmegaConf. Cached, because this takes as long as a composition."""
    made: DictConfig = OmegaConf.structured(schema)
    return made


@cache
def _scratch(schema: type) -> DictConfig:
    """Return a config of the dataclass ``schema`` in which values are set only to check their types."""
    return copy.deepcopy(structured(schema))


def searched_folders() -> list[Path]:
    """Return the folders that the running Hydra searches in addition to configs/; empty if Hydra does not run."""
    from hydra.core.global_hydra import GlobalHydra

    running = GlobalHydra.instance()
    if not running.is_initialized():
        return []
    entries = running.config_loader().get_search_path().get_path()
    return [Path(entry.path.removeprefix("file://")) for entry in entries if entry.path.startswith("file://")]


def check_overrides(overrides: Iterable[str], schema: type, folders: Sequence[Path] = ()) -> list[str]:
    """Return overrides in Hydra's grammar, after a check of each key and value.

    Users type ``experiment=X``, and keys of their choice such as ``script.options.lr``, without the plus signs that
    Hydra needs. The result has the plus signs.

    Args:
        overrides: overrides as typed.
        schema: dataclass of the config.
        folders: the user's own folders of config files, laid out as configs/.

    Raises:
        ConfigError: an override that cannot be read, an unknown key or option, or a value of the wrong type.
    """
    args = list(overrides)
    if "=" in args:  # nodes = 2 reaches a program as three arguments
        raise ConfigError(" ".join(args), "KEY=VALUE without blanks around =", " ".join(args).replace(" = ", "="))
    return [_checked(arg, schema, tuple(folders)) for arg in args]


@cache
def _checked(typed: str, schema: type, folders: tuple[Path, ...]) -> str:
    key, equals, value = typed.partition("=")
    name, keys, free = typed_key(typed), schema_keys(schema), free_keys(schema)
    if not name or not (equals or typed.startswith("~")):
        raise _incomplete(typed, schema)
    if typed.startswith("~") and name in config_groups() - {"experiment", "workload"}:
        expected = f"one option of {name}, which every run has"
        raise ConfigError(f"{typed}, which removes it", expected, f"the same without {typed}")
    is_group = name in config_groups() or any((folder / name).is_dir() for folder in folders)
    if is_group and name not in ("experiment", "workload", "hydra"):
        _check_option(typed, name, folders)
    if is_group or "/" in name or name.startswith("hydra."):
        parse_override(typed, schema)
        return f"+{typed}" if key == "experiment" else typed
    if not is_within(name, free):
        inner = [one for one in keys if one.startswith(f"{name}.")]
        if inner and not value.startswith("{"):
            raise ConfigError(typed.lstrip("+"), f"a value for one of {', '.join(inner)}", f"{inner[0]}=VALUE")
        if name not in keys and name.rpartition("[")[0].rstrip(".") not in keys:
            raise unknown_key(name, value, schema)
    override = parse_override(typed, schema)
    if not override.is_delete():
        _check_value(override, typed, schema)
    is_free = is_within(name, free) and (name not in free or value.startswith("{"))
    return f"++{typed}" if is_free and key == name else typed


def _incomplete(typed: str, schema: type) -> ConfigError:
    """Return the ConfigError for ``typed``, an argument without a key or a value. ``schema`` has the possible keys."""
    keys = schema_keys(schema)
    likely = [typed] if is_within(typed, free_keys(schema)) else closest(typed, keys)
    fix = f"{likely[0]}=VALUE" if likely else f"the same without {typed}"
    if typed.endswith(".py") and "nodes" in keys:
        fix = f"workload=script script.path={shlex.quote(typed)}"
    return ConfigError(f"{typed}, which is no override", "KEY=VALUE", fix)


def _check_option(typed: str, group: str, folders: Sequence[Path]) -> None:
    """Raise ConfigError unless each option in ``typed`` (``GROUP=OPTION,OPTION``) is a config file of ``group``.

    A list in brackets is refused. ``folders`` are the user's own folders of config files, searched in addition to
    configs/.
    """
    value = typed.partition("=")[2]
    words = [word for option in value.split(",") if (word := option.strip("[] '\""))]
    if value.startswith("["):
        expected = f"one option of {group}; python -m launch -m sweeps over several"
        fix = f"python -m launch -m {group}={','.join(words) or 'OPTION'}"
        raise ConfigError(f"{typed}, a list of options", expected, fix)
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    options = {path.stem for path in paths} | {
        entry.name.removesuffix(".yaml")
        for entry in (files("configs").joinpath(group).iterdir() if group in config_groups() else ())
    }
    wrong = next((word for word in words if word not in options and PLAIN.fullmatch(word)), None)
    if wrong is not None:
        raise unknown_option(group, wrong, options)


def unknown_option(group: str, choice: str, options: Collection[str]) -> ConfigError:
    """Return the ConfigError for ``choice``, an option that a group of config files does not have."""
    likely = [option for option in sorted(options) if option.startswith(choice)] or closest(choice, options)
    likely = likely or sorted(options)
    fix = f"{group}={likely[0]}"
    if group == "hydra/launcher" and choice in ("submitit_slurm", "submitit_local"):
        fix = f"pip install hydra-submitit-launcher, or the same without {group}={choice}"
    return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(options))}", fix)


@cache
def parse_override(typed: str, schema: type) -> Override:
    """Return the override ``typed``, parsed by Hydra's grammar.

    Raises ConfigError if the grammar does not accept ``typed``. Its message proposes a value that fits ``schema``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(typed)
    except HydraException as error:
        fix = fitting_value(typed, schema)[1]
        expected = "KEY=VALUE, quoted if it contains []{}:, or ="
        raise ConfigError(f"{typed}, which cannot be read", expected, fix) from error


def _check_value(override: Override, typed: str, schema: type) -> None:
    """Raise ConfigError if the value of an override, or a value of a sweep, does not have the type of the key.

    ``typed`` is the override as typed, for the message; ``schema`` is the dataclass of the config.
    """
    key, values = override.key_or_group, [override]
    if override.is_sweep_override():
        texts = override.sweep_string_iterator() if override.value_type and override.value_type.name in SWEEPS else ()
        values = [parse_override(f"{key}={text}", schema) for text in texts]
    for one in values:
        set_value(_scratch(schema), one, schema, typed)


def set_value(config: DictConfig, override: Override, schema: type, typed: str = "") -> None:
    """Set the value of an override in a config, as Hydra does. Raises ConfigError if the type of the value is wrong.

    ``schema`` is the dataclass of the config; ``typed`` is the override as typed, for the message.
    """
    from hydra.errors import HydraException

    try:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, HydraException) as error:
        raise refuse_value(error, schema, typed or str(override.input_line)) from error


# Refusals of a value and of a key.


def refuse_value(error: BaseException, schema: type, typed: str = "") -> ConfigError:
    """Return the ConfigError for a value that OmegaConf rejects.

    Args:
        error: error of OmegaConf.
        schema: dataclass of the config.
        typed: the override; empty for a value in a file.
    """
    key, wrong = str(getattr(error, "full_key", None) or ""), getattr(error, "value", None)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    typed = (typed or f"{key}={'null' if wrong is None else wrong}").lstrip("+")
    return ConfigError(typed, *fitting_value(typed, schema))


def fitting_value(typed: str, schema: type) -> tuple[str, str]:
    """Return a description of the values that the key of an override accepts, and an override with such a value.

    ``typed`` is the override with the wrong value; ``schema`` is the dataclass of the config.
    """
    key, _, value = typed.partition("=")
    path = key.partition("[")[0]
    kind, value = key_types(schema).get(path), value.lstrip("=")
    if names := list_elements(schema).get(path):
        return f"a list of {{KEY: VALUE}} with keys among {', '.join(names)}", f"{path}='[{{{names[0]}: VALUE}}]'"
    is_list = get_origin(kind) is list
    inner = get_args(kind)[0] if is_list else kind
    # A command is typed as in a shell; in other lists a blank is part of an element.
    separator = None if path.endswith("command") and not value.startswith("[") else ","
    words = [word.strip() for word in value.strip("[]").split(separator) if word.strip()] if is_list else [value]
    expected = "a list" if is_list else "one text"
    if isinstance(inner, type) and issubclass(inner, Enum):
        options = [option.name for option in inner]
        if "none" in options and value.lower() == "false":  # compile is a switch in other programs
            words = ["none"]
        words = [(closest(word, options) or options)[0] for word in words]
        expected = f"{'a list of' if is_list else 'one of'} {', '.join(options)}"
    elif get_origin(kind) is dict:
        return f"keys of your own below {key}, each with its value", f"{key}.NAME=VALUE"
    elif kind in (bool, int, float):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        known = f"; python -m launch.keys {key} has its meaning" if value == "null" else ""
        return expected, f"{key}={'true' if kind is bool else 'NUMBER'}{known}"
    elif not is_list:
        words = ["TEXT" if value == "null" else value.strip("[]") if value.startswith("[") else value]
    texts = ",".join(map(quoted, words))
    return expected, in_shell(key, f"[{texts}]" if is_list else texts)


ELSEWHERE = {
    # torchrun and Slurm
    **dict.fromkeys(("nnodes", "num_nodes"), "nodes"),
    **dict.fromkeys(("nproc_per_node", "ntasks_per_node", "devices"), "ranks_per_node"),
    "time": "cluster.timeout_min=MINUTES",
    "mem": "cluster.mem_gb=GB",
    "gpus": "cluster.gpus_per_node",
    "gpu": "cluster.gpu_name",
    "job_name": "name",
    "dry_run": "dry_run=true",
    # transformers' Trainer
    "resume_from_checkpoint": "resume_from",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "torch_compile": "compile=default",
    "gradient_checkpointing": "recompute=full",
    "learning_rate": "optim.lr",
    "steps": "optim.max_steps",
    "num_train_epochs": "optim.max_steps=STEPS",
    "gradient_accumulation_steps": "optim.max_micro_batch=VALUE",
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "optim.max_micro_batch"),
    "max_grad_norm": "optim.grad_clip",
    **dict.fromkeys(("eval_steps", "eval_interval"), "eval.interval"),
    "save_steps": "checkpoint.interval",
    "save_total_limit": "checkpoint.keep_last",
    # nanoGPT, and programs that name the parts of a model
    "dataset": "data",
    "dtype": "precision",
    "eval_iters": "eval.sequences=SEQUENCES",
    "lr_decay_iters": "optim.max_steps",
    "wandb_log": "logging.wandb",
    "wandb_project": "logging.wandb=true, with WANDB_PROJECT={} before the command",
    "arch_preset": "model",
    "position_encoding": "model.position",
    "normalization": "model.norm",
    "ffn_type": "model.ffn",
    "weight_tying": "model.tie_embeddings",
    **{f"use_{engine}": f"parallel={engine}" for engine in ("ddp", "zero1", "fsdp")},
    # earlier versions of this project
    "keep_every": "checkpoint.keep_last=null",
    "copy_keep": "checkpoint.keep_last",
    "in_memory": "checkpoint.memory_interval=10",
    "in_memory_interval": "checkpoint.memory_interval",
    "subset": "data.dataset=NAME:SUBSET",
    "target_val_nats_per_byte": "optim.target_val_loss=LOSS",
    **dict.fromkeys(("offload_optimizer", "offload_parameters"), "parallel.cpu_offload=true"),
}
"""Name of a setting in another program or in an earlier version of this project -> key with the same meaning.

If a value means something else in this project, there is a whole override in place of the key. ``{}`` in the override
is replaced by the typed value.
"""
MOST_NAMES = 6
"""Largest number of similar keys that an error message lists."""


def likely_override(name: str, value: str, schema: type) -> str | None:
    """Return the override that a user who typed an unknown key probably meant, quoted for a shell.

    None if no key has a similar name. The override has the user's value if the key accepts it.
    """
    keys, free = schema_keys(schema), free_keys(schema)
    name = name.replace("-", "_")
    parent, _, leaf = name.rpartition(".")
    ours, _, other = ELSEWHERE.get(leaf, "").partition("=")
    if ours in keys and other:  # A switch of another tool that is false needs no key here.
        return None if value.lower() == "false" else f"{ours}={other}".format(shlex.quote(value))
    # A name without a group is compared with the last parts of keys. If several are equal, the shortest key counts.
    named = {key if parent else key.rpartition(".")[2]: key for key in sorted(keys, key=lambda key: -key.count("."))}
    likely = [ours] if ours in keys else []
    likely += [named[one] for one in difflib.get_close_matches(name, named, cutoff=0.75)]
    likely = [f"{key}.{leaf}" if key in free and parent.count(".") == key.count(".") else key for key in likely]
    likely += [key for key in keys if parent and key.rpartition(".")[2] == leaf]
    if not likely and not parent and "script.options" in free:
        likely = [f"script.options.{name}"]
    if not likely:
        return None
    try:
        _checked(f"{likely[0]}={value}", schema, ())
    except ConfigError as refusal:
        return refusal.fix
    return in_shell(likely[0], value)


def unknown_key(key: str, value: str, schema: type) -> ConfigError:
    """Return the ConfigError for a key that does not exist. It lists the keys that the user probably meant."""
    keys, typed = schema_keys(schema), f"{key}={value}"
    if "nodes" not in keys and key.split(".")[0] in (*LAUNCHER_KEYS, "script"):
        words = ["workload=script", typed] if key.startswith("script") else [typed]
        expected = "keys of gpt.train: torchrun and gpt.train know no nodes"
        return ConfigError(f"{key}, a key of the launcher", expected, f"python -m launch {shlex.join(words)}")
    names = difflib.get_close_matches(key, keys, n=MOST_NAMES, cutoff=0.5)
    such = f"such as {', '.join(names)} " if names else ""
    fix = likely_override(key, value, schema) or f"the same without {typed}"
    return ConfigError(f"unknown key {key}", f"a key {such}(python -m launch.keys lists all)", fix)


def unknown_flag(flag: str, argv: Sequence[str], schema: type, flags: Sequence[str], command: str) -> ConfigError:
    """Return the ConfigError for a flag that does not exist, such as ``--max-steps 3``.

    It proposes the override that the user probably meant: ``optim.max_steps=3``.

    Args:
        flag: flag as typed, with its value if they are joined by ``=``.
        argv: all arguments; the one after the flag may be its value, another override or another flag.
        schema: dataclass of the config.
        flags: flags of the command.
        command: ``python -m`` and the module.
    """
    name, _, value = flag.partition("=")
    following = value or next(iter(argv[argv.index(flag) + 1 :]), "")
    value = following if following and not re.search("^-|=", following) else "VALUE"
    bare = name.lstrip("-")
    alike = [f"--{one}" for one in closest(bare, [flag.lstrip("-") for flag in flags])]
    fix = likely_override(bare, value, schema) or next(iter(alike), f"{command} --help")
    return ConfigError(f"{flag}, which is no flag", f"KEY=VALUE, or one of {', '.join(flags)}", fix)
