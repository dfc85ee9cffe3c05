"""Conversion of state dicts to those of transformers and back, and loading of a trained model in one process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gpt import checkpoint as folders
from gpt.checkpoint import DEEPSPEED, DamagedError, find_damage, formats, read_manifest, sum_file
from gpt.config import LoraConfig, ModelConfig, TrainConfig
from gpt.conversion import Rule, StateDictAdapter
from gpt.conversion.source import (
    HF_CONFIG,
    MERGE,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    WeightSource,
    damaged_file_error,
    inspect_hf_folder,
    read_run,
    tensors_in_folder,
)
from gpt.model.gpt import GPT
from launch.errors import ConfigError
from launch.runs.find import runs_inside, runs_labelled
from launch.runs.folder import RunFolder

# Conversion of a state dict of this project to that of transformers, and back.


State = dict[str, Tensor]
VOCABULARY = ("token_embedding.weight", "head.weight")


def to_hf(state: State, adapter: StateDictAdapter, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Convert a state of this project to tensors of transformers. Yield the name in transformers and the tensor, one
    after another.

    Args:
        state: weights of the model, without adapters (LoRA).
        adapter: conversion to the architecture of transformers.
        config: config of the model.
    """
    # Padding rows of the vocabulary are left out, because transformers would use them as tokens.
    state = {name: tensor[: config.vocab_size] if name in VOCABULARY else tensor for name, tensor in state.items()}
    if adapter.requires_bias:
        tables = ("token_embedding.weight", "position.weight", "head.weight")
        layers = (name.removesuffix("weight") for name in state if name.endswith(".weight") and name not in tables)
        state = {
            f"{name}bias": state[f"{name}weight"].new_zeros(len(state[f"{name}weight"])) for name in layers
        } | state
    for rule in adapter.rules(config):
        if len(rule.hf_names) == 1:
            parts = [torch.cat([state[name] for name in rule.names])]
        else:
            parts = list(state[rule.names[0]].unbind())
        for name, part in zip(rule.hf_names, parts, strict=True):
            part = part.mT if rule.transposed else part
            yield name, (part - rule.offset if rule.offset else part).contiguous()


def from_hf(read: Callable[[str], Tensor], rules: list[Rule], shapes: dict[str, torch.Size]) -> State:
    """Convert tensors of transformers to a state of this project, in fp32.

    Args:
        read: returns a tensor by its name in transformers.
        rules: rules of the architecture for the model.
        shapes: shapes of the parameters of this project, by name. A stacked tensor of transformers is split by them.

    Raises:
        ConfigError: the rows of a tensor are not the sum of the rows of its parameters.
    """
    state: State = {}
    for rule in rules:
        tensors = [read(name).float() for name in rule.hf_names]
        parts = [tensor.mT if rule.transposed else tensor for tensor in tensors]
        parts = [part + rule.offset for part in parts] if rule.offset else parts
        if len(rule.names) == 1:
            state[rule.names[0]] = parts[0] if len(parts) == 1 else torch.stack(parts)
            continue
        rows = [shapes[name][0] for name in rule.names]
        if sum(rows) != parts[0].size(0):
            raise wrong_shapes_error([f"{rule.hf_names[0]} is {tuple(tensors[0].shape)}, for {sum(rows)} rows"])
        state |= zip(rule.names, parts[0].split(rows), strict=True)
    return state


