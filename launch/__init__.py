"""The launcher: plans, submits and watches training runs on Slurm or on this machine, and reports their scaling.

Only ``launch.agent``, which runs on the nodes, imports torch.
"""

__version__ = "1.0.0"
