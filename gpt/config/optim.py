"""The schema of batch, optimizer, schedule, divergence and checkpoints. Torch-free; values are in configs/optim."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Union

from omegaconf import MISSING

from gpt.config.checks import check_custom_name
from launch.errors import ConfigError, require_positive, require_range

# The schema of batch, optimizer and schedule. Torch-free; its values are in ``configs/optim``.


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


# The schema of what a run does where its numbers go wrong. Torch-free; its values are in ``configs/train.yaml``.


# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class DivergenceConfig:
    """Limits of steps that are skipped and of roll-backs, spikes of the loss, and replicas that drift apart."""

    max_skipped_steps: int = 10
    """After so many steps in a row whose loss or gradients are not finite, and which were skipped, the run goes back to
    its last good checkpoint and passes over their batches."""
    max_rollbacks: int = 2
    """After so many roll-backs that brought no newer checkpoint the run ends, and is not started again."""
    spike_sigmas: Optional[float] = None
    """Go back and pass over the batch of a step whose loss exceeds the mean of the steps before it by so many standard
    deviations. null: never."""
    spike_window: int = 100
    """Number of steps whose losses a spike is compared with; none is found before there are so many."""
    replica_check_interval: int = 0
    """Steps between comparisons of the replicas of the parameters, bit by bit; each save is preceded by one as well. 0
    compares none."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_positive("divergence.max_skipped_steps", self.max_skipped_steps)
        require_range("divergence.max_rollbacks", self.max_rollbacks, 0, float("inf"))
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ConfigError(
                f"divergence.spike_sigmas={self.spike_sigmas}",
                "a number above 0, such as 6, or null for no look at spikes",
                "divergence.spike_sigmas=6",
            )
        require_range("divergence.spike_window", self.spike_window, 2, 1e6)
        require_range("divergence.replica_check_interval", self.replica_check_interval, 0, float("inf"))


# Keys of the checkpoints of a run: when they are saved, by whom, and which are kept. Torch-free.


# OmegaConf 2.3 reads these annotations at run time and knows Optional[X] and Union[X, Y], not X | Y.
# ruff: noqa: UP007, UP045

AUTO = "auto"
URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")
INSTALLS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
}
"""Packages with which fsspec reaches a store, by the beginning of its URLs."""
MINUTES = re.compile(r"(\d+(?:\.\d+)?) ?min")


def read_minutes(text: str) -> float | None:
    """Read a number of minutes, as ``30min``; None where the text is none, or zero."""
    found = MINUTES.fullmatch(text)
    return float(found[1]) or None if found else None


@dataclass(frozen=True)
class Interval:
    """Distance of the periodic checkpoints: of ``steps`` and ``minutes`` at most one is set; neither is ``auto``."""

    steps: int | None = None
    """0: no periodic checkpoints."""
    minutes: float | None = None

    def __str__(self) -> str:
        if self.steps is not None:
            return f"every {self.steps} steps" if self.steps else "at the end"
        return "as often as failures ask for" if self.minutes is None else f"every {self.minutes:g} minutes"


