"""Keys of the checkpoints of a run: when they are saved, by whom, and which are kept. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Union

from omegaconf import MISSING

from launch.errors import ConfigError, require_positive, require_range

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
