"""Sources of a run's first weights (``init_from``), inspected without torch, so that the login node can refuse them."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from gpt.checkpoint import folders
from gpt.config import ModelConfig, Position, TrainConfig, rules
from gpt.conversion import StateDictAdapter, architecture_fields, find_adapter, format_value
from launch.errors import ConfigError
from launch.runs import compose
from launch.runs.folder import RunFolder

# Names, shapes and config in a file of weights, read without the weights.
#
# Reading the first kilobytes finds a truncated file, but no flipped bit.


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError)

Shape = tuple[int, ...]


def tensors_in_folder(folder: Path) -> dict[str, tuple[Path, Shape]]:
    """Return file and shape of every tensor, by name, in a folder of transformers: one file, or several with an index.

    Raises:
        ConfigError: a safetensors file is missing or truncated, or the index names a missing tensor.
    """
    index = read_index(folder)
    found: dict[str, tuple[Path, Shape]] = {}
    for path in sorted({folder / name for name in index.values()} if index else {folder / SINGLE}):
        for name, shape in safetensors_shapes(path).items():
            if index and index.get(name) != path.name:
                raise damaged_file_error(folder / INDEX, f"it does not say that {name} is in {path.name}")
            found[name] = (path, shape)
    gone = sorted(index.keys() - found.keys())
    if gone:
        raise damaged_file_error(folder / INDEX, f"{', '.join(gone[:3])} not in the files that it names")
    return found


def read_index(folder: Path) -> dict[str, str]:
    """Read the index: tensor -> file. It is empty if one file has all tensors.

    Raises:
        ConfigError: both file and index are missing, or the index is invalid.
    """
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        holds = f"{pickled[0].name} and no {SINGLE}" if pickled else f"neither {SINGLE} nor {INDEX}"
        convert = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
        raise ConfigError(
            f"{folder} holds {holds}",
            "weights as safetensors, which cannot run code when they are read",
            f"""python -c "{convert}.save_pretrained('{folder}-safetensors')\"""",
        )
    try:
        index = json.loads((folder / INDEX).read_bytes())["weight_map"]
        # Accept only names of files: an index must not point outside its folder.
        names = {str(tensor): Path(str(file)).name for tensor, file in index.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged_file_error(folder / INDEX, f"no index: {error}") from error
    return names


def safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Read name and shape of every tensor of one safetensors file, from its header."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise damaged_file_error(path, str(error)) from error


def damaged_file_error(path: Path, why: str) -> ConfigError:
    """Return the error for a damaged file."""
    return ConfigError(f"{path} cannot be used ({why})", "the file as it was written", "another copy of it")


def torch_file_contents(path: Path) -> dict[str, Any]:
    """Return the object in a file of ``torch.save``, with shapes in place of tensors.

    Raises:
        ConfigError: the file is missing, or contains anything but plain values and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            value = ShapeUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, *UNREADABLE) as error:
        raise damaged_file_error(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged_file_error(path, f"a {type(value).__name__} instead of a dictionary")
    return value


def verify_torch_file(path: Path) -> None:
    """Read a whole file of ``torch.save`` and compare its checksums, which torch itself does not do.

    Raises:
        ConfigError: a checksum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged_file_error(path, str(error)) from error
    if bad is not None:
        raise damaged_file_error(path, f"{bad} has a wrong checksum")


class ShapeUnpickler(pickle.Unpickler):
    """Unpickler for torch's files without torch. It keeps the shapes of tensors, and refuses other classes and
    functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: tuple(size)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict  # not dict: a state_dict also has attributes
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


# Kind, model and checks of a source of first weights.


HF_CONFIG = "config.json"
OUR_WORKLOAD = "gpt.workload.GptWorkload"
"""Name under which the launcher finds this library."""
PART_KEYS = ("position", "rope_scaling", "ffn", "expert_ffn")


class SourceKind(Enum):
    """Kind of source: a folder of transformers, a file of ``gpt.export --format torch``, or a run or its checkpoint."""

    hf = "hf"
    torch = "torch"
    run = "run"


@dataclass(frozen=True)
class WeightSource:
    """Weights to start from, and their model."""

    path: Path
    """Folder or file of the weights; for a checkpoint, the folder of its run."""
    kind: SourceKind
    model: ModelConfig
    step: int | None = None
    """Step of the checkpoint of a run; None for the newest."""


def find_source(init_from: str) -> WeightSource:
    """Return the kind and the model of the weights at a path.

    Raises:
        ConfigError: the path has none of the kinds, or is incomplete.
    """
    path = Path(init_from).expanduser().absolute()
    if (path / HF_CONFIG).is_file():
        return WeightSource(path, SourceKind.hf, inspect_hf_folder(path)[1])
    if RunFolder(path).config.is_file():
        return inspect_run(path, None)
    if folders.COMMITTED.fullmatch(path.name) and RunFolder(path.parents[1]).config.is_file():
        return inspect_run(path.parents[1], folders.step_of(path))
    # Single files of other libraries have no config next to them that describes the model.
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
    """Inspect a run as a source of weights.

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
    return WeightSource(path, SourceKind.run, config.model, step)


def inspect_hf_folder(folder: Path) -> tuple[StateDictAdapter, ModelConfig]:
    """Return the adapter and the model of a folder of transformers, after a check of its tensors' names.

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


def check_names(folder: Path, adapter: StateDictAdapter, config: ModelConfig, names: set[str]) -> None:
    """Raise ConfigError unless a folder has exactly the tensors of the model."""
    wanted = {name for rule in adapter.rules(config) for name in rule.hf_names}
    found = {name for name in map(adapter.canonical, names) if not adapter.buffers.fullmatch(name)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some writers repeat this matrix; it is compared when it is read
    problems = [f"no {list_names(wanted - found)}"] if wanted - found else []
    problems += [f"unknown {list_names(found - wanted)}"] if found - wanted else []
    if problems:
        raise ConfigError(
            f"the tensors in {folder} are not those of its {HF_CONFIG}: {'; '.join(problems)}",
            f"the {len(wanted)} tensors of a {adapter.architecture} with {config.n_layer} layers",
            "save_pretrained() of the model once more, with its head",
        )


def list_names(names: set[str]) -> str:
    """Return up to ten names, sorted and joined by commas, and the number of further names."""
    first = sorted(names)[:10]
    return ", ".join(first) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def torch_file_model(path: Path, contents: dict[str, Any]) -> ModelConfig:
    """Return the model of a file that ``gpt.export --format torch`` wrote."""
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
    """Return the overrides that turn ``asked`` into the architecture of ``found``; empty if its weights fit.

    The embedding may have more rows than the source. Training may use shorter sequences than the source, and longer
    ones if no table of positions limits them.
    """
    there = architecture_fields(found)
    if asked.vocab_size >= found.vocab_size:
        del there["vocab_size"]
    if asked.block_size <= found.block_size or found.position is not Position.learned:
        del there["block_size"]
    changes: dict[str, Any] = {}
    # A part decides which other keys matter and their defaults, so parts come first.
    for keys in (PART_KEYS, there.keys()):
        here = architecture_fields(dataclasses.replace(asked, **changes))
        changes |= {key: there[key] for key in there if key in keys and key in here and here[key] != there[key]}
    return [f"model.{key}={format_value(value)}" for key, value in changes.items()]


def refuse_other_model(asked: ModelConfig, source: WeightSource) -> None:
    """Raise ConfigError if the weights of ``source`` have another architecture than the run."""
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
    """Refuse an unusable ``init_from``, unless the run has its own checkpoint, which takes precedence.

    Raises:
        ConfigError: the source is missing, or has another model.
    """
    if config.init_from is not None and not folders.steps(folder.checkpoints):
        refuse_other_model(config.model, find_source(config.init_from))