def fit_shapes(state: State, config: ModelConfig, shapes: dict[str, torch.Size]) -> State:
    """Return ``state`` with the vocabulary and the table of positions changed to the sizes in ``shapes``.

    The table of positions may be shortened, and the vocabulary extended. The row of a new token is the mean of the rows
    of existing tokens, so that the new token has little probability. With a row of zeros it could have nearly all, if
    all other logits are far below zero (J. Hewitt, Initializing New Word Embeddings for Pretrained Language Models,
    2021). Padding rows are 0.

    Raises:
        ConfigError: a tensor has another shape; the message names all such tensors.
    """
    fitted, wrong = {}, []
    for name, tensor in state.items():
        rows = shapes[name][0]
        if name in VOCABULARY:
            new = tensor.mean(0, keepdim=True).expand(config.vocab_size - tensor.size(0), -1)
            tensor = F.pad(torch.cat([tensor, new]), (0, 0, 0, rows - config.vocab_size))
        elif name == "position.weight":
            tensor = tensor[:rows]
        if tensor.shape != shapes[name]:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(shapes[name])}")
        fitted[name] = tensor
    if wrong:
        raise wrong_shapes_error(wrong)
    return fitted


def wrong_shapes_error(wrong: list[str]) -> ConfigError:
    """Return the error for tensors that do not fit the model; ``wrong`` has a line of text for each tensor."""
    return ConfigError("; ".join(wrong), "tensors of the model that is described beside them", "another copy of it")


def merge_adapters(state: State, lora: LoraConfig) -> State:
    """Return a state without adapters (LoRA): the scaled product of the two matrices of each adapter is added to the
    weight of its layer."""
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_a"):
            module = name.removesuffix("lora_a")
            product = state[f"{module}lora_b"] @ state[name] * (lora.alpha / lora.rank)
            merged[f"{module}weight"] = merged[f"{module}weight"] + product
    return merged


