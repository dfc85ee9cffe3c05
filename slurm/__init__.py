"""Files for Slurm itself: batch scripts for users to edit, and a sandbox cluster on which to try them.

The package does not import the training library, and of the launcher only ``launch.errors``.
"""
