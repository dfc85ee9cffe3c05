"""Tensors from our names and shapes to a foreign format's, and back.

Owns the moving of numbers by a format's rules, and the reading of a source into our model. All of it on the CPU and in
fp32. Must not know ranks, nor where an export is written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from gpt.config import ModelConfig
from gpt.conversion.inspect import damaged, tensors_in_folder, verify_torch_file
from gpt.conversion.source import Kind, Source, look_into_hf
from gpt.conversion.spec import Format, Rule
from gpt.conversion.trained import find_checkpoint, open_run, read_weights
from gpt.model.gpt import GPT
from launch.errors import ConfigError

State = dict[str, Tensor]
SUMS = "SHA256SUMS"
VOCABULARY = ("token_embedding.weight", "head.weight")


def to_theirs(state: State, fmt: Format, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model of ours under a format's names, in the order of its rules."""
    state = {name: tensor[: config.vocab_size] if name in VOCABULARY else tensor for name, tensor in state.items()}
    if fmt.requires_bias:
        state = zero_biases(state) | state
    for rule in fmt.rules(config):
        if len(rule.theirs) == 1:
            parts = [torch.cat([state[name] for name in rule.ours])]
        else:
            parts = list(state[rule.ours[0]].unbind())
        for name, part in zip(rule.theirs, parts, strict=True):
            yield name, (part.mT if rule.transposed else part).contiguous()


def zero_biases(state: State) -> State:
    """A bias of zeros for every layer that could have one."""
    tables = ("token_embedding.weight", "position.weight", "head.weight")
    layers = [name for name in state if name.endswith(".weight") and name not in tables]
    return {name.removesuffix("weight") + "bias": state[name].new_zeros(state[name].size(0)) for name in layers}


def to_ours(read: Callable[[str], Tensor], rules: list[Rule], shapes: dict[str, torch.Size]) -> State:
    """A model's state from a format's tensors; ``read`` gives one by its name.

    Raises:
        ConfigError: a tensor of theirs has not the size that its parts of ours have together.
    """
    state: State = {}
    for rule in rules:
        theirs = [read(name).float() for name in rule.theirs]
        parts = [tensor.mT if rule.transposed else tensor for tensor in theirs]
        if len(rule.ours) == 1:
            state[rule.ours[0]] = parts[0] if len(parts) == 1 else torch.stack(parts)
            continue
        rows = [shapes[name][0] for name in rule.ours]
        if sum(rows) != parts[0].size(0):
            raise wrong_shapes([f"{rule.theirs[0]} is {tuple(theirs[0].shape)}, for {sum(rows)} rows"])
        state |= zip(rule.ours, parts[0].split(rows), strict=True)
    return state


def fit(state: State, config: ModelConfig, shapes: dict[str, torch.Size]) -> State:
    """``state`` in the shapes of our model: a longer vocabulary is filled up, a shorter table of positions cut off.

    Tokens that the source does not have get the mean of those it has, so that they take next to nothing from the
    probabilities of the others; zeros can take nearly all where the logits are far below zero (J. Hewitt, Initializing
    New Word Embeddings for Pretrained Language Models, 2021). Rows that only fill up the table are 0.

    Raises:
        ConfigError: a tensor has another shape; names all of them.
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
        raise wrong_shapes(wrong)
    return fitted


def wrong_shapes(wrong: list[str]) -> ConfigError:
    """The error for tensors that are not of the model that the config beside them describes."""
    return ConfigError("; ".join(wrong), "tensors of the model that is described beside them", "another copy of it")


@dataclass(frozen=True)
class Verified:
    """A source that one process has read through; the others need not. Can be sent to them."""

    source: Source
    files: dict[str, str]
    """sha256 of its files; of a checkpoint, that of its manifest, which has those of the others."""
    checkpoint: Path | None
    """The checkpoint of a run that was chosen."""


def verify(source: Source) -> Verified:
    """Read a source through, compare what checksums it has, and choose the checkpoint of a run.

    Raises:
        ConfigError: it is not what was written.
    """
    if source.kind is Kind.run:
        checkpoint = find_checkpoint(open_run(source.path)[0], source.step)
        return Verified(source, sums([checkpoint / "manifest.json"]), checkpoint)
    if source.kind is Kind.torch:
        verify_torch_file(source.path)
        return Verified(source, sums([source.path]), None)
    held = {path for path, _ in tensors_in_folder(source.path).values()}
    files = sums([source.path / "config.json", *sorted(held)])
    refuse_other_sums(source.path / SUMS, files)
    return Verified(source, files, None)


def sums(paths: list[Path]) -> dict[str, str]:
    """sha256 of files, by name."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def refuse_other_sums(path: Path, files: dict[str, str]) -> None:
    """Raise ConfigError where a list of checksums beside the files, as ``sha256sum`` writes it, says otherwise."""
    if not path.is_file():
        return
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    told = {words[1]: words[0] for words in lines if len(words) == 2}
    for name, digest in files.items():
        if told.get(name, digest) != digest:
            raise damaged(path.with_name(name), f"its sha256 is not the one in {SUMS}")


def read_source(verified: Verified, model: GPT) -> State:
    """The state of ``model`` as the source has it, fp32, with every tensor in its shape.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape.
    """
    source, shapes = verified.source, {name: tensor.shape for name, tensor in model.state_dict().items()}
    if source.kind is Kind.hf:
        state = read_hf(source.path, shapes)
    elif source.kind is Kind.torch:
        state = torch.load(source.path, map_location="cpu", mmap=True, weights_only=True)["model"]
    else:
        assert verified.checkpoint is not None
        state = read_weights(open_run(source.path)[1], verified.checkpoint).state_dict()
    if state.keys() != shapes.keys():
        differing = sorted(state.keys() ^ shapes.keys())
        raise wrong_shapes([f"{name} is {'missing' if name in shapes else 'unknown'}" for name in differing])
    known = source.model.vocab_size
    state = {name: (tensor[:known] if name in VOCABULARY else tensor).float() for name, tensor in state.items()}
    return fit(state, model.config, shapes)


def read_hf(folder: Path, shapes: dict[str, torch.Size]) -> State:
    """Our state from a folder of transformers."""
    fmt, config = look_into_hf(folder)
    files = {fmt.canonical(name): (path, name) for name, (path, _) in tensors_in_folder(folder).items()}
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in {path for path, _ in files.values()}
        }

        def read(name: str) -> Tensor:
            path, written = files[name]
            return opened[path].get_tensor(written)

        state = to_ours(read, fmt.rules(config), shapes)
        head = files.get("lm_head.weight")
        if config.tie_embeddings and head and not torch.equal(read("lm_head.weight").float(), state[VOCABULARY[0]]):
            raise damaged(head[0], "lm_head.weight differs from the embedding, which config.json says is the same")
    return state
