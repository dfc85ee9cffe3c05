"""Planner: valid layouts, memory per rank, step-time estimates, and ``parallel=auto``. Imports no torch.

``hardware`` has the assumptions about a device and its links, and the cost of collectives. ``memory`` computes the
memory of a rank, and ``cost`` estimates the time of a step. ``search`` enumerates the layouts, keeps those that fit,
and explains the rest. ``auto`` ranks them and chooses the first. ``execution`` resolves precision and compilation. The
estimates serve to rank layouts; they are not measurements of the machine.
"""
