"""Hydra's basic sweeper for the launcher of this project, which composes and checks all points before it submits."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from hydra_plugins.launch_plugin.launcher import PerPointLauncher


class PerPointSweeper(BasicSweeper):
    """Composes each point once: stock sweepers compose a batch to check it, and the launcher composes it again."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check a batch as Hydra does, unless the launcher is about to."""
        if not isinstance(self.launcher, PerPointLauncher):
            super().validate_batch_is_legal(batch)
