"""Sources of a run's first weights (``init_from``), inspected without torch, so that the login node can refuse them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from gpt import checkpoint as folders
from gpt.config import HF_PREFIX, LoraConfig, ModelConfig, Position, TrainConfig, rules
from gpt.config.model import LORA_TARGETS
from gpt.conversion import StateDictAdapter, architecture_fields, find_adapter, format_value
from launch.errors import ConfigError
from launch.runs import compose
from launch.runs.folder import RunFolder

# Names, shapes and config in a file of weights, read without the weights.
#
# Reading the first kilobytes finds a truncated file, but no flipped bit.


SINGLE = "model.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Prefix of the names of all tensors in files of peft."""
PEFT_ONLY: dict[str, Any] = {
    **{"peft_type": "LORA", "bias": "none", "layer_replication": None},
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias"), False),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "kasa_config"), None),
    **dict.fromkeys(("target_parameters", "arrow_config", "monteclora_config", "velora_config"), None),
}
"""Key of adapter_config.json -> the only supported value. A missing key or an empty value counts as this value."""
MERGE = "merge_and_unload().save_pretrained(FOLDER) of the model in peft, and init_from=hf:FOLDER"
"""Text that errors propose for an adapter whose settings this project does not support."""
INDEX = "model.safetensors.index.json"


