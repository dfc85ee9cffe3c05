"""The adapter from Hydra's Launcher to ``launch.sweep``: composes each point by itself, resources included.

Stock hydra-submitit-launcher submits every point with the resources of the base config; here a point that sets
``nodes=4`` gets four nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PerPointLauncher(Launcher):
    """Hands all points of a sweep over at once."""

    def __init__(self) -> None:
        self.context: HydraContext | None = None
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. The task function is for launchers that run it; jobs of ours run ``launch.agent``."""
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, submit, watch and report the points. Raises where one does not finish."""
        from launch.config.compose import typed_form
        from launch.config.sweep_points import compose_points
        from launch.sweep import run_sweep

        assert self.context is not None and self.config is not None
        setup_globals()
        composed = compose_points(self.context.config_loader, self.config, job_overrides)
        typed = [[typed_form(text) for text in filter_overrides(list(map(str, point)))] for point in job_overrides]
        run_sweep(list(zip(composed, typed, strict=True)))
        return [done(overrides) for overrides in job_overrides]


def done(overrides: Sequence[str]) -> JobReturn:
    """Result of a point that finished, as Hydra's sweeper wants it."""
    result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    result.return_value = None
    return result
