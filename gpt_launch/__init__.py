"""The one name of this project that no other project has.

    gpt-launch -m nodes=1,2,4             the launcher, as ``python -m launch`` in the checkout
    gpt-launch status outputs             ``python -m launch.status outputs``
    python -m gpt_launch gpt.train        ``python -m gpt.train``
    from gpt_launch import worker         ``from launch import worker``, in a script beside a ``launch.py`` of its own

The folders of the project are called launch, gpt, configs and slurm, and so are files in the projects of many users.
Agents, ranks and batch scripts therefore start as ``python -m gpt_launch``, which imports ``gpt_launch.own_names``
first. A rank that runs the user's script must not do that, since the script may import its own ``launch.py``:
``gpt_launch.worker`` is found by another way, through ``__path__`` below.
"""

from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
"""The folder that holds the folders of the project: the checkout, or site-packages."""

# Makes the folder launch importable as gpt_launch.launch. Only the modules that a rank needs can be imported by that
# name, because they import each other relatively; all others are imported as launch.
__path__.append(str(ROOT))
