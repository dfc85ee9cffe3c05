"""Schema of batch, optimizer, learning rate, divergence and checkpoints. Imports no torch. The values are in
configs/optim."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Union

from omegaconf import MISSING

from gpt.config.rules import check_custom_name, check_numbers, is_importable
from launch.errors import ConfigError, closest, require_range
from launch.runs.environment import install_command

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X] and Union[X, Y], not X | Y.
# ruff: noqa: UP007, UP045


# Batch, optimizer and schedule of the learning rate.


ADAMW = "adamw"
MUON = "muon"
SCHEDULE_FREE = "adamw_schedule_free"


class LrSchedule(Enum):
    """Learning rate after the linear warm-up.

    ``cosine`` and ``linear`` go down to ``min_lr`` at the last step; ``constant`` stays at ``lr``. ``wsd`` (warm-up,
    stable, decay; arXiv 2404.06395, section 4) stays at ``lr`` until ``decay_from``, and then goes down to ``min_lr``.
    """

    cosine = "cosine"
    wsd = "wsd"
    linear = "linear"
    constant = "constant"


class DecayShape(Enum):
    """Curve of the decay from ``lr`` to ``min_lr``. The names are those of torchtitan.

    After a share *p* of the steps of the decay, the learning rate is min_lr + *s* (lr - min_lr). The factor *s* goes
    from 1 to 0: 1 - *p* for ``linear``, 1 - sqrt(*p*) for ``sqrt`` (arXiv 2405.18392), half a cosine for ``cosine``.
    """

    linear = "linear"
    sqrt = "sqrt"
    cosine = "cosine"


@dataclass
class OptimConfig:
    """Batch, length of the run, optimizer, and learning rate: linear warm-up, then ``schedule``."""

    optimizer: str = ADAMW
    """adamw; muon for the matrices of the blocks, with adamw for the rest; or adamw_schedule_free (docs/training.md).
    Or a class of your own, as ``package.module:Class`` or as an entry point of the group ``gpt.optimizer``
    (docs/components.md)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of muon (those of ``torch.optim.Muon``), or of an optimizer of your own. Your optimizer
    receives lr, betas and eps from this config if it accepts them."""

    max_steps: int = MISSING
    """Number of optimizer steps; without effect if ``max_tokens`` is given. A larger number extends a finished run; its
    additional steps have the learning rates of a run of the new length."""
    max_tokens: Optional[float] = None
    """Number of tokens to train on, instead of a number of steps. The run makes as many steps as these tokens need.
    null: ``max_steps`` decides."""
    global_batch: int = MISSING
    """Sequences per optimizer step over all ranks; per rank with weak_scaling=true."""
    max_micro_batch: int = MISSING
    """Largest number of sequences of a micro-batch, per rank. Each rank accumulates the gradients of as many
    micro-batches as the global batch needs."""
    weak_scaling: bool = False
    """Multiply ``global_batch`` by the number of data-parallel ranks. The losses then depend on the number of ranks."""
    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = MISSING
    """Learning rate at the end of cosine, linear and wsd."""
    warmup_steps: int = MISSING
    """Steps in which the learning rate rises linearly from zero to lr."""
    schedule: LrSchedule = LrSchedule.cosine
    """Learning rate after the warm-up: cosine or linear down to min_lr; constant at lr; or wsd, which is constant until
    decay_from. A run may continue with another schedule that gives the same rates to the steps already made."""
    decay_from: Optional[float] = None
    """wsd only: step after which the learning rate decays, until the last step. A value below 1 is a share of all
    steps. null means 0.9."""
    decay_shape: DecayShape = DecayShape.linear
    """wsd only: curve of the decay."""
    weight_decay: float = 0.1
    """Weight decay of matrices; biases and norms have none."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.95
    """Decay of the mean of the squared gradients."""
    eps: float = 1e-8
    """Number that AdamW adds to the root of the mean of the squared gradients."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    target_val_loss: Optional[float] = None
    """Validation loss, in nats per token, at which the run saves and ends before its last step; null never does."""
    patience: Optional[int] = None
    """Number of evaluations in a row without a lower validation loss, after which the run saves and ends (early
    stopping); null never does."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range."""
        if self.optimizer == MUON:
            check_muon_options(self.options)
        elif self.optimizer not in (ADAMW, SCHEDULE_FREE):
            check_custom_name("optim.optimizer", self.optimizer, (ADAMW, MUON, SCHEDULE_FREE))
        elif self.options:
            raise ConfigError(
                f"optim.options={self.options} with optim.optimizer={self.optimizer}",
                "arguments for muon, or for an optimizer of your own",
                "optim.options={}, or optim.optimizer=muon, or optim.optimizer=PACKAGE.MODULE:CLASS",
            )
        check_numbers(
            "optim.",
            self,
            positive=(
                *("max_steps", "global_batch", "max_micro_batch", "lr"),
                *("target_val_loss", "patience"),
            ),
            at_least_0=("min_lr", "warmup_steps", "weight_decay", "grad_clip", "decay_from"),
            **{"max_tokens": (1.0, 1e18), "beta1": (0.0, 0.9999999), "beta2": (0.0, 0.9999999)},
        )
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} above optim.lr={self.lr}",
                "a schedule that goes down",
                f"optim.min_lr={self.lr / 10:g}",
            )
        self._validate_decay()
        if self.optimizer == SCHEDULE_FREE:
            self._validate_schedule_free()

    def _validate_schedule_free(self) -> None:
        found = f"optim.optimizer={SCHEDULE_FREE}"
        if not is_importable("schedulefree"):
            raise ConfigError(
                f"{found}, and the package schedulefree is not installed",
                "the extra schedulefree",
                f"{install_command('schedulefree')}, or optim.optimizer={ADAMW}",
            )
        if self.schedule is not LrSchedule.constant or not self.beta1:
            raise ConfigError(
                f"{found} with optim.schedule={self.schedule.name} optim.beta1={self.beta1:g}",
                "a constant learning rate after the warm-up, and weights between the average and the newest ones",
                "optim.schedule=constant optim.beta1=0.9",
            )

    def _validate_decay(self) -> None:
        if self.schedule is LrSchedule.wsd:
            if self.max_tokens is None:
                check_decay(self)
            return
        for key, idle in (("decay_from", None), ("decay_shape", DecayShape.linear)):
            value = getattr(self, key)
            if value != idle:
                shown = value.name if isinstance(value, Enum) else f"{value:.10g}"
                raise ConfigError(
                    f"optim.{key}={shown} with optim.schedule={self.schedule.name}",
                    "a schedule with a decay of its own after a stable phase",
                    f"optim.schedule=wsd optim.{key}={shown}",
                )


