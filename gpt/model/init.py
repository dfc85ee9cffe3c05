"""The initial weights, as in GPT-2.

Every parameter is drawn from a generator of its own, seeded by the run's seed and the parameter's name, on the CPU. So
its values depend on nothing else: not on the order of construction, not on the device, not on who holds which part of
the model, and not on what other parameters there are.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from gpt.model.gpt import GPT

STD = 0.02
RESIDUAL_OUTPUTS = ("attention.output.weight", "ffn.down.weight")
"""The matrices that write into the residual stream."""


def initialize(model: GPT, seed: int) -> None:
    """Fill every parameter and buffer of ``model``, whatever they hold and wherever they lie.

    Matrices are normal with standard deviation 0.02; those that write into the residual stream are scaled by
    1 / sqrt(2 n_layer), one factor for each addition to it; gains are 1 and biases 0. Language Models are Unsupervised
    Multitask Learners (Radford et al. 2019), section 2.3,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and
    https://github.com/openai/gpt-2/blob/master/src/model.py. The position table has 0.02 too, as in later GPTs, where
    that code has 0.01.

    To be called before a strategy wraps or cuts the model, since wrappers change the parameters' names.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, model.config.n_layer, seed))
    model.reset_buffers()


def initial_value(name: str, shape: torch.Size, n_layer: int, seed: int) -> Tensor:
    """The whole of one parameter, fp32 on the CPU."""
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu")
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    std = STD / math.sqrt(2 * n_layer) if name.endswith(RESIDUAL_OUTPUTS) else STD
    generator = torch.Generator("cpu").manual_seed(seed_of(name, seed))
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)


def seed_of(name: str, seed: int) -> int:
    """63 bits that follow from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
