"""The project's ``launch.worker``, even if ``import launch`` finds a user's file: ``from gpt_launch import worker``.

If ``launch`` is the project's package, this module is the same object as ``launch.worker``. If the user has a
``launch.py``, this module is a second copy of ``launch/worker``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from gpt_launch import ROOT

if TYPE_CHECKING:
    from launch.worker import *  # noqa: F403


def is_shadowed() -> bool:
    """Return whether ``import launch`` finds another module than the project's package."""
    found = sys.modules.get("launch") or importlib.util.find_spec("launch")
    spec = getattr(found, "__spec__", found)
    return spec is None or spec.origin != str(ROOT / "launch" / "__init__.py")


sys.modules[__name__] = importlib.import_module("gpt_launch.launch.worker" if is_shadowed() else "launch.worker")
