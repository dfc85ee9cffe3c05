"""A real Slurm cluster on one machine, for trying launch scripts and for testing them: ``python -m slurm.sandbox up``.

Owns the cluster's processes, network and state directory. Must not know what runs on the cluster.
"""
