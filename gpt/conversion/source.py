"""Sources of a run's first weights (``init_from``), inspected without torch, so that the login node can refuse them.

Owns the three kinds of source, and the comparison of the model found there with the model of the run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt.checkpoint import folders
from gpt.config import ModelConfig, Position, TrainConfig, model_rules
from gpt.conversion.adapter import StateDictAdapter, architecture, format_value
from gpt.conversion.inspect import damaged_file_error, tensors_in_folder, torch_file_contents
from gpt.conversion.registry import find_adapter
from launch.errors import ConfigError
from launch.runs import compose
from launch.runs.folder import RunFolder

HF_CONFIG = "config.json"
OUR_WORKLOAD = "gpt.workload.GptWorkload"
"""Name by which the launcher finds this library."""
PART_KEYS = ("position", "rope_scaling", "ffn", "expert_ffn")


class SourceKind(Enum):
    """Kind of source: a folder of transformers, a file of ``gpt.export --format torch``, or a run or its checkpoint."""

    hf = "hf"
    torch = "torch"
    run = "run"


@dataclass(frozen=True)
class WeightSource:
    """Weights to start from, and the model they belong to."""

    path: Path
    """Folder or file of the weights; for a checkpoint the folder of its run."""
    kind: SourceKind
    model: ModelConfig
    step: int | None = None
    """Step of the checkpoint of a run; None is the newest."""


def find_source(init_from: str) -> WeightSource:
    """Find out the kind and the model of the weights at a path.

    Raises:
        ConfigError: it is none of the kinds, or something is missing in it.
    """
    path = Path(init_from).expanduser().absolute()
    if (path / HF_CONFIG).is_file():
        return WeightSource(path, SourceKind.hf, inspect_hf_folder(path)[1])
    if RunFolder(path).config.is_file():
        return inspect_run(path, None)
    if folders.COMMITTED.fullmatch(path.name) and RunFolder(path.parents[1]).config.is_file():
        return inspect_run(path.parents[1], folders.step_of(path))
    # Single files of other libraries have no config beside them to tell the model by.
    if path.is_file() and path.suffix not in (".safetensors", ".json", ".bin"):
        return WeightSource(path, SourceKind.torch, torch_file_model(path, torch_file_contents(path)))
    if path.exists():
        inside = "a file" if path.is_file() else f"a folder without {HF_CONFIG} and without .hydra/config.yaml"
        parent = path.parent if path.is_file() else path
        found, fix = f"init_from={path}, {inside}", f"init_from={parent} if {HF_CONFIG} is there"
    else:
        found = f"init_from={init_from}, and there is no {path}"
        fix = "hf download NAME --local-dir FOLDER, then init_from=FOLDER"
    raise ConfigError(
        found, "a folder of transformers, a file of gpt.export --format torch, or the folder of a run", fix
    )


def read_run(folder: RunFolder) -> TrainConfig:
    """Read the config of a run of ``gpt.train``.

    Raises:
        ConfigError: it is the run of another program, which has no model of ours, or its config is damaged.
    """
    try:
        return compose.read_config(folder, TrainConfig)
    except ConfigError:
        kind = OmegaConf.select(compose.read_document(folder), "workload._target_")
        if kind is None or kind == OUR_WORKLOAD:
            raise
        raise ConfigError(
            f"{folder.path}, a run of another program ({kind.rpartition('.')[2]})",
            "a run of gpt.train, which alone has a model that this command knows",
            f"python -m launch.logs {quote(str(folder.path))}, which prints what that program has printed",
        ) from None


def inspect_run(path: Path, step: int | None) -> WeightSource:
    """Inspect a run as a source of weights.

    Raises:
        ConfigError: it has not saved yet, or not at ``step``.
    """
    folder = RunFolder(path)
    config = read_run(folder)
    steps = folders.steps(folder.checkpoints)
    if not steps or (step is not None and step not in steps):
        raise ConfigError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {folder.checkpoints}",
            "a run that has saved one",
            f"touch {path}/SAVE while it runs, or init_from=another",
        )
    return WeightSource(path, SourceKind.run, config.model, step)


def inspect_hf_folder(folder: Path) -> tuple[StateDictAdapter, ModelConfig]:
    """Find the adapter and the model of a folder of transformers, and check the names of its tensors.

    Raises:
        ConfigError: the config cannot be read or is of no known architecture, or tensors are missing or unknown.
    """
    try:
        hf = json.loads((folder / HF_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged_file_error(folder / HF_CONFIG, str(error)) from error
    adapter = find_adapter(hf)
    config = adapter.read_config(hf)
    model_rules.check(config)
    check_names(folder, adapter, config, set(tensors_in_folder(folder)))
    return adapter, config


def check_names(folder: Path, adapter: StateDictAdapter, config: ModelConfig, names: set[str]) -> None:
    """Raise ConfigError unless a folder holds every tensor of the model, and no other."""
    wanted = {name for rule in adapter.rules(config) for name in rule.hf_names}
    found = {name for name in map(adapter.canonical, names) if not adapter.buffers.fullmatch(name)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some writers repeat it; it is compared when it is read
    problems = [f"no {list_names(wanted - found)}"] if wanted - found else []
    problems += [f"unknown {list_names(found - wanted)}"] if found - wanted else []
    if problems:
        raise ConfigError(
            f"the tensors in {folder} are not those of its {HF_CONFIG}: {'; '.join(problems)}",
            f"the {len(wanted)} tensors of a {adapter.architecture} with {config.n_layer} layers",
            "save_pretrained() of the model once more, with its head",
        )


def list_names(names: set[str]) -> str:
    """Join names in order, up to ten of them and the number of the others."""
    first = sorted(names)[:10]
    return ", ".join(first) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def torch_file_model(path: Path, contents: dict[str, Any]) -> ModelConfig:
    """Read the model of a file that ``gpt.export --format torch`` wrote."""
    if not isinstance(contents.get("model_config"), dict) or not isinstance(contents.get("model"), dict):
        raise damaged_file_error(
            path, "it has no model_config and model, which python -m gpt.export --format torch writes"
        )
    try:
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), contents["model_config"]))
    except OmegaConfBaseException as error:
        raise damaged_file_error(path, str(error).splitlines()[0]) from error
    assert isinstance(model, ModelConfig)
    return model


def plain_model(model: ModelConfig) -> dict[str, Any]:
    """Convert a model's config to plain values, which ``torch_file_model`` reads back."""
    return {key: getattr(value, "name", value) for key, value in dataclasses.asdict(model).items()}


