"""Layouts that train a model of a given size: a model with that many parameters, and the fastest layouts for it.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from gpt.accounting import counts
from gpt.accounting.counts import training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.config import ModelConfig, TrainConfig
from gpt.planning.auto import LayoutChoice, rank_layouts
from gpt.planning.hardware import Machine
from gpt.planning.search import describe
from launch.errors import ConfigError
from launch.workload import SetUp, TrainingGoal

GOAL_WORDS = ("model=llama_1p36b", "parallel=auto", "precision=bf16", "recompute=selective", "optim=gpt2")
"""Overrides of the family of models, and the usual settings of large ones."""
ASPECT = 110
"""Width divided by layers of the sized models: 128 in Llama 2 7B, 102 in Llama 2 70B (arXiv 2307.09288)."""
WITHIN = 0.03
"""Relative difference from the requested size below which the aspect decides."""
TOKENS_PER_STEP = 4e6
"""Default global batch in tokens: that of Llama 2 (arXiv 2307.09288, section 2.2)."""
BATCH_MULTIPLE = 384
"""The batch is a multiple of this, 2^7 x 3, so that many numbers of data ranks divide it."""
HEAD_DIM = 128
EXAMPLE = 'python -m launch.project --fit "7e9 params, 1e12 tokens, 30 days" --gpu h100'
MOST_PARAMETERS = 1e15
"""Largest size of a model in parameters: the plan computes its layers one by one."""
SHOWN = 2
"""Number of layouts that are returned for one number of nodes."""


def sized_model(family: ModelConfig, wanted: float) -> ModelConfig:
    """Return a model of about ``wanted`` parameters, with the parts of ``family`` and a usual shape.

    Raises:
        ConfigError: no width and depth come near ``wanted``, or it exceeds ``MOST_PARAMETERS``.
    """
    if wanted > MOST_PARAMETERS:
        raise ConfigError(f"{wanted:.3g} params", f"{MOST_PARAMETERS:.0e} at most", EXAMPLE)
    ratio = 0.0 if family.ffn_hidden is None else family.ffn_hidden / family.n_embd
    keys = family.n_head // (family.n_kv_head or family.n_head)
    found: list[tuple[bool, float, ModelConfig]] = []
    for heads in range(2, 257, 2):
        if heads % keys:
            continue
        width = heads * HEAD_DIM
        hidden = round(ratio * width / 256) * 256 if ratio else None
        shaped = replace(family, n_embd=width, n_head=heads, ffn_hidden=hidden, n_layer=1)
        shaped = shaped if family.n_kv_head is None else replace(shaped, n_kv_head=heads // keys)
        one, two = (counts.count(replace(shaped, n_layer=layers)).total for layers in (1, 2))
        layers = max(1, round(1 + (wanted - one) / (two - one)))
        error = abs(one + (layers - 1) * (two - one) - wanted) / wanted
        aspect = max(width / layers / ASPECT, ASPECT * layers / width)
        found.append((error > WITHIN, aspect if error <= WITHIN else error, replace(shaped, n_layer=layers)))
    is_far, _, model = min(found, key=lambda one: one[:2])
    if is_far:
        raise ConfigError(
            f"{wanted:.3g} params, and the nearest of model={family.name} has {counts.count(model).total:.3g}",
            f"a size that a model with heads of {HEAD_DIM} comes within {100 * WITHIN:.0f} % of",
            EXAMPLE,
        )
    return model


def sized_config(config: TrainConfig, goal: TrainingGoal, has_batch: bool) -> TrainConfig:
    """Return the config with a model of the goal's size, and without a typed batch also with a usual one."""
    model = sized_model(config.model, goal.parameters)
    optim = config.optim
    if not has_batch:
        batches = max(1, round(TOKENS_PER_STEP / model.block_size / BATCH_MULTIPLE))
        optim = replace(optim, global_batch=batches * BATCH_MULTIPLE)
    return replace(config, model=model, optim=replace(optim, weak_scaling=False))


def rank_set_ups(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str] = ()) -> list[SetUp]:
    """Return the fastest layouts that fit, by the estimate of ``parallel=auto``. Typed keys, in ``fixed``, stay
    unchanged.

    Raises:
        ConfigError: no layout is valid, or none fits.
    """
    ranked = rank_layouts(config, world_size, machine, fixed).choices
    return [as_set_up(config, choice, world_size, machine) for choice in ranked[:SHOWN]]


def as_set_up(config: TrainConfig, choice: LayoutChoice, world_size: int, machine: Machine) -> SetUp:
    """Return the figures of a layout that ``launch.project`` shows."""
    model, found = config.model, choice.estimate
    peak = peak_flops(machine.device, config.precision)
    rate = training_flops_per_token(model).palm * found.tokens_per_s / world_size
    words = [
        *(f"model={model.name}", f"model.n_layer={model.n_layer}", f"model.n_head={model.n_head}"),
        *(f"model.n_embd={model.n_embd}", f"optim.global_batch={config.optim.global_batch}"),
        *([] if model.ffn_hidden is None else [f"model.ffn_hidden={model.ffn_hidden}"]),
        *([] if model.n_kv_head is None else [f"model.n_kv_head={model.n_kv_head}"]),
        *(f"optim.max_micro_batch={choice.batch.micro}", f"precision={config.precision.name}"),
        *(f"recompute={config.recompute.name}", "parallel=auto"),
    ]
    return SetUp(
        parallelism=re.sub(r" dp_replicate=1\b", "", describe(choice.parallel, choice.dims)),
        micro_batch=choice.batch.micro,
        step_s=found.step_s,
        work_per_step=found.tokens,
        memory_bytes=choice.memory.total,
        mfu=None if peak is None else rate / peak,
        command=" ".join(words),
    )
