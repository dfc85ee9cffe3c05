"""From what was typed to a typed config, with Hydra's complaints put into words.

Owns composition for ``gpt.train`` and the translation of Hydra's and OmegaConf's exceptions, which the launcher uses
too. Torch-free. Must not know any key of the launcher.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from gpt.config import ParallelConfig, TrainConfig
from launch.errors import ConfigError
from launch.runs.files import write_atomically
from launch.runs.folder import RunFolder
from launch.runs.overrides import point_name
from launch.runs.ranges import closest

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
WATCHING = ("logging", "profile", "profile_from", "profile_to")
NOT_IN_POINT = ("output_dir", "name", "run_dir", "fresh", "strict", "data.cache_dir", *WATCHING)
"""Keys that say where a run's files go or how it is watched, not what it computes."""

Schema = TypeVar("Schema", bound=TrainConfig)


def compose_train(overrides: Sequence[str]) -> DictConfig:
    """Compose ``configs/train.yaml`` with ``overrides``, checked against the schema.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("train_main", {"defaults": ["train_schema", "train", "_self_"]})
    with initialize_config_module("configs", version_base="1.3"):
        try:
            config = compose("train_main", overrides=list(overrides))
        except CONFIG_ERRORS as error:
            raise explain(error, TrainConfig) from error
    refuse_unknown(config, TrainConfig)
    make_paths_absolute(config)
    return config


def make_paths_absolute(config: DictConfig) -> None:
    """Take the paths that were typed relative to the folder they were typed in; ranks may run elsewhere."""
    data = config.data
    keys = [(config, key) for key in ("output_dir", "run_dir", "init_from")]
    keys += [(data, key) for key in ("path", "val_path", "tokenizer_path", "cache_dir")]
    keys.append((config.parallel, "deepspeed_config"))
    keys += [(source, "path") for source in data.sources]
    if data.dataset is not None and Path(data.dataset).is_dir():  # elsewhere it is a name on the hub
        keys.append((data, "dataset"))
    for node, key in keys:
        if not OmegaConf.is_missing(node, key) and node[key] is not None:
            node[key] = str(Path(node[key]).expanduser().absolute())


def refuse_unknown(config: DictConfig, schema: type) -> None:
    """Raise ConfigError for a key that ``+key=value`` added and nothing would read."""
    known = set(schema_keys(schema))
    free = {f"{key}." for key in free_keys(schema)}
    for key in dotted_keys(OmegaConf.to_container(config)):
        if key not in known and not any(key.startswith(prefix) for prefix in free):
            raise unknown_key(key, schema)


def dotted_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of nested dictionaries, groups included; ``hydra`` is Hydra's own."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            yield from dotted_keys(inner, f"{prefix}{key}.")


def to_schema(config: DictConfig, schema: type[Schema]) -> Schema:
    """The plain dataclass that travels further. Keys of ``config`` that ``schema`` does not have are left out.

    Raises:
        ConfigError: a value is missing, or of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(schema)]
    try:
        known = OmegaConf.masked_copy(config, [name for name in names if name in config])
        value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), known))
    except OmegaConfBaseException as error:
        raise explain(error, schema) from error
    assert isinstance(value, schema)
    return value


def read_config(folder: RunFolder, schema: type[Schema]) -> Schema:
    """The config a run folder was made with.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not folder.config.is_file():
        raise ConfigError(
            f"no {folder.config}", "the folder of a run", "python -m launch, or python -m gpt.train, to make one"
        )
    loaded = OmegaConf.load(folder.config)
    assert isinstance(loaded, DictConfig)
    return to_schema(loaded, schema)


def settle_parallel(config: DictConfig, values: Mapping[str, Any], micro_batch: int) -> None:
    """Put how a run is spread, every key of ``parallel``, and how large its passes are into its composed config, which
    may have left it open."""
    config.parallel = OmegaConf.merge(OmegaConf.structured(ParallelConfig), values)
    config.optim.micro_batch = micro_batch


def write_config(folder: RunFolder, config: DictConfig, overrides: Sequence[str]) -> None:
    """Write Hydra's own files: ``.hydra/config.yaml`` with every value resolved, and ``.hydra/overrides.yaml``."""
    write_atomically(folder.config, OmegaConf.to_yaml(config, resolve=True).encode())
    write_atomically(folder.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))).encode())


def choose_folder(config: TrainConfig, overrides: Sequence[str], not_in_point: Sequence[str]) -> RunFolder:
    """The folder of a run: ``run_dir``, or ``<output_dir>/<name>/<point>``.

    With ``fresh`` a new generation, ``<point>~2``, ``<point>~3``, ...; without it the newest there is, so that the
    same command goes on where the last one stopped.
    """
    base = Path(config.run_dir or Path(config.output_dir) / config.name / point_name(overrides, not_in_point))
    base = base.expanduser().absolute()
    generations = [1] if base.exists() else []
    generations += [
        int(p.name.rsplit("~", 1)[1]) for p in base.parent.glob(f"{glob_escape(base.name)}~*") if p.is_dir()
    ]
    newest = max(generations, default=0) + (1 if config.fresh else 0)
    return RunFolder(base if newest <= 1 else base.with_name(f"{base.name}~{newest}"))


