"""``python -m launch.bench_network``: latency and bandwidth of each collective within a node and between nodes.

A short run of the launcher's own, here or on Slurm, whose ranks measure; the fits are written into a file that
``launch.project --network`` and ``cluster.network`` read. No torch on the login node.
"""
