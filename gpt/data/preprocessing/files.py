"""Lookup of the files of a corpus: the running Python's library, a text, tinyshakespeare, or those a pattern matches.

Owns the refusal of paths that lead nowhere. Torch-free and quick, since the login node asks before it submits: files
are looked up, not read. Must not know of tokens.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import sys
import sysconfig
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpt.data.formats.token_file import glob_files
from launch.errors import ConfigError, closest
from launch.runs.files import write_atomically

# Left out of the corpus of the standard library: other people's packages, tests, programs that happen to be shipped
# with it and are missing from some distributions' packages, and files generated for one machine.
STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"} | {
    "idlelib",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}
STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
DOWNLOAD_TIMEOUT_S = 60
DOCUMENT_SUFFIXES = {".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".parquet": "parquet"}
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z")


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus; size and time of change tell its present content from an older one."""

    path: Path
    size: int
    mtime_ns: int


def text_file(path: str, key: str = "data.path") -> CorpusFile:
    """Look up the text file at ``path``, given by ``key``; a relative path starts at the current folder.

    Raises:
        ConfigError: it is not there, cannot be read, or is empty.
    """
    try:
        text = Path(path).expanduser().absolute()
        status = text.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ConfigError(f"{key}={path} is {kind}", "a text file", _suggestion(key, text))
        with text.open("rb"):
            pass  # permissions are best asked of the filesystem itself
    except FileNotFoundError as error:
        raise ConfigError(
            f"{key}={path}, but there is no {text}", "a text file", _suggestion(key, text.parent, text.name)
        ) from error
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown ~user
        raise unreadable_file_error(Path(path), error) from error
    if not status.st_size:
        raise ConfigError(f"{text} is empty", "a file with text in it", _suggestion(key, text.parent, text.name))
    return CorpusFile(text, status.st_size, status.st_mtime_ns)


def _suggestion(key: str, folder: Path, name: str = "") -> str:
    """Override to type instead of a path that leads to no text: a file beside it, where one looks right."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name != name)
    except OSError:
        names = []
    likely = closest(name, names) if name else [n for n in names if n.endswith(".txt")]
    if likely:
        return f"{key}={shlex.quote(str(folder / likely[0]))}"
    there = next((above for above in (folder, *folder.parents) if above.is_dir()), folder)
    without = "data=stdlib, which needs none" if key == "data.path" else f"{key}=null"
    return f"ls {shlex.quote(str(there))}, and {key}= with a text that is there; or {without}"


def unreadable_file_error(path: Path, error: Exception) -> ConfigError:
    """Refusal of a file that is there and cannot be read."""
    return ConfigError(f"{path} cannot be read ({error})", "a text file this user may read", f"chmod u+r {path}")


def pattern_files(pattern: str, key: str = "data.path") -> tuple[CorpusFile, ...]:
    """List the files that match ``pattern``, given by ``key``, ordered by path, without empty ones.

    ``**`` crosses folders.

    Raises:
        ConfigError: there is none, or they are of several kinds.
    """
    found = glob_files(pattern)
    files = [CorpusFile(p, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]
    files = [file for file in files if file.size]
    if not files:
        raise ConfigError(
            f"{key}={pattern} matches no file with something in it",
            "a pattern of text, .jsonl, .jsonl.gz or .parquet files, in quotes",
            f"'{key}=FOLDER/**/*.jsonl'",
        )
    kinds = sorted({file_kind(file.path) for file in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"{key}={pattern} matches files of several kinds ({', '.join(kinds)})",
            "files of one kind",
            f"'{key}={Path(pattern).parent}/*.{kinds[0] if kinds[0] != 'text' else 'txt'}'",
        )
    return tuple(files)


def file_kind(path: Path) -> str:
    """Kind of a file by its name: ``text``, ``jsonl``, ``jsonl.gz`` or ``parquet``.

    Raises:
        ConfigError: the file is packed in a way that is not read.
    """
    for suffix, kind in DOCUMENT_SUFFIXES.items():
        if path.name.endswith(suffix):
            return kind
    if path.name.endswith(PACKED_SUFFIXES):
        raise ConfigError(
            f"{path} is packed",
            "text, .jsonl, .jsonl.gz or .parquet",
            "the file unpacked, or packed again as .jsonl.gz",
        )
    return "text"


@cache
def stdlib_files() -> tuple[CorpusFile, ...]:
    """List the source files of the running Python's own library, ordered by relative path; looked up once a process."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, CorpusFile] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if _in_stdlib_corpus(s)]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and _in_stdlib_corpus(name) and path.is_file():
                status = path.stat()
                found[path.relative_to(root).as_posix()] = CorpusFile(path, status.st_size, status.st_mtime_ns)
    if not found:
        raise ConfigError(
            f"Python {sys.version.split()[0]} has no library source in {root}",
            "a Python installed with its .py files",
            "data=text data.path=FILE",
        )
    return tuple(found[name] for name in sorted(found))


def _in_stdlib_corpus(name: str) -> bool:
    return name not in STDLIB_SKIPPED_FOLDERS and not name.startswith(STDLIB_SKIPPED_PREFIXES)


def take_bytes(files: Iterable[CorpusFile], limit: int | None) -> tuple[CorpusFile, ...]:
    """Take the first ``limit`` bytes of ``files``, the last one cut short by its ``size``; None takes all."""
    taken, left = [], limit
    for file in files:
        if left is not None and left <= 0:
            break
        size = file.size if left is None else min(file.size, left)
        taken.append(CorpusFile(file.path, size, file.mtime_ns))
        left = None if left is None else left - size
    return tuple(taken)


def shakespeare_file(path: str | None, cache: Path) -> CorpusFile | None:
    """Look up tinyshakespeare at ``path`` or in the cache; None where it has to be downloaded first.

    Raises:
        ConfigError: the local file is another text.
    """
    if path is None:
        cached = cache / SHAKESPEARE_FILE
        return text_file(str(cached)) if cached.is_file() else None
    file = text_file(path)
    refuse_other_shakespeare(file.path.read_bytes(), path)
    return file


def refuse_other_shakespeare(content: bytes, where: str) -> None:
    """Raise ConfigError unless ``content`` is the text on which published losses are measured."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ConfigError(
            f"{where} with {len(content)} bytes and sha256 {found[:12]}... is not tinyshakespeare",
            f"sha256 {SHAKESPEARE_SHA256}",
            "data=text data.path=FILE for a text of your own",
        )


def download_shakespeare(cache: Path, url: str = SHAKESPEARE_URL) -> CorpusFile:
    """Download tinyshakespeare (1.1 MB) into ``cache``.

    Raises:
        ConfigError: there is no network, or what came is another text.
    """
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise ConfigError(
            f"{url} cannot be fetched ({error})",
            "a network, or the file from another machine",
            "data=shakespeare data.path=FILE",
        ) from error
    refuse_other_shakespeare(content, url)
    write_atomically(cache / SHAKESPEARE_FILE, content)
    return text_file(str(cache / SHAKESPEARE_FILE))
