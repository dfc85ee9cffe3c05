"""Checkpoints: saved whole or not at all, verified before they are believed, loadable on any number of ranks.

``manifest`` says what a checkpoint must contain, ``folders`` what happens to its folder, ``agreement`` how ranks act as
one, ``store`` puts them together over torch.distributed.checkpoint. Must not know the model, the loop or the launcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.checkpoint.collective import CheckpointError
    from gpt.checkpoint.store import CheckpointStore, Loaded, OutdatedAttemptError

__all__ = ["CheckpointError", "CheckpointStore", "Loaded", "OutdatedAttemptError"]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for: the login node looks into ``folders``, which does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpt.checkpoint import store

    return getattr(store, name)