def to_peft(state: State, adapter: StateDictAdapter, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor for all adapters (LoRA) of a model, with the names of peft.

    If transformers stacks several matrices by rows, their adapters become one adapter with the sum of their ranks: its
    second matrix is block-diagonal, without columns for matrices that have no adapter.
    """
    for hf_module, modules in adapter.adapted(config).items():
        firsts = [state[f"{m}.lora_a"] for m in modules if f"{m}.lora_a" in state]
        seconds = [state.get(f"{m}.lora_b", state[f"{m}.weight"][:, :0]) for m in modules]
        yield f"{PEFT_PREFIX}{hf_module}.lora_A.weight", torch.cat(firsts)
        yield f"{PEFT_PREFIX}{hf_module}.lora_B.weight", torch.block_diag(*seconds)


def read_peft(folder: Path, adapter: StateDictAdapter, config: ModelConfig, shapes: dict[str, torch.Size]) -> State:
    """Return the tensors of the adapters (LoRA) in a folder of peft, in fp32, with their names in this project.

    If transformers stacks several matrices, peft has one adapter for all of them. It is split into one adapter for each
    matrix; ``to_peft`` does the reverse. If the rank of peft's adapter is only ``lora.rank``, each of the split
    adapters gets a copy of its first matrix (``lora_A``).

    Raises:
        ConfigError: the rows of an adapter are not those of its stacked matrices, or its second matrix is not
            block-diagonal.
    """
    rank = config.lora.rank
    state: State = {}
    with safe_open(folder / PEFT_WEIGHTS, framework="pt") as file:
        names = {adapter.canonical(name.removeprefix(PEFT_PREFIX)): name for name in file.keys()}  # noqa: SIM118
        for hf_module, modules in adapter.adapted(config).items():
            first, second = (file.get_tensor(names[f"{hf_module}.lora_{part}.weight"]).float() for part in "AB")
            rows = [shapes[f"{m}.weight"][0] for m in modules]
            if sum(rows) != second.size(0):
                raise wrong_shapes_error([f"lora_B of {hf_module} is {tuple(second.shape)}, for {sum(rows)} rows"])
            start = 0
            for module, part in zip(modules, second.split(rows), strict=True):
                if module.endswith(config.adapted):
                    ranks = slice(start, start + rank)
                    state |= {f"{module}.lora_a": first[ranks], f"{module}.lora_b": part[:, ranks].clone()}
                    part[:, ranks] = 0
                    start += rank if len(first) > rank else 0
            if second.any():  # outside of the blocks, which are zeros by now
                raise ConfigError(
                    f"lora_B of {hf_module} in {folder / PEFT_WEIGHTS}, which mixes the ranks of {', '.join(modules)}",
                    "zeros outside of the blocks of these matrices, each with an adapter of its own",
                    MERGE,
                )
    return state


@dataclass(frozen=True)
class VerifiedSource:
    """Source of weights after one rank has verified its files for all ranks."""

    source: WeightSource
    files: dict[str, str]
    """Name of a file -> sha256. For a checkpoint only its manifest, which has the checksums of the other files."""
    checkpoint: Path | None
    """Folder of the checkpoint, if the source is a run; otherwise None."""


def verify_source(source: WeightSource) -> VerifiedSource:
    """Read all files of a source of weights, and return it with their checksums. If the source is a run without
    a step, choose the newest undamaged checkpoint.

    Raises:
        ConfigError: the source is damaged.
    """
    if source.is_run:
        checkpoint = find_checkpoint(open_run(source.path)[0], source.step)
        return VerifiedSource(source, sum_files([checkpoint / "manifest.json"]), checkpoint)
    held = sorted({source.path / HF_CONFIG, *tensors_in_folder(source.path).values()})
    if source.adapter is not None:
        held += [source.adapter / PEFT_CONFIG, source.adapter / PEFT_WEIGHTS]
    return VerifiedSource(source, sum_files(held), None)


def sum_files(paths: list[Path]) -> dict[str, str]:
    """Return name of a file, without its folder -> sha256 in hexadecimal digits, for all ``paths``."""
    return {path.name: sum_file(path).sha256 for path in paths}


def read_source(verified: VerifiedSource, model: GPT) -> State:
    """Return the weights of a source as a state of ``model``, in fp32, with the shapes of its parameters.

    If only the model has adapters (LoRA), the state has none. If only the source has adapters, they are merged into its
    weights.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape.
    """
    source, shapes = verified.source, {name: tensor.shape for name, tensor in model.state_dict().items()}
    if verified.checkpoint is None:
        state = read_hf_folder(source.path, shapes)
        if source.adapter is not None:
            state |= read_peft(source.adapter, inspect_hf_folder(source.path)[0], source.model, shapes)
    else:
        state = read_weights(open_run(source.path)[1], verified.checkpoint).state_dict()
    if not model.config.lora.rank:
        state = merge_adapters(state, source.model.lora)
    elif not source.model.lora.rank:
        shapes = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
    if state.keys() != shapes.keys():
        differing = sorted(state.keys() ^ shapes.keys())
        raise wrong_shapes_error([f"{name} is {'missing' if name in shapes else 'unknown'}" for name in differing])
    known = source.model.vocab_size
    state = {name: (tensor[:known] if name in VOCABULARY else tensor).float() for name, tensor in state.items()}
    return fit_shapes(state, model.config, shapes)


def read_hf_folder(folder: Path, shapes: dict[str, torch.Size]) -> State:
    """Return the weights in a folder of transformers as a state of this project, in fp32. ``shapes`` are those of the
    parameters of this project, by name."""
    adapter, config = inspect_hf_folder(folder)
    files = {adapter.canonical(name): (path, name) for name, path in tensors_in_folder(folder).items()}
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in {path for path, _ in files.values()}
        }

        def read(name: str) -> Tensor:
            path, written = files[name]
            return opened[path].get_tensor(written)

        state = from_hf(read, adapter.rules(config), shapes)
        head = files.get("lm_head.weight")
        # Some writers repeat a tied matrix. If it differs, config.json is wrong, and the head would be lost.
        if config.tie_embeddings and head and not torch.equal(read("lm_head.weight").float(), state[VOCABULARY[0]]):
            raise damaged_file_error(
                head[0], "lm_head.weight differs from the embedding, which config.json says is the same"
            )
    return state


# Loading of a trained model from a run folder into one process, for any number of ranks and any saving strategy.
#
# Loading only reads. A damaged checkpoint is skipped, not set aside, because its run may still be training.


log = logging.getLogger(__name__)


def load_model(
    run_folder: str | os.PathLike[str], step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[TrainConfig, GPT]:
    """Load the config of a run and its model, fp32 and in eval mode, from the newest undamaged checkpoint.

        config, model = load_model("outputs/quick_test/default")

    Args:
        run_folder: the folder of one run.
        step: step of the checkpoint to load; None for the newest that is undamaged.
        device: the device of the returned model.

    Raises:
        ConfigError: the run is missing, or has no undamaged checkpoint.
    """
    folder, config = open_run(run_folder)
    return config, read_weights(config, find_checkpoint(folder, step), device)


def open_run(path: str | os.PathLike[str]) -> tuple[RunFolder, TrainConfig]:
    """Return folder and config of the run at ``path``. If ``path`` does not exist, it may be FOLDER/LABEL, with the
    label of a run in the launcher's reports.

    Raises:
        ConfigError: the run is missing, another program made it, or several runs have this label. For a sweep, the
            message names its runs.
    """
    given = Path(path).expanduser()
    if not given.exists():  # may be the label of a run, as in every command of the launcher
        given = next(iter(runs_labelled(given)), given)
    folder = RunFolder(given.absolute())
    if not folder.config.is_file():
        inside = [run for run in runs_inside(folder.path) if run != folder.path]
        raise ConfigError(
            f"{folder.path}, the folder of a sweep" if inside else f"no run in {folder.path}",
            "the folder of one run, which has .hydra/config.yaml",
            str(inside[-1]) if inside else "python -m gpt.train, to make one (it prints its folder first)",
        )
    return folder, read_run(folder)


def find_checkpoint(folder: RunFolder, step: int | None = None) -> Path:
    """Return the folder of a run's checkpoint of ``step``. If ``step`` is None, return the folder of the newest
    undamaged checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged.
    """
    there = {folders.step_of(path): path for path in folders.list_committed(folder.checkpoints)}
    wanted = [path for each, path in there.items() if step in (None, each)]
    if not wanted:
        raise ConfigError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {folder.checkpoints}",
            f"one of {', '.join(map(str, there))}" if there else "a run that has saved one",
            f"--step {max(there)}" if there else f"touch {folder.path}/SAVE while it runs",
        )
    damaged = []
    for path in reversed(wanted):
        try:
            for name, entry in read_manifest(path).files.items():
                if text := find_damage(path / name, entry):
                    raise DamagedError(text)
        except DamagedError as damage:
            if path.exists():  # the run itself may have deleted it meanwhile
                log.warning("checkpoint %s is damaged (%s): passed over", path, damage)
            damaged.append(f"{path.name} ({damage})")
        else:
            return path
    raise ConfigError(
        f"damaged: {'; '.join(damaged)}", "a checkpoint that is as it was saved", "the same command with another step"
    )


def read_weights(config: TrainConfig, checkpoint: Path, device: torch.device | str = "cpu") -> GPT:
    """Return the model of ``config`` with the weights of a checkpoint, in fp32 and eval mode, on ``device``.

    Raises:
        ConfigError: the checkpoint has another model, or needs DeepSpeed, which is not installed.
    """
    with torch.device("meta"):
        model = GPT(config.model)
    model.to_empty(device="cpu")
    model.reset_buffers()
    state = {"model": model.state_dict()}
    manifest = read_manifest(checkpoint)
    try:
        if manifest.contents["kind"] == DEEPSPEED:
            model.load_state_dict(formats.read_deepspeed_weights(checkpoint, manifest))
            return model.to(device).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that a single process loads, which is intended
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise ConfigError(
            f"{checkpoint} cannot be loaded into the model of its run ({str(error).strip().splitlines()[-1]})",
            "the model it was saved from",
            "another run, or the version of this program that made it",
        ) from error
    return model.to(device).eval()
