"""``python -m launch``: compose every point of a sweep, plan, submit, watch, report.

    python -m launch -m nodes=1,2,4                 # a scaling sweep, then one scaling table
    python -m launch nodes=2 model=gpt2_124m        # one run
    python -m launch -m nodes=1,2 dry_run=true      # the plan and the sbatch text; submits nothing

Hydra composes the points and calls ``hydra_plugins.launch_plugin``, which calls ``launch.runner.run_sweep``.
"""

from __future__ import annotations

import atexit
import difflib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from gpt_launch import as_typed
from launch import __version__
from launch.config import Config
from launch.config.compose import (
    not_in_point,
    prepare_overrides,
    register,
    require_folder,
    schema_of,
    sweep_points,
    target_of,
    typed_form,
)
from launch.errors import ConfigError, refusing
from launch.runner import SweepFailedError, print_failure
from launch.runs.compose import CONFIG_ERRORS, refuse_file_of_config
from launch.runs.files import deny_others_writing
from launch.runs.overrides import override_of_flag, point_name
from launch.workload import load_workload


def sweep_dir(launcher: str, sweeper: str, folder: str) -> str:
    """Return the folder for the output of Hydra's sweeper: the sweep's folder, if the launcher or the sweeper needs it.

    Otherwise the folder is temporary: a dry run or a refusal must leave no files.
    """
    if not all(target.startswith("hydra_plugins.launch_plugin.") for target in (launcher, sweeper)):
        return folder
    scratch = tempfile.mkdtemp(prefix="launch-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


CONFIG_DIR = ("--config-dir", "-cd")
WITH_VALUE = (
    *CONFIG_DIR, "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p",
    "--experimental-rerun",
)  # fmt: skip
"""Flags of Hydra that need a value."""
ALONE = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
)
"""Flags of Hydra without a value, or with an optional value."""
SWEEP = ("--multirun", "-m")
HELP = ("--help", "-h", "--hydra-help")
COMPLETION = ("--shell-completion", "-sc")
SHOWING = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--run", "-r")
"""Flags of Hydra that exclude each other and -m."""
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Values of ``--info``."""


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into Hydra's flags with their values, and overrides.

    Hydra's own parser accepts no flag between overrides, and its refusals are long.

    Raises:
        ConfigError: Hydra does not have a flag, or a flag lacks its value.
    """
    flags: list[str] = []
    typed: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if not word.startswith("-"):
            last = flags[-1:] if word in INFO else []
            (flags if last in (["--info"], ["-i"]) else typed).append(word)
        elif flag in ALONE:
            flags += [flag, value] if equals else [flag]
        elif flag in WITH_VALUE:
            following = value if equals else next(words, None)
            if following is None:
                raise ConfigError(f"{flag} without a value", f"{flag} VALUE", "python -m launch --help")
            flags += [flag, following]
        else:
            raise unknown_flag(flag, value or next(words, ""), argv)
    return flags, typed


def without_sweep(flags: list[str], typed: list[str], config_dir: Path | None) -> tuple[list[str], list[str]]:
    """Return the flags without -m, and the overrides of the first point: Hydra shows help of one run only.

    Without -m, or without a flag that shows something, both are returned unchanged.

    Raises:
        ConfigError: the flags request a config or other information of a sweep.
    """
    showing = next((flag for flag in flags if flag in (*HELP, *SHOWING)), None)
    if showing is None or not set(flags) & set(SWEEP):
        return flags, typed
    flags = [flag for flag in flags if flag not in SWEEP]
    first = [typed_form(override) for override in sweep_points(typed, config_dir)[0]]
    if showing in HELP:
        return flags, first
    command = shlex.join(["python", "-m", "launch", *first, *flags])
    raise ConfigError(f"{showing} of a sweep (-m)", f"{showing} of one run: here of the first of its points", command)


def unknown_flag(flag: str, following: str, argv: Sequence[str]) -> ConfigError:
    """Return a ConfigError for a flag that Hydra does not have, with the key or flag that was probably meant."""
    schema: type[Config] = Config
    with suppress(ConfigError):  # a workload of the user's own folder of configs, which is not known yet
        schema = schema_of(target_of([word for word in argv if word.startswith("workload=")]))
    meant = override_of_flag(flag, following, schema)
    likely = difflib.get_close_matches(flag, [*ALONE, *WITH_VALUE], n=1, cutoff=0.7)
    fix = meant or next(iter(likely), "python -m launch --help")
    return ConfigError(f"{flag}, which is no flag", "KEY=VALUE, -m for a sweep, or a flag of Hydra's", fix)


COMMANDS = ("status", "logs", "cancel", "report", "project", "verify", "doctor", "move", "keys", "batch")
"""Other commands, each in a module of its own."""


def refuse_command(argv: Sequence[str]) -> None:
    """Raise ConfigError if the first argument is another command of the launcher."""
    if argv and argv[0] in COMMANDS:
        raise ConfigError(
            f"python -m launch {argv[0]}",
            f"KEY=VALUE; the other commands are launch.{', launch.'.join(COMMANDS)}",
            shlex.join(["python", "-m", f"launch.{argv[0]}", *argv[1:]]),
        )


def prepare(argv: Sequence[str]) -> tuple[list[str], type[Config]]:
    """Register with Hydra the schema of the arguments, and the two functions that ``configs/config.yaml`` uses.

    Returns:
        The arguments for Hydra, flags first, and the schema.
    """
    refuse_command(argv)
    flags, typed = split_flags(argv)
    config_dir = next((require_folder(a, b) for a, b in pairwise(flags) if a in CONFIG_DIR), None)
    flags, typed = without_sweep(flags, typed, config_dir)
    line: list[str] = []
    if set(flags) & set(COMPLETION):  # The overrides come from the shell; their last word may be incomplete.
        words = os.environ.get("COMP_LINE", "").rpartition(" ")[0].split()
        line = [word for word in words if word.startswith("workload")]
    else:
        typed = prepare_overrides(typed, config_dir)
    schema = register([*typed, *line], config_dir)
    excluded = not_in_point(load_workload(target_of(typed, config_dir)))
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("point_name", lambda overrides: point_name(overrides, excluded), replace=True)
    return [*flags, *typed], schema


@hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
def run_point(composed: DictConfig) -> None:
    """Run one task of a job that a stock launcher (hydra/launcher=submitit_slurm, submitit_local, basic) started."""
    from launch.batch import run_task

    run_task(composed)


@refusing
def main() -> int:
    """Return the exit status: 0 all points finished, 1 a point failed, 2 refused, 130 stopped by Ctrl-C."""
    if "--version" in sys.argv[1:]:
        print(f"gpt-launch {__version__}")
        return 0
    deny_others_writing()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Exceptions reach this point, where they become messages.
    schema: type[Config] = Config
    try:
        sys.argv[1:], schema = prepare(sys.argv[1:])
        run_point()
    except CONFIG_ERRORS as error:
        print(as_typed(str(refuse_file_of_config(error, schema))), file=sys.stderr)
        return 2
    except SweepFailedError as error:
        return print_failure(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
