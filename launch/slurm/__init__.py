"""All talk with Slurm, and jobs: checked, submitted, followed, stopped and moved."""
