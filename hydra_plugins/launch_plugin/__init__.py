"""The project's launcher and sweeper as Hydra plugins, and a refusal of launchers that start a wrong number of agents.

Hydra finds launchers only in the namespace package ``hydra_plugins``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from launch.runner import PointResult


# Launchers of Hydra's other plugins: the tasks that they start for a point, and the refusal of points that need more.


def tasks_of(launcher: DictConfig) -> int | None:
    """Return the number of tasks that a launcher of Hydra starts for every point; None for an unknown launcher.

    Args:
        launcher: the keys under ``hydra.launcher``.
    """
    target = str(launcher.get("_target_"))
    if target.endswith("submitit_launcher.SlurmLauncher"):
        return int(launcher.nodes) * int(launcher.tasks_per_node)
    if target.endswith("submitit_launcher.LocalLauncher"):
        return int(launcher.tasks_per_node)
    if target.endswith(("basic_launcher.BasicLauncher", "joblib_launcher.JoblibLauncher")):
        return 1
    return None


def refuse_other_tasks(points: Sequence[DictConfig], chosen: str) -> None:
    """Raise ConfigError if another launcher of Hydra would not start one agent for each node of every point.

    Args:
        points: composed configs with Hydra's own keys.
        chosen: name of that launcher, the chosen option of the group ``hydra/launcher``.
    """
    # Hydra imports this module in every app of the environment, even in a project with its own launch.py.
    from launch.errors import ConfigError, counted

    for point in points:
        need, have = int(point.nodes) + int(point.spare_nodes), tasks_of(point.hydra.launcher)
        if have not in (None, need):
            raise ConfigError(
                f"a point with nodes={need} (spare_nodes included), and hydra/launcher={chosen} starts "
                f"{counted(have, 'task')} for every point",
                "one task, the agent, for each node of a point; a stock launcher gives all points the same resources",
                f"the same without hydra/launcher={chosen}: then each point gets the nodes that it names",
            )


# The adapter from Hydra's Launcher to ``launch.sweep``. It composes each point separately, resources included.


GRID = ("hydra_plugins.launch_plugin.", "hydra._internal.core_plugins.basic_sweeper.")
"""Beginnings of the names of sweeper classes that do not use the results of points.

A failed point of such a sweep makes the command fail.
"""
SEARCHING = ("hydra_optuna_sweeper", "hydra_ax_sweeper", "hydra_nevergrad_sweeper")
"""Packages of sweepers that need the result of each point."""


class PerPointLauncher(Launcher):
    """Hydra launcher that runs the points of a sweep by ``launch.runner.run_sweep``.

    It runs all points together that the sweeper passes in one call: the whole sweep, or one batch of a search.
    """

    def __init__(self) -> None:
        self.context: HydraContext | None = None
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's context and config. Hydra calls this method; this launcher does not run the task function."""
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, submit, watch and report the points, and return the result of each.

        The result contains the objective of the point: the figure by which the sweeper compares points.

        A point that cannot run or does not finish is a failed point. If the sweeper searches (it is not in ``GRID``),
        it gets a failed job for this point, and decides what follows, for example by Optuna's ``max_failure_rate``. In
        any other sweep, a failed point makes this method raise an error.

        Args:
            job_overrides: overrides of each point.
            initial_job_idx: Hydra's number of the first point.
        """
        from launch.config.compose import compose_launch, typed_form
        from launch.runner import run_sweep
        from launch.runs.compose import CONFIG_ERRORS

        assert self.context is not None and self.config is not None
        setup_globals()
        target = str(self.config.hydra.sweeper.get("_target_"))
        searches = not target.startswith(GRID)
        refuse_without_values(self.config, target)
        points = [[str(text) for text in overrides] for overrides in job_overrides]
        try:
            composed = [compose_launch(point, primary=self.config.hydra.job.config_name) for point in points]
            typed = [list(map(typed_form, filter_overrides(point))) for point in points]  # As a person types.
            results: Sequence[PointResult | None] = run_sweep(
                list(zip(composed, typed, strict=True)), tolerates_failures=searches
            )
            return [job_return(*pair) for pair in zip(points, results or [None] * len(points), strict=True)]
        except CONFIG_ERRORS as error:
            if not searches:
                raise
            if len(points) == 1:
                return [job_return(points[0], error)]
        # One point of the batch cannot work, and nothing was submitted. If each point runs alone, only this one fails.
        return [result for point in points for result in self.launch([point], initial_job_idx)]


def refuse_without_values(config: DictConfig, target: str) -> None:
    """Raise ConfigError if the sweeper chooses points by earlier results, but the points will return no objective.

    They return none with ``objective=null``, in a dry run, and with ``launch.detach``. ``target`` is the dotted path of
    the sweeper's class.
    """
    from launch.errors import ConfigError

    package = next((name for name in SEARCHING if name in target), None)
    if package is None:
        return
    sweeper = f"hydra/sweeper={package.removeprefix('hydra_').removesuffix('_sweeper')}"
    if config.objective is None:
        raise ConfigError(
            f"{sweeper}, which chooses points by the results of others, with objective=null",
            "the figure of the step records by which it chooses",
            "objective=val_loss",
        )
    for key in [key for key in ("dry_run", "launch.detach") if OmegaConf.select(config, key)]:
        raise ConfigError(
            f"{sweeper} with {key}=true",
            "points that are run to their end before the sweeper chooses the next ones",
            f"{key}=false, or the same without hydra/sweeper",
        )


def job_return(overrides: Sequence[str], result: PointResult | Exception | None) -> JobReturn:
    """Return the result of a point in the form for Hydra's sweeper.

    The value of a finished point is its objective. The value of a failed point is its error: some sweepers raise this
    error, and others only count the failures. A finished point whose records lack the objective counts as failed.

    Args:
        overrides: overrides of the point.
        result: result of the point; an exception if the point could not run; None in a dry run.
    """
    from launch.runner import SweepFailedError
    from launch.runs.folder import RunFolder
    from launch.runs.records import refuse_absent

    value: object = result
    if result is not None and not isinstance(result, Exception):
        value = result.value if result.error is None else SweepFailedError(result.error, 1)
        if value is None and result.objective is not None:
            value = refuse_absent(RunFolder(result.run_dir), result.objective)
    status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
    found = JobReturn(overrides=list(overrides), status=status)
    found.return_value = value
    return found


# Hydra's basic sweeper for the launcher of this project, which composes and checks all points before it submits.


class PerPointSweeper(BasicSweeper):
    """Hydra sweeper that composes each point once.

    Other sweepers compose each batch of points to check it, and the launcher then composes the batch again.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose the points of a batch, and check them, if they run in a launcher that Hydra or another project
        provides (``hydra/launcher=...``).

        Hydra calls this method before a launcher runs the batch. The method does nothing if the launcher is
        ``PerPointLauncher`` of this project, which composes and checks the points itself.

        Raises:
            ConfigError: the launcher would start more or fewer agents than a point has nodes.
        """
        if isinstance(self.launcher, PerPointLauncher):
            return
        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        points = [loader.load_sweep_config(self.config, [str(word) for word in overrides]) for overrides in batch]
        refuse_other_tasks(points, str(OmegaConf.select(self.config, "hydra.runtime.choices")["hydra/launcher"]))
