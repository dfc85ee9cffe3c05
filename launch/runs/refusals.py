"""Refusals of overrides that Hydra or OmegaConf rejects, with the key that was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.errors import EXAMPLES, ConfigError, closest
from launch.runs.overrides import NOT_IN_POINT, RANK_VALUES, typed_key

# What keys are called elsewhere: by torchrun, by Slurm, and by the training libraries that people come from.


ELSEWHERE = {
    # torchrun, Lightning
    "nodes": "nnodes num_nodes n_nodes",
    "ranks_per_node": "nproc_per_node ntasks_per_node tasks_per_node gpus_per_task devices num_gpus num_processes",
    "resilience.rendezvous_timeout_s": "rdzv_timeout join_timeout",
    # sbatch
    "cluster.timeout_min": "time time_limit time_limit_min timelimit time_min timeout walltime wall_time",
    "cluster.mem_gb=VALUE": "mem memory mem_per_node",
    "cluster.partition": "queue",
    "cluster.account": "allocation",
    "cluster.array_parallelism": "max_parallel max_jobs",
    "cluster.cpus_per_task": "cpus num_cpus cpus_per_gpu",
    "cluster.gpus_per_node": "gres_gpus gpu_per_node",
    "cluster.srun_args": "srun_flags",
    "cluster.additional_parameters": "sbatch_args slurm_args",
    "name": "job_name run_name experiment_name",
    # nanoGPT, Megatron-LM, torchtitan, transformers, Lightning, DeepSpeed
    "output_dir": "out_dir save_dir dump_folder default_root_dir",
    "resume_from": "resume resume_from_checkpoint ckpt_path",
    "init_from": "pretrained initial_load_path",
    "precision": "dtype mixed_precision mixed_precision_param torch_dtype",
    "precision=bf16": "bf16",
    "precision=fp16": "fp16",
    "tf32": "allow_tf32",
    "compile=default": "torch_compile use_compile",
    "recompute": "activation_checkpoint activation_checkpointing recompute_activations recompute_granularity",
    "recompute=full": "gradient_checkpointing use_gradient_checkpointing",
    "optim.lr": "learning_rate base_lr max_lr",
    "optim.min_lr": "min_learning_rate",
    "optim.max_steps": "steps num_steps train_steps total_steps max_train_steps max_iters train_iters iterations",
    "optim.max_steps=VALUE": "epochs num_epochs max_epochs num_train_epochs",
    "optim.max_tokens": "train_tokens total_tokens num_tokens token_budget",
    "optim.global_batch": "batch_size global_batch_size train_batch_size total_batch_size bs",
    "optim.max_micro_batch": (
        "micro_batch_size local_batch_size per_device_train_batch_size per_device_batch_size device_batch_size "
        "train_micro_batch_size_per_gpu mbs"
    ),
    "optim.max_micro_batch=VALUE": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches grad_accum",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps",
    "optim.grad_clip": "clip_grad max_grad_norm max_norm gradient_clipping gradient_clip_val clip",
    "optim.weight_decay": "wd",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "model.n_layer": "num_layers layers n_layers num_hidden_layers depth",
    "model.n_head": "num_heads heads n_heads num_attention_heads",
    "model.n_kv_head": "num_kv_heads n_kv_heads num_key_value_heads num_query_groups",
    "model.n_embd": "hidden_size d_model dim embed_dim width n_embed",
    "model.ffn_hidden": "ffn_hidden_size intermediate_size d_ff",
    "model.block_size": "seq_len seq_length sequence_length max_seq_len context_length context_size max_length",
    "model.n_expert": "num_experts experts",
    "model.n_expert_per_token": "top_k moe_router_topk num_experts_per_tok",
    "model.rope_base": "rope_theta",
    "model.vocab_multiple": "make_vocab_size_divisible_by",
    "parallel.tp": "tensor tensor_parallel tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size",
    "parallel.pp": "pipeline pipeline_parallel pipeline_parallel_size pipeline_parallel_degree "
    "pipeline_model_parallel_size",
    "parallel.cp": "context_parallel context_parallel_size context_parallel_degree",
    "parallel.ep": "expert_parallel expert_parallel_size expert_parallel_degree expert_model_parallel_size",
    "parallel.dp_shard": "fsdp_size data_parallel_shard_degree",
    "parallel.schedule": "pipeline_parallel_schedule",
    "parallel.cpu_offload": "offload",
    "eval.interval": "eval_interval eval_steps val_interval val_check_interval",
    "eval.sequences": "eval_iters eval_samples",
    "checkpoint.interval": "save_interval save_steps checkpoint_interval checkpoint_every save_every",
    "checkpoint.keep_last": "save_total_limit keep_latest_k save_top_k",
    "checkpoint.asynchronous": "async_mode async_save async_checkpoint",
    "logging.wandb": "wandb_log use_wandb enable_wandb",
    "logging.console_interval_s=VALUE": "log_interval logging_steps log_freq log_every",
    "data.path": "data_path train_data train_file",
    "data.dataset": "dataset_name hf_dataset",
    "data.tokenizer": "tokenizer_name tokenizer_type",
}
"""Key of ours, or a whole override where values mean something else -> its names elsewhere, none of which is ours."""
MEANT = {name: ours for ours, names in ELSEWHERE.items() for name in names.split()}


def override_meant(name: str, value: str, keys: Collection[str]) -> tuple[str, str] | None:
    """Return which of ``keys`` is meant by a ``name`` from elsewhere, dotted or not, and its value; else None.

    The value is the one that was typed, unless the two mean different things: then that of the table.
    """
    key, _, other = MEANT.get(name.rpartition(".")[2].lower().replace("-", "_"), "").partition("=")
    return (key, other or value) if key in keys else None


# Refusals of a value that its key cannot take: what a key takes is read from the schema. Torch-free.


NUMBER = re.compile(r"[+-]?[\d_]*\.?[\d_]*(e[+-]?\d+)?|[+-]?inf|nan", re.IGNORECASE)
"""Numbers, and what else Hydra's grammar of overrides takes for one."""
PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Values that Hydra's grammar of overrides reads without quotes."""


