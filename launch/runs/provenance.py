"""Provenance of an attempt: its code, its libraries, and what has changed since the attempt before.

Owns the fingerprint of our packages' files and the comparison of two records. What counts is the text of the files: a
commit that touches none of them is no change. Torch-free: the login node compares before it submits.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runs.files import read_json
from launch.runs.folder import RunFolder

ROOT = Path(__file__).absolute().parents[2]
"""The folder that the packages of this process lie in."""

PACKAGES = ("gpt", "launch", "slurm", "hydra_plugins", "configs")
SUFFIXES = (".py", ".yaml", ".sh")
ORIGIN = "code.json"
"""In a copy of the code: what it is a copy of."""

LIBRARIES = ("torch", "numpy", "hydra-core", "omegaconf", "submitit", "deepspeed")
GIT_TIMEOUT_S = 10
NAMED = 5


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The files that make a run what it is, tracked by git or not, in the order of their names relative to ``root``."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(paths):
        if path.is_file():
            yield str(path.relative_to(root)), path


def describe_code(
    root: Path = ROOT, files_of: Callable[[Path], Iterable[tuple[str, Path]]] = source_files
) -> dict[str, Any]:
    """Folder of the code, one digest of it, and one for each file.

    Args:
        root: folder of the code, or of a copy.
        files_of: names relative to a root, and paths, of the files that count; those of this project by default.
    """
    files = {name: digest(path.read_bytes()) for name, path in files_of(root)}
    whole = digest("".join(f"{name} {files[name]}\n" for name in files).encode())
    return {"root": str(root), "is_snapshot": (root / ORIGIN).is_file(), "sha256": whole, "files": files}


def digest(content: bytes) -> str:
    """The first half of a SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def install_command(extra: str, root: Path = ROOT) -> str:
    """Return the command that installs an optional extra of this project beside what is there.

    Args:
        extra: its name in pyproject.toml.
        root: folder that the packages lie in: a checkout, or site-packages.
    """
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'gpt-launch[{extra}]'"
    place = "." if root == Path.cwd() else str(root)
    return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"


def code_state(root: Path = ROOT) -> dict[str, str]:
    """Commit and hash of the uncommitted changes of the checkout ``root`` lies in; empty where there is none.

    A copy says what it was copied from.
    """
    origin = root / ORIGIN
    if origin.is_file():
        told = json.loads(origin.read_text())["git"]
        assert isinstance(told, dict)
        return told
    commit = git(root, "rev-parse", "HEAD")
    diff = git(root, "diff", "HEAD")
    if commit is None or diff is None:
        return {}
    return {"commit": commit.decode().strip(), "diff_sha256": hashlib.sha256(diff).hexdigest()}


def git(folder: Path, *args: str) -> bytes | None:
    """Run git; its output, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, as they are installed."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what differs between two attempts' ``environment.json``; what one of them does not say is left out."""
    return [*code_changes(before, now), *library_changes(before.get("software") or {}, now.get("software") or {})]


def code_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The files that differ; commit or uncommitted changes where an older record does not name files."""
    old, new = before.get("git") or {}, now.get("git") or {}
    commits = [str(state.get("commit", "none"))[:12] for state in (old, new)]
    moved = f" (commit {commits[0]} -> {commits[1]})" if commits[0] != commits[1] else ""
    files = (before.get("code") or {}).get("files"), (now.get("code") or {}).get("files")
    if files[0] is not None and files[1] is not None:
        touched = [f"{name} {how(files[0].get(name), files[1].get(name))}" for name in sorted({*files[0], *files[1]})
                   if files[0].get(name) != files[1].get(name)]  # fmt: skip
        more = f" and {len(touched) - NAMED} more" if len(touched) > NAMED else ""
        if touched:
            yield ", ".join(touched[:NAMED]) + more + moved
    elif old and new and old != new:
        yield f"the checkout{moved}" if moved else "uncommitted changes"


def how(before: str | None, now: str | None) -> str:
    """Describe what happened to a file."""
    return "added" if before is None else "removed" if now is None else "changed"


def library_changes(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """The libraries that differ. CUDA and NCCL are known on the nodes only, so one side may not name them.

    The driver is not compared: it is the node's, and a requeued job may get others.
    """
    of_torch = {"cuda", "nccl"} & {*before} & {*now}
    for name in sorted({*before, *now} & {"python", *LIBRARIES} | of_torch):
        if before.get(name) != now.get(name):
            yield f"{name} {before.get(name, 'not installed')} -> {now.get(name, 'not installed')}"


def changed_since(folder: RunFolder, now: dict[str, Any], attempt: int | None = None) -> tuple[int, str] | None:
    """Find what has changed since the attempt before ``attempt``, by default the last, and that attempt's number."""
    earlier = {n: read_json(folder.environment(n)) for n in folder.attempts() if attempt is None or n < attempt}
    there = [number for number, known in earlier.items() if known]
    if not there:
        return None
    texts = changes(earlier[there[-1]], now)
    return (there[-1], "; ".join(texts)) if texts else None


def refuse_change(folder: RunFolder, since: int, what: str) -> None:
    """Raise ConfigError, for ``require_same_code=true``."""
    commit = (read_json(folder.environment(since)).get("git") or {}).get("commit")
    back = f"git checkout {commit[:12]}, " if commit else ""
    raise ConfigError(
        f"since attempt {since} of {folder.path}: {what}",
        "the code and the libraries of that attempt, as require_same_code=true demands",
        f"{back}require_same_code=false to go on with what has changed, or fresh=true for a new folder",
    )
