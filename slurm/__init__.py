"""Files for Slurm itself: batch scripts for users to edit, and a sandbox cluster to try them on.

The package imports neither the training library nor the launcher.
"""
