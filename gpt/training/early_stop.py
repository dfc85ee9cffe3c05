"""The end of a run before its last step: the validation loss is low enough, or no longer falls.

Every rank has the same losses, and so decides alike without a message. The state is kept in checkpoints, so that a
resumed run counts on. Must not know how a loss is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpt.config import OptimConfig, TrainConfig
from launch.errors import ConfigError


@dataclass
class EarlyStop:
    """Judge of the validation losses of a run, in the order of its evaluations."""

    config: OptimConfig
    best: float = math.inf
    """Lowest loss so far, nats per token."""
    best_step: int = 0
    waited: int = 0
    """Evaluations since the lowest."""
    best_per_byte: float | None = None
    """The lowest loss in nats per byte of text; None where the text is not known."""

    def hear(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        """Take in the validation loss of a step, nats per token, and in bits per byte of text where that is known.

        A step that was evaluated already counts once.
        """
        if step <= self.best_step:
            return
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            self.best_per_byte = None if bits_per_byte is None else bits_per_byte * math.log(2)
        else:
            self.waited += 1

    def reason(self) -> str | None:
        """Say why the run is over; None where it is not."""
        target, patience = self.config.target_val_loss, self.config.patience
        per_byte, per_byte_target = self.best_per_byte, self.config.target_val_nats_per_byte
        told = f"val_loss {self.best:.4f} at step {self.best_step}"
        told += "" if per_byte is None else f" ({per_byte:.4f} nats per byte)"
        if target is not None and self.best <= target:
            return f"{told} reached optim.target_val_loss={target:g}"
        if per_byte_target is not None and per_byte is not None and per_byte <= per_byte_target:
            return f"{told} reached optim.target_val_nats_per_byte={per_byte_target:g}"
        if patience is not None and self.waited >= patience:
            return (
                f"val_loss did not fall below {self.best:.4f}, that of step {self.best_step}, in {self.waited} "
                f"evaluations (optim.patience={patience})"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint tells, as plain JSON."""
        known = {"best": self.best, "best_step": self.best_step} if self.best_step else {}
        if self.best_per_byte is not None:
            known["best_per_byte"] = self.best_per_byte
        return {**known, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint; the config is that of now."""
        self.best, self.best_step = state.get("best", math.inf), state.get("best_step", 0)
        self.waited = state.get("waited", 0)
        self.best_per_byte = state.get("best_per_byte")


def refuse_unknown_text(config: TrainConfig, val_bytes: float | None) -> None:
    """Raise ConfigError where a target is per byte of text, and the bytes of the validation text are not known."""
    target = config.optim.target_val_nats_per_byte
    if target is not None and not val_bytes:
        raise ConfigError(
            f"optim.target_val_nats_per_byte={target:g} with data={config.data.title}, whose bytes of text are unknown",
            "a corpus of gpt.prepare, or of characters",
            "optim.target_val_loss=LOSS, in nats per token",
        )
