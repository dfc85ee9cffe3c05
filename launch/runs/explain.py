"""Hydra's and OmegaConf's complaints as refusals: found, expected, and what to type next. Torch-free."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.errors import ConfigError
from launch.runs.overrides import RANK_VALUES, typed_key
from launch.runs.ranges import closest
from launch.runs.renamed import is_former
from launch.runs.synonyms import override_meant
from launch.runs.wrong_values import PLAIN, could_take, field_of, in_shell, in_unit_of, listed, quoted, wrong_value

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
    inner = [known for known in schema_keys(schema) if known.startswith(f"{key}.") and not is_former(known)]
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
    keys = [known for known in schema_keys(schema) if not is_former(known)]
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
    keys = [known for known in schema_keys(schema) if not is_former(known)]
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
