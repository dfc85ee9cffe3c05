"""Checkpoints: saved whole or not at all, verified before they are believed, loadable on any number of ranks.

``manifest`` says what a checkpoint must contain, ``folders`` what happens to its folder, ``agreement`` how ranks act as
one, ``store`` puts them together over torch.distributed.checkpoint. Must not know the model, the loop or the launcher.
"""

from gpt.checkpoint.agreement import CheckpointError
from gpt.checkpoint.store import CheckpointStore, Loaded, OutdatedAttemptError

__all__ = ["CheckpointError", "CheckpointStore", "Loaded", "OutdatedAttemptError"]
