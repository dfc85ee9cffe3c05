"""What text a run trains on: which files, how much of them, and where training ends and validation begins.

Owns the sources and everything that can be refused before a start. Torch-free and quick, since the login node asks
it before submitting. Must not know how tokens become batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.config import DataConfig, Source, closest
from gpt.data.token_file import TOKENIZER, TokenFile, open_or_write
from gpt.errors import ConfigError

CHUNK_BYTES = 1 << 20

# Left out of the standard library: other people's packages, tests, programs that happen to be shipped with it and are
# missing from some distributions' packages, and files generated for one machine.
STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"} | {
    "idlelib",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}
STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus and what tells its present content from an older one."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """A text as it lies there now. A token is a byte; validation is the last part of the text."""

    source: Source
    files: tuple[CorpusFile, ...]
    tokens: int
    train_tokens: int
    val_tokens: int

    @property
    def key(self) -> str:
        """Name of the token file: the same as long as the files and the amount taken of them are the same."""
        content = [TOKENIZER, self.tokens, [(str(f.path), f.size, f.mtime_ns) for f in self.files]]
        return f"{self.source.value}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"


def describe(config: DataConfig) -> Corpus:
    """Look up the corpus without reading it; a relative ``data.path`` starts at the current folder.

    Raises:
        ConfigError: it is not there, cannot be read, or holds nothing.
    """
    files = _stdlib_files() if config.source is Source.stdlib else (_text_file(config.path),)
    taken, tokens = [], 0
    for file in files:
        if config.max_bytes is not None and tokens >= config.max_bytes:
            break
        taken.append(file)
        tokens += file.size
    if config.max_bytes is not None:
        tokens = min(tokens, config.max_bytes)
    if not tokens:
        raise ConfigError(f"{files[0].path} is empty", "a file with text in it", "data=text data.path=FILE")
    train, val = split_tokens(tokens, config.val_fraction)
    return Corpus(config.source, tuple(taken), tokens, train, val)


def split_tokens(tokens: int, val_fraction: float) -> tuple[int, int]:
    """Number of training and of validation tokens; the training tokens come first."""
    val = min(tokens, max(1, int(tokens * val_fraction)))
    return tokens - val, val


def num_windows(tokens: int, block_size: int) -> int:
    """Samples in a split: windows of ``block_size`` tokens that do not overlap, each with its next token as target."""
    return max(0, (tokens - 1) // block_size)


def check_size(corpus: Corpus, block_size: int, eval_sequences: int = 1) -> None:
    """Raise ConfigError unless both splits hold the samples that are asked of them."""
    val_samples = num_windows(corpus.val_tokens, block_size)
    if not num_windows(corpus.train_tokens, block_size) or not val_samples:
        smaller = max(1, min(corpus.train_tokens, corpus.val_tokens) - 1)
        raise ConfigError(
            f"a corpus of {corpus.train_tokens} training and {corpus.val_tokens} validation tokens",
            f"at least model.block_size + 1 = {block_size + 1} tokens in each",
            f"a longer text, or model.block_size={smaller}",
        )
    if eval_sequences > val_samples:
        raise ConfigError(
            f"eval.sequences={eval_sequences}, but {corpus.val_tokens} validation tokens make {val_samples}"
            f" sequences of {block_size}",
            "an evaluation that uses no sequence twice",
            f"eval.sequences={val_samples} (or a larger data.val_fraction)",
        )


def prepare(config: DataConfig, cache_dir: Path) -> TokenFile:
    """The token file of the corpus, written into ``cache_dir`` by the first caller and found there by all others.

    Raises:
        ConfigError: as ``describe`` does; the folder cannot be written; the text changed while it was read.
    """
    corpus = describe(config)
    try:
        return open_or_write(cache_dir, corpus.key, corpus.tokens, corpus.source.value, lambda: _read(corpus))
    except (OSError, NotImplementedError) as error:  # the latter from filelock, on filesystems without locks
        raise ConfigError(
            f"the token file cannot be written in {cache_dir} ({error})",
            "a folder with room that all nodes share",
            "data.cache_dir=FOLDER",
        ) from error


def _read(corpus: Corpus) -> Iterator[bytes]:
    """The text in pieces of bounded size."""
    left = corpus.tokens
    for file in corpus.files:
        expected = min(file.size, left)
        got = 0
        try:
            with file.path.open("rb") as stream:
                while got < expected and (chunk := stream.read(min(CHUNK_BYTES, expected - got))):
                    got += len(chunk)
                    yield chunk
            changed = got < expected or file.path.stat().st_mtime_ns != file.mtime_ns
        except OSError as error:
            raise _unreadable(file.path, error) from error
        if changed:
            raise ConfigError(
                f"{file.path} changed while it was read", "a text that holds still", "the same command again"
            )
        left -= expected


def _text_file(path: str | None) -> CorpusFile:
    assert path is not None, "DataConfig.validate asks for a path"
    try:
        text = Path(path).expanduser().absolute()
        status = text.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ConfigError(f"data.path={path} is {kind}", "a text file", _suggestion(text))
        with text.open("rb"):
            pass  # permissions are best asked of the filesystem itself
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.path={path}, but there is no {text}", "a text file", _suggestion(text.parent, text.name)
        ) from error
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown ~user
        raise _unreadable(Path(path), error) from error
    return CorpusFile(text, status.st_size, status.st_mtime_ns)


def _suggestion(folder: Path, name: str = "") -> str:
    """What to type for a path that does not lead to a text: a file beside it, where one looks right."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        names = []
    likely = closest(name, names) if name else [n for n in names if n.endswith(".txt")]
    return f"data.path={folder / likely[0]}" if likely else "data.path=FILE"


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({error})", "a text file this user may read", f"chmod u+r {path}")


def _stdlib_files() -> tuple[CorpusFile, ...]:
    """Source files of the running Python's own library, in the order of their relative paths."""
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
