"""The workload for any program that torchrun could start: a script, a module, or a command.

Owns the keys under ``script``, the refusal of what cannot start, and the command of a rank. What the launcher does not
know of a script, such as its memory, is absent from the plan. Torch-free.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from launch.agent.progress import check_pattern
from launch.errors import ConfigError
from launch.runs.compose import make_absolute
from launch.runs.damage import read_plan
from launch.runs.folder import RunFolder
from launch.runs.identity import RunConfig
from launch.runs.provenance import ORIGIN, git
from launch.runs.ranges import closest, require_positive, require_range
from launch.workload import CodeTree, PlanRequest, RankCommand, RankContract, WorkloadPlan

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

STOP_SIGNALS = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGUSR1")
"""Signals that a program can catch, and that mean nothing else to torch's launcher or to Slurm."""
VALUES = ("nodes", "ranks_per_node", "world_size", "run_dir", "checkpoint_dir", "attempt", "name")
"""Names that ``${...}`` in arguments may stand for."""
PLACEHOLDER = re.compile(r"%\{(\w+)\}")
CODE_SUFFIXES = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".sh", ".txt", ".md", ".ini")
HIDDEN = ("__pycache__", "outputs", "node_modules", "wandb")
MAX_FILES = 5000
"""A folder with more files than this, and no git, is not the folder of a program: only the script itself counts."""


class Style(Enum):
    """Spelling of ``script.options``: ``--key=value`` for argparse and the like, or ``key=value`` for Hydra."""

    argparse = "argparse"
    hydra = "hydra"


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
            raise ConfigError(found, "one of script.path, script.module and script.command", "script.path=train.py")
        if self.command is not None and not self.command:
            raise ConfigError("script.command=[]", "a program and its arguments", "'script.command=[./train,--fast]'")
        split_args("script.args", self.args)
        split_args("script.resume_args", self.resume_args)
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


def split_args(key: str, args: Any) -> list[str]:
    """Arguments as a list, from a string as a shell would split it or from a list.

    Raises:
        ConfigError: a quote is not closed, or it is neither.
    """
    if args is None:
        return []
    if isinstance(args, list):
        return [str(arg) for arg in args]
    if isinstance(args, dict):
        raise ConfigError(f"{key}={args}", "a string as a shell would split it, or a list", f"{key}='\"--lr 3e-4\"'")
    try:
        return shlex.split(str(args))
    except ValueError as error:
        raise ConfigError(
            f"{key}={args}: {str(error)[:1].lower()}{str(error)[1:]}",
            "arguments as a shell would split them, every quote closed",
            f"{key}='\"--lr 3e-4\"'",
        ) from error


def written_options(options: Mapping[str, Any], style: Style) -> Iterator[str]:
    """Arguments by name as the program reads them."""
    for key, value in options.items():
        if value is None:
            continue
        dashes = "--" if style is Style.argparse else ""
        if value == "":
            yield f"{dashes}{key}"
            continue
        if isinstance(value, list):
            joined = ",".join(map(str, value))
            text = joined if style is Style.argparse else f"[{joined}]"
        else:
            text = str(value)
        yield f"{dashes}{key}={text}"


def script_name(path: str | None, module: str | None, command: Sequence[str] | None) -> str:
    """Name of a run by its program, where none was typed."""
    if path:
        return Path(path).stem
    if module:
        return module.removesuffix(".__main__").rpartition(".")[2]
    return Path(command[0]).stem if command else "script"


