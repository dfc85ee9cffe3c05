"""Entry of the agent for submitit. Its pickle names this function, also for a project with its own ``launch.py``."""

from __future__ import annotations


def run(run_dir: str) -> None:
    """Run this node's ranks until the run ends, as ``launch.agent.__main__.run_agent`` does."""
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.__main__ import run_agent

    run_agent(run_dir)
