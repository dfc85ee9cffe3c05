"""Overrides: ``KEY=VALUE`` as typed, the check of each against a schema, and the name that they give a run.

The check comes before Hydra composes a file, because Hydra's own errors do not name the key, nor the override to type
next.
"""

from __future__ import annotations

import copy
import dataclasses
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
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from launch.errors import ConfigError, closest
from launch.runs.folder import RunFolder, damaged, read_strictly
from launch.schema import field_of, free_keys, list_elements, schema_keys

if TYPE_CHECKING:
    # Only functions that parse overrides import Hydra, so that a report, which reads text, does not wait for it.
    from hydra.core.override_parser.types import Override

# Overrides as text.


def typed_key(override: str) -> str:
    """Return the key of an override: ``nodes`` for ``++nodes=2``."""
    return override.split("=", 1)[0].lstrip("+~")


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """Return the value typed for ``key``, of the last such override; None if there is none."""
    values = [override.split("=", 1)[1] for override in overrides if "=" in override and typed_key(override) == key]
    return values[-1] if values else None


def without_key(overrides: Iterable[str], key: str) -> list[str]:
    """Return the overrides of other keys."""
    return [override for override in overrides if typed_key(override) != key]


def is_within(key: str, groups: Iterable[str]) -> bool:
    """Return whether ``key``, or a group that it is in, is among ``groups``."""
    return f"{key}.".startswith(tuple(f"{group}." for group in groups))


PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Values that neither Hydra's grammar of overrides nor a shell reads as syntax."""


def quoted(value: str) -> str:
    """Quote a value for Hydra's grammar of overrides, if needed."""
    if PLAIN.fullmatch(value):
        return value
    bare = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{bare}"'


def in_shell(key: str, value: str) -> str:
    """Write an override as it is typed into a shell."""
    return f"{key}={value}" if PLAIN.fullmatch(value) else shlex.quote(f"{key}={value}")


def read_overrides(folder: RunFolder) -> tuple[str, ...]:
    """Read the overrides of the run of a folder; empty if the folder has no file of overrides.

    Raises:
        ConfigError: the file is damaged.
    """
    if not folder.overrides.exists():
        return ()
    found = read_strictly(folder.overrides)
    if not isinstance(found, list):  # of a run without overrides it is an empty list
        raise damaged(folder.overrides, "it is empty" if not found else "it holds no list")
    return tuple(str(override) for override in found)


# The name of a run.


PLACE_KEYS = ("output_dir", "name", "run_dir", "fresh", "resume_from", "require_same_code")
"""Keys for the place of a run's files. They do not change the results of the run."""
LAUNCHER_KEYS = (
    *("workload", "nodes", "ranks_per_node", "spare_nodes", "dry_run", "copy_code"),
    *("launch", "cluster", "resilience", "budget", "objective", "objective_of"),
)
"""Keys that exist only in configs of the launcher."""
NOT_IN_POINT = (*PLACE_KEYS, *(key for key in LAUNCHER_KEYS if key not in ("nodes", "ranks_per_node")), "hydra")
"""Keys that are not part of the name of a run's folder: where and how the run is submitted."""
RANK_VALUES = ("nodes", "ranks_per_node", "world_size", "run_dir", "checkpoint_dir", "attempt", "name")
"""Names that ``${...}`` in the arguments of a program can have. Their values are known when a rank starts."""
NOTHING_TYPED = "default"
"""Name of a run without overrides."""
NAME_LIMIT = 120  # a folder name holds 255 bytes on common filesystems; leaves room for suffixes


def point_keys(overrides: Iterable[str], exclude: Collection[str]) -> frozenset[str]:
    """Return the overrides that name a point. Two points with the same ones are the same run.

    Args:
        overrides: as typed.
        exclude: keys, or groups of keys, that do not distinguish runs.
    """
    # A plus before a key is for Hydra, and does not change the run.
    return frozenset(o.lstrip("+") for o in overrides if not is_within(typed_key(o), exclude))


def point_name(overrides: Iterable[str], exclude: Collection[str]) -> str:
    """Return the name of a point: the same overrides in any order give the same name.

    Characters that do not belong into a folder name are replaced, and a hash of the exact text is appended.
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
"""Names of Hydra's kinds of sweeps whose values are listed; a search (``interval``) chooses values later."""


