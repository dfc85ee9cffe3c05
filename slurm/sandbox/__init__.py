"""A real Slurm cluster on one machine, to try and to test launch scripts: ``python -m slurm.sandbox up``."""