def differences(asked: ModelConfig, found: ModelConfig) -> list[str]:
    """List the overrides that make ``asked`` the architecture of ``found``; empty where its weights fit.

    The embedding may have more rows than the source, and a model may be trained on shorter sequences than the source
    (on longer ones where no table of positions limits it).
    """
    there = architecture(found)
    if asked.vocab_size >= found.vocab_size:
        del there["vocab_size"]
    if asked.block_size <= found.block_size or found.position is not Position.learned:
        del there["block_size"]
    changes: dict[str, Any] = {}
    # A part decides which other keys matter and what their defaults are, so the parts are changed first.
    for keys in (PART_KEYS, there.keys()):
        here = architecture(dataclasses.replace(asked, **changes))
        changes |= {key: there[key] for key in there if key in keys and key in here and here[key] != there[key]}
    return [f"model.{key}={format_value(value)}" for key, value in changes.items()]


def refuse_other_model(asked: ModelConfig, source: WeightSource) -> None:
    """Raise ConfigError where the weights of ``source`` are of another architecture than the run's."""
    overrides = differences(asked, source.model)
    if overrides:
        keys = [override.split("=")[0].removeprefix("model.") for override in overrides]
        mine = ", ".join(f"model.{key}={format_value(getattr(asked, key))}" for key in keys)
        raise ConfigError(
            f"init_from={source.path} with {mine}",
            "the same model as there, since its weights fit no other",
            " ".join(overrides),
        )


def check_init_from(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse an ``init_from`` that cannot be used, unless the run has a checkpoint of its own, which counts instead.

    Raises:
        ConfigError: there is no source, or it holds another model.
    """
    if config.init_from is not None and not folders.steps(folder.checkpoints):
        refuse_other_model(config.model, find_source(config.init_from))
