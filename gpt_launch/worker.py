"""``launch.worker``, whatever ``import launch`` finds in this process: ``from gpt_launch import worker``.

The module is the same object as ``launch.worker`` if ``launch`` is the project's. If the user has a ``launch.py``, it
is a module of its own.
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
    """Tell whether ``import launch`` finds something else than the project's package."""
    found = sys.modules.get("launch") or importlib.util.find_spec("launch")
    spec = getattr(found, "__spec__", found)
    return spec is None or spec.origin != str(ROOT / "launch" / "__init__.py")


sys.modules[__name__] = importlib.import_module("gpt_launch.launch.worker" if is_shadowed() else "launch.worker")
