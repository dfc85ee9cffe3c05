"""Hydra's basic sweeper for the launcher of this project, which composes and checks all points before it submits."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf

from hydra_plugins.launch_plugin.launcher import PerPointLauncher


class PerPointSweeper(BasicSweeper):
    """Composes each point once: stock sweepers compose a batch to check it, and the launcher composes it again."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check a batch as Hydra does, unless the launcher is about to.

        Raises:
            ConfigError: a stock launcher would start another number of agents than a point has nodes.
        """
        if isinstance(self.launcher, PerPointLauncher):
            return
        from launch.checks.stock_launchers import refuse_other_tasks

        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        points = [loader.load_sweep_config(self.config, [str(word) for word in overrides]) for overrides in batch]
        refuse_other_tasks(points, str(OmegaConf.select(self.config, "hydra.runtime.choices")["hydra/launcher"]))
