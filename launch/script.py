"""The workloads for any program that torchrun could start (a script, a module, a command), and for a function."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from launch.errors import ConfigError, check_ranges, closest, key
from launch.runs.compose import RunConfig, make_absolute
from launch.runs.environment import git
from launch.runs.folder import RunFolder, read_plan
from launch.runs.overrides import RANK_VALUES, in_shell, quoted
from launch.runs.progress import check_pattern
from launch.worker.call import REQUEUE_EXIT
from launch.workload import (
    PLACEHOLDER,
    CodeTree,
    PlanRequest,
    RankCommand,
    RankContract,
    Workload,
    WorkloadPlan,
    code_files,
    fill,
    possible_sizes,
)

# Arguments of a script: as a user types them, as the config stores them, and as the program receives them. Does not
# import torch.


IN_RUN = "%{run_dir}"
"""Beginning of a path inside the run folder. The path of the run folder is known only when ranks start."""
REFERENCE = re.compile(r"(?<!\\)\$\{(\w+)\}")


class Style(Enum):
    """Spelling of ``script.options``: ``--key=value`` for parsers such as argparse, or ``key=value`` for Hydra."""

    argparse = "argparse"
    hydra = "hydra"


def split_args(key: str, args: Any) -> list[str]:
    """Return ``args`` as a list of arguments. A string is split as in a shell. ``key`` is named in errors.

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
"""Characters with a meaning in Hydra's grammar of overrides, outside of quotes."""


