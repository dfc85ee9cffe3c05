"""Initialization of the weights, as in GPT-2.

Every parameter is drawn from a generator of its own, seeded by the run's seed and the parameter's name, on the CPU. So
its values depend on nothing else: not on the order of construction, not on the device, not on who holds which part of
the model, and not on what other parameters there are. Where the model is sharded, gpt/parallel/materialize.py draws one
parameter after another and keeps this rank's shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpt.components.facts import owner_of
from gpt.components.load import load_part
from gpt.config import ModelConfig
from gpt.model.gpt import GPT

Weights = Callable[[str, torch.Size], Tensor]
"""Values of a whole parameter, or of a buffer that checkpoints hold, by its name and shape; fp32 on the CPU."""
RESIDUAL_OUTPUTS = ("attention.output.weight", "ffn.down.weight", "ffn.experts.down", "ffn.shared.down.weight")
"""Ends of the names of the matrices that write into the residual stream."""


def initialize(model: GPT, seed: int) -> None:
    """Fill every parameter and buffer of ``model``, whatever they hold and wherever they lie.

    Matrices are normal with standard deviation ``init_std``; those that write into the residual stream are scaled by
    1 / sqrt(2 n_layer), one factor for each addition to it; gains are 1 and biases 0. Language Models are Unsupervised
    Multitask Learners (Radford et al. 2019), section 2.3,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and
    https://github.com/openai/gpt-2/blob/master/src/model.py. The position table is like the matrices, as in later GPTs,
    where that code has half as much.

    Call before a strategy wraps or shards the model, since wrappers change the parameters' names.
    """
    weights = initial_weights(model.config, seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(weights(name, tensor.shape))
    model.reset_buffers()


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Return the function that draws the tensors of a model by their names."""
    return partial(initial_value, config=config, seed=seed)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Draw one whole parameter, or the value of a buffer, fp32 on the CPU.

    Each expert is drawn by itself, so its values do not depend on how many there are. Rows that only fill up the
    vocabulary are 0, and the others are what they are without them. A part of the user's may give values of its own.
    """
    own = part_value(name, shape, config, seed)
    if own is not None:
        return own
    if name.endswith("bias"):  # of a layer, or of the balance of experts
        return torch.zeros(shape, device="cpu")
    if len(shape) < 2:  # the gain of a norm
        return torch.ones(shape, device="cpu")
    std = initial_std(name, config)
    whole = torch.zeros(shape, device="cpu")
    if len(shape) == 3:
        for expert in range(shape[0]):
            fill_normal(whole[expert], f"{name}.{expert}", std, seed)
        return whole
    # In place: a copy with the padding would be as large again, and this is the largest tensor of many a model.
    is_padded = name in ("token_embedding.weight", "head.weight")
    fill_normal(whole[: config.vocab_size] if is_padded else whole, name, std, seed)
    return whole


def part_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor | None:
    """Ask the user's part that a tensor belongs to for its value; None where it has none, or leaves it to the rule."""
    owner = owner_of(name, config)
    if owner is None:
        return None
    key, local = owner
    kind = load_part(f"model.{key}", config.custom_parts[key])
    if not hasattr(kind, "initial_value"):
        return None
    generator = torch.Generator("cpu").manual_seed(parameter_seed(name, seed))
    value: Tensor | None = kind.initial_value(config, local, shape, generator)
    assert value is None or value.shape == shape, f"{name}: {tuple(value.shape)} instead of {tuple(shape)}"
    return value


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of one initial matrix."""
    if name == "token_embedding.weight" and config.embedding_init_std is not None:
        return config.embedding_init_std
    scaled = config.residual_init_scaled and name.endswith(RESIDUAL_OUTPUTS)
    return config.init_std / math.sqrt(2 * config.n_layer) if scaled else config.init_std


def fill_normal(values: Tensor, name: str, std: float, seed: int) -> None:
    """Fill a contiguous tensor on the CPU with normal values that follow from the run's seed and a name."""
    generator = torch.Generator("cpu").manual_seed(parameter_seed(name, seed))
    values.normal_(std=std, generator=generator)


def parameter_seed(name: str, seed: int) -> int:
    """Derive a seed of 63 bits from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
