"""Checkpoints: saved whole or not at all, verified before they are loaded, loadable on any number of ranks.

``folders`` names, commits and deletes the folder of a checkpoint, and keeps its manifest of files. ``messages`` has all
ranks succeed or fail together. ``formats`` defines the files. ``saving`` has each rank's
``writer`` do the jobs of a save. ``store`` saves and loads the checkpoints of a run with all of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.checkpoint.messages import CheckpointError
    from gpt.checkpoint.store import CheckpointStore, LoadedCheckpoint, OutdatedAttemptError

__all__ = ["CheckpointError", "CheckpointStore", "LoadedCheckpoint", "OutdatedAttemptError"]


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__`` on first use: it needs torch, and a login node imports only ``folders``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpt.checkpoint import store

    return getattr(store, name)
