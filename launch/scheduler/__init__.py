"""All talk with Slurm: its commands, its limits, and the one parser of what it prints."""
