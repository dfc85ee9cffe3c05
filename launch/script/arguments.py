"""Keys that ``workload=script`` adds to the config, and the arguments of the program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from launch.errors import ConfigError, closest
from launch.runs.compose import RunConfig
from launch.runs.overrides import RANK_VALUES, quoted
from launch.runs.progress import check_pattern
from launch.schema import check_ranges, key

# Arguments of a script: as a user types them, as the config stores them, and as the program receives them. Does not
# import torch.


PLACEHOLDER = re.compile(r"%\{(\w+)\}")
REFERENCE = re.compile(r"(?<!\\)\$\{(\w+)\}")


class Style(Enum):
    """Spelling of ``script.options``: ``--key=value`` for parsers such as argparse, or ``key=value`` for Hydra."""

    argparse = "argparse"
    hydra = "hydra"


def split_args(key: str, args: Any) -> list[str]:
    """Return arguments as a list, from a list or from a string that is split as in a shell.

    Raises:
        ConfigError: a quote is not closed, or the value is neither a list nor a string.
    """
    if isinstance(args, list):
        return [str(arg) for arg in args]
    try:
        if isinstance(args, dict):
            raise ValueError("names with values belong to script.options")
        return [] if args is None else shlex.split(str(args))
    except ValueError as error:
        expected = "a list, or one text that a shell would split, every quote closed"
        raise ConfigError(f"{key}={args}: {error}", expected, f"{key}='\"--lr 3e-4\"'") from error


HYDRA_SYNTAX = frozenset("=,()[]{}'\"")
"""Characters that Hydra's override grammar reads as syntax in unquoted text."""


def hydra_text(value: Any) -> str:
    """Return a value as text for an element of a list in Hydra's grammar, with quotes if it needs them."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_text(inner)}' for key, inner in value.items())}}}"
    if value is None:
        return "null"
    return quoted(value) if isinstance(value, str) else str(value)


def written_options(options: Mapping[str, Any], style: Style, prefix: str = "") -> Iterator[str]:
    """Yield the options as arguments of the program. Nested mappings become dotted names.

    None leaves an option out, and an empty string yields only its name. ``prefix`` comes before each name.
    """
    for name, value in options.items():
        key = f"{prefix}{name}"
        if value is None:
            continue
        if isinstance(value, Mapping):
            yield from written_options(value, style, f"{key}.")
            continue
        dashes = "--" if style is Style.argparse else ""
        if value == "":
            yield f"{dashes}{key}"
            continue
        if isinstance(value, list):
            text = ",".join(map(str, value)) if style is Style.argparse else hydra_text(value)
        elif style is Style.hydra and isinstance(value, str) and HYDRA_SYNTAX & {*value}:
            text = quoted(value)  # For example, a run folder has a = in its name.
        else:
            text = str(value)
        yield f"{dashes}{key}={text}"


def require_known(key: str, value: Any, keys: Collection[str]) -> None:
    """Raise ConfigError if ``value`` has a ``${NAME}`` that is neither in ``RANK_VALUES`` nor in ``keys``.

    Args:
        key: key of ``value``, for the message.
        value: arguments: a text, or a list or mapping of texts.
        keys: names of the config's keys at its root.
    """
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        require_known(key, item, keys)
    for name in REFERENCE.findall(value) if isinstance(value, str) else ():
        if name not in RANK_VALUES and name not in keys:
            meant = (closest(name.lower(), RANK_VALUES) or RANK_VALUES)[0]
            raise ConfigError(
                f"${{{name}}} in {key}",
                f"one of {', '.join(f'${{{known}}}' for known in RANK_VALUES)}",
                f"${{{meant}}} in its place, or \\${{{name}}} for these signs themselves",
            )


def keep_values(value: Any) -> Any:
    """Return ``value`` with ``${NAME}`` of ``RANK_VALUES`` as ``%{NAME}``, which ``fill`` replaces when ranks start."""
    if isinstance(value, str):
        return re.sub(r"(?<!\\)\$\{(" + "|".join(RANK_VALUES) + r")\}", r"%{\1}", value)
    if isinstance(value, list):
        return [keep_values(item) for item in value]
    if isinstance(value, dict):
        return {key: keep_values(item) for key, item in value.items()}
    return value


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Return an argument with each ``%{NAME}`` replaced by ``values[NAME]``. Unknown names are not replaced."""
    return PLACEHOLDER.sub(lambda found: str(values.get(found.group(1), found.group(0))), text)


# Keys that ``workload=script`` adds to the config: a program, its arguments, and its abilities. Does not import torch.


# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

STOP_SIGNALS = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGUSR1")
"""Signals that a program can catch, and that torch's launcher and Slurm do not use otherwise."""


