"""Code of a script: the files that make it what it is, for the copy and the record of a run. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launch.runs.provenance import ORIGIN, git

CODE_SUFFIXES = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".sh", ".txt", ".md", ".ini")
HIDDEN = ("__pycache__", "outputs", "node_modules", "wandb")
MAX_FILES = 5000
"""A folder with more files than this, and no git, is not the folder of a program: only the script itself counts."""


def code_files(script: str | None, root: Path) -> Iterator[tuple[str, Path]]:
    """The files of a program's folder that make it what it is: what git tracks, and code that it does not ignore.

    In a copy, which has no git, these are all files.
    """
    if (root / ORIGIN).is_file():
        # A program that runs from it leaves compiled files there.
        paths = (path for path in root.rglob("*") if path.name != ORIGIN and "__pycache__" not in path.parts)
        names = [str(path.relative_to(root)) for path in paths]
    else:
        names = git_names(root) or folder_names(root) or ([Path(script).name] if script else [])
    for name in sorted(set(names)):
        if (root / name).is_file():
            yield name, root / name


def git_names(root: Path) -> list[str]:
    """Files of a checkout: those that git tracks, and code that it neither tracks nor ignores."""
    tracked = git(root, "ls-files", "-z")
    others = git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if not tracked and not others:
        return []
    new = [name for name in (others or b"").decode().split("\0") if name.endswith(CODE_SUFFIXES)]
    return [name for name in [*(tracked or b"").decode().split("\0"), *new] if name]


def folder_names(root: Path) -> list[str]:
    """Code below a folder that is no checkout; nothing where it holds too many files to be one program."""
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in HIDDEN]
        found += [str((Path(folder) / name).relative_to(root)) for name in files if name.endswith(CODE_SUFFIXES)]
        if len(found) > MAX_FILES:
            return []
    return found
