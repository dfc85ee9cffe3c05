"""Package with a name that no other project has, under which users can start and import this project.

    gpt-launch -m nodes=1,2,4             the launcher, as ``python -m launch`` in the checkout
    gpt-launch status outputs             ``python -m launch.status outputs``
    python -m gpt_launch gpt.train        ``python -m gpt.train``
    from gpt_launch import worker         ``from launch import worker``, in a project with its own ``launch.py``

Many users have files with the names of this project's folders: launch, gpt, configs and slurm. Agents, ranks and batch
scripts therefore start as ``python -m gpt_launch``, which imports ``gpt_launch.own_names`` first. A rank that runs the
user's script must not import ``own_names``, since the script may import its own ``launch.py``. So
``gpt_launch.worker`` is found in another way, through ``__path__`` below.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
"""Folder that contains the project's packages: the checkout, or site-packages."""

COMMANDS = (
    *("status", "why", "logs", "cancel", "attach", "report", "verify", "doctor", "project", "keys", "storm"),
    *("bench_network", "fleet", "trace", "agent", "batch", "move"),
)
"""Names of the launcher's commands. Each is the module ``launch.NAME``."""

# Makes the folder launch importable as gpt_launch.launch. Only the modules that a rank needs can be imported by that
# name, because they import each other relatively; all others are imported as launch.
__path__.append(str(ROOT))


def as_typed(text: str) -> str:
    """Return ``text`` with each command of the launcher in the form in which the user can type it.

    If ``gpt-launch`` or ``python -m gpt_launch`` started this process, each ``python -m launch`` becomes
    ``gpt-launch``, because the user's project may have a ``launch.py``, which ``python -m launch`` would run. If
    another command started this process, ``text`` is returned unchanged.
    """
    if Path(sys.orig_argv[0] if len(sys.orig_argv) < 2 else sys.orig_argv[1]).name != "gpt-launch" and (
        sys.orig_argv[1:3] != ["-m", "gpt_launch"]
    ):
        return text
    return re.sub(r"python -m launch(?:\.(\w+))?", lambda found: " ".join(filter(None, ("gpt-launch", found[1]))), text)
