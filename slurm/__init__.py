"""Files for Slurm itself: batch scripts that a user edits, and a sandbox cluster to try them on.

Knows nothing of training or of the launcher.
"""