def wrong_value(found: str, key: str, schema: type, overrides: Sequence[str] = ()) -> ConfigError:
    """Say which values ``key`` takes, and propose one of them: what was meant, the default, or a pattern."""
    key = key.partition("[")[0]  # of an element, the list
    typed = next((arg for arg in overrides if typed_key(arg) == key), found).removeprefix("++")
    value = typed.partition("=")[2]
    kind, default = field_of(schema, key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        options = [option.name for option in kind]
        likely = (closest(value, options) or options)[0]
        return ConfigError(typed, f"one of {', '.join(options)}", f"{key}={likely}")
    if kind is bool:
        return ConfigError(typed, "true or false", f"{key}={meant_bool(value)}")
    if kind in (int, float):
        usual = default if type(default) in (int, float) else EXAMPLES.get(key, "1" if kind is int else "0.1")
        fix = f"{key}={in_unit_of(key, value) or (whole(value) if kind is int else None) or usual}"
        if len(several := points_of_range(key, value) or elements(value)) > 1:
            fix = f"python -m launch -m {key}={','.join(several)}"
        return ConfigError(typed, "a whole number" if kind is int else "a number", fix)
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    if isinstance(inner, type) and issubclass(inner, Enum):
        options = [option.name for option in inner]
        alike = dict.fromkeys(next(iter(closest(word, options)), options[0]) for word in elements(value) or options[:1])
        return ConfigError(typed, f"a list of {', '.join(options)}", in_shell(key, f"[{','.join(alike)}]"))
    if get_origin(kind) is list:
        return ConfigError(typed, "a list", listed(key, value))
    if get_origin(kind) is dict:
        return ConfigError(typed, f"keys of your own below {key}, each with its value", f"{key}.NAME=VALUE")
    if kind is str and (meant := ",".join(elements(value))):
        return ConfigError(typed, "one text", in_shell(key, quoted(meant)))
    return ConfigError(typed, "a text" if kind is str else "a value that fits", f"the same without {typed}")


def field_of(schema: type, key: str) -> tuple[Any, Any]:
    """Type of a dotted key, without its None, and its default; None twice where the schema does not tell."""
    kind: Any = schema
    default: Any = None
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            return None, None
        field = next((field for field in dataclasses.fields(kind) if field.name == name), None)
        if field is None:
            return None, None
        hint = get_type_hints(kind)[name]
        optional = NoneType in get_args(hint)
        kind = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
        default = None if field.default is dataclasses.MISSING else field.default
    return kind, default


def could_take(key: str, value: str, schema: type) -> bool:
    """Tell whether a key may take a value as it was typed, of a sweep all of them: False for words where a number is
    expected, or a choice of others."""
    kind, _ = field_of(schema, key)
    several = {word.strip() for word in value.split(",")} - {"null", "VALUE"}
    if kind in (int, float):
        return all(re.fullmatch(NUMBER, word) for word in several)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return several <= kind.__members__.keys()
    return kind is not bool or several <= {"true", "false"}


def meant_bool(value: str) -> str:
    """Return the truth value that a mistyped one begins like."""
    return "false" if value.strip().lower()[:1] in ("f", "n", "0") or value.lower() == "off" else "true"


def listed(key: str, value: str) -> str:
    """Write a single value as the list that its key takes."""
    return in_shell(key, f"[{','.join(quoted(word) for word in words(key, value))}]")


def words(key: str, value: str) -> list[str]:
    """Elements that were meant by a single value: the words of a command, as a shell would split it, else the value."""
    try:
        return shlex.split(value) if key.rpartition(".")[2] == "command" else [value]
    except ValueError:  # a quote that is never closed
        return [value]


def elements(value: str) -> list[str]:
    """Elements of a list as it is typed, or the value alone; nothing of an empty list or null."""
    bare = value.strip()
    if bare in ("null", "[]", "{}"):
        return []
    return [word.strip() for word in bare[1:-1].split(",")] if bare[:1] in ("[", "{") else [bare]


RANGE = re.compile(r"(\d{1,9})(?:\.\.|-)(\d{1,9})")
"""A range of whole numbers, as ``1..4`` or ``1-4``."""
SIZES = ("nodes", "ranks_per_node")
"""Keys of which a scaling sweep takes each value twice as large as the one before."""
MOST_POINTS = 12
"""Points of a sweep that a refusal lists."""


def points_of_range(key: str, value: str) -> list[str]:
    """Values that were meant by a range such as ``1..4``; none where there are too many, or the key makes no points."""
    found = RANGE.fullmatch(value)
    if found is None or key.partition(".")[0] in NOT_IN_POINT:
        return []
    first, last = int(found[1]), int(found[2])
    if key in SIZES and first:
        return [str(first << power) for power in range((last // first).bit_length())]
    return [] if last - first >= MOST_POINTS else [str(number) for number in range(first, last + 1)]


def whole(value: str) -> str | None:
    """Whole number above 0 that was meant by a number with a point or an exponent, as ``1e3``; None for others."""
    try:
        number = float(value)
    except ValueError:
        return None
    return str(int(number)) if 1 <= number < 1e15 and number.is_integer() else None


def quoted(value: str) -> str:
    """Quote a value for Hydra's grammar of overrides, where it needs that."""
    if PLAIN.fullmatch(value):
        return value
    bare = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{bare}"'


def in_shell(key: str, value: str) -> str:
    """Write an override as it is typed into a shell."""
    return f"{key}={value}" if PLAIN.fullmatch(value) else shlex.quote(f"{key}={value}")


def in_unit_of(key: str, value: str) -> str | None:
    """Convert a time such as ``1h`` or ``1:30:00``, or a size such as ``64G``, to the unit that the name of a key ends
    with; None for anything else."""
    if size := re.fullmatch(r"(\d+) ?G(B|iB)?", value, re.IGNORECASE):
        return size.group(1) if key.endswith(("_gb", "_gib")) else None
    if clock := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value):
        hours, minutes, seconds = map(int, clock.groups())
        value = f"{3600 * hours + 60 * minutes + seconds}s"
    units = {"s": 1, "min": 60, "m": 60, "h": 3600, "hours": 3600, "d": 86400}
    told = re.fullmatch(r"(\d+)(s|min|m|h|d)", value)
    unit = units.get(key.rpartition("_")[2])
    if told is None or unit is None:
        return None
    return str(max(1, int(told.group(1)) * units[told.group(2)] // unit))


# Hydra's and OmegaConf's complaints as refusals: found, expected, and what to type next. Torch-free.


CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
LAUNCHER_KEYS = (
    *("workload", "nodes", "ranks_per_node", "spare_nodes", "dry_run", "copy_code"),
    *("launch", "cluster", "resilience", "budget", "objective", "objective_of"),
)
"""Keys that a config has only under the launcher, to tell who types them to a workload."""
BRACES = re.compile(r"(?<![$%\\{])\{(" + "|".join(RANK_VALUES) + r")\}")
"""A value of a run that was meant as ``${...}``."""


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema of nested dataclasses, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from schema_keys(inner, f"{prefix}{field.name}.")


def override_of_flag(flag: str, following: str, schema: type) -> str | None:
    """Return the override that was typed like a flag, ``optim.max_steps=3`` for ``--max-steps 3``; None where no key
    has its name. ``following`` is the word behind it, which may be another override or flag."""
    keys = {key.rsplit(".", 1)[-1]: key for key in sorted(schema_keys(schema), key=lambda key: -key.count("."))}
    keys |= {key: key for key in schema_keys(schema)}
    name = flag.lstrip("-").replace("-", "_")
    value = following if following and not re.search("^-|=", following) else "VALUE"
    meant = (keys[name], value) if name in keys else override_meant(name, value, keys.values())
    return None if meant is None else f"{meant[0]}={shlex.quote(in_unit_of(*meant) or meant[1])}"


def free_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Keys whose value is a mapping with keys of the user's choice."""
    for field in dataclasses.fields(schema):
        inner = field.default_factory
        if inner is dict:
            yield prefix + field.name
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from free_keys(inner, f"{prefix}{field.name}.")


def explain(error: BaseException, schema: type, overrides: Sequence[str] = ()) -> ConfigError:
    """Say what Hydra or OmegaConf refused of ``overrides``: found, expected, and what to type next."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    found_key = re.search(r"full_key: (\S+)", text)
    key = found_key.group(1) if found_key else ""
    first = str(error).strip().splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        return unknown_option(error.missing_cfg_file or "", error.options)
    if isinstance(error, MissingConfigException) and "primary config" in first:
        found = f"no config {error.missing_cfg_file}"
        return ConfigError(found, "config, the name of the launcher's own", "the same without --config-name")
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, schema)
    packaged = next((arg for arg in overrides if "@" in typed_key(arg) and typed_key(arg) in text), None)
    if packaged is not None:
        key, _, value = packaged.partition("=")
        expected = "GROUP=OPTION: an option fills the keys of its own group, and no others"
        return ConfigError(packaged, expected, in_shell(typed_key(key).partition("@")[0], value))
    if "is not in struct" in text or "not in '" in text or "No match in the defaults list" in text:
        key = key or (re.findall(r"'([\w./+]+)'", text) or [first])[0]
        typed = next((arg for arg in overrides if f"{typed_key(arg)}.".startswith(f"{key}.")), f"{key}=VALUE")
        return unknown_in_list(text, schema) or unknown_key(key, schema, typed)
    if several := re.search(r"Ambiguous value for argument '(.+)'", text):
        fix = f"python -m launch -m {several.group(1)}"
        return ConfigError(
            f"{several.group(1)}, several values", "one value; python -m launch -m sweeps over several", fix
        )
    if any(isinstance(e, MissingMandatoryValue) for e in chain):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    refused = re.search(r"override (\S+)", text)
    inner = [known for known in schema_keys(schema) if known.startswith(f"{key}.")]
    if inner and refused:
        return ConfigError(refused.group(1), f"a value for one of {', '.join(inner)}", f"{inner[0]}=VALUE")
    return wrong_value(refused.group(1) if refused else first, key or "KEY", schema, overrides)


def unknown_option(path: str, options: Sequence[str]) -> ConfigError:
    """Name the options of a group of config files that has no such one."""
    group, _, choice = path.rpartition("/")
    likely = closest(choice, options) or sorted(options)
    fix = f"{group}={likely[0]}"
    if group == "hydra/launcher" and choice in ("submitit_slurm", "submitit_local"):
        fix = f"pip install hydra-submitit-launcher, or the same without {group}={choice}"
    return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(options))}", fix)


def unreadable(override: str, schema: type) -> ConfigError:
    """Say how an argument is written that Hydra's grammar of overrides cannot read."""
    override = override.removeprefix("++")  # of a key of the user's choice, which needs none where it is typed
    key, equals, value = override.partition("=")
    value = BRACES.sub(r"${\1}", value)
    found, expected = f"{override}, which cannot be read", "KEY=VALUE, quoted where it holds []{}:, or ="
    if not equals and is_path(override, schema):
        expected = "KEY=VALUE; a run that is there has commands of its own"
        return ConfigError(f"{override}, a path without a key", expected, complete_path(override, schema))
    if not equals:
        return ConfigError(found, "KEY=VALUE", complete(override, schema))
    if key in free_keys(schema) and re.match(r"[\w.]+=", value):
        expected = f"keys of your own below {key}, each with its value"
        return ConfigError(found, expected, f"{key}.{value.replace(',', f' {key}.')}")
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")):
        return ConfigError(found, "one argument: the shell splits at blanks", f"'{key}=...', quoted as a whole")
    if value.startswith("["):
        return ConfigError(
            found, expected, f"""'{key}=[{",".join(f'"{word.strip()}"' for word in value.strip("[]").split(","))}]'"""
        )
    if get_origin(field_of(schema, key)[0]) is list:
        return ConfigError(found, expected, listed(key, value))
    return ConfigError(found, expected, respell(key, value))


def respell(key: str, value: str) -> str:
    """Write anew what Hydra's grammar could not read: without stray signs where that is what was meant, else quoted."""
    name = key.strip(" '\"-")
    if name.rpartition(".")[2] == "command":
        return listed(name, value)
    several = [word for word in value.split(",") if word.strip()]
    bare = ",".join(several) if "," in value else value.lstrip("=").strip(" '\"")
    if (name, bare) != (key, value) and all(PLAIN.fullmatch(word) for word in bare.split(",")):
        return f"{name}={bare}"  # a comma without its value, one sign or a quote too many
    return in_shell(name, quoted(value))


def is_path(word: str, schema: type) -> bool:
    """Tell a word that was meant as a file or a folder from a mistyped key."""
    return "/" in word or word.endswith(".py") or (Path(word).exists() and word not in schema_keys(schema))


def complete_path(word: str, schema: type) -> str:
    """Propose what to type in place of a path: the command that looks at runs, or the key that takes it."""
    if word.endswith(".py") and "nodes" in schema_keys(schema):
        return f"workload=script script.path={shlex.quote(word)}"
    return f"python -m launch.status {shlex.quote(word)}, or output_dir={shlex.quote(word)}"


def complete(word: str, schema: type) -> str:
    """Propose what to type in place of a word without a value: a key, the group that has it as option, or nothing."""
    keys = list(schema_keys(schema))
    if word.rpartition(".")[0] in free_keys(schema):
        return f"{word}=VALUE"
    if word.isdecimal() and "nodes" in keys:
        return f"nodes={word}"
    groups = [group for group in option_groups(word) if group in keys]
    meant = [word] if word in keys else closest(word, keys)
    if groups or meant:
        return f"{groups[0]}={word}" if groups and word not in keys else f"{meant[0]}=VALUE"
    return f"the same without {word}"


def option_groups(option: str) -> list[str]:
    """Groups of config files that have an option of this name, of those that Hydra searches at the moment."""
    running = GlobalHydra.instance()
    if not running.is_initialized():
        return []
    loader = running.config_loader()
    return [group for group in loader.list_groups("") if option in loader.get_group_options(group)]


def unknown_in_list(text: str, schema: type) -> ConfigError | None:
    """Name the keys of the elements of a list, where OmegaConf says that one of them has no such key; else None."""
    found = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    for path, element in list_elements(schema):
        if found and element.__name__ == found.group(2):
            keys = [field.name for field in dataclasses.fields(element)]
            example = (closest(found.group(1), keys) or keys)[0]
            return ConfigError(
                f"unknown key {found.group(1)} in {path}",
                f"one of {', '.join(keys)}",
                f"{path}='[{{{example}: VALUE}}]'",
            )
    return None


def list_elements(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted keys whose value is a list of dataclasses, and that dataclass."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, arguments = field.default_factory, get_args(hints[field.name])
        element = arguments[0] if inner is list and arguments else None
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            yield f"{prefix}{field.name}", element
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from list_elements(inner, f"{prefix}{field.name}.")


def below(group: str, rest: str, schema: type) -> str:
    """Return a key that was found in place of a mistyped group, with what was typed below that where it is a key."""
    is_key = group in free_keys(schema) or f"{group}{rest}" in schema_keys(schema)
    return f"{group}{rest}" if is_key else group


def unknown_key(key: str, schema: type, typed: str) -> ConfigError:
    """Name the keys that look like the one that does not exist, of the override that was ``typed``."""
    value = typed.partition("=")[2]
    keys = list(schema_keys(schema))
    if key.split(".")[0] in LAUNCHER_KEYS and "nodes" not in keys:
        return ConfigError(
            f"{key}, a key of the launcher",
            f"one of {', '.join(k for k in keys if '.' not in k)}: torchrun and gpt.train know no nodes",
            f"python -m launch {typed}",
        )
    if key.split(".")[0] == "script" and "nodes" not in keys:
        found, expected = f"{key}, a key of workload=script", "the launcher, which starts a program of your own"
        return ConfigError(found, expected, f"python -m launch workload=script {shlex.quote(typed)}")
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    groups = {k.rpartition(".")[0] for k in keys}
    if parent in keys and parent not in groups:
        return ConfigError(typed, f"a value for {parent}, which has no keys below it", f"{parent}=VALUE")
    name = typed_key(typed)
    elsewhere = override_meant(name, value, [*keys, *LAUNCHER_KEYS])
    above = name.rpartition(".")[0]
    if elsewhere and (above not in groups - {""} or elsewhere[0].rpartition(".")[0] == above):
        ours = elsewhere[0], in_unit_of(*elsewhere) or elsewhere[1]
        command = "" if ours[0] in keys else "python -m launch "
        return ConfigError(f"unknown key {key}", some_of(siblings, leaf, [ours[0]]), command + in_shell(*ours))
    rest = name[len(key) :]
    settable = {k.rpartition(".")[2]: k for k in siblings if k not in groups or "." not in k or f"{k}{rest}" in keys}
    likely = [settable[name] for name in closest(leaf, settable)]
    leaves = {k: k.rpartition(".")[2] for k in keys}
    likely += [k for k in keys if leaves[k] == leaf] or [k for k in keys if f"_{leaf}_" in f"_{leaves[k]}_"]
    if not likely and "." not in key and "script.options" in free_keys(schema):
        likely = [f"script.options.{key}"]
    meant = sorted((below(name, rest, schema) for name in likely), key=lambda name: not could_take(name, value, schema))
    fix = in_shell(meant[0], value) if meant else f"the same without {typed}"
    return ConfigError(f"unknown key {key}", some_of(siblings, leaf, likely), fix)


MOST_NAMES = 12
"""Names that a refusal lists."""


def some_of(names: Sequence[str], meant: str, first: Sequence[str] = ()) -> str:
    """List names for people: ``first``, then those most like what was ``meant``, and not more than one can take in."""
    alike = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, name.rpartition(".")[2], meant).ratio())
    shown = list(dict.fromkeys([*(name for name in first if name in names), *alike]))[:MOST_NAMES]
    left = len(names) - len(shown)
    if left:
        return f"a key such as {', '.join(shown)} ({left} more, listed in configs/)"
    return f"one of {', '.join(name for name in names)}"


# The last part of a refusal, tried before it is made: what to type next must not be refused in its turn.


Check = Callable[[list[str]], object]
"""Raises ConfigError where a run with these overrides cannot work."""
SEPARATOR = ", or "
"""Between the alternatives of a fix."""
DEEPEST = 3
"""Refusals in a row that are followed before an alternative is given up."""
OVERRIDE = re.compile(r"[a-z]\w*([./]\w+)*=\S.*", re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.")
"""Values that stand for one of the user's: VALUE, FILE, N."""


def with_checked_fix(error: ConfigError, overrides: Sequence[str], check: Check) -> ConfigError:
    """Return the refusal of ``overrides`` with a fix that ``check`` does not refuse, as far as it can be tried.

    An alternative that is refused for something else is completed by what that asks for; one that leads nowhere is left
    out. Words, and commands, are kept as they are.
    """
    if not refuses(check, list(overrides), error.found):  # the check sees another config than the refused one
        return error
    settled = [settle(alternative, overrides, check, (error.found,)) for alternative in error.fix.split(SEPARATOR)]
    by_words = {frozenset(alternative.split()): alternative for alternative in settled[::-1] if alternative}
    kept = [alternative for alternative in dict.fromkeys(settled) if alternative and alternative in by_words.values()]
    if not kept:
        return ConfigError(
            error.found, error.expected, f"{error.fix.split(SEPARATOR)[0]}, and what the next refusal then asks for"
        )
    return ConfigError(error.found, error.expected, SEPARATOR.join(kept))


def refuses(check: Check, overrides: list[str], found: str) -> bool:
    """True where ``check`` refuses ``overrides`` for what was ``found``."""
    try:
        check(overrides)
    except ConfigError as error:
        return error.found == found
    return False


def settle(alternative: str, overrides: Sequence[str], check: Check, before: tuple[str, ...]) -> str | None:
    """Return an alternative, completed until ``check`` takes it, or untried where it is no list of overrides.

    None where it leads nowhere. ``before`` are the findings of the refusals that led to it.
    """
    words = read_overrides(alternative)
    if words is None:
        return alternative
    try:
        check(replace_typed(overrides, words))
    except ConfigError as error:
        if error.found in before or len(before) == DEEPEST:
            return None
        for further in error.fix.split(SEPARATOR):
            more = read_overrides(further)
            if more is not None:
                joined = shlex.join(replace_typed(words, more))
                if settled := settle(joined, overrides, check, (*before, error.found)):
                    return settled
        return None
    return alternative


def read_overrides(alternative: str) -> list[str] | None:
    """Return the overrides that an alternative consists of; None where it holds words or placeholders."""
    try:
        words = shlex.split(alternative)
    except ValueError:  # an apostrophe in a word
        return None
    fits = all(OVERRIDE.fullmatch(word) and not PLACEHOLDER.fullmatch(word.split("=", 1)[1]) for word in words)
    return words if words and fits else None


def replace_typed(overrides: Sequence[str], words: Sequence[str]) -> list[str]:
    """Return overrides with others in place of those of the same keys."""
    keys = {typed_key(word) for word in words}
    return [*(override for override in overrides if typed_key(override) not in keys), *words]
