"""The launcher: plans, submits and watches training runs on Slurm or on this machine, and reports their scaling.

    import launch

    job = launch.submit("train.py", nodes=2)

Only ``launch.agent``, which runs on the nodes, imports torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.api import DryRun, Job, JobFailedError, Sweep, jobs, submit, sweep
    from launch.errors import ConfigError

__version__ = "1.0.0"
__all__ = ["ConfigError", "DryRun", "Job", "JobFailedError", "Sweep", "jobs", "submit", "sweep"]


def __getattr__(name: str) -> Any:
    """Return the member ``name`` of the Python API, which is imported at its first use.

    So a rank loads only ``launch.worker``. Raises AttributeError if the API has no such name.
    """
    if name == "ConfigError":
        from launch.errors import ConfigError

        return ConfigError
    if name in __all__:
        from launch import api

        return getattr(api, name)
    raise AttributeError(f"module 'launch' has no attribute {name!r}")
