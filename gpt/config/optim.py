"""The schema of batch, optimizer and schedule. Torch-free; its values are in ``configs/optim``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from omegaconf import MISSING

from gpt.config.checks import check_custom_name
from launch.errors import ConfigError, require_positive, require_range

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


ADAMW = "adamw"


@dataclass
class OptimConfig:
    """Batch, AdamW (arXiv 1711.05101) and its schedule: linear warm-up, then a cosine to ``min_lr``."""

    optimizer: str = ADAMW
    """adamw; or a class of your own, ``package.module:Class`` or an entry point of the group ``gpt.optimizer``. See
    docs/components.md."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of an optimizer of your own, beside lr, betas and eps, which come from here where it takes them."""

    max_steps: int = MISSING
    """Number of optimizer steps; without effect where ``max_tokens`` is given. A run goes on beyond its end where it is
    larger than it was, on the schedule of the new length."""
    max_tokens: Optional[float] = None
    """Tokens to train on, instead of a number of steps: as many steps of the global batch as that takes."""
    global_batch: int = MISSING
    """Sequences per optimizer step over all ranks; per rank with weak_scaling=true."""
    max_micro_batch: int = MISSING
    """Most sequences of a micro-batch, per rank; gradients accumulate over as many micro-batches as that takes."""
    weak_scaling: bool = False
    """Let the batch grow with the ranks, which changes the loss curve."""
    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = MISSING
    """Learning rate at the end of the cosine."""
    warmup_steps: int = MISSING
    """Steps in which the learning rate rises linearly from zero to lr."""
    weight_decay: float = 0.1
    """Applied to matrices, not to biases and norms."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Number that AdamW adds to the root of that mean."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    target_val_loss: Optional[float] = None
    """Validation loss, in nats per token, at which the run is over: it saves, and ends as finished."""
    target_val_nats_per_byte: Optional[float] = None
    """Validation loss, in nats per byte of text, at which the run is over; of any tokenizer whose text is known."""
    patience: Optional[int] = None
    """Evaluations in a row without a lower validation loss after which the run is over (early stopping)."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        if self.optimizer != ADAMW:
            check_custom_name("optim.optimizer", self.optimizer, (ADAMW,))
        elif self.options:
            raise ConfigError(
                f"optim.options={self.options} with optim.optimizer={ADAMW}",
                "arguments for an optimizer of your own only",
                "optim.options={}, or optim.optimizer=PACKAGE.MODULE:CLASS",
            )
        for key in ("max_steps", "global_batch", "max_micro_batch", "lr"):
            require_positive(f"optim.{key}", getattr(self, key))
        if self.max_tokens is not None:
            require_range("optim.max_tokens", self.max_tokens, 1.0, 1e18)
        for key in ("min_lr", "warmup_steps", "weight_decay", "grad_clip"):
            require_range(f"optim.{key}", getattr(self, key), 0.0, float("inf"))
        require_range("optim.beta1", self.beta1, 0.0, 0.9999999)
        require_range("optim.beta2", self.beta2, 0.0, 0.9999999)
        if self.target_val_loss is not None:
            require_positive("optim.target_val_loss", self.target_val_loss)
        if self.target_val_nats_per_byte is not None:
            require_positive("optim.target_val_nats_per_byte", self.target_val_nats_per_byte)
        if self.patience is not None:
            require_positive("optim.patience", self.patience)
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} above optim.lr={self.lr}",
                "a schedule that goes down",
                f"optim.min_lr={self.lr / 10:g}",
            )


def lr_at(config: OptimConfig, step: int) -> float:
    """Learning rate of step ``step`` (counted from 1): linear warm-up, then a cosine down to ``min_lr``.

    A pure function of the step and of all steps, so a resumed run needs no schedule state. A run that is extended
    changes over to the schedule of its new length with its next step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))


def describe_extended_schedule(config: OptimConfig, before: int) -> str:
    """Say how the learning rate goes on where a run of ``before`` steps is extended to ``config.max_steps``."""
    last, following = lr_at(replace(config, max_steps=before), before), lr_at(config, before + 1)
    return (
        f"learning rate {last:.3g} at step {before}, {following:.3g} at step {before + 1}: from there on that of a run "
        f"of {config.max_steps} steps (optim.lr and optim.min_lr alike keep it even)"
    )
