"""Checks for requests that Slurm would refuse, or never start: pure functions over its limits and a request."""
