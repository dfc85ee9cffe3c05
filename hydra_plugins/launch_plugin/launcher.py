"""The launcher and the sweeper as Hydra finds them, and the refusal of what stock launchers cannot give a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from launch.sweep import Composed, PointResult


# Launchers of Hydra's other plugins: what they start for a point, and the refusal of what they cannot give it.


def tasks_of(launcher: DictConfig) -> int | None:
    """Tasks that a launcher starts for every point; None of one that is not known.

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
    """Raise ConfigError if a launcher would not start an agent for each node of every point.

    Args:
        points: composed, with Hydra's own keys.
        chosen: option of the group ``hydra/launcher``.
    """
    wanted = [int(point.nodes) + int(point.spare_nodes) for point in points]
    given = [tasks_of(point.hydra.launcher) for point in points]
    wrong = [(need, have) for need, have in zip(wanted, given, strict=True) if have is not None and have != need]
    if not wrong:
        return
    # Hydra imports this module in every app of the environment, also in a project with a launch.py of its own.
    from launch.errors import ConfigError, counted

    need, have = wrong[0]
    own = f"the same without hydra/launcher={chosen}: then each point gets the nodes that it names"
    same = f"hydra.launcher.tasks_per_node={need}"
    if "slurm" in chosen:
        same = f"hydra.launcher.nodes={need} hydra.launcher.tasks_per_node=1"
    fits = len(set(wanted)) == 1 and "submitit" in chosen
    raise ConfigError(
        f"a point with nodes={need} (spare_nodes included), and hydra/launcher={chosen} starts "
        f"{counted(have, 'task')} for every point",
        "one task, the agent, for each node of a point; a stock launcher gives all points the same resources",
        f"{same}; or {own}" if fits else own,
    )


# The adapter from Hydra's Launcher to ``launch.sweep``: composes each point by itself, resources included.


GRID = ("hydra_plugins.launch_plugin.", "hydra._internal.core_plugins.basic_sweeper.")
"""Beginnings of the targets of sweepers that want no value back: the first point that fails ends the command."""
SEARCHING = ("hydra_optuna_sweeper", "hydra_ax_sweeper", "hydra_nevergrad_sweeper")
"""Packages of sweepers that cannot do without a value."""


class PerPointLauncher(Launcher):
    """Hands all points of a sweep over at once; of a search those of a batch."""

    def __init__(self) -> None:
        self.context: HydraContext | None = None
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. The task function is for launchers that run it; jobs of ours run ``launch.agent``."""
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, submit, watch and report the points, and return their objectives.

        A point of a search that does not finish, or cannot, is a job that failed: what follows is the sweeper's to
        decide, as by Optuna's ``max_failure_rate``. In any other sweep it raises.
        """
        from launch.config.compose import compose_launch
        from launch.runs.compose import CONFIG_ERRORS

        assert self.context is not None and self.config is not None
        setup_globals()
        target = str(self.config.hydra.sweeper.get("_target_"))
        searches = not target.startswith(GRID)
        refuse_without_values(self.config, target)
        points = [[str(text) for text in overrides] for overrides in job_overrides]
        try:
            composed = [compose_launch(point, primary=self.config.hydra.job.config_name) for point in points]
            return run(list(zip(composed, map(typed_by_hand, points), strict=True)), points, searches)
        except CONFIG_ERRORS as error:
            if not searches:
                raise
            if len(points) == 1:
                return [failed(points[0], error)]
        # One of the batch cannot work, and nothing was submitted: by itself, it alone fails.
        return [result for point in points for result in self.launch([point], initial_job_idx)]


def typed_by_hand(overrides: Sequence[str]) -> list[str]:
    """Overrides of a point as a person would type them."""
    from launch.config.compose import typed_form

    return [typed_form(text) for text in filter_overrides(list(overrides))]


def run(points: list[Composed], overrides: Sequence[Sequence[str]], searches: bool) -> list[JobReturn]:
    """Run points, and return what Hydra's sweeper wants of each."""
    from launch.sweep import run_sweep

    results = run_sweep(points, tolerates_failures=searches)
    if not results:  # a dry run
        return [completed(of_point, None) for of_point in overrides]
    return [job_return(of_point, result) for of_point, result in zip(overrides, results, strict=True)]


def refuse_without_values(config: DictConfig, target: str) -> None:
    """Raise ConfigError if a sweeper searches, and would get no value to go by."""
    from launch.errors import ConfigError

    package = next((name for name in SEARCHING if name in target), None)
    if package is None:
        return
    sweeper = f"hydra/sweeper={package.removeprefix('hydra_').removesuffix('_sweeper')}"
    if config.objective is None:
        raise ConfigError(
            f"{sweeper}, which chooses points by the results of others, with objective=null",
            "the figure of the step records that it is to go by",
            "objective=val_loss",
        )
    for key in ("dry_run", "launch.detach"):
        if config.dry_run if key == "dry_run" else config.launch.detach:
            raise ConfigError(
                f"{sweeper} with {key}=true",
                "points that are run to their end before the sweeper chooses the next ones",
                f"{key}=false" + (", or the same without hydra/sweeper for the plans" if key == "dry_run" else ""),
            )


def job_return(overrides: Sequence[str], result: PointResult) -> JobReturn:
    """Result of a point as Hydra's sweeper wants it; of one that finished without its objective, a failure."""
    from launch.sweep import SweepFailedError

    if result.error is not None:
        return failed(overrides, SweepFailedError(result.error, 1))
    if result.objective is not None and result.value is None:
        from launch.runs.folder import RunFolder
        from launch.runs.records import refuse_absent

        return failed(overrides, refuse_absent(RunFolder(result.run_dir), result.objective))
    return completed(overrides, result.value)


def completed(overrides: Sequence[str], value: float | None) -> JobReturn:
    """Result of a point that finished."""
    result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    result.return_value = value
    return result


def failed(overrides: Sequence[str], error: Exception) -> JobReturn:
    """Result of a point that failed: the sweeper raises ``error`` when it asks for the value, or counts it."""
    result = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
    result.return_value = error
    return result


# Hydra's basic sweeper for the launcher of this project, which composes and checks all points before it submits.


class PerPointSweeper(BasicSweeper):
    """Composes each point once: stock sweepers compose a batch to check it, and the launcher composes it again."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check a batch as Hydra does, unless the launcher is about to.

        Raises:
            ConfigError: a stock launcher would start another number of agents than a point has nodes.
        """
        if isinstance(self.launcher, PerPointLauncher):
            return
        pass

        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        points = [loader.load_sweep_config(self.config, [str(word) for word in overrides]) for overrides in batch]
        refuse_other_tasks(points, str(OmegaConf.select(self.config, "hydra.runtime.choices")["hydra/launcher"]))
