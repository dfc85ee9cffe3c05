"""Refusals of overrides that Hydra or OmegaConf rejects, with the key that was probably meant.

Hydra's and OmegaConf's errors have no fields for the key and the value that they refuse, so ``explain`` reads both from
their texts: without it a mistyped key would end in a traceback of some sixty lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import get_args, get_origin

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.errors import EXAMPLES, ConfigError, closest
from launch.runs.overrides import RANK_VALUES, typed_key
from launch.schema import field_of, free_keys, list_elements, schema_keys

# What torchrun, Slurm and other training libraries call a key.


ELSEWHERE = {
    # torchrun, Lightning
    "nodes": "nnodes num_nodes n_nodes",
    "ranks_per_node": "nproc_per_node ntasks_per_node tasks_per_node gpus_per_task devices num_gpus num_processes",
    "resilience.rendezvous_timeout_s": "rdzv_timeout join_timeout",
    # sbatch
    "cluster.timeout_min=MINUTES": "time time_limit time_limit_min timelimit time_min timeout walltime wall_time",
    "cluster.mem_gb=GB": "mem memory mem_per_node",
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
    "optim.max_steps=STEPS": "epochs num_epochs max_epochs num_train_epochs",
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
    """Return the one of ``keys`` that torchrun, Slurm or another library calls ``name``, and its value; else None.

    The value is the one that was typed, unless the two mean different things: then that of the table.
    """
    key, _, other = MEANT.get(name.rpartition(".")[2].lower().replace("-", "_"), "").partition("=")
    return (key, other or value) if key in keys else None


def override_of_flag(flag: str, following: str, schema: type) -> str | None:
    """Return the override for a flag, ``optim.max_steps=3`` for ``--max-steps 3``; None where no key has its name.

    Args:
        flag: as typed.
        following: the next argument, which may be another override or flag.
        schema: of the config.
    """
    keys = {key.rsplit(".", 1)[-1]: key for key in sorted(schema_keys(schema), key=lambda key: -key.count("."))}
    keys |= {key: key for key in schema_keys(schema)}
    name = flag.lstrip("-").replace("-", "_")
    value = following if following and not re.search("^-|=", following) else "VALUE"
    meant = (keys[name], value) if name in keys else override_meant(name, value, keys.values())
    return None if meant is None else in_shell(*meant)


# What the keys of a schema are, and how a value is written.


CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
LAUNCHER_KEYS = (
    *("workload", "nodes", "ranks_per_node", "spare_nodes", "dry_run", "copy_code"),
    *("launch", "cluster", "resilience", "budget", "objective", "objective_of"),
)
"""Keys that a config has only under the launcher."""
PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Values that neither Hydra's grammar of overrides nor a shell reads as syntax."""
BRACES = re.compile(r"(?<![$%\\{])\{(" + "|".join(RANK_VALUES) + r")\}")
"""A value of a run that was meant as ``${...}``."""


def quoted(value: str) -> str:
    """Quote a value for Hydra's grammar of overrides, where it needs that."""
    if PLAIN.fullmatch(value):
        return value
    bare = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{bare}"'


def in_shell(key: str, value: str) -> str:
    """Write an override as it is typed into a shell."""
    return f"{key}={value}" if PLAIN.fullmatch(value) else shlex.quote(f"{key}={value}")


def list_of(key: str, value: str) -> str:
    """Write a value, or the elements of a list that cannot be read, as a list in Hydra's grammar of overrides."""
    is_command = key.rpartition(".")[2] == "command" and not value.startswith("[")
    words = value.split() if is_command else [word.strip() for word in value.strip("[]").split(",")]
    return f"[{','.join(quoted(word) for word in words if word)}]"


# Refusals.


def explain(error: BaseException, schema: type, overrides: Sequence[str] = ()) -> ConfigError:
    """Return the refusal for an error of Hydra or OmegaConf: found, expected, and what to type next.

    Args:
        error: as it was raised.
        schema: of the config.
        overrides: as typed.
    """
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
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
        found = f"{where}, which is no YAML: {getattr(error, 'problem', None) or first}"
        return ConfigError(found, "KEY: VALUE on each line, with every bracket and quote closed", "the same command")
    if in_file := re.search(r"In '([^']+)': ", first):
        values = re.findall(r"Value '([^']*)'", text)
        refusal = wrong_value(f"{key}={values[0] if values else '?'}", key or "KEY", schema)
        fix = f"{refusal.fix.replace('=', ': ', 1)} in that file"
        return ConfigError(f"{refusal.found} in {in_file[1]}.yaml", refusal.expected, fix)
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
        found, expected = f"{several.group(1)}, several values", "one value; python -m launch -m sweeps over several"
        return ConfigError(found, expected, f"python -m launch -m {several.group(1)}")
    if any(isinstance(e, MissingMandatoryValue) for e in chain):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    refused = re.search(r"override (\S+)", text)
    inner = [known for known in schema_keys(schema) if known.startswith(f"{key}.")]
    if inner and refused:
        return ConfigError(refused.group(1), f"a value for one of {', '.join(inner)}", f"{inner[0]}=VALUE")
    return wrong_value(refused.group(1) if refused else first, key or "KEY", schema, overrides)


