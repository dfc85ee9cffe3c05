"""The schema of what happens beside the steps: evaluation, checkpoints, views of the records. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from omegaconf import MISSING

from gpt.config.checks import require_positive, require_range
from launch.errors import ConfigError


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
    csv: bool = True
    """Write ``steps.csv``: rank 0's records, one row a step."""
    json: bool = True
    """Write ``run.json``: the whole run in one file, made anew at the start, at evaluations and at the end."""
    wandb: bool = False
    """Send rank 0's records to Weights & Biases; needs the extra ``wandb``, and obeys WANDB_MODE=offline."""
    wandb_project: str = "gpt"
    """Project in Weights & Biases."""
    console_interval_s: float = 5.0
    """Seconds between the lines that rank 0 prints into a log; on a terminal one line is kept up to date."""
    gradients_interval: int = 10
    """Steps between records of the gradients' mean, standard deviation and norm by layer; 0 records none."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range, or an extra is missing that is asked for."""
        require_range("logging.console_interval_s", self.console_interval_s, 0, float("inf"))
        require_range("logging.gradients_interval", self.gradients_interval, 0, float("inf"))
        if self.wandb and not is_installed("wandb"):
            raise ConfigError(
                "logging.wandb=true, and the package wandb is not installed",
                "the extra of that name",
                "pip install '.[wandb]', or logging.wandb=false",
            )


def is_installed(package: str) -> bool:
    """Whether a distribution is there; a folder of its name, such as wandb leaves behind, is none."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
