"""The chaos drill: one run with seeded faults, compared with an undisturbed run.

Imports neither the sandbox nor torch.
"""