MUON_OPTIONS: dict[str, Any] = {
    **{"momentum": 0.95, "nesterov": True, "ns_coefficients": [3.4445, -4.7750, 2.0315], "ns_steps": 5},
    "adjust_lr_fn": "match_rms_adamw",
}
"""Arguments of torch.optim.Muon -> their values in this project: torch's defaults, except for the last. With
``match_rms_adamw`` (arXiv 2502.16982, section 2.2) a matrix moves as far as with AdamW, so that one learning rate suits
both."""


def check_muon_options(options: dict[str, Any]) -> None:
    """Raise ConfigError unless ``options`` are arguments of torch.optim.Muon with values of the right type."""
    for key, value in options.items():
        usual = MUON_OPTIONS.get(key)
        suits = value in ("original", usual) if isinstance(value, str) else type(value) is type(usual)
        if not suits or (key == "momentum" and not 0 <= value < 1):
            near = (closest(key, MUON_OPTIONS) or ["momentum"])[0]
            raise ConfigError(
                f"optim.options={options} with optim.optimizer={MUON}",
                "momentum below 1, nesterov, three ns_coefficients, ns_steps, or adjust_lr_fn as original or "
                "match_rms_adamw",
                f"'optim.options={{{near}: {MUON_OPTIONS[near]}}}'",
            )


def muon_options(config: OptimConfig) -> dict[str, Any]:
    """Return the arguments of torch.optim.Muon: the defaults, replaced by those in ``optim.options``."""
    return MUON_OPTIONS | config.options


