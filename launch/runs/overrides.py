"""What was typed to get a run: ``key=value`` words, in Hydra's grammar of overrides.

Owns how a key or a value is found in them, and how they are read back from a run folder. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from launch.runs.folder import RunFolder, typed_key


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """What was typed for ``key``, the last word where it was typed twice; None where it was not."""
    values = [word.split("=", 1)[1] for word in overrides if "=" in word and typed_key(word) == key]
    return values[-1] if values else None


def read_overrides(folder: RunFolder) -> tuple[str, ...]:
    """What was typed to get the run of a folder; nothing where that was not kept."""
    if not folder.overrides.is_file():
        return ()
    return tuple(str(word) for word in yaml.safe_load(folder.overrides.read_text()) or ())
