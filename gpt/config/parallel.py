"""The schema of how a model is spread over ranks. Torch-free; its values are in ``configs/parallel``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from gpt.config.checks import require_positive


class Strategy(Enum):
    """How ranks share the work: DDP (replicas) or FSDP2 (parameters, gradients and optimizer sharded)."""

    ddp = "ddp"
    fsdp = "fsdp"


@dataclass
class ParallelConfig:
    """How the model is spread over the ranks. Nothing here changes the loss curve."""

    strategy: Strategy = MISSING
    reshard_after_forward: bool = True
    """fsdp only: free the gathered parameters of a block after its forward pass (less memory, one more all-gather)."""
    timeout_s: int = 600
    """Seconds after which a collective that does not complete fails the run."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_positive("parallel.timeout_s", self.timeout_s)