SCHEDULE = ("schedule", "decay_from", "decay_shape")
"""Keys of the learning rate that may change during a run, if all steps already done keep their learning rates."""
DECAY_FROM = 0.9
"""Default of ``decay_from``, as a share of all steps: MiniCPM decays in the last tenth (arXiv 2404.06395)."""
CURVES: dict[DecayShape, Callable[[float], float]] = {
    DecayShape.linear: lambda done: 1 - done,
    DecayShape.sqrt: lambda done: 1 - math.sqrt(done),
    DecayShape.cosine: lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
"""Shape of a decay -> function. Its argument is the share of the decay's steps that are done, 0 to 1. Its result is the
factor *s* of ``DecayShape``, 1 to 0."""


def decay_start(config: OptimConfig) -> int:
    """Return the last step before the decay of the learning rate. With ``wsd`` this is the end of the stable phase,
    with other schedules the last step of the warm-up. With ``constant`` no decay follows."""
    if config.schedule is not LrSchedule.wsd:
        return config.warmup_steps
    since = DECAY_FROM if config.decay_from is None else config.decay_from
    return round(since * config.max_steps if since < 1 else since)


def check_decay(config: OptimConfig) -> None:
    """Raise ConfigError unless the decay of ``wsd`` begins after the warm-up, and before the last step."""
    start, warmup, steps = decay_start(config), config.warmup_steps, config.max_steps
    if warmup <= start < steps:
        return
    typed = "null" if config.decay_from is None else f"{config.decay_from:.10g}"
    usual = max(warmup, round(DECAY_FROM * steps))
    raise ConfigError(
        f"optim.decay_from={typed}: a decay after step {start} in a run of {steps} steps, {warmup} of them warm-up",
        "a step after the warm-up and before the last one, or a share of all steps below 1",
        f"optim.decay_from={usual}" if usual < steps else f"optim.warmup_steps={steps // 10}",
    )


def lr_at(config: OptimConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, then ``config.schedule``.

    The rate depends only on the step and on the config, so a checkpoint needs no state of the schedule. An extended run
    uses the schedule of its new length, from its next step on.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = decay_start(config)
    done = (step - start) / max(1, config.max_steps - start)
    if done <= 0 or config.schedule is LrSchedule.constant:
        return config.lr
    shape = config.decay_shape if config.schedule is LrSchedule.wsd else DecayShape[config.schedule.name]
    return config.min_lr + (config.lr - config.min_lr) * CURVES[shape](min(1.0, done))


def describe_schedule(config: OptimConfig) -> str:
    """Return the schedule as text, such as ``cosine: 10 steps of warm-up to 0.002, down to 0.0002 at step 60``."""
    text = f"{config.schedule.name}: {config.warmup_steps} steps of warm-up to {config.lr:g}"
    if config.schedule is LrSchedule.constant:
        return text
    stable = ""
    if config.schedule is LrSchedule.wsd:
        stable = f"stable to step {decay_start(config)}, {config.decay_shape.name} "
    return f"{text}, {stable}down to {config.min_lr:g} at step {config.max_steps}"


def describe_extended_schedule(config: OptimConfig, before: OptimConfig) -> str:
    """Return text on an extended run: the learning rate of the last step before the extension, and the learning rate of
    the first additional step.

    ``before`` is the config of the run before the extension, and ``config`` the new config.
    """
    end = before.max_steps
    return (
        f"learning rate {lr_at(before, end):.3g} at step {end}, {lr_at(config, end + 1):.3g} at step {end + 1}: from "
        f"there on that of a run of {config.max_steps} steps (optim.schedule=constant from the beginning keeps it even)"
    )


# Divergence: reaction of a run to a non-finite loss, spikes and unequal replicas. The values are in
# ``configs/train.yaml``.


@dataclass
class DivergenceConfig:
    """Detection of divergence: skipped steps, spikes of the loss, and replicas with different parameters."""

    max_skipped_steps: int = 10
    """Number of consecutive steps with a non-finite loss or gradient, after which the run rolls back: it loads the
    newest checkpoint from before these steps, and continues without their batches."""
    spike_sigmas: Optional[float] = None
    """Roll back, and skip the batch, if the loss of a step exceeds the mean of the 100 previous steps by this many
    standard deviations. null never does."""
    replica_check_interval: int = 0
    """Steps between comparisons, bit by bit, of the parameters on ranks that have the same shards. If this is above 0,
    they are also compared before each save. 0 never compares."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range."""
        check_numbers("divergence.", self, ("max_skipped_steps",), ("replica_check_interval",))
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ConfigError(
                f"divergence.spike_sigmas={self.spike_sigmas}",
                "a number above 0, such as 6, or null for no look at spikes",
                "divergence.spike_sigmas=6",
            )


# Checkpoints: their intervals, writers and deletion.


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
"""Scheme of a URL, such as ``s3`` -> package that fsspec needs for this scheme."""
MINUTES = re.compile(r"(\d+(?:\.\d+)?) ?min")


@dataclass(frozen=True)
class Interval:
    """Interval of periodic checkpoints, in steps or in minutes. At most one field has a value; both are None for
    ``auto``."""

    steps: int | None = None
    """Steps between checkpoints; 0 makes no periodic checkpoints. None if the interval is not in steps."""
    minutes: float | None = None
    """Minutes between checkpoints; None if the interval is not in minutes."""

    def __str__(self) -> str:
        if self.steps is not None:
            return f"every {self.steps} steps" if self.steps else "at the end"
        return "as often as failures ask for" if self.minutes is None else f"every {self.minutes:g} minutes"


@dataclass
class CheckpointConfig:
    """Schedule of the checkpoints, and their deletion."""

    interval: Union[int, str] = MISSING
    """Steps between checkpoints; 0 saves only at the end and when the run is stopped. A text such as ``30min`` sets
    minutes. ``auto`` chooses the interval that loses the least time, from the duration of saves and the rate of
    failures (Young 1974)."""
    keep_last: Optional[int] = MISSING
    """Number of the newest checkpoints to keep; null keeps all."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation losses to keep, even if they are older than those of
    ``keep_last``. Only checkpoints of evaluated steps count."""
    asynchronous: bool = True
    """Copy the state to host memory, and write it to disk in a second process of each rank while training continues.
    false makes training wait for each checkpoint."""
    give_up_after_min: float = 60.0
    """Minutes for which a run continues while its checkpoints cannot be written, as on a full disk. 0 stops at the
    first failure."""
    scrub: bool = False
    """Read each checkpoint again in the background after it was written, and rename it if it is damaged. Older
    checkpoints are deleted only after a newer one was found undamaged."""
    memory_interval: int = 0
    """Steps between checkpoints in the memory of the nodes, such as 10; none is made while a save to disk is in flight.
    Each node keeps the state of its ranks, and of the ranks of a neighboring node. So after the death of ranks or of a
    node, the run can resume without the disk. Needs the launcher. 0 makes none."""

    copy_to: Optional[str] = None
    """URL for copies of the checkpoints, such as ``s3://BUCKET/FOLDER`` or ``file:///FOLDER``, which fsspec can write.
    Each checkpoint is copied there while training continues. A run that finds no undamaged checkpoint on its disk at
    its start fetches a copy. null makes no copies."""

    @property
    def in_memory(self) -> bool:
        """True if checkpoints are also kept in the memory of the nodes."""
        return self.memory_interval > 0

    def validate(self) -> None:
        """Raise ConfigError if a value is out of its range, ``copy_to`` is no URL, or keys contradict each other."""
        self.every()
        self._validate_copies()
        check_numbers("checkpoint.", self, ("keep_last",), ("keep_best", "memory_interval", "give_up_after_min"))
        beside = {
            "scrub": ("false", "reads while training continues"),
            "memory_interval": ("0", "sends the copy to the other nodes"),
        }
        for key, (off, does) in beside.items():
            value = getattr(self, key)
            if value and not self.asynchronous:
                raise ConfigError(
                    f"checkpoint.{key}={str(value).lower()} with checkpoint.asynchronous=false",
                    f"a process beside each rank, which {does}",
                    f"checkpoint.asynchronous=true, or checkpoint.{key}={off}",
                )

    def _validate_copies(self) -> None:
        if self.copy_to is None:
            return
        found = URL.fullmatch(self.copy_to)
        example = "checkpoint.copy_to=s3://BUCKET/FOLDER, or checkpoint.copy_to=file:///FOLDER"
        if found is None:
            raise ConfigError(f"checkpoint.copy_to={self.copy_to}", "a URL of a place elsewhere", example)
        if {*"@?#"} & {*found[2]}:  # the URL itself may contain a password, so the message does not show it
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
        """Return ``interval`` as steps, minutes or ``auto``.

        Raises:
            ConfigError: the value is no number of steps, no minutes and not ``auto``.
        """
        text = str(self.interval).strip()
        if text == AUTO:
            return Interval()
        if re.fullmatch(r"-?\d+", text):
            require_range("checkpoint.interval", int(text), 0, float("inf"))
            return Interval(steps=int(text))
        found = MINUTES.fullmatch(text)
        if found is None or not float(found[1]):
            raise ConfigError(
                f"checkpoint.interval={text}",
                "a number of steps, a number of minutes, or auto",
                "checkpoint.interval=200, checkpoint.interval=30min or checkpoint.interval=auto",
            )
        return Interval(minutes=float(found[1]))
