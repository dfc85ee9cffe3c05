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

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from launch.config import NOT_IN_POINT, Config
from launch.errors import ConfigError
from launch.runs.compose import CONFIG_ERRORS, explain
from launch.runs.overrides import point_name
from launch.sweep import SweepFailedError, fail


def sweep_dir(launcher: str, folder: str) -> str:
    """Where Hydra's sweeper writes: the sweep's folder for stock launchers.

    Ours needs nothing of it, and a dry run or a refusal must leave nothing behind: a folder that goes with the process.
    """
    if not launcher.startswith("hydra_plugins.launch_plugin."):
        return folder
    scratch = tempfile.mkdtemp(prefix="launch-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def point_of(overrides: Sequence[str]) -> str:
    """The point's folder, for stock launchers."""
    return point_name(overrides, NOT_IN_POINT)


def register() -> None:
    """Tell Hydra of the schema and of the two functions that ``configs/config.yaml`` uses."""
    ConfigStore.instance().store("launch_schema", Config)
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("point_name", point_of, replace=True)


@hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
def run_point(composed: DictConfig) -> None:
    """One task of a job that a stock launcher (hydra/launcher=submitit_slurm, submitit_local, basic) started."""
    from launch.batch import run_task

    run_task(composed)


def main() -> int:
    """Exit status: 0 all points finished, 1 one failed, 2 refused, 130 stopped by Ctrl-C."""
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here, where they are put into words
    try:
        run_point()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except CONFIG_ERRORS as error:
        print(explain(error, Config), file=sys.stderr)
        return 2
    except SweepFailedError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
