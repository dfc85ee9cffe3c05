"""The launcher: plans, submits and watches training runs on Slurm or on this machine, and reports how they scaled.

Imports no torch, except in ``launch.agent``, which runs on the nodes.
"""

__version__ = "1.0.0"
