"""Counts of the user's parts of a model and of the user's optimizer: as a class states them, or as its
parameters imply.

Counting imports the user's module, and torch with it. For a model of built-in parts neither is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from functools import lru_cache
from typing import Any

from gpt.components import KINDS_OF_PARALLELISM, PartCounts, StateBytes, build_custom_optimizer, load_part
from gpt.config.model import CACHED, ModelConfig
from gpt.config.optim import ADAMW, MUON, OptimConfig
from launch.errors import ConfigError

# Counts of the parts. B batch, T time, D width, H heads, C head width.


@lru_cache(maxsize=CACHED)
def part_counts(model: ModelConfig) -> Mapping[str, PartCounts]:
    """Return shapes, FLOPs and bytes of the user's own classes in a model, by the part that each replaces.

    The keys are ``norm``, ``head_norm``, ``position``, ``attention`` and ``ffn``, without built-in parts.
    ``head_norm`` counts the norms of queries and keys together; its parameters are those of one norm.

    Raises:
        ConfigError: a part cannot be imported, takes other arguments, or fails.
    """
    custom, hidden = model.custom_parts, (model.block_size, model.n_embd)
    heads = (model.block_size, model.n_head + model.kv_heads, model.head_dim)
    found: dict[str, PartCounts] = {}
    if "norm" in custom:
        found["norm"] = count_part(model, "norm", hidden, model.n_embd)
        if model.qk_norm and "attention" not in custom:
            found["head_norm"] = count_part(model, "norm", heads, model.head_dim)
    if name := custom.get("position"):
        on_heads = getattr(load_part("model.position", name), "on_heads", False)
        found["position"] = count_part(model, "position", heads if on_heads else hidden)
    return found | {key: count_part(model, key, hidden) for key in ("attention", "ffn") if key in custom}


def count_part(model: ModelConfig, key: str, shape: tuple[int, ...], *arguments: int) -> PartCounts:
    """Build the user's class for one part on the meta device, call it once, and return its shapes, FLOPs and bytes.

    A class may state ``forward_flops(config)`` and ``saved_bytes(config, width)``. Without them, each element of a
    matrix counts two FLOPs a token, and the backward pass keeps the input and twice the results of the matrices.

    Args:
        model: the config of the model.
        key: field of the config that names the part.
        shape: shape of the input of one sequence, without B.
        arguments: arguments of the constructor after the config.

    Raises:
        ConfigError: the part cannot be built, changes the shape of its input, or cannot be sharded.
    """
    import torch

    name = model.custom_parts[key]
    kind = load_part(f"model.{key}", name)
    after = {"position": (0,), "attention": (None,)}.get(key, ())
    try:
        with torch.device("meta"), torch.no_grad():
            module = kind(model, *arguments)
            x = torch.empty(1, *shape)
            y = module(x, *after)
            if not isinstance(y, torch.Tensor) or y.shape != x.shape:
                raise ValueError(f"it gives {tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__}")
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"model.{key}={name} fails on a tensor of {('B', *shape)}: {type(error).__name__}: {error}",
            "a part that keeps the shape of its input, and whose operations do not look at values (.item(), .tolist())",
            "the class repaired; docs/components.md has one of each kind",
        ) from error
    check_state(f"model.{key}={name}", module)
    matrices = [parameter.shape for parameter in module.parameters() if parameter.dim() > 1]
    tokens, widths = model.block_size, {"fp32": 4, "half": 2}
    # The result of an attention kernel is as wide as the model.
    results = tokens * (sum(rows for rows, *_ in matrices) + model.n_embd * (key == "attention"))
    saved = {word: 4 * math.prod(shape) + 2 * width * results for word, width in widths.items()}
    if hasattr(kind, "saved_bytes"):
        share = math.prod(shape) / (tokens * model.n_embd) if key == "norm" else 1  # a norm of heads has another width
        saved = {word: math.ceil(share * kind.saved_bytes(model, width)) for word, width in widths.items()}
    stated = hasattr(kind, "forward_flops")
    return PartCounts(
        shapes={name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
        flops=int(kind.forward_flops(model)) if stated else 2 * tokens * sum(map(math.prod, matrices)),
        saved=saved,
        products={word: width * results for word, width in widths.items()},
        parallel=stated_parallelism(key, name, kind),
        on_heads=key == "position" and len(shape) == 3,
    )


def check_state(part: str, module: Any) -> None:
    """Raise ConfigError for parameters without dimensions, and for unsaved buffers if the class has no
    ``reset_buffers``."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"{part} has the parameter {scalars[0]} without a dimension",
            "parameters of at least one dimension, which FSDP can shard",
            f"self.{scalars[0]} = nn.Parameter(torch.empty(1))",
        )
    persistent = module.state_dict().keys()
    tables = [name for name, _ in module.named_buffers() if name not in persistent]
    if tables and not hasattr(module, "reset_buffers"):
        raise ConfigError(
            f"{part} has the buffer {tables[0]}, which no checkpoint holds, and no reset_buffers()",
            "a method that fills such buffers in place: models are built without memory first",
            "def reset_buffers(self), which computes them",
        )


