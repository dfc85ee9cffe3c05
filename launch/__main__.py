"""``python -m launch``: compose every point of a sweep, plan, submit, watch, report.

    python -m launch -m nodes=1,2,4                 # a scaling sweep, then one scaling table
    python -m launch nodes=2 model=gpt2_124m        # one run
    python -m launch -m nodes=1,2 dry_run=true      # the plan and the sbatch text; submits nothing

Hydra composes the points and calls ``hydra_plugins.launch_plugin``, which calls ``launch.runner.run_sweep``.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from gpt_launch import COMMANDS
from launch import __version__
from launch.config import Config
from launch.config.compose import (
    not_in_point,
    prepare_overrides,
    register,
    require_config_dir,
    schema_of,
    target_of,
)
from launch.errors import ConfigError, refusing
from launch.plan.remote import remote_of, run_remotely
from launch.runs.compose import CONFIG_ERRORS, refuse_file_of_config
from launch.runs.folder import deny_others_writing
from launch.runs.overrides import point_name, unknown_flag
from launch.workload import load_workload


def sweep_dir(launcher: str, sweeper: str, folder: str) -> str:
    """Return the path of the folder for the output of Hydra's sweeper.

    If launcher and sweeper are both this project's, the folder is temporary, because a dry run or a refusal must leave
    no files. Otherwise ``folder`` is returned.

    Args:
        launcher: dotted path of the launcher's class.
        sweeper: dotted path of the sweeper's class.
        folder: folder in which other launchers and sweepers of Hydra write.
    """
    if not all(target.startswith("hydra_plugins.launch_plugin.") for target in (launcher, sweeper)):
        return folder
    scratch = tempfile.mkdtemp(prefix="launch-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


SHOWING = ("help", "hydra_help", "cfg", "info", "shell_completion", "run")
"""Flags of Hydra that only work for one run, so that they cannot be combined with -m."""


def split_flags(argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """Return (flags, parsed) for the arguments ``argv`` of the command line.

    ``flags`` are the flags of Hydra with their values. ``parsed`` has all arguments, as Hydra's parser reads them. This
    function calls the parser itself, because Hydra accepts no flag between overrides, and its error messages are long.

    Raises:
        ConfigError: Hydra does not have a flag, a flag lacks its value, or a flag does not fit -m.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        given, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error), "a flag of Hydra's with its value", "python -m launch --help") from error
    if unknown:
        schema: type[Config] = Config
        with suppress(ConfigError):  # The workload may be in the user's own folder of configs, which is not known yet.
            schema = schema_of(target_of([word for word in argv if word.startswith("workload=")]))
        raise unknown_flag(unknown[0], argv, schema, re.findall(r"--[\w-]+", parser.format_usage()), "python -m launch")
    showing = next((name.replace("_", "-") for name in SHOWING if getattr(given, name)), None)
    if showing is not None and given.multirun:
        fix = "the same without -m, and with one value for each key"
        raise ConfigError(f"--{showing} of a sweep (-m)", f"--{showing} of one run", fix)
    flags = list(argv)
    for override in given.overrides:
        flags.remove(override)
    return flags, given


def refuse_command(argv: Sequence[str]) -> None:
    """Raise ConfigError if the first argument is another command of the launcher, such as ``status``."""
    if argv and argv[0] in COMMANDS:
        raise ConfigError(
            f"python -m launch {argv[0]}",
            f"KEY=VALUE; the other commands are launch.{', launch.'.join(COMMANDS)}",
            shlex.join(["python", "-m", f"launch.{argv[0]}", *argv[1:]]),
        )


def prepare(argv: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra, flags first, with checked overrides.

    Also registers with Hydra the schema of the config, and the two resolvers that ``configs/config.yaml`` uses:
    ``sweep_dir`` and ``point_name``.
    """
    refuse_command(argv)
    flags, given = split_flags(argv)
    typed = given.overrides
    config_dir = require_config_dir(given.config_dir)
    if not given.shell_completion:  # the last word of a line that the shell completes may be incomplete
        typed = prepare_overrides(typed, config_dir)
    register(typed, config_dir)
    excluded = not_in_point(load_workload(target_of(typed, config_dir)))
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("point_name", lambda overrides: point_name(overrides, excluded), replace=True)
    return [*flags, *typed]


@hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
def run_point(composed: DictConfig) -> None:
    """Run one task of a job that another launcher of Hydra started (hydra/launcher=submitit_slurm, for example).

    ``composed`` is the config of the point. With the project's own launcher, Hydra does not call this function.
    """
    from launch.batch import run_task

    run_task(composed)


@refusing
def main() -> int:
    """Run the points of the command line.

    Returns the exit status: 0 all points finished, 1 a point failed, 2 refused, 130 stopped by Ctrl-C.
    """
    if "--version" in sys.argv[1:]:
        print(f"gpt-launch {__version__}")
        return 0
    if remote_of(sys.argv[1:]) is not None:
        return run_remotely(sys.argv[1:])
    deny_others_writing()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Exceptions reach this point, where they become messages.
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
        run_point()
    except CONFIG_ERRORS as error:
        raise refuse_file_of_config(error) from error
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
