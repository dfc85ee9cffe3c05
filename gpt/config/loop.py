"""The schema of what happens beside the steps: evaluation, checkpoints, views of the records. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from gpt.config.checks import require_positive, require_range


@dataclass
class EvalConfig:
    """Validation during training."""

    interval: int = MISSING
    """Steps between evaluations; 0 evaluates at the end only."""
    sequences: int = MISSING
    """Sequences of the validation split per evaluation, the same ones every time."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("eval.interval", self.interval, 0, float("inf"))
        require_positive("eval.sequences", self.sequences)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval: int = MISSING
    """Steps between checkpoints; 0 saves at the end and when interrupted only."""
    keep_last: int = MISSING
    """How many of the newest are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for good."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("checkpoint.interval", self.interval, 0, float("inf"))
        require_positive("checkpoint.keep_last", self.keep_last)
        require_range("checkpoint.keep_every", self.keep_every, 0, float("inf"))


@dataclass
class LoggingConfig:
    """Views of the step records. The records themselves are always written."""

    tensorboard: bool = True
    """Write event files for TensorBoard (rank 0)."""
    console_interval_s: float = 5.0
    """Seconds between the plain lines that rank 0 prints."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("logging.console_interval_s", self.console_interval_s, 0, float("inf"))
