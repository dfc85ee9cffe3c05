"""Doctor: looks for what commonly breaks a run, before it is submitted: ``python -m launch.doctor``.

Owns the gathering of facts, the checks over them, and a short job that measures the nodes. Decides nothing about runs.
"""
