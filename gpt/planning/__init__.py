"""The planner: feasible layouts, memory per rank, step-time estimates, and ``parallel=auto``. Torch-free.

``hardware`` holds what is assumed of a device and its links, ``collectives`` the cost of a collective on them,
``memory`` the memory of a rank. ``communication`` and ``cost`` estimate the time of a step. ``search`` enumerates the
layouts and keeps those that fit, ``auto`` ranks them and takes the first, ``explain`` says why not the others. The
estimates rank layouts and promise no speed: nothing here was measured on the machine in question.
"""