def tensors_in_folder(folder: Path) -> dict[str, Path]:
    """Return name of a tensor -> path of its file, for all tensors in a folder of transformers.

    Raises:
        ConfigError: there are no safetensors files, or one is missing or truncated.
    """
    files = {folder / SINGLE}
    if not (folder / SINGLE).is_file():
        try:
            index = json.loads((folder / INDEX).read_bytes())["weight_map"]
            # Accept only names of files: an index must not point outside its folder.
            files = {folder / Path(str(name)).name for name in index.values()}
        except FileNotFoundError as error:
            convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
            raise ConfigError(
                f"{folder} holds neither {SINGLE} nor {INDEX}",
                "weights as safetensors, which cannot run code when they are read",
                f"""python -c "{convert}.save_pretrained('{folder}-safetensors')\"""",
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise damaged_file_error(folder / INDEX, f"no index: {error}") from error
    found: dict[str, Path] = {}
    for path in sorted(files):
        try:
            with safe_open(path, framework="np") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise damaged_file_error(path, str(error)) from error
    return found


def damaged_file_error(path: Path, why: str) -> ConfigError:
    """Return the error for the damaged file ``path``; ``why`` is its damage."""
    return ConfigError(f"{path} cannot be used ({why})", "the file as it was written", "another copy of it")


# Kind, model and checks of a source of first weights.


HF_CONFIG = "config.json"
OUR_WORKLOAD = "gpt.workload.GptWorkload"
"""Value of ``workload._target_`` in the config of runs of this library."""
PART_KEYS = ("position", "rope_scaling", "ffn", "expert_ffn", "kv_lora_rank")


@dataclass(frozen=True)
class WeightSource:
    """Source of the first weights of a run (``init_from``), and the model of these weights."""

    path: Path
    """Folder of transformers, or folder of a run."""
    is_run: bool
    """True for a run of this project, False for a folder of transformers."""
    model: ModelConfig
    step: int | None = None
    """Step of the checkpoint of a run; None for the newest one."""
    adapter: Path | None = None
    """Folder of an adapter (LoRA) of peft that is added to the weights of ``path``; None if there is no adapter."""


def find_source(init_from: str) -> WeightSource:
    """Return the source of weights that a value of ``init_from`` names. If the value is ``hf:PATH``, PATH must
    be a folder that transformers or peft has written.

    Raises:
        ConfigError: the path has no weights of a known kind, or is incomplete.
    """
    path = Path(init_from.removeprefix(HF_PREFIX)).expanduser().absolute()
    if (path / PEFT_CONFIG).is_file():
        return inspect_adapter(path)
    if (path / HF_CONFIG).is_file():
        return WeightSource(path, False, inspect_hf_folder(path)[1])
    if init_from.startswith(HF_PREFIX):
        raise ConfigError(
            f"init_from={init_from}, which is no folder with {HF_CONFIG}",
            "a local folder that save_pretrained() of transformers has written",
            "init_from=hf:FOLDER; for a model of the hub, first: hf download NAME --local-dir FOLDER",
        )
    if RunFolder(path).config.is_file():
        return inspect_run(path, None)
    if folders.COMMITTED.fullmatch(path.name) and RunFolder(path.parents[1]).config.is_file():
        return inspect_run(path.parents[1], folders.step_of(path))
    fix = "init_from=FOLDER; for a model of the hub, first: hf download NAME --local-dir FOLDER"
    if path.suffix == ".pt":
        fix = f"init_from=FOLDER, for nanoGPT's after python examples/conversion/nanogpt_weights.py {init_from} FOLDER"
    raise ConfigError(
        f"init_from={init_from}, which is no folder with {HF_CONFIG} or .hydra/config.yaml",
        "a folder of transformers, or the folder of a run or of its checkpoint",
        fix,
    )


def read_run(folder: RunFolder) -> TrainConfig:
    """Return the config of a run of ``gpt.train``.

    Raises:
        ConfigError: another program made the run, or its config is damaged.
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
    """Return the run folder ``path`` as a source of weights. ``step`` names a checkpoint; None means the newest.

    Raises:
        ConfigError: the run has no checkpoint, or none of ``step``.
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
    return WeightSource(path, True, config.model, step)


def inspect_hf_folder(folder: Path) -> tuple[StateDictAdapter, ModelConfig]:
    """Return the architecture and the model of a folder of transformers. The names of its tensors are checked.

    Raises:
        ConfigError: the config is unreadable or of an unknown architecture, or tensors are missing or unknown.
    """
    try:
        hf = json.loads((folder / HF_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged_file_error(folder / HF_CONFIG, str(error)) from error
    adapter = find_adapter(hf)
    config = adapter.read_config(hf)
    rules.check_model(config)
    check_names(folder, adapter, config, set(tensors_in_folder(folder)))
    return adapter, config


def inspect_adapter(folder: Path) -> WeightSource:
    """Return an adapter (LoRA) of peft in ``folder`` as a source of weights, together with its base weights. The base
    weights are in the same folder, or in the folder that the config of the adapter names.

    Raises:
        ConfigError: there are no base weights, or the adapter is damaged or has settings that this project does not
            support.
    """
    path, weights = folder / PEFT_CONFIG, folder / PEFT_WEIGHTS
    try:
        peft = json.loads(path.read_bytes())
        rank, alpha = int(peft["r"]), float(peft["lora_alpha"])
        with safe_open(weights, framework="np") as file:
            names, told = {*file.keys()}, (file.metadata() or {}).get("targets", "").split(",")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged_file_error(path, str(error)) from error
    odd = [f"{key}={peft[key]}" for key, value in PEFT_ONLY.items() if peft.get(key) and peft[key] != value]
    if odd:
        raise ConfigError(f"{', '.join(odd)} in {path}", "a plain LoRA", MERGE)
    base = folder if (folder / HF_CONFIG).is_file() else Path(peft.get("base_model_name_or_path") or "").absolute()
    if not (base / HF_CONFIG).is_file():
        raise ConfigError(
            f"{folder}, an adapter for {peft.get('base_model_name_or_path')}, which is no local folder",
            f"base weights beside the adapter, with their {HF_CONFIG}",
            f"hf download {peft.get('base_model_name_or_path')} --local-dir {folder}",
        )
    adapter, config = inspect_hf_folder(base)
    everywhere = replace(config, lora=LoraConfig(rank, alpha, targets=[*LORA_TARGETS]))
    stacks = adapter.adapted(everywhere)
    found = {adapter.canonical(name.removeprefix(PEFT_PREFIX)): name for name in names}
    modules = [m for name, stack in stacks.items() if f"{name}.lora_A.weight" in found for m in stack]
    targets = [target for target, module in LORA_TARGETS.items() if any(m.endswith(module) for m in modules)]
    # An export names its targets, since a stack may have adapters for some of its matrices only.
    targets = [target for target in targets if target in told] or targets
    config = replace(config, lora=LoraConfig(rank, alpha, targets=targets))
    wanted = {f"{name}.lora_{part}.weight" for name in adapter.adapted(config) for part in "AB"}
    if not wanted or wanted != found.keys():
        differing = ", ".join(sorted(wanted ^ found.keys())[:5]) or "no tensors"
        raise ConfigError(
            f"{weights} with {differing}",
            f"two matrices for each adapter, of the same linear layers in each block: {', '.join(LORA_TARGETS)}",
            "another adapter to start from",
        )
    patterns = {key: peft.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if any(patterns.values()) and not patterns.items() <= adapter.peft_targets(config).items():
        raise ConfigError(f"{patterns} in {path}", "one rank for all layers, and its multiples for stacks", MERGE)
    return WeightSource(base, False, config, adapter=folder)


def check_names(folder: Path, adapter: StateDictAdapter, config: ModelConfig, names: set[str]) -> None:
    """Raise ConfigError unless ``names``, the names of the tensors in ``folder``, are exactly those of the model
    ``config``."""
    wanted = {name for rule in adapter.rules(config) for name in rule.hf_names}
    found = {name for name in map(adapter.canonical, names) if not re.fullmatch(adapter.buffers, name)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some writers repeat this matrix; it is compared when it is read
    if wanted != found:
        named = {"no": sorted(wanted - found), "unknown": sorted(found - wanted)}
        problems = (f"{word} {', '.join(some[:10])}, {len(some)} in all" for word, some in named.items() if some)
        raise ConfigError(
            f"the tensors in {folder} are not those of its {HF_CONFIG}: {'; '.join(problems)}",
            f"the {len(wanted)} tensors of a {adapter.architecture} with {config.n_layer} layers",
            "save_pretrained() of the model once more, with its head",
        )


def differences(asked: ModelConfig, found: ModelConfig) -> list[str]:
    """Return the overrides that make the model ``asked`` equal to the model ``found``. Empty if the weights of
    ``found`` fit ``asked``.

    ``asked`` is the model of the run, and ``found`` the model of existing weights. The weights also fit if ``asked``
    has a larger vocabulary, shorter sequences, or longer sequences and no table of positions. If both models have
    adapters (LoRA), these must be equal, except for their dropout.
    """
    there = architecture_fields(found)
    if asked.vocab_size >= found.vocab_size:
        del there["vocab_size"]
    if asked.block_size <= found.block_size or found.position is not Position.learned:
        del there["block_size"]
    changes: dict[str, Any] = {}
    # A part decides which other keys matter and their defaults, so parts come first.
    for keys in (PART_KEYS, there.keys()):
        here = architecture_fields(replace(asked, **changes))
        changes |= {key: there[key] for key in there if key in keys and key in here and here[key] != there[key]}
    if asked.lora.rank and found.lora.rank and replace(found.lora, dropout=asked.lora.dropout) != asked.lora:
        lora = found.lora
        changes |= {"lora.rank": lora.rank, "lora.alpha": lora.alpha, "lora.targets": f"[{','.join(lora.targets)}]"}
    return [f"model.{key}={format_value(value)}" for key, value in changes.items()]


def refuse_other_model(asked: ModelConfig, source: WeightSource) -> None:
    """Raise ConfigError if the weights of ``source`` do not fit the model ``asked`` of the run."""
    overrides = differences(asked, source.model)
    if overrides:
        keys = [override.split("=")[0].removeprefix("model.") for override in overrides]
        mine = ", ".join(f"model.{key}={format_value(attrgetter(key)(asked))}" for key in keys)
        raise ConfigError(
            f"init_from={source.path} with {mine}",
            "the same model as there, since its weights fit no other",
            " ".join(overrides),
        )


def check_init_from(config: TrainConfig, folder: RunFolder) -> None:
    """Raise ConfigError if ``init_from`` names no source of weights, or one with another model. Do nothing if the run
    in ``folder`` has a checkpoint, because ``init_from`` is then ignored."""
    if config.init_from is not None and not folders.steps(folder.checkpoints):
        refuse_other_model(config.model, find_source(config.init_from))