@dataclass
class CheckpointConfig:
    """Schedule of the checkpoints, and their deletion."""

    interval: Union[int, str] = MISSING
    """Steps between checkpoints; 0 saves at the end and when interrupted only. ``30min`` for minutes. ``auto`` for the
    interval that loses least, by what a save has taken and how often the run has failed (Young 1974)."""
    keep_last: int = MISSING
    """Number of the newest checkpoints to keep; keep_every=1 keeps all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for good."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation loss to keep besides, of those whose step was evaluated."""
    asynchronous: bool = True
    """Write checkpoints from a copy in host memory by a process beside each rank, while training goes on; false has
    training wait for each."""
    give_up_after_min: float = 60.0
    """Minutes for which a run goes on whose checkpoints cannot be written, as on a full disk; 0 stops at the first."""
    scrub: Union[bool, str] = False
    """Read each checkpoint again after it was written, beside training, and set it aside where it is damaged; those
    before it are deleted only when it is whole. ``30min`` reads the newest one again every thirty minutes, too."""
    in_memory: bool = False
    """Keep the newest state of each node in its own memory and in that of the next node as well, so that ranks that
    die, or a node that a spare replaces, are back without reading the disk. Needs the launcher."""
    in_memory_interval: int = 10
    """Steps between checkpoints in memory; each checkpoint on the disk goes there too."""

    copy_to: Optional[str] = None
    """URL of a place elsewhere that fsspec reaches, as ``s3://BUCKET/FOLDER`` or ``file:///FOLDER``, to which each
    checkpoint is copied while training goes on, and from which a start fetches where no checkpoint on the disk is
    whole."""
    copy_keep: Optional[int] = None
    """Number of the newest copies to keep; null keeps those that keep_last, keep_every and keep_best say."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range, or ``copy_to`` no URL."""
        self.every()
        self._validate_copies()
        require_positive("checkpoint.keep_last", self.keep_last)
        require_range("checkpoint.keep_every", self.keep_every, 0, float("inf"))
        require_range("checkpoint.keep_best", self.keep_best, 0, float("inf"))
        require_range("checkpoint.give_up_after_min", self.give_up_after_min, 0, float("inf"))
        require_positive("checkpoint.in_memory_interval", self.in_memory_interval)
        if self.scrub_every_s() is not None and not self.asynchronous:
            raise ConfigError(
                f"checkpoint.scrub={str(self.scrub).lower()} with checkpoint.asynchronous=false",
                "a process beside each rank, which reads while training goes on",
                "checkpoint.asynchronous=true, or python -m launch.verify RUN, which may run beside a run",
            )
        if self.in_memory and not self.asynchronous:
            raise ConfigError(
                "checkpoint.in_memory=true with checkpoint.asynchronous=false",
                "a process beside each rank, which sends the copy to the other nodes while training goes on",
                "checkpoint.asynchronous=true, or checkpoint.in_memory=false",
            )

    def _validate_copies(self) -> None:
        if self.copy_to is None:
            if self.copy_keep is not None:
                raise ConfigError(
                    f"checkpoint.copy_keep={self.copy_keep} without checkpoint.copy_to",
                    "a place that checkpoints are copied to",
                    "checkpoint.copy_to=s3://BUCKET/FOLDER, or checkpoint.copy_keep=null",
                )
            return
        if self.copy_keep is not None:
            require_positive("checkpoint.copy_keep", self.copy_keep)
        found = URL.fullmatch(self.copy_to)
        example = "checkpoint.copy_to=s3://BUCKET/FOLDER, or checkpoint.copy_to=file:///FOLDER"
        if found is None:
            raise ConfigError(f"checkpoint.copy_to={self.copy_to}", "a URL of a place elsewhere", example)
        if {*"@?#"} & {*found[2]}:  # the URL itself may hold a password: it is not shown
            raise ConfigError(
                f"checkpoint.copy_to={found[1]}://... with @, ? or # in it",
                "a URL without credentials, which are kept in the config of the run and in its logs",
                f"the URL without them, and credentials in the environment (as AWS_ACCESS_KEY_ID); {example}",
            )
        if found[1] == "memory":
            raise ConfigError(
                f"checkpoint.copy_to={self.copy_to}", "a place that outlives the process that copies", example
            )

    def every(self) -> Interval:
        """Read ``interval``.

        Raises:
            ConfigError: it is none of a number of steps, minutes and ``auto``.
        """
        text = str(self.interval).strip()
        if text == AUTO:
            return Interval()
        if re.fullmatch(r"-?\d+", text):
            require_range("checkpoint.interval", int(text), 0, float("inf"))
            return Interval(steps=int(text))
        minutes = read_minutes(text)
        if minutes is None:
            raise ConfigError(
                f"checkpoint.interval={text}",
                "a number of steps, a number of minutes, or auto",
                "checkpoint.interval=200, checkpoint.interval=30min or checkpoint.interval=auto",
            )
        return Interval(minutes=minutes)

    def scrub_every_s(self) -> float | None:
        """Read ``scrub``: None for no reading, 0 for one after each save, else the seconds until the next one too.

        Raises:
            ConfigError: it is none of true, false and a number of minutes.
        """
        if isinstance(self.scrub, bool):
            return 0.0 if self.scrub else None
        minutes = read_minutes(self.scrub.strip())
        if minutes is None:
            raise ConfigError(
                f"checkpoint.scrub={self.scrub}",
                "true to read each checkpoint once, false, or the minutes after which the newest is read again",
                "checkpoint.scrub=true or checkpoint.scrub=30min",
            )
        return 60 * minutes