def stated_parallelism(key: str, name: str, kind: Any) -> tuple[str, ...]:
    """Return the class attribute ``parallel``: the kinds of parallelism that a part supports.

    Raises:
        ConfigError: the attribute has a value that parts of its kind cannot have.
    """
    stated, able = tuple(getattr(kind, "parallel", ())), KINDS_OF_PARALLELISM[key]
    if not set(stated) <= set(able):
        raise ConfigError(
            f"model.{key}={name} says parallel = {stated!r}",
            f"of {', '.join(able)} those that it can be computed under",
            f"parallel = {tuple(word for word in stated if word in able)!r}",
        )
    return stated


OWNERS = (
    ("attention", r"blocks\.\d+\.attention\.(.+)"),
    ("norm", r"(?:norm|blocks\.\d+\.(?:attention_norm|ffn_norm|attention\.query_norm|attention\.key_norm))\.(.+)"),
    ("position", r"(?:position|blocks\.\d+\.attention\.rope)\.(.+)"),
    ("ffn", r"blocks\.\d+\.ffn\.(.+)"),
)
"""Parts, and patterns of their tensors' names in the whole model. A tensor belongs to the first part of the user that
matches, so norms and positions inside the user's attention belong to the attention."""


def owner_of(name: str, model: ModelConfig) -> tuple[str, str] | None:
    """Return the user's part that a tensor belongs to: field of the config, and name in the part; None if there is
    none."""
    custom = model.custom_parts
    for key, pattern in OWNERS if custom else ():
        if key in custom and (found := re.fullmatch(pattern, name)):
            return key, found.group(1)
    return None


# State of an optimizer.


def optimizer_state(optim: OptimConfig) -> StateBytes:
    """Return the bytes of an optimizer's state. For AdamW these are two moments and a count of steps; for a user's
    optimizer they are measured after one step.

    For Muon these are the bytes for the parameters that AdamW steps.

    Raises:
        ConfigError: the user's optimizer cannot be imported, refuses its arguments, or fails.
    """
    if optim.optimizer in (ADAMW, MUON):
        return StateBytes(8, 4)
    numbers = {key: value for key, value in asdict(optim).items() if not isinstance(value, Enum)}
    return _state_after_step(json.dumps(numbers, sort_keys=True))


@lru_cache(maxsize=16)
def _state_after_step(optim_json: str) -> StateBytes:
    import torch

    optim = OptimConfig(**json.loads(optim_json))
    matrix = torch.nn.Parameter(torch.zeros(64, 64))
    matrix.grad = torch.full_like(matrix, 1e-3)
    optimizer = build_custom_optimizer(optim, [{"params": [matrix], "weight_decay": optim.weight_decay}])
    try:
        optimizer.step()
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"optim.optimizer={optim.optimizer} fails in a step over a matrix: {type(error).__name__}: {error}",
            "an optimizer that steps any parameters with gradients",
            "the class repaired; docs/components.md has an example",
        ) from error
    tensors = [value for value in optimizer.state[matrix].values() if torch.is_tensor(value)]
    whole = [tensor.nbytes for tensor in tensors if tensor.numel() >= matrix.numel()]
    return StateBytes(sum(whole) / matrix.numel(), sum(tensor.nbytes for tensor in tensors) - sum(whole))