@cache
def config_groups() -> frozenset[str]:
    """Return the folders of configs/: groups of files, such as ``model``, of which one option is chosen by its name."""
    return frozenset(folder.name for folder in files("configs").iterdir() if folder.is_dir())


@cache
def structured(schema: type) -> DictConfig:
    """Return the schema as a config of OmegaConf. Cached, because making it takes as long as a composition."""
    made: DictConfig = OmegaConf.structured(schema)
    return made


@cache
def _scratch(schema: type) -> DictConfig:
    """Return a config in which values are set only to check their types."""
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
    """Return typed overrides as Hydra takes them, after a check of each key and value.

    ``experiment=X``, and keys of the user's choice, such as ``script.options.lr``, are typed without a plus.

    Args:
        overrides: as typed.
        schema: of the config.
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
    name, free = typed_key(typed), free_keys(schema)
    if equals and not name:
        raise ConfigError(f"{typed}, a value without a key", "KEY=VALUE", f"the same without {typed}")
    if typed.startswith("~") and name in config_groups() - {"experiment", "workload"}:
        expected = f"one option of {name}, which every run has"
        raise ConfigError(f"{typed}, which takes it away", expected, f"the same without {typed}")
    is_group = name in config_groups() or any((folder / name).is_dir() for folder in folders)
    if is_group and name not in ("experiment", "workload", "hydra"):
        _check_option(typed, name, folders)
    override = parse(typed, schema)
    if name.startswith(("hydra.", "hydra/")):
        return typed
    if override.package is not None:
        expected = "GROUP=OPTION: an option fills the keys of its own group"
        raise ConfigError(typed, expected, in_shell(name.partition("@")[0], value))
    if is_group or "/" in name:
        return f"+{typed}" if key == "experiment" else typed
    _check_key(name, typed, schema)
    if not override.is_delete():
        _check_value(override, typed, schema)
    is_free = name.startswith(tuple(f"{one}." for one in free)) or (name in free and value.startswith("{"))
    return f"++{typed}" if is_free and key == name else typed


def _check_option(typed: str, group: str, folders: Sequence[Path]) -> None:
    """Raise ConfigError unless ``typed`` chooses options that a group of config files has."""
    value = typed.partition("=")[2]
    words = [word for option in value.split(",") if (word := option.strip("[] '\""))]
    if value.startswith("["):
        fix = f"{group}={','.join(words)}" if words else f"the same without {typed}"
        expected = f"one option of {group}; python -m launch -m sweeps over several"
        raise ConfigError(f"{typed}, a list of options", expected, f"python -m launch -m {fix}" if words[1:] else fix)
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    options = {path.stem for path in paths} | {
        entry.name.removesuffix(".yaml")
        for entry in (files("configs").joinpath(group).iterdir() if group in config_groups() else ())
    }
    wrong = next((word for word in words if word not in options and PLAIN.fullmatch(word)), None)
    if wrong is not None:
        raise unknown_option(group, wrong, options)


def unknown_option(group: str, choice: str, options: Collection[str]) -> ConfigError:
    """Return the refusal of an option that a group of config files does not have."""
    likely = closest(choice, options) or sorted(options)
    fix = f"{group}={likely[0]}"
    if group == "hydra/launcher" and choice in ("submitit_slurm", "submitit_local"):
        fix = f"pip install hydra-submitit-launcher, or the same without {group}={choice}"
    return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(options))}", fix)


@cache
def _parsed(typed: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(typed)


def parse(typed: str, schema: type) -> Override:
    """Read one override by Hydra's grammar. Raises ConfigError if it cannot be read."""
    from hydra.errors import HydraException

    try:
        return _parsed(typed)
    except HydraException as error:
        raise _unreadable(typed, schema) from error


def _check_key(name: str, typed: str, schema: type) -> None:
    """Raise ConfigError unless ``name`` is a key of the schema, or below a key that takes keys of the user's choice."""
    keys = schema_keys(schema)
    if is_within(name, free_keys(schema)):
        return
    inner = [key for key in keys if key.startswith(f"{name}.")]
    if inner and not typed.partition("=")[2].startswith("{"):
        raise ConfigError(typed.lstrip("+"), f"a value for one of {', '.join(inner)}", f"{inner[0]}=VALUE")
    if name not in keys and name.rpartition("[")[0].rstrip(".") not in keys:
        raise unknown_key(name, typed.partition("=")[2], schema)