def hydra_text(value: Any) -> str:
    """Return a value as text in Hydra's grammar of overrides, in quotes if it needs them."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_text(inner)}' for key, inner in value.items())}}}"
    if value is None:
        return "null"
    return quoted(value) if isinstance(value, str) else str(value)


def written_options(options: Mapping[str, Any], style: Style, prefix: str = "") -> Iterator[str]:
    """Yield options as arguments of the program. Nested mappings become dotted names.

    An option with the value None is left out. For an option with an empty string, only the name of the option is
    yielded. ``style`` sets whether the names begin with ``--``; ``prefix`` comes before each name.
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
    """Raise ConfigError if ``value`` contains ``${NAME}`` with a NAME that is neither in ``RANK_VALUES`` nor in
    ``keys``.

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
    """Return ``value`` with each ``${NAME}`` whose NAME is in ``RANK_VALUES`` written as ``%{NAME}``.

    ``fill`` replaces ``%{NAME}`` by its value when ranks start.
    """
    if isinstance(value, str):
        return re.sub(r"(?<!\\)\$\{(" + "|".join(RANK_VALUES) + r")\}", r"%{\1}", value)
    if isinstance(value, list):
        return [keep_values(item) for item in value]
    if isinstance(value, dict):
        return {key: keep_values(item) for key, item in value.items()}
    return value


# Keys that ``workload=script`` adds to the config: a program, its arguments, and its abilities. Does not import torch.


# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class StopSignal(Enum):
    """Signal that requests the program to save and leave: one that torch's launcher and Slurm do not use otherwise."""

    SIGTERM = "SIGTERM"
    SIGUSR2 = "SIGUSR2"
    SIGINT = "SIGINT"
    SIGUSR1 = "SIGUSR1"


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
    workdir: Optional[str] = key(
        None, "Working directory of the ranks, created if it is within ${run_dir}; null: the folder of the command."
    )
    env: dict[str, Optional[str]] = key(
        dict, "Environment variables of the ranks by name; null removes one, also RANK and the like."
    )
    resumes: bool = key(
        False, "The script resumes from a checkpoint of its own, so that it may be restarted and requeued."
    )
    elastic: bool = key(False, "The script can resume with another number of ranks; it reads WORLD_SIZE.")
    resume_args: Any = key(None, "Further arguments from the second attempt on.")
    checkpoint: Optional[str] = key(
        None, "Pattern of the paths of its complete checkpoints; without such a path a restart has no resume_args."
    )
    stop_signal: StopSignal = key(
        StopSignal.SIGTERM,
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
        "Regular expression that finds step records in the output of a rank by named groups: step, and any of epoch,"
        " epoch_from_1, steps_per_epoch, loss, perplexity, lr, grad_norm, step_time_s, step_time_ms, tokens, samples,"
        " tokens_per_s.",
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
        if self.progress is not None:
            check_pattern(self.progress)
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                expected = "the name of a variable of the environment"
                raise ConfigError(f"script.env.{name}", expected, "script.env.NAME=VALUE")
        if self.elastic and not self.resumes:
            raise ConfigError(
                "script.elastic=true without script.resumes=true",
                "a script that continues from its own checkpoint; without one it begins again",
                "script.resumes=true script.elastic=true, or script.elastic=false",
            )
        if "%{newest" in str(self.resume_args) and self.checkpoint is None:
            raise ConfigError(
                "${newest} without script.checkpoint",
                "a pattern of the paths of complete checkpoints, of which ${newest} is the newest",
                "'script.checkpoint=${checkpoint_dir}/step*.pt'",
            )
        if "%{newest_step}" in str(self.resume_args) and str(self.checkpoint).count("*") != 1:
            pattern = PLACEHOLDER.sub(r"${\1}", str(self.checkpoint))
            raise ConfigError(
                f"${{newest_step}} with script.checkpoint={pattern}",
                "a pattern with one *, for which ${newest_step} is the text in the newest path",
                "'script.checkpoint=${checkpoint_dir}/step*.pt'",
            )
        if self.resume_args is not None and not self.resumes:
            raise ConfigError(
                "script.resume_args without script.resumes=true",
                "arguments for a new start of a script that continues from its own checkpoint",
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
    """The keys under ``call``: the function call that every rank makes."""

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


# Refusal of a module that ``python -m`` would not run, without an import of the module. Does not import torch.


OWN_IMPORTS = re.compile(r"__path__|declare_namespace|meta_path|path_hooks|sys\.modules")
"""Pattern of code with which a package changes how its modules are found."""
EXPECTED = "a module that python -m finds from script.workdir, or a package with a __main__.py"


def require_module(module: str, workdir: Path, pythonpath: Sequence[str] = (), *, elsewhere: bool = False) -> None:
    """Raise ConfigError if ``python -m`` would not find or run ``module``. The module is not imported.

    Args:
        module: dotted name.
        workdir: working directory, which is searched first.
        pythonpath: folders that are searched next, before the folders of this Python.
        elsewhere: True if ranks may have search paths or packages that this machine does not know. A package that is
            not found here is then accepted.
    """
    importlib.invalidate_caches()  # A folder that was searched before may have new files.
    typed, package = f"script.module={module}", ""
    locations = [str(workdir), *(str(workdir / folder) for folder in pythonpath), *sys.path]
    for part in [*module.split("."), "__main__"]:
        name = f"{package}.{part}" if package else part
        spec = PathFinder.find_spec(name, locations) if part else None
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            if name not in (module, f"{module}.__main__"):
                raise ConfigError(f"{typed}, and {name} is a module, not a package", EXPECTED, f"script.module={name}")
            return
        source = spec.loader.get_source(name) if spec.loader else ""  # type: ignore[attr-defined]
        if source is None or OWN_IMPORTS.search(source):  # The package may find modules outside its folders.
            return
        package, locations = name, list(spec.submodule_search_locations)
    if package:
        modules = [entry.name for entry in pkgutil.iter_modules(locations) if not entry.ispkg or part != "__main__"]
        likely = next(iter(sorted(modules) if part == "__main__" else closest(part, modules)), "MODULE")
        lacking = f"there is no {part} in {' nor '.join(locations)}"
        raise ConfigError(f"{typed}, and {lacking}", EXPECTED, f"script.module={package}.{likely}")
    # Other finders, such as that of an editable install, may know the package.
    if not elsewhere and not any(finder.find_spec(part, None) for finder in sys.meta_path if part):
        found = f"{typed}, and there is no {part} in {workdir} nor among the installed packages"
        raise ConfigError(found, EXPECTED, "script.workdir=PATH of its folder, or script.path=FILE")


# Refusal of a script that cannot start, as far as the login node can see. Does not import torch.


def require_program(script: ScriptOptions, *, elsewhere: bool = False) -> None:
    """Raise ConfigError if the program, its interpreter or its working directory does not exist on this machine.

    A working directory inside the run folder is not checked.

    Args:
        script: the keys under ``script``.
        elsewhere: True if the ranks may find packages that this machine does not have, as in a container.
    """
    in_run = (script.workdir or "").startswith(IN_RUN)
    if script.workdir is not None and not in_run and not Path(script.workdir).is_dir():
        raise ConfigError(f"script.workdir={script.workdir}, which is no folder", "a folder", "script.workdir=PATH")
    if script.python is not None and shutil.which(script.python) is None:
        raise ConfigError(
            f"script.python={script.python}, which cannot be run", "an interpreter", f"script.python={sys.executable}"
        )
    if script.path is not None and not Path(script.path).is_file():
        folder = Path(script.path) if Path(script.path).is_dir() else Path(script.path).parent
        there = sorted(path.name for path in folder.glob("*.py"))
        likely = (closest(Path(script.path).name, there) or there or ["train.py"])[0]
        raise ConfigError(f"script.path={script.path}, which is no file", "a script", f"script.path={folder / likely}")
    if script.module is not None and script.python is None:
        pythonpath = (script.env.get("PYTHONPATH") or "").split(os.pathsep)
        unsettled = in_run or any(PLACEHOLDER.search(folder) for folder in pythonpath)
        folders = [folder for folder in pythonpath if folder]
        require_module(script.module, Path(script.workdir or "."), folders, elsewhere=elsewhere or unsettled)
    if script.command is not None and not in_run:
        require_command([str(word) for word in script.command], Path(script.workdir or "."))


def require_command(command: Sequence[str], workdir: Path) -> None:
    """Raise ConfigError if the program of a command does not exist, or cannot be executed.

    The program is searched in ``workdir``, the working directory of the ranks, and on the PATH.
    """
    program, local = command[0], workdir / command[0]
    path = os.pathsep.join([str(workdir), os.environ.get("PATH", "")])
    if shutil.which(program, path=path) or (local.is_file() and os.access(local, os.X_OK)):
        return
    typed = f"script.command={shlex.join(command)}"
    if local.is_file():
        expected = "a program that its owner may execute, or an interpreter before it"
        raise ConfigError(f"{typed}, and {program} is not executable", expected, f"chmod +x {shlex.quote(str(local))}")
    fix = in_shell("script.command", f"[{','.join(map(quoted, ['PROGRAM', *command[1:]]))}]")
    raise ConfigError(f"{typed}, and no program {program}", "a program on the PATH, or in script.workdir", fix)


def script_name(path: str | None, module: str | None, command: Sequence[str] | None) -> str:
    """Return the default name of a run: file name of the script or command without suffix, or name of the module."""
    if path:
        return Path(path).stem
    if module:
        return module.removesuffix(".__main__").rpartition(".")[2]
    return Path(command[0]).stem if command else "script"


class ScriptWorkload(Workload):
    """Workload for any program that torchrun could start; see docs/scripts.md."""

    name = "script"
    schema = ScriptConfig
    raw_keys = ("script.progress",)
    not_in_point = (
        "like",
        *(f"script.{key}" for key in ("path", "module", "python", "workdir", "env", "resumes", "elastic")),
        *(f"script.{key}" for key in ("resume_args", "checkpoint", "stop_signal", "silence_timeout_s", "progress")),
        *(f"script.{key}" for key in ("work_per_step", "unit", "max_steps")),
    )
    resumable = tuple(key for key in not_in_point if key not in ("script.path", "script.module"))

    def __init__(self) -> None:
        OmegaConf.register_new_resolver("script_name", script_name, replace=True)

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Make the paths in ``document`` absolute. Relative paths begin at the working directory of the launcher.

        References such as ``${run_dir}`` become ``%{run_dir}``, which the method ``command`` replaces when ranks start.
        """
        raw: Any = OmegaConf.to_container(document.script, resolve=False)
        for name in ("args", "resume_args", "checkpoint", "options", "env", "command", "workdir"):
            if (value := raw.get(name)) is not None:
                require_known(f"script.{name}", value, [str(known) for known in document])
                document.script[name] = keep_values(value)
        make_absolute([(document, "output_dir"), (document, "run_dir"), (document.script, "path")])
        if document.script.workdir is None:
            document.script.workdir = "."
        if not document.script.workdir.startswith(IN_RUN):
            make_absolute([(document.script, "workdir")])

    def plan(self, config: ScriptConfig, request: PlanRequest) -> WorkloadPlan:
        """Return the program's part of the plan of a point: its command, its work in a step and its number of steps.

        ``request`` has the ranks and the cluster of the point.

        Raises:
            ConfigError: the program does not exist, or cannot be started.
        """
        script = config.script
        cluster = request.cluster
        require_program(script, elsewhere=not request.is_local and bool(cluster.container or cluster.setup))
        work = total_work(script, request.world_size)
        command = shlex.join(self._args(config))
        again = (
            "a new start continues from the script's own checkpoint"
            if script.resumes
            else "none: an interrupted script is not started again (script.resumes=true where it has checkpoints)"
        )
        rows = {"workload": self.name, "command": PLACEHOLDER.sub(r"${\1}", command), "restarts": again}
        if work is not None:
            rows["work"] = f"{work:,.12g} {script.unit.name} a step"
        if script.max_steps is not None:
            rows["steps"] = f"{script.max_steps:,}"
        facts = {"command": self._args(config), "unit": script.unit.name, "work_per_step": work}
        return WorkloadPlan(
            rows=rows,
            facts={key: value for key, value in facts.items() if value is not None},
            max_steps=script.max_steps,
            resumes=script.resumes,
            fewer_nodes=possible_sizes(request, lambda fewer: require_elastic(script, fewer)),
        )

    def command(self, config: ScriptConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """Return the command of a rank of attempt number ``attempt``.

        If the working directory is inside the run folder, the directory is created. If the run has a copy of the code,
        the paths of the script and of the working directory point into the copy.
        """
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
        workdir = Path(fill(script.workdir or ".", values))
        if script.checkpoint is not None:
            pattern = workdir / fill(script.checkpoint, values)
            newest = newest_checkpoint(str(pattern), folder)
            before, _, after = str(pattern).partition("*")
            step = (newest or "").removeprefix(before).removesuffix(after)
            values |= {"newest": newest, "newest_step": int(step) if step.isdecimal() else step}

        def place(path: str) -> str:
            if copied is None or not Path(path).is_relative_to(root):
                return path
            return str(Path(copied) / Path(path).relative_to(root))

        env = {key: fill(value, values) for key, value in script.env.items() if value is not None}
        if copied is not None:
            env.setdefault("PYTHONPATH", os.pathsep.join(filter(None, (copied, os.environ.get("PYTHONPATH")))))
        resumes = attempt > 1 and ("newest" not in values or values["newest"] is not None)
        args = self._args(config, place(script.path) if script.path else None, resumes=resumes)
        hidden = [word for key, value in script.env.items() if value is None for word in ("-u", key)]
        if hidden:  # env(1) removes these variables last, after torch elastic has set RANK and the like.
            args = ["env", *hidden, *args]
        if workdir.is_relative_to(folder.path):
            workdir.mkdir(parents=True, exist_ok=True)
        return RankCommand(tuple(fill(word, values) for word in args), env=env, workdir=Path(place(str(workdir))))

    def contract(self, config: ScriptConfig, world_size: int) -> RankContract:
        """Return how the ranks behave: how they report steps, which signal stops them, and whether they resume.

        The ranks of a script record no events. The agent knows how a rank ended only from its log and its exit status.
        ``world_size`` is the number of ranks.
        """
        script = config.script
        return RankContract(
            records_events=False,
            stop_signal=script.stop_signal.name,
            requeue_exit=REQUEUE_EXIT,
            resumes=script.resumes,
            silence_timeout_s=script.silence_timeout_s,
            progress=script.progress,
            unit=script.unit.name,
            work_per_step=total_work(script, world_size),
            weak_scaling=script.weak_scaling,
            max_steps=script.max_steps,
            writes_curves=True,
        )

    def code(self, config: ScriptConfig) -> CodeTree:
        """Return the files of the program's git repository; outside of a repository, of the program's folder."""
        script = config.script
        start = Path(script.path).parent if script.path is not None else Path(script.workdir or ".")
        found = git(start, "rev-parse", "--show-toplevel")
        root = Path(found.decode().strip()) if found else start
        return CodeTree(root, partial(code_files, script=script.path), has_launcher=False)

    def _args(self, config: ScriptConfig, path: str | None = None, *, resumes: bool = False) -> list[str]:
        script = config.script
        python = script.python or sys.executable
        if script.command is not None:
            program = list(script.command)
        elif script.module is not None:
            program = [python, "-m", script.module]
        else:
            program = [python, path or str(script.path)]
        args = [*program, *split_args("script.args", script.args), *written_options(script.options, script.style)]
        return args + (split_args("script.resume_args", script.resume_args) if resumes else [])


def newest_checkpoint(pattern: str, folder: RunFolder) -> str | None:
    """Return the path of the checkpoint from which the next attempt resumes; None if no path matches ``pattern``.

    This is the newest matching path; an empty file is only returned if all are empty. A program that is killed during a
    save can leave a checkpoint that cannot be loaded. Attempts that resume from it crash before their first step. So
    after two such crashes in a row the next older path is returned, after four the path before it, and so on.
    """
    matches = (Path(path) for path in glob(pattern))  # noqa: PTH207 (may be absolute)
    paths = sorted(matches, key=lambda path: (path.stat().st_size > 0, _modified(path)), reverse=True)
    if not paths:
        return None
    events, crashes = folder.read_events(), 0
    started = {event["attempt"]: event["time"] for event in events if event["event"] == "started"}
    for event in reversed([event for event in events if event["event"] == "attempt_ended"]):
        has_saved = started.get(event["attempt"], 0.0) < _modified(paths[0])
        if event["cause"] != "crashed" or event.get("step") is not None or has_saved:
            break
        crashes += 1
    return str(paths[min(crashes // 2, len(paths) - 1)])


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def require_elastic(script: ScriptOptions, request: PlanRequest) -> None:
    """Raise ConfigError if ``script.elastic`` is false.

    With this setting, the script may be unable to resume with another number of ranks, such as that of ``request``,
    which the message names.
    """
    if not script.elastic:
        raise ConfigError(
            f"a script that is not known to continue with {request.world_size} ranks",
            "a script that reads WORLD_SIZE, and loads a checkpoint of another number of ranks",
            "script.resumes=true script.elastic=true",
        )


def total_work(script: ScriptOptions, world_size: int) -> float | None:
    """Return the work of all ranks in one step, in ``script.unit``; None if script.work_per_step is not set."""
    if script.work_per_step is None:
        return None
    return script.work_per_step * (world_size if script.weak_scaling else 1)


class FunctionWorkload(ScriptWorkload):
    """Workload for a Python function that every rank calls; see docs/python.md."""

    name = "function"
    schema = FunctionConfig
    not_in_point = (*ScriptWorkload.not_in_point, "script.args", "call.file")
    resumable = (*ScriptWorkload.resumable, "script.args", "call.file")

    def plan(self, config: ScriptConfig, request: PlanRequest) -> WorkloadPlan:
        """Return the plan of a point, as for a script. It shows the function and its arguments as the command.

        Raises:
            ConfigError: the program that calls the function does not exist, or cannot be started.
        """
        assert isinstance(config, FunctionConfig)
        plan = super().plan(config, request)
        called = f"{config.name}({', '.join(f'{name}={value}' for name, value in config.call.args.items())})"
        command = {"command": called}
        return replace(plan, rows={**plan.rows, **command}, facts={**plan.facts, **command})