class ScriptWorkload:
    """A user's own program, whatever it is; see docs/scripts.md."""

    name = "script"
    schema = ScriptConfig
    raw_keys = ("script.progress",)
    not_in_point = tuple(
        f"script.{key}"
        for key in (
            *("path", "module", "python", "workdir", "env", "resumes", "resume_args", "stop_signal", "requeue_exit"),
            *("silence_timeout_s", "progress", "work_per_step", "unit", "max_steps", "tensorboard"),
        )
    )
    resumable = tuple(key for key in not_in_point if key not in ("script.path", "script.module"))

    def __init__(self) -> None:
        OmegaConf.register_new_resolver("script_name", script_name, replace=True)

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Take paths relative to where the command was typed, and keep ``${run_dir}`` and the like for the ranks."""
        for key in ("args", "resume_args", "options", "env", "command"):
            raw = OmegaConf.to_container(document, resolve=False)
            assert isinstance(raw, dict)
            value = raw["script"].get(key)
            if value is not None:
                document.script[key] = keep_values(value)
        make_absolute([(document, "output_dir"), (document, "run_dir"), (document.script, "path")])
        if document.script.workdir is None:
            document.script.workdir = "."
        make_absolute([(document.script, "workdir")])

    def plan(self, config: ScriptConfig, request: PlanRequest) -> WorkloadPlan:
        """Check that the program is there, and tell what is known of it before it runs.

        Raises:
            ConfigError: it cannot be started.
        """
        script = config.script
        require_program(script)
        work = total_work(script, request.world_size)
        command = shlex.join(self._args(config, attempt=1))
        again = (
            "a new start goes on from the script's own checkpoint"
            if script.resumes
            else "none: an interrupted script is not started again (script.resumes=true where it has checkpoints)"
        )
        rows = {"workload": "script", "command": PLACEHOLDER.sub(r"${\1}", command), "restarts": again}
        if work is not None:
            rows["work"] = f"{work:,.12g} {script.unit.name} a step"
        if script.max_steps is not None:
            rows["steps"] = f"{script.max_steps:,}"
        facts = {"command": self._args(config, attempt=1), "unit": script.unit.name, "work_per_step": work}
        return WorkloadPlan(
            rows=rows,
            facts={key: value for key, value in facts.items() if value is not None},
            max_steps=script.max_steps,
            checkpoint_kind=command,
            step_kind=command,
            resumes=script.resumes,
        )

    def command(self, config: ScriptConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """The program, from the copy of the code where the run has one."""
        script, copied = config.script, read_plan(folder).get("code")
        root = self.code(config).root
        values = {
            "nodes": getattr(config, "nodes", ""),
            "ranks_per_node": getattr(config, "ranks_on_node", ""),
            "world_size": getattr(config, "world_size", ""),
            "run_dir": folder.path,
            "checkpoint_dir": folder.checkpoints,
            "attempt": attempt,
            "name": config.name,
        }

        def fill(text: str) -> str:
            return PLACEHOLDER.sub(lambda found: str(values.get(found.group(1), found.group(0))), text)

        def place(path: str) -> str:
            if copied is None or not Path(path).is_relative_to(root):
                return path
            return str(Path(copied) / Path(path).relative_to(root))

        env = {key: fill(value) for key, value in script.env.items() if value is not None}
        if copied is not None:
            env.setdefault("PYTHONPATH", os.pathsep.join(filter(None, (copied, os.environ.get("PYTHONPATH")))))
        args = self._args(config, attempt, place(script.path) if script.path else None)
        hidden = [word for key, value in script.env.items() if value is None for word in ("-u", key)]
        if hidden:  # by env(1): torch elastic sets RANK and the like last
            args = ["env", *hidden, *args]
        assert script.workdir is not None
        return RankCommand(tuple(map(fill, args)), env=env, workdir=Path(place(script.workdir)))

    def contract(self, config: ScriptConfig, world_size: int) -> RankContract:
        """Return the behavior of ranks that need not know of their agent."""
        script = config.script
        return RankContract(
            records_events=False,
            stop_signal=script.stop_signal,
            requeue_exit=script.requeue_exit,
            resumes=script.resumes,
            silence_timeout_s=script.silence_timeout_s,
            progress=script.progress,
            unit=script.unit.name,
            work_per_step=total_work(script, world_size),
            weak_scaling=script.weak_scaling,
            max_steps=script.max_steps,
            writes_curves=script.tensorboard,
        )

    def code(self, config: ScriptConfig) -> CodeTree:
        """The repository that the program lies in, or its folder."""
        script = config.script
        start = Path(script.path).parent if script.path is not None else Path(script.workdir or ".")
        found = git(start, "rev-parse", "--show-toplevel")
        root = Path(found.decode().strip()) if found else start
        return CodeTree(root, partial(code_files, script.path), has_launcher=False)

    def _args(self, config: ScriptConfig, attempt: int, path: str | None = None) -> list[str]:
        script = config.script
        python = script.python or sys.executable
        if script.command is not None:
            program = list(script.command)
        elif script.module is not None:
            program = [python, "-m", script.module]
        else:
            program = [python, path or str(script.path)]
        args = [*program, *split_args("script.args", script.args), *written_options(script.options, script.style)]
        return args + (split_args("script.resume_args", script.resume_args) if attempt > 1 else [])


def keep_values(value: Any) -> Any:
    """Arguments in which ``${run_dir}`` and the like, known only when a rank starts, wait for it as ``%{run_dir}``."""
    if isinstance(value, str):
        return re.sub(r"\$\{(" + "|".join(VALUES) + r")\}", r"%{\1}", value)
    if isinstance(value, list):
        return [keep_values(item) for item in value]
    if isinstance(value, dict):
        return {key: keep_values(item) for key, item in value.items()}
    return value


def total_work(script: ScriptOptions, world_size: int) -> float | None:
    """Units of work of one step, of all ranks together."""
    if script.work_per_step is None:
        return None
    return script.work_per_step * (world_size if script.weak_scaling else 1)


def require_program(script: ScriptOptions) -> None:
    """Raise ConfigError where the program is not there, as far as this machine can tell."""
    if script.workdir is not None and not Path(script.workdir).is_dir():
        raise ConfigError(f"script.workdir={script.workdir}, which is no folder", "a folder", "script.workdir=PATH")
    if script.python is not None and shutil.which(script.python) is None:
        raise ConfigError(
            f"script.python={script.python}, which cannot be run", "an interpreter", f"script.python={sys.executable}"
        )
    if script.path is not None and not Path(script.path).is_file():
        folder = Path(script.path).parent
        there = [path.name for path in folder.glob("*.py")] if folder.is_dir() else []
        likely = closest(Path(script.path).name, there) or sorted(there)[:3]
        raise ConfigError(
            f"script.path={script.path}, which is no file",
            f"a script{', such as ' + ', '.join(likely) if likely else ''}",
            f"script.path={folder / likely[0] if likely else 'train.py'}",
        )
    if script.module is not None and script.python is None:
        top, workdir = script.module.partition(".")[0], Path(script.workdir or ".")
        inside = (workdir / top).is_dir() or (workdir / f"{top}.py").is_file()
        if not inside and importlib.util.find_spec(top) is None:
            raise ConfigError(
                f"script.module={script.module}, and there is no {top} in {workdir} nor among the installed packages",
                "a module that python -m finds from script.workdir",
                "script.workdir=PATH of the folder it lies in, or script.path=FILE",
            )
    if script.command is not None:
        program = str(script.command[0])
        found = shutil.which(program, path=os.pathsep.join([str(script.workdir), os.environ.get("PATH", "")]))
        local = Path(script.workdir or ".") / program
        if found is None and not os.access(local, os.X_OK):
            raise ConfigError(
                f"script.command={shlex.join(map(str, script.command))}, and no program {program}",
                "a program on the PATH, or in script.workdir",
                "'script.command=[./train,--fast]'",
            )


def code_files(script: str | None, root: Path) -> Iterator[tuple[str, Path]]:
    """The files of a program's folder that make it what it is: what git tracks, and code that it does not ignore.

    In a copy, which has no git, these are all files.
    """
    if (root / ORIGIN).is_file():
        # A program that runs from it leaves compiled files there.
        paths = (path for path in root.rglob("*") if path.name != ORIGIN and "__pycache__" not in path.parts)
        names = [str(path.relative_to(root)) for path in paths]
    else:
        names = git_names(root) or folder_names(root) or ([Path(script).name] if script else [])
    for name in sorted(set(names)):
        if (root / name).is_file():
            yield name, root / name


def git_names(root: Path) -> list[str]:
    """Files of a checkout: those that git tracks, and code that it neither tracks nor ignores."""
    tracked = git(root, "ls-files", "-z")
    others = git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if not tracked and not others:
        return []
    new = [name for name in (others or b"").decode().split("\0") if name.endswith(CODE_SUFFIXES)]
    return [name for name in [*(tracked or b"").decode().split("\0"), *new] if name]


def folder_names(root: Path) -> list[str]:
    """Code below a folder that is no checkout; nothing where it holds too many files to be one program."""
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in HIDDEN]
        found += [str((Path(folder) / name).relative_to(root)) for name in files if name.endswith(CODE_SUFFIXES)]
        if len(found) > MAX_FILES:
            return []
    return found