def _check_value(override: Override, typed: str, schema: type) -> None:
    """Raise ConfigError if a value, or one of those of a sweep, is not of the type of its key."""
    key, values = override.key_or_group, [override]
    if override.is_sweep_override():
        texts = override.sweep_string_iterator() if override.value_type and override.value_type.name in SWEEPS else ()
        values = [parse(f"{key}={text}", schema) for text in texts]
    for one in values:
        set_value(_scratch(schema), one, schema, typed)


def set_value(config: DictConfig, override: Override, schema: type, typed: str = "") -> None:
    """Set the value of an override in a config, as Hydra does. Raises ConfigError if its type is wrong."""
    from hydra.errors import HydraException

    try:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, HydraException) as error:
        raise refuse_value(error, schema, typed or str(override.input_line)) from error


# Refusals, with a proposal of the override that was probably meant.


def refuse_value(error: BaseException, schema: type, typed: str = "") -> ConfigError:
    """Return the refusal of a value that OmegaConf rejects.

    Args:
        error: as raised.
        schema: of the config.
        typed: the override; empty for a value in a file.
    """
    key, wrong = str(getattr(error, "full_key", None) or ""), getattr(error, "value", None)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    for path, element in list_elements(schema).items():
        if isinstance(error, ConfigKeyError) and error.object_type is element:
            names = [field.name for field in dataclasses.fields(element)]
            fix = _example_of(path, closest(str(error.key), names) or names)
            return ConfigError(f"unknown key {error.key} in {path}", f"one of {', '.join(names)}", fix)
    typed = (typed or f"{key}={'null' if wrong is None else wrong}").lstrip("+")
    return wrong_value(typed, schema)


def wrong_value(typed: str, schema: type) -> ConfigError:
    """Return the refusal of an override whose value has the wrong type, with the values that its key takes."""
    key, _, value = typed.partition("=")
    kind = field_of(schema, key.partition("[")[0])[0]
    is_list = get_origin(kind) is list
    inner = get_args(kind)[0] if is_list else kind
    if isinstance(inner, type) and issubclass(inner, Enum):
        options = [option.name for option in inner]
        words = [word.strip() for word in value.strip("[]{}").split(",")]
        alike = dict.fromkeys(next(iter(closest(word, options)), options[0]) for word in words)
        fix = f"[{','.join(alike)}]" if is_list else next(iter(alike))
        return ConfigError(typed, f"{'a list of' if is_list else 'one of'} {', '.join(options)}", in_shell(key, fix))
    if kind is bool:
        return ConfigError(typed, "true or false", f"{key}=true, or {key}=false")
    if kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        if value == "null":
            return ConfigError(typed, expected, f"{key}=NUMBER; python -m launch.keys {key} says what each number does")
        sweep = f"python -m launch -m {key}={value.strip('[]')}"
        return ConfigError(typed, expected, sweep if "," in value else f"{key}=NUMBER")
    if is_list:
        return ConfigError(typed, "a list", in_shell(key, _list_of(key, value)))
    if get_origin(kind) is dict:
        return ConfigError(typed, f"keys of your own below {key}, each with its value", f"{key}.NAME=VALUE")
    if kind is str and value != "null":
        return ConfigError(typed, "one text", in_shell(key, quoted(value.strip("[]{}"))))
    return ConfigError(typed, "a text" if kind is str else "a value that fits", f"the same without {typed}")


def _list_of(key: str, value: str) -> str:
    """Write a value, or the elements of a list that cannot be read, as a list in Hydra's grammar."""
    is_command = key.rpartition(".")[2] == "command" and not value.startswith("[")
    words = value.split() if is_command else [word.strip() for word in value.strip("[]").split(",")]
    return f"[{','.join(quoted(word) for word in words if word)}]"


def _example_of(path: str, keys: Sequence[str]) -> str:
    return f"{path}='[{{{keys[0]}: VALUE}}]'"


BRACES = re.compile(r"(?<![$%\\{])\{(" + "|".join(RANK_VALUES) + r")\}")
"""A value of a run that was meant as ``${...}``."""


