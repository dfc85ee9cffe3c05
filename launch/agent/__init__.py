"""The agent: one process on each node, which starts the ranks of a run, watches them, and restarts them."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``launch.agent.run`` under its former name: jobs that were submitted before the move unpickle it by that."""
    if name == "run":
        import launch.agent.main

        return launch.agent.main.run
    raise AttributeError(name)
