"""Entry point of the agent for submitit, whose pickle names ``run``; also beside a user's own ``launch.py``."""

from __future__ import annotations


def run(run_dir: str) -> None:
    """Run this node's ranks until the run ends, as ``launch.agent.__main__.run_agent`` does."""
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.__main__ import run_agent

    run_agent(run_dir)