class Unit(Enum):
    """Unit of throughput."""

    tokens = "tokens"
    samples = "samples"
    images = "images"


@dataclass
class ScriptOptions:
    """A program, its arguments, and how it resumes and stops. Exactly one of path, module and command is set."""

    path: Optional[str] = key(None, "Script that Python runs.")
    module: Optional[str] = key(None, "Module that Python runs, as with python -m.")
    command: Optional[list[str]] = key(None, "Program and its arguments, for programs that are not Python.")
    args: Any = key(None, "Arguments: a string that is split as in a shell, or a list.")
    options: dict[str, Any] = key(
        dict, "Arguments by name, which can be swept; null leaves one out, an empty string writes its name alone."
    )
    style: Style = key(Style.argparse, "Spelling of the options: --NAME=VALUE (argparse) or NAME=VALUE (hydra).")
    python: Optional[str] = key(None, "Interpreter for path and module; null: the one that runs the launcher.")
    workdir: Optional[str] = key(None, "Working directory of the ranks; null: the folder of the command.")
    env: dict[str, Optional[str]] = key(
        dict, "Environment variables of the ranks by name; null removes one, also RANK and the like."
    )
    resumes: bool = key(
        False, "The script resumes from a checkpoint of its own, so that it may be restarted and requeued."
    )
    elastic: bool = key(False, "The script can resume with another number of ranks; it reads WORLD_SIZE.")
    resume_args: Any = key(None, "Further arguments from the second attempt on.")
    stop_signal: str = key(
        "SIGTERM",
        "Signal to every rank before the time limit, at preemption and by launch.cancel: the script saves and leaves.",
    )
    silence_timeout_s: Optional[float] = key(
        None,
        "Time without a new line in the log of a rank after which it counts as hung; null: never.",
        unit="s",
        above=0,
    )
    progress: Optional[str] = key(
        None,
        "Regular expression that finds step records in the output of a rank by named groups: step, and any of loss, lr,"
        " grad_norm, step_time_s, step_time_ms, tokens, samples, tokens_per_s.",
    )
    work_per_step: Optional[float] = key(
        None, "Units of work of one step, of all ranks together; with weak_scaling of one rank.", above=0
    )
    unit: Unit = key(Unit.samples, "Unit of work.")
    weak_scaling: bool = key(False, "The work of a step grows with the number of ranks.")
    max_steps: Optional[int] = key(None, "Steps of the whole run, from which the remaining time follows.", above=0)

    def validate(self) -> None:
        """Raise ConfigError for the first invalid value, without reading any file."""
        check_ranges(self, "script.")
        given = [name for name in ("path", "module", "command") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"script.{name}" for name in given) or "workload=script without a program"
            fix = f"the same without script.{given[-1]}" if given else "script.path=train.py"
            raise ConfigError(found, "one of script.path, script.module and script.command", fix)
        if self.command is not None and not self.command:
            raise ConfigError("script.command=[]", "a program and its arguments", "'script.command=[./train,--fast]'")
        split_args("script.args", self.args)
        split_args("script.resume_args", self.resume_args)
        if self.stop_signal not in STOP_SIGNALS:
            likely = (closest(self.stop_signal, STOP_SIGNALS) or STOP_SIGNALS)[0]
            expected = f"one of {', '.join(STOP_SIGNALS)}, which a program can catch"
            raise ConfigError(f"script.stop_signal={self.stop_signal}", expected, f"script.stop_signal={likely}")
        if self.progress is not None:
            check_pattern(self.progress)
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                expected = "the name of a variable of the environment"
                raise ConfigError(f"script.env.{name}", expected, "script.env.NAME=VALUE")
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

    script: ScriptOptions = key(ScriptOptions, "The program.")

    def validate(self) -> None:
        """Raise ConfigError for the first invalid value."""
        super().validate()
        self.script.validate()


@dataclass
class CallOptions:
    """The call that every rank makes."""

    file: Optional[str] = key(None, "File of the pickled function and its arguments, which launch.submit writes.")
    args: dict[str, Any] = key(dict, "Arguments of the function, for the name of the run folder and for reports.")


@dataclass
class FunctionConfig(ScriptConfig):
    """The keys that ``workload=function`` adds at the root."""

    call: CallOptions = key(CallOptions, "The function and its arguments.")

    def validate(self) -> None:
        """Raise ConfigError for the first invalid value, or if no function was given."""
        if self.call.file is None:
            raise ConfigError(
                "workload=function without a function",
                "a Python function, as the first argument of launch.submit or launch.sweep",
                "python -c 'import launch; launch.submit(FUNCTION, nodes=2)'",
            )
        super().validate()
