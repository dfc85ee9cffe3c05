"""Entry points of the agent for submitit, whose pickles name these functions.

The functions can be imported in a project with its own ``launch.py``, too.
"""

from __future__ import annotations


def run(*run_dirs: str) -> None:
    """Run this node's ranks until the run ends, as ``launch.agent.__main__.run_agent`` does.

    ``run_dirs`` are the folders of the runs that share the Slurm job. Each task of the job is the agent of one of these
    runs (``launch.agent.hosts.take_part``).
    """
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.__main__ import run_agent
    from launch.agent.hosts import take_part

    run_agent(take_part(run_dirs))


def run_spare(run_dir: str, identity: str) -> None:
    """Join the agents of the run in ``run_dir`` from a spare job (``spare_jobs``).

    ``identity`` is JSON that describes the node of the spare job.
    """
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.__main__ import run_spare as join_run

    join_run(run_dir, identity)


def run_step(run_dir: str, job: str, shares: bool) -> None:
    """Run the agents of a run as a step of the Slurm job ``job``, as ``launch.agent.hosts.run_step`` does.

    ``shares`` is True if other steps of the job may use the same nodes at the same time.
    """
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.hosts import run_step as run_in_job

    run_in_job(run_dir, job, shares)
