"""All communication with Slurm, and jobs: checked, submitted, followed, stopped and moved."""
