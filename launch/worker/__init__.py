"""The public API of a rank: a training script reports steps to the launcher and polls for requests to save or stop.

    from launch import worker                   # from gpt_launch import worker, beside a launch.py of your own

    run = worker.attach()
    for step in range(first_step, steps):
        ...
        run.record(step, loss=loss, tokens=tokens)
        if run.stop_requested():
            save(run.checkpoint_dir, step)
            run.saved(step)
            break

The same script runs without the launcher: ``attach`` then returns a stand-in that writes nothing. Standard library
only. docs/scripts.md is the guide; ``gpt.train`` is the first user.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from pathlib import Path

# Relative imports: a rank may load this package as gpt_launch.launch, beside a launch.py of the user's.
from ..process import die_with_parent
from ..runs.heartbeat import ENVIRONMENT
from .run import OutdatedAttemptError, Run, beat_on, is_child, open_heartbeat, register_stacks

__all__ = ["STORE_PREFIX", "OutdatedAttemptError", "Run", "attach", "is_child", "make_run"]

STORE_PREFIX = "LAUNCH_STORE_PREFIX"
"""Variable of an agent's ranks: a secret prefix, the same for all, for their keys in the store at MASTER_PORT."""
RANK_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
"""Variables that torchrun sets too, with what a single process has."""

_attached: Run | None = None


def attach(handle_signals: bool = True) -> Run:
    """Join the launcher as the rank that the environment names. A second call returns the same Run.

    Without the launcher, and in a process that multiprocessing started, the Run is a stand-in: nothing is written, and
    ``stop_requested`` answers by the signals of this process alone. To be called in the main thread, early: from here
    on a request to stop is heard instead of ending the process.

    Args:
        handle_signals: take SIGTERM, SIGUSR2 and SIGINT as requests to stop. Without it the launcher is still heard,
            but the signal that it sends besides is the script's own to handle.
    """
    global _attached
    if _attached is None:
        _attached = make_run(os.environ)
        if handle_signals and not is_child():
            _attached.install_handlers()
        atexit.register(_attached._leave)
        os.register_at_fork(after_in_child=_attached._let_go)
    return _attached


def make_run(environment: Mapping[str, str]) -> Run:
    """Make the Run of the rank that ``environment`` names, with its heartbeat where an agent keeps one."""
    rank, local_rank, size = (int(environment.get(name, str(default))) for name, default in RANK_VARIABLES)
    folder = environment.get("LAUNCH_RUN_DIR")
    if folder is None or is_child():
        return Run(rank, local_rank, size)
    parent = os.getppid()  # before the heartbeat, by which others see this rank: from then on its parent may end
    agent = environment.get("LAUNCH_AGENT_PID")
    grace = environment.get("LAUNCH_GRACE_S")
    heartbeat = open_heartbeat(environment.get(ENVIRONMENT), rank)
    run = Run(rank, local_rank, size, float(grace) if grace else None, heartbeat, agent is not None)
    run.open_folder(Path(folder), int(environment.get("LAUNCH_ATTEMPT", "1")))
    checkpoints = environment.get("LAUNCH_CHECKPOINT_DIR")
    if checkpoints:
        run.checkpoint_dir = Path(checkpoints)
    is_direct = agent is not None and parent == int(agent)
    if agent is not None and is_direct:
        die_with_parent(int(agent))
    if heartbeat is not None:
        register_stacks()
        # A wrapper between agent and rank, as a shell or `uv run`, would leave the rank behind when it is killed.
        wrapper = None if is_direct else parent
        threading.Thread(target=beat_on, args=(heartbeat, wrapper), name="heartbeat", daemon=True).start()
    return run
