"""The agent as submitit calls it: its pickle names this function, so it is found beside a ``launch.py`` too."""

from __future__ import annotations


def run(run_dir: str) -> None:
    """Run this node's ranks of a run to their end; ``launch.agent.main.run``."""
    import gpt_launch.own_names  # noqa: F401
    from launch.agent import main

    main.run(run_dir)
