"""``gpt-launch`` and ``python -m gpt_launch``: the commands of the project, in any working directory.

gpt-launch -m nodes=1,2,4                   a sweep
gpt-launch status outputs                   any other command of the launcher
torchrun -m gpt_launch gpt.train            a module of the project by its name
"""

from __future__ import annotations

import runpy
import sys

import gpt_launch.own_names  # noqa: F401  # before anything else of the project
from gpt_launch import COMMANDS

OF_THE_LAUNCHER = ("agent", "batch", "move")
"""Commands that the launcher and its batch scripts start, and that users mostly do not type."""
PACKAGES = ("launch.", "gpt.", "slurm.")


def module_of(word: str) -> str | None:
    """Return the full name of the module that ``word``, the first argument, names.

    None if ``word`` is an override or an option of the launcher.
    """
    if "=" in word:
        return None
    return f"launch.{word}" if word in COMMANDS else word if word.startswith(PACKAGES) else None


def main() -> int:
    """Run the command that the first argument names, and return its exit status.

    If the first argument names no command, run ``python -m launch``.
    """
    module = module_of(sys.argv[1]) if len(sys.argv) > 1 else None
    if module is None:
        from launch.__main__ import main as launch

        return launch()
    name = sys.argv.pop(1)
    if name in COMMANDS and name not in OF_THE_LAUNCHER:
        from launch.plan.remote import remote_of, run_remotely

        if remote_of(sys.argv[1:]) is not None:
            return run_remotely(sys.argv[1:], name)
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # A forked rank has imported the module; runpy would warn.
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