def _unreadable(typed: str, schema: type) -> ConfigError:
    """Return the refusal of an argument that Hydra's grammar of overrides cannot read."""
    key, equals, value = typed.partition("=")
    value = BRACES.sub(r"${\1}", value).lstrip("=")
    found, expected = f"{typed}, which cannot be read", "KEY=VALUE, quoted where it holds []{}:, or ="
    if not equals:
        is_path = "/" in typed or typed.endswith(".py")
        found = f"{typed}, a path without a key" if is_path else found
        return ConfigError(found, "KEY=VALUE", _completed(typed, schema))
    if key in free_keys(schema) and re.match(r"[\w.]+=", value):
        expected = f"keys of your own below {key}, each with its value"
        return ConfigError(found, expected, f"{key}.{value.replace(',', f' {key}.')}")
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")):
        return ConfigError(found, "one argument: the shell splits at blanks", f"'{key}=...', quoted as a whole")
    element = list_elements(schema).get(key)
    if element is not None:
        names = [field.name for field in dataclasses.fields(element)]
        expected = f"a list of {{KEY: VALUE}} with keys among {', '.join(names)}"
        return ConfigError(found, expected, _example_of(key, names))
    is_list = value.startswith("[") or get_origin(field_of(schema, key)[0]) is list
    return ConfigError(found, expected, in_shell(key.strip(" '\""), _list_of(key, value) if is_list else quoted(value)))


def _completed(word: str, schema: type) -> str:
    """Return the proposal for an argument without a value: a command, a key, or the command without the argument."""
    keys = schema_keys(schema)
    if word.isdecimal() and "nodes" in keys:
        return f"nodes={word}"
    if word.endswith(".py") and "nodes" in keys:
        return f"workload=script script.path={shlex.quote(word)}"
    if "/" in word or word.endswith(".py"):
        return f"python -m launch.status {shlex.quote(word)}, or output_dir={shlex.quote(word)}"
    if word in keys or word.rpartition(".")[0] in free_keys(schema):
        return f"{word}=VALUE"
    groups = config_groups() & {*keys}
    group = next((one for one in sorted(groups) if files("configs").joinpath(one, f"{word}.yaml").is_file()), None)
    if group is not None:
        return f"{group}={word}"
    likely = closest(word, keys)
    return f"{likely[0]}=VALUE" if likely else f"the same without {word}"


MEANT = {
    name: ours
    for ours, names in {
        # torchrun and Slurm
        "nodes": "nnodes num_nodes",
        "ranks_per_node": "nproc_per_node ntasks_per_node tasks_per_node devices num_processes",
        "resilience.rendezvous_timeout_s": "rdzv_timeout join_timeout",
        "cluster.timeout_min=MINUTES": "time time_limit timelimit timeout walltime",
        "cluster.mem_gb=GB": "mem memory mem_per_node",
        "cluster.partition": "queue",
        "cluster.cpus_per_task": "cpus cpus_per_gpu",
        "cluster.gpus_per_node": "gpus num_gpus",
        "cluster.gpu_name": "gpu gpu_type",
        "cluster.additional_parameters": "sbatch_args slurm_args",
        "name": "job_name run_name",
        # transformers' Trainer, Lightning, nanoGPT
        "output_dir": "out_dir save_dir default_root_dir",
        "resume_from": "resume resume_from_checkpoint ckpt_path",
        "precision": "dtype mixed_precision torch_dtype",
        "precision=bf16": "bf16",
        "precision=fp16": "fp16",
        "compile=default": "torch_compile",
        "recompute": "activation_checkpointing",
        "recompute=full": "gradient_checkpointing",
        "optim.lr": "learning_rate",
        "optim.max_steps": "steps num_steps max_iters train_iters",
        "optim.max_steps=STEPS": "epochs max_epochs num_train_epochs",
        "optim.global_batch": "batch_size global_batch_size train_batch_size",
        "optim.max_micro_batch": "micro_batch_size per_device_train_batch_size",
        "optim.max_micro_batch=VALUE": "gradient_accumulation_steps accumulate_grad_batches",
        "optim.warmup_steps": "warmup warmup_iters num_warmup_steps",
        "optim.grad_clip": "max_grad_norm gradient_clip_val",
        "model.n_layer": "num_layers num_hidden_layers",
        "model.n_head": "num_heads num_attention_heads",
        "model.n_embd": "hidden_size d_model",
        "model.block_size": "seq_len seq_length sequence_length max_seq_len context_length",
        "parallel.tp": "tensor tensor_parallel_size tensor_model_parallel_size",
        "parallel.pp": "pipeline pipeline_parallel_size pipeline_model_parallel_size",
        "parallel.dp_shard": "fsdp_size",
        "eval.interval": "eval_interval eval_steps val_check_interval",
        "checkpoint.interval": "save_interval save_steps",
        "checkpoint.keep_last": "save_total_limit save_top_k",
        "logging.console_interval_s=VALUE": "log_interval logging_steps",
        "data.path": "data_path train_file",
        "data.dataset": "dataset_name",
    }.items()
    for name in names.split()
}
"""Name of a key elsewhere -> key of ours, or a whole override if its values mean something else."""


