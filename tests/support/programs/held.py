"""AdamW whose steps wait while a test says so, for runs that nodes are to be taken from at a certain step.

Lies where the run is started. A step N waits while there is a file ``hold_N`` beside this one, and tells so by a file
``held_N``: by then all ranks have their gradients of that step, and no rank has made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


class HeldAdamW(torch.optim.AdamW):
    """torch's AdamW, in the steps that are not held."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Wait, and step."""
        number = 1 + max((int(state["step"]) for state in self.state.values()), default=0)
        while (FOLDER / f"hold_{number}").exists():
            (FOLDER / f"held_{number}").touch()
            time.sleep(0.02)
        return super().step(closure)