def wrong_value(found: str, key: str, schema: type, overrides: Sequence[str] = ()) -> ConfigError:
    """Return the refusal of a value that ``key`` cannot take, with the values that it takes."""
    key = key.partition("[")[0]  # of an element, the list
    typed = next((arg for arg in overrides if typed_key(arg) == key), found).removeprefix("++")
    value = typed.partition("=")[2]
    kind, default = field_of(schema, key)
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
        usual = default if type(default) in (int, float) else EXAMPLES.get(key, "NUMBER")
        sweep = f"; python -m launch -m {key}={value.strip('[]')} sweeps" if "," in value else ""
        return ConfigError(typed, expected, f"{key}={usual}{sweep}")
    if is_list:
        return ConfigError(typed, "a list", in_shell(key, list_of(key, value)))
    if get_origin(kind) is dict:
        return ConfigError(typed, f"keys of your own below {key}, each with its value", f"{key}.NAME=VALUE")
    if kind is str and value != "null":
        return ConfigError(typed, "one text", in_shell(key, quoted(value.strip("[]{}"))))
    return ConfigError(typed, "a text" if kind is str else "a value that fits", f"the same without {typed}")


def unknown_option(path: str, options: Sequence[str]) -> ConfigError:
    """Return the refusal of an option that a group of config files does not have."""
    group, _, choice = path.rpartition("/")
    likely = closest(choice, options) or sorted(options)
    fix = f"{group}={likely[0]}"
    if group == "hydra/launcher" and choice in ("submitit_slurm", "submitit_local"):
        fix = f"pip install hydra-submitit-launcher, or the same without {group}={choice}"
    return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(options))}", fix)


def unreadable(override: str, schema: type) -> ConfigError:
    """Return the refusal of an argument that Hydra's grammar of overrides cannot read."""
    override = override.removeprefix("++")  # of a key of the user's choice, which needs none where it is typed
    key, equals, value = override.partition("=")
    value = BRACES.sub(r"${\1}", value).lstrip("=")
    found, expected = f"{override}, which cannot be read", "KEY=VALUE, quoted where it holds []{}:, or ="
    if not equals or not key:
        if is_path(override, list(schema_keys(schema))):
            found = f"{override}, a path without a key"
        return ConfigError(found, "KEY=VALUE", complete(override.strip("="), schema))
    if key in free_keys(schema) and re.match(r"[\w.]+=", value):
        expected = f"keys of your own below {key}, each with its value"
        return ConfigError(found, expected, f"{key}.{value.replace(',', f' {key}.')}")
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")):
        return ConfigError(found, "one argument: the shell splits at blanks", f"'{key}=...', quoted as a whole")
    element = dict(list_elements(schema)).get(key)
    if element is not None:
        names = [field.name for field in dataclasses.fields(element)]
        return ConfigError(
            found, f"a list of {{KEY: VALUE}} with keys among {', '.join(names)}", example_of(key, names)
        )
    is_list = value.startswith("[") or get_origin(field_of(schema, key)[0]) is list
    return ConfigError(found, expected, in_shell(key.strip(" '\""), list_of(key, value) if is_list else quoted(value)))


def complete(word: str, schema: type) -> str:
    """Return what to type in place of an argument without a value: a command, a key, or the same without it."""
    keys = list(schema_keys(schema))
    if word.isdecimal() and "nodes" in keys:
        return f"nodes={word}"
    if word.endswith(".py") and "nodes" in keys:
        return f"workload=script script.path={shlex.quote(word)}"
    if is_path(word, keys):
        return f"python -m launch.status {shlex.quote(word)}, or output_dir={shlex.quote(word)}"
    if word.rpartition(".")[0] in free_keys(schema):
        return f"{word}=VALUE"
    groups = [group for group in option_groups(word) if group in keys]
    meant = [word] if word in keys else closest(word, keys)
    if groups and word not in keys:
        return f"{groups[0]}={word}"
    return f"{meant[0]}=VALUE" if meant else f"the same without {word}"


