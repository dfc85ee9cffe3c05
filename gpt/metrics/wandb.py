"""Writer of rank 0's records to Weights & Biases, where the config asks for it (the extra ``wandb``).

Owns the run in that service: its id follows from the run folder, so a resumed run goes on as the same one. A step that
was done twice keeps the values it had first, since the service takes each step once. Training never depends on it.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord
from launch.runs.tensorboard import record_scalars

log = logging.getLogger(__name__)


class WeightsAndBiases:
    """Writer that sends records under the names that TensorBoard has."""

    def __init__(self, folder: RunFolder, project: str, config: dict[str, Any]) -> None:
        import wandb

        folder.path.mkdir(parents=True, exist_ok=True)
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=project,
                group=folder.path.parent.name,
                name=folder.point,
                id=hashlib.sha256(str(folder.path).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder.path),
                config=config,
            )
        except (wandb.Error, OSError) as error:
            # A compute node without a way out, or a service that is down, must not cost the run.
            log.warning("Weights & Biases: %s; training goes on without it (WANDB_MODE=offline keeps it here)", error)

    def write(self, record: StepRecord) -> None:
        """Send one record."""
        if self._run is not None:
            self._run.log(record_scalars(record.as_dict()), step=record.step)

    def close(self) -> None:
        """Send the rest and end the run in the service."""
        if self._run is not None:
            self._run.finish()
