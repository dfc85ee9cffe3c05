"""The schema of what a run does where its numbers go wrong. Torch-free; its values are in ``configs/train.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from launch.errors import ConfigError, require_positive, require_range

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class DivergenceConfig:
    """Limits of steps that are skipped and of roll-backs, spikes of the loss, and replicas that drift apart."""

    max_skipped_steps: int = 10
    """After so many steps in a row whose loss or gradients are not finite, and which were skipped, the run goes back to
    its last good checkpoint and passes over their batches."""
    max_rollbacks: int = 2
    """After so many roll-backs that brought no newer checkpoint the run ends, and is not started again."""
    spike_sigmas: Optional[float] = None
    """Go back and pass over the batch of a step whose loss exceeds the mean of the steps before it by so many standard
    deviations. null: never."""
    spike_window: int = 100
    """Number of steps whose losses a spike is compared with; none is found before there are so many."""
    replica_check_interval: int = 0
    """Steps between comparisons of the replicas of the parameters, bit by bit; each save is preceded by one as well. 0
    compares none."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_positive("divergence.max_skipped_steps", self.max_skipped_steps)
        require_range("divergence.max_rollbacks", self.max_rollbacks, 0, float("inf"))
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ConfigError(
                f"divergence.spike_sigmas={self.spike_sigmas}",
                "a number above 0, such as 6, or null for no look at spikes",
                "divergence.spike_sigmas=6",
            )
        require_range("divergence.spike_window", self.spike_window, 2, 1e6)
        require_range("divergence.replica_check_interval", self.replica_check_interval, 0, float("inf"))
