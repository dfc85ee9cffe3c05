"""Overrides of a run as they were typed: ``key=value``, in Hydra's grammar of overrides.

Owns how a key or a value is found in them, and how they are read back from a run folder. Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import yaml

from launch.runs.folder import RunFolder
from launch.runs.renamed import former_keys


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """Value typed for ``key``, of the last override where it was typed twice; None where it was not."""
    names = (key, *former_keys(key))
    values = [override.split("=", 1)[1] for override in overrides if "=" in override and typed_key(override) in names]
    return values[-1] if values else None


def read_overrides(folder: RunFolder) -> tuple[str, ...]:
    """Read the overrides of the run of a folder; nothing where that was not kept."""
    if not folder.overrides.is_file():
        return ()
    return tuple(str(override) for override in yaml.safe_load(folder.overrides.read_text()) or ())


def append_groups(overrides: Iterable[str], groups: Iterable[str] = ("experiment",)) -> list[str]:
    """Overrides in which groups outside the defaults list may be typed without a plus: ``experiment=weak_scaling``."""
    named = tuple(f"{group}=" for group in groups)
    return [f"+{arg}" if arg.startswith(named) else arg for arg in overrides]


NAME_LIMIT = 120  # a folder name holds 255 bytes on common filesystems; leaves room for suffixes


def typed_key(override: str) -> str:
    """The key of an override: ``nodes`` for ``++nodes=2``."""
    return override.split("=", 1)[0].lstrip("+~")


def point_name(overrides: Iterable[str], exclude: Iterable[str]) -> str:
    """Name of a point from what was typed: the same overrides in any order give the same name.

    ``overrides`` are ``key=value`` strings; those whose key, or a parent of it, is in ``exclude`` say where or when
    a run happens, not what it is. Characters that do not belong in a folder name are replaced and the exact text is
    then kept apart by a hash.
    """
    excluded = set(exclude)
    kept = []
    for override in overrides:
        key = typed_key(override)
        parents = {".".join(key.split(".")[: i + 1]) for i in range(len(key.split(".")))}
        if not parents & excluded:
            kept.append(override)
    exact = ",".join(sorted(kept)) or "default"
    name = re.sub(r"[^A-Za-z0-9_=.,+~-]", "_", exact)
    if name == exact and len(name) <= NAME_LIMIT and not name.startswith("."):
        return name
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[:NAME_LIMIT].lstrip('.')}-{digest}"
