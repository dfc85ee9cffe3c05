"""The agent for submitit: its pickle names this function, which a project with its own ``launch.py`` finds too."""

from __future__ import annotations


def run(run_dir: str) -> None:
    """Run this node's ranks of a run to their end; ``launch.agent.__main__.run``."""
    import gpt_launch.own_names  # noqa: F401
    from launch.agent.__main__ import run as run_agent

    run_agent(run_dir)