def meant(name: str, value: str, schema: type, *, exactly: bool = False) -> list[str]:
    """Return the overrides that a name of no key probably means, best first, as they are typed into a shell.

    Args:
        name: as typed, such as ``learning-rate``.
        value: as typed.
        schema: of the config.
        exactly: leave out keys whose name is merely alike.
    """
    keys, free = schema_keys(schema), free_keys(schema)
    name = name.replace("-", "_")
    parent, _, leaf = name.rpartition(".")
    ours, _, other = MEANT.get(leaf.lower(), "").partition("=")
    is_group = parent and any(key.rpartition(".")[0] == parent for key in keys)
    if ours in (*keys, *LAUNCHER_KEYS) and (not is_group or ours.rpartition(".")[0] == parent):
        return [in_shell(ours, other or value)]
    likely = [key for key in keys if key == name]
    if not exactly and (is_group or not parent):
        named = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
        likely += [named[one] for one in difflib.get_close_matches(leaf, named)]
    if not exactly and parent:
        likely += [f"{one}.{leaf}" for one in difflib.get_close_matches(parent, free, cutoff=0.8)]
    likely += sorted((key for key in keys if key.rpartition(".")[2] == leaf), key=lambda key: key.count("."))
    if not likely and not exactly:
        likely = [key for key in keys if f"_{leaf}_" in f"_{key.rpartition('.')[2]}_"]
    if not likely and not exactly and not parent and "script.options" in free:
        likely = [f"script.options.{name}"]
    return [in_shell(key, value) for key in dict.fromkeys(likely)]


def unknown_key(key: str, value: str, schema: type) -> ConfigError:
    """Return the refusal of a key that does not exist, with the keys that were probably meant."""
    keys, typed = schema_keys(schema), f"{key}={value}"
    if "nodes" not in keys and key.split(".")[0] in (*LAUNCHER_KEYS, "script"):
        workload = "workload=script" if key.startswith("script") else ""
        expected = "keys of gpt.train: torchrun and gpt.train know no nodes"
        command = f"python -m launch {workload} {shlex.quote(typed)}".replace("  ", " ")
        return ConfigError(f"{key}, a key of {workload or 'the launcher'}", expected, command)
    parent = key.rpartition(".")[0]
    if parent in keys and not any(one.startswith(f"{parent}.") for one in keys):
        return ConfigError(typed, f"a value for {parent}, which has no keys below it", f"{parent}=VALUE")
    likely = meant(key, value, schema)
    siblings = [one for one in keys if one.rpartition(".")[0] == parent] or [one for one in keys if "." not in one]
    alike = difflib.get_close_matches(key, siblings, n=MOST_NAMES, cutoff=0)
    listed = dict.fromkeys([*(one.strip("'").partition("=")[0] for one in likely), *alike])
    names = [name for name in listed if name in keys][:MOST_NAMES]
    expected = f"a key such as {', '.join(names)} (python -m launch.keys lists all)"
    fix = likely[0] if likely else f"the same without {typed}"
    if likely and "nodes" not in keys and fix.partition("=")[0].strip("'") not in keys:
        fix = f"python -m launch {fix}"
    return ConfigError(f"unknown key {key}", expected, fix)


MOST_NAMES = 12
"""Names that a refusal lists."""


def override_of_flag(flag: str, following: str, schema: type) -> str | None:
    """Return the override for a flag, ``optim.max_steps=3`` for ``--max-steps 3``; None if no key has its name.

    Args:
        flag: as typed.
        following: the next argument, which may be another override or flag.
        schema: of the config.
    """
    value = following if following and not re.search("^-|=", following) else "VALUE"
    return next(iter(meant(flag.lstrip("-"), value, schema, exactly=True)), None)
