"""Planner: valid layouts, memory per rank, step-time estimates, and ``parallel=auto``. Imports no torch.

``hardware`` has the assumptions about a device and its links, and the cost of collectives. ``shards`` computes the
shard of each parameter and the saved activations, ``memory`` the memory of a rank, and ``cost`` the time of a step.
``search`` enumerates the layouts, keeps those that fit, and explains the rest. ``auto`` ranks them and chooses the
first. The estimates serve to rank layouts; they are not measurements of the machine.
"""