def glob_escape(name: str) -> str:
    """``name`` with the characters that mean something to glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


EXECUTION = ("parallel", "optim.micro_batch", "device", "compile", "compile_dynamic", "recompute", "deterministic")
RESUMABLE = (
    "output_dir",
    "name",
    "run_dir",
    "fresh",
    "strict",
    "data.cache_dir",
    *WATCHING,
    "checkpoint",
    "eval",
    *EXECUTION,
)
"""What may change between the attempts of one run: it does not change what is learned."""


def refuse_other_run(folder: RunFolder, config: TrainConfig) -> None:
    """Raise ConfigError where ``folder`` already holds a run that learns something else."""
    if not folder.config.is_file():
        return
    there = flatten(dataclasses.asdict(read_config(folder, TrainConfig)))
    here = flatten({f.name: dataclasses.asdict(config)[f.name] for f in dataclasses.fields(TrainConfig)})
    changed = [key for key in here if here[key] != there.get(key) and not may_change(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder.path} holds a run with {key}={plain(there.get(key))}, and now {key}={plain(here[key])}",
            "the same settings, to go on with that run",
            f"fresh=true, for a new folder beside it (or {key}={plain(there.get(key))}, to go on)",
        )


def may_change(key: str) -> bool:
    """Whether ``key``, or a group that it is in, may change between attempts."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in RESUMABLE)


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


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The config by dotted keys, as plain values that JSON can hold."""
    flat = flatten(dataclasses.asdict(config))
    return {key: plain(value) if hasattr(value, "name") else value for key, value in flat.items()}


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema of nested dataclasses, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from schema_keys(inner, f"{prefix}{field.name}.")


def free_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Keys whose value is a mapping with keys of the user's choice."""
    for field in dataclasses.fields(schema):
        inner = field.default_factory
        if inner is dict:
            yield prefix + field.name
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from free_keys(inner, f"{prefix}{field.name}.")


def explain(error: BaseException, schema: type) -> ConfigError:
    """Say what Hydra or OmegaConf refused: found, expected, and what to type next."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    found_key = re.search(r"full_key: (\S+)", text)
    key = found_key.group(1) if found_key else ""
    first = str(error).strip().splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        likely = closest(choice, error.options) or sorted(error.options)
        return ConfigError(f"{group}={choice}", f"one of {', '.join(sorted(error.options))}", f"{group}={likely[0]}")
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        fix = f"'{key}=\"{value}\"'" if value else f"{key}=VALUE"
        if value.startswith("["):
            fix = f"""'{key}=[{",".join(f'"{word.strip()}"' for word in value.strip("[]").split(","))}]'"""
        return ConfigError(
            f"{error.override}, which cannot be read", "KEY=VALUE, quoted where it holds []{}:, or =", fix
        )
    if "is not in struct" in text or "not in '" in text or "No match in the defaults list" in text:
        of_list = unknown_in_list(text, schema)
        return of_list or unknown_key(key or (re.findall(r"'([\w./+]+)'", text) or [first])[0], schema)
    if any(isinstance(e, MissingMandatoryValue) for e in chain):
        return ConfigError(f"no value for {key}", "a value", f"{key}=VALUE")
    typed = re.search(r"override (\S+)", text)
    return wrong_value(typed.group(1) if typed else first, key or "KEY", text)


def wrong_value(found: str, key: str, text: str) -> ConfigError:
    """Say which values a key takes, from OmegaConf's validation message."""
    choices = re.search(r"expected one of \[([^]]+)\]", text)
    if choices:
        return ConfigError(found, f"one of {choices.group(1)}", f"{key}={choices.group(1).split(',')[0]}")
    kind = re.search(r"could not be converted to (\w+)", text)
    names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    if kind:
        expected = names.get(kind.group(1), f"a value of type {kind.group(1)}")
        example = {"Integer": "1", "Float": "0.1", "Boolean": "true"}.get(kind.group(1), "VALUE")
        return ConfigError(found, expected, f"{key}={example}")
    lines = [line for line in text.splitlines() if line.strip() and "$" not in line]
    return ConfigError(found, lines[-1] if lines else "a value that fits", f"{key}=VALUE with a value that fits")


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


def unknown_key(key: str, schema: type) -> ConfigError:
    """Name the keys that look like the one that does not exist."""
    keys = list(schema_keys(schema))
    likely = closest(key, keys) or [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    suggestion = f"{likely[0]}=VALUE" if likely else f"{siblings[0]}=VALUE"
    return ConfigError(f"unknown key {key}", f"one of {', '.join(siblings)}", suggestion)
