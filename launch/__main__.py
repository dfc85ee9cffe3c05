"""``python -m launch``: compose every point of a sweep, plan, submit, watch, report.

    python -m launch -m nodes=1,2,4                 # a scaling sweep, then one scaling table
    python -m launch nodes=2 model=gpt2_124m        # one run
    python -m launch -m nodes=1,2 dry_run=true      # the plan and the sbatch text; submits nothing

Hydra composes the points and hands them to ``hydra_plugins.launch_plugin``, which calls ``launch.sweep.run_sweep``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from launch import __version__
from launch.config import Config
from launch.config.compose import not_in_point, prepare_overrides, register, target_of
from launch.errors import ConfigError
from launch.runs.explain import CONFIG_ERRORS, explain
from launch.runs.overrides import point_name
from launch.sweep import SweepFailedError, fail
from launch.workload import load_workload


def sweep_dir(launcher: str, folder: str) -> str:
    """Where Hydra's sweeper writes: the sweep's folder for stock launchers.

    Ours needs nothing of it, and a dry run or a refusal must leave nothing behind: a folder that goes with the process.
    """
    if not launcher.startswith("hydra_plugins.launch_plugin."):
        return folder
    scratch = tempfile.mkdtemp(prefix="launch-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


CONFIG_DIR = ("--config-dir", "-cd")
WITH_VALUE = (
    *CONFIG_DIR, "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p", "--info", "-i",
    "--experimental-rerun",
)  # fmt: skip
"""Flags of Hydra that are followed by a value."""


def prepare(argv: Sequence[str]) -> tuple[list[str], type[Config]]:
    """Tell Hydra the schema of what was typed, and the two functions that ``configs/config.yaml`` uses.

    Returns:
        The arguments, completed, and the schema.
    """
    config_dir = next((Path(b) for a, b in pairwise(argv) if a in CONFIG_DIR), None)
    flags = {index for index, arg in enumerate(argv) if arg.startswith("-") or argv[index - 1] in WITH_VALUE}
    typed = prepare_overrides([arg for index, arg in enumerate(argv) if index not in flags], config_dir)
    schema = register(typed, config_dir)
    excluded = not_in_point(load_workload(target_of(typed, config_dir)))
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("point_name", lambda overrides: point_name(overrides, excluded), replace=True)
    return [*(argv[index] for index in sorted(flags)), *typed], schema


@hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
def run_point(composed: DictConfig) -> None:
    """One task of a job that a stock launcher (hydra/launcher=submitit_slurm, submitit_local, basic) started."""
    from launch.batch import run_task

    run_task(composed)


def main() -> int:
    """Exit status: 0 all points finished, 1 one failed, 2 refused, 130 stopped by Ctrl-C."""
    if "--version" in sys.argv[1:]:
        print(f"gpt-launch {__version__}")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here, where they become messages
    schema: type[Config] = Config
    try:
        sys.argv[1:], schema = prepare(sys.argv[1:])
        run_point()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except CONFIG_ERRORS as error:
        print(explain(error, schema), file=sys.stderr)
        return 2
    except SweepFailedError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
