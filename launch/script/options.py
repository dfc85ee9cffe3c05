"""Keys that ``workload=script`` adds to the config: a program, how it is called, and what it can do. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from launch.agent.progress import check_pattern
from launch.errors import ConfigError
from launch.runs.identity import RunConfig
from launch.runs.ranges import closest, require_positive, require_range
from launch.script.arguments import Style, check_options, split_args

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

STOP_SIGNALS = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGUSR1")
"""Signals that a program can catch, and that mean nothing else to torch's launcher or to Slurm."""


class Unit(Enum):
    """Unit of throughput."""

    tokens = "tokens"
    samples = "samples"
    images = "images"


@dataclass
class ScriptOptions:
    """A program, how it is called, and what it can do. One of path, module and command."""

    path: Optional[str] = None
    """File that Python runs."""
    module: Optional[str] = None
    """Module that Python runs, as with ``python -m``."""
    command: Optional[list[str]] = None
    """Program and arguments that are run as they are; for what is not Python."""
    args: Any = None
    """Arguments: a string as a shell would split it, or a list."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments by name, which can be swept; null leaves one out, an empty string writes its name alone."""
    style: Style = Style.argparse
    python: Optional[str] = None
    """Interpreter for path and module; null is the one that runs the launcher."""
    workdir: Optional[str] = None
    """Working directory of the ranks; null is where the command was typed."""
    env: dict[str, Optional[str]] = field(default_factory=dict)
    """Variables of the environment that are set for the ranks, or with null taken away, RANK and the like included."""
    resumes: bool = False
    """A new start goes on from the script's own checkpoint, so it may be restarted and requeued."""
    elastic: bool = False
    """A new start may have fewer ranks than the one before, or more: WORLD_SIZE tells, the script does the rest."""
    resume_args: Any = None
    """Arguments that are appended from the second attempt on."""
    stop_signal: str = "SIGTERM"
    """Sent to every rank ahead of the time limit, at preemption and by launch.cancel: save, and leave."""
    requeue_exit: Optional[int] = 75
    """Exit status that means: saved, put me back into the queue (EX_TEMPFAIL of sysexits.h)."""
    silence_timeout_s: Optional[float] = None
    """Seconds without a line in the log of a rank after which it counts as hung; null: never."""
    progress: Optional[str] = None
    """Regular expression that finds step records in what a rank prints, by its named groups: step, and any of loss, lr,
    grad_norm, step_time_s, step_time_ms, tokens, samples, tokens_per_s."""
    work_per_step: Optional[float] = None
    """Units of work of one step, of all ranks together; with weak_scaling of one rank."""
    unit: Unit = Unit.samples
    weak_scaling: bool = False
    """The work of a step grows with the number of ranks."""
    max_steps: Optional[int] = None
    """Steps of the whole run, for the time that is left."""
    tensorboard: bool = True
    """Write curves of rank 0's step records for TensorBoard."""

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work, without a look at any file."""
        given = [key for key in ("path", "module", "command") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"script.{key}" for key in given) or "workload=script without a program"
            fix = f"the same without script.{given[-1]}" if given else "script.path=train.py"
            raise ConfigError(found, "one of script.path, script.module and script.command", fix)
        if self.command is not None and not self.command:
            raise ConfigError("script.command=[]", "a program and its arguments", "'script.command=[./train,--fast]'")
        split_args("script.args", self.args)
        split_args("script.resume_args", self.resume_args)
        check_options(self.options, self.style)
        if self.stop_signal not in STOP_SIGNALS:
            uncatchable = ", which cannot be caught" if self.stop_signal in ("SIGKILL", "SIGSTOP") else ""
            likely = [] if uncatchable else closest(self.stop_signal, STOP_SIGNALS)
            raise ConfigError(
                f"script.stop_signal={self.stop_signal}{uncatchable}",
                f"one of {', '.join(STOP_SIGNALS)}",
                f"script.stop_signal={(likely or STOP_SIGNALS)[0]}",
            )
        if self.requeue_exit is not None:
            require_range("script.requeue_exit", self.requeue_exit, 1, 255)
        for key in ("silence_timeout_s", "work_per_step", "max_steps"):
            if getattr(self, key) is not None:
                require_positive(f"script.{key}", getattr(self, key))
        if self.progress is not None:
            check_pattern(self.progress)
        for key in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", key):
                expected = "the name of a variable of the environment"
                raise ConfigError(f"script.env.{key}", expected, "script.env.NAME=VALUE")
        if self.elastic and not self.resumes:
            raise ConfigError(
                "script.elastic=true without script.resumes=true",
                "a script that goes on from its own checkpoint: with another number of ranks it starts anew",
                "script.resumes=true script.elastic=true, or script.elastic=false",
            )
        if self.resume_args is not None and not self.resumes:
            raise ConfigError(
                "script.resume_args without script.resumes=true",
                "arguments for a new start of a script that goes on from its own checkpoint",
                "script.resumes=true, or no script.resume_args",
            )


@dataclass
class ScriptConfig(RunConfig):
    """The keys that ``workload=script`` adds at the root."""

    script: ScriptOptions = field(default_factory=ScriptOptions)

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work."""
        super().validate()
        self.script.validate()
