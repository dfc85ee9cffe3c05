"""The public API of a rank: a training script reports steps to the launcher and polls for requests to save or stop.

    from launch import worker                   # from gpt_launch import worker, if you have your own launch.py

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

from .run import STORE_PREFIX, OutdatedAttemptError, Run, attach, is_child, run_of_environment

__all__ = ["STORE_PREFIX", "OutdatedAttemptError", "Run", "attach", "is_child", "run_of_environment"]
