"""Checkpoints: saved whole or not at all, verified before they are believed, loadable on any number of ranks.

``manifest`` lists the files of a checkpoint, ``folders`` names, commits and deletes its folder, ``collective`` has all
ranks succeed or fail together, ``formats`` and ``deepspeed_files`` say what is written and read, ``saving`` has each
rank's ``writer`` do the ``jobs`` of a save, and ``store`` joins these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.checkpoint.messages import CheckpointError
    from gpt.checkpoint.store import CheckpointStore, LoadedCheckpoint, OutdatedAttemptError

__all__ = ["CheckpointError", "CheckpointStore", "LoadedCheckpoint", "OutdatedAttemptError"]


def __getattr__(name: str) -> Any:
    """Load what needs torch on first use: the login node imports ``folders``, which does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpt.checkpoint import store

    return getattr(store, name)
