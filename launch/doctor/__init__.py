"""Doctor: finds what commonly breaks a run, before it is submitted: ``python -m launch.doctor``.

The doctor gathers facts, checks them, and can submit a short job that measures the nodes. It changes no run.
"""
