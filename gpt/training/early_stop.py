"""The end of a run before its last step: the validation loss is low enough, or no longer falls.

Every rank has the same losses, and so decides alike without a message. The state is kept in checkpoints, so that a
resumed run counts on. Must not know how a loss is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpt.config import OptimConfig


@dataclass
class EarlyStop:
    """Judge of the validation losses of a run, in the order of its evaluations."""

    config: OptimConfig
    best: float = math.inf
    """Lowest loss so far, nats per token."""
    best_step: int = 0
    waited: int = 0
    """Evaluations since the lowest."""

    def hear(self, step: int, loss: float) -> None:
        """Take in the validation loss of a step, nats per token. A step that was evaluated already counts once."""
        if step <= self.best_step:
            return
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    def reason(self) -> str | None:
        """Say why the run is over; None where it is not."""
        target, patience = self.config.target_val_loss, self.config.patience
        if target is not None and self.best <= target:
            return f"val_loss {self.best:.4f} at step {self.best_step} reached optim.target_val_loss={target:g}"
        if patience is not None and self.waited >= patience:
            return (
                f"val_loss did not fall below {self.best:.4f}, that of step {self.best_step}, in {self.waited} "
                f"evaluations (optim.patience={patience})"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint tells, as plain JSON."""
        known = {"best": self.best, "best_step": self.best_step} if self.best_step else {}
        return {**known, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint; the config is that of now."""
        self.best, self.best_step = state.get("best", math.inf), state.get("best_step", 0)
        self.waited = state.get("waited", 0)
