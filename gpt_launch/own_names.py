"""Import of the project's own packages ``launch``, ``gpt``, ``configs`` and ``slurm``.

Python searches the working directory first, where a user's project may have a ``launch.py`` or a ``gpt/``. Importing
this module gives the project's packages precedence in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from gpt_launch import ROOT

NAMES = ("launch", "gpt", "configs", "slurm")


class OwnNames(MetaPathFinder):
    """Import finder for the project's four packages in ``ROOT``. Python asks it before it searches ``sys.path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the import spec of one of the four packages; None for every other module."""
        return PathFinder.find_spec(fullname, [str(ROOT)]) if path is None and fullname in NAMES else None


sys.meta_path.insert(0, OwnNames())