def is_path(word: str, keys: Collection[str]) -> bool:
    """Tell a file or a folder from a mistyped key."""
    return "/" in word or word.endswith(".py") or (Path(word).exists() and word not in keys)


def option_groups(option: str) -> list[str]:
    """Groups of config files that have an option of this name, of those that Hydra searches at the moment."""
    running = GlobalHydra.instance()
    if not running.is_initialized():
        return []
    loader = running.config_loader()
    return [group for group in loader.list_groups("") if option in loader.get_group_options(group)]


def unknown_in_list(text: str, schema: type) -> ConfigError | None:
    """Return the refusal of an unknown key in an element of a list; None where OmegaConf names no such element."""
    found = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    for path, element in list_elements(schema):
        if found and element.__name__ == found.group(2):
            keys = [field.name for field in dataclasses.fields(element)]
            example = example_of(path, closest(found.group(1), keys) or keys)
            return ConfigError(f"unknown key {found.group(1)} in {path}", f"one of {', '.join(keys)}", example)
    return None


def example_of(path: str, keys: Sequence[str]) -> str:
    """Write a list of one element with the first of ``keys``."""
    return f"{path}='[{{{keys[0]}: VALUE}}]'"


def unknown_key(key: str, schema: type, typed: str) -> ConfigError:
    """Return the refusal of a key that does not exist, with keys of a similar name.

    Args:
        key: the part of the typed key that does not exist.
        schema: of the config.
        typed: the override.
    """
    value = typed.partition("=")[2]
    keys = list(schema_keys(schema))
    if "nodes" not in keys and key.split(".")[0] in (*LAUNCHER_KEYS, "script"):
        found = f"{key}, a key of {'workload=script' if key.startswith('script') else 'the launcher'}"
        expected = f"one of {', '.join(k for k in keys if '.' not in k)}: torchrun and gpt.train know no nodes"
        workload = "workload=script " if key.startswith("script") else ""
        return ConfigError(found, expected, f"python -m launch {workload}{shlex.quote(typed)}")
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    groups = {k.rpartition(".")[0] for k in keys}
    if parent in keys and parent not in groups:
        return ConfigError(typed, f"a value for {parent}, which has no keys below it", f"{parent}=VALUE")
    name = typed_key(typed)
    elsewhere = override_meant(name, value, [*keys, *LAUNCHER_KEYS])
    above = name.rpartition(".")[0]
    if elsewhere and (above not in groups - {""} or elsewhere[0].rpartition(".")[0] == above):
        command = "" if elsewhere[0] in keys else "python -m launch "
        expected = some_of(siblings, leaf, [elsewhere[0]])
        return ConfigError(f"unknown key {key}", expected, command + in_shell(*elsewhere))
    rest = name[len(key) :]  # keys below a mistyped group
    named = {k.rpartition(".")[2]: k for k in siblings if k not in groups or f"{k}{rest}" in keys or not rest}
    likely = [named[name] for name in closest(leaf, named)]
    likely += [k for k in keys if k.rpartition(".")[2] == leaf]
    likely += [k for k in keys if not likely and f"_{leaf}_" in f"_{k.rpartition('.')[2]}_"]
    if not likely and "." not in key and "script.options" in free_keys(schema):
        likely = [f"script.options.{key}"]
    free = [*free_keys(schema)]
    whole = [f"{name}{rest}" if name in free or f"{name}{rest}" in keys else name for name in likely]
    is_number = value[:1].isdigit()
    whole.sort(key=lambda name: field_of(schema, name)[0] in (int, float) and not is_number)
    fix = in_shell(whole[0], value) if whole else f"the same without {typed}"
    return ConfigError(f"unknown key {key}", some_of(siblings, leaf, likely), fix)


MOST_NAMES = 12
"""Names that a refusal lists."""


def some_of(names: Sequence[str], meant: str, first: Sequence[str] = ()) -> str:
    """List names for people: ``first``, then those most like ``meant``, at most ``MOST_NAMES``."""
    alike = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, name.rpartition(".")[2], meant).ratio())
    shown = list(dict.fromkeys([*(name for name in first if name in names), *alike]))[:MOST_NAMES]
    left = len(names) - len(shown)
    if left:
        return f"a key such as {', '.join(shown)} ({left} more, listed in configs/)"
    return f"one of {', '.join(names)}"
