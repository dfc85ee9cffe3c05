"""Preprocessing spec: the inputs that determine the tokens of a corpus. Imports no torch.

The login node makes the spec before it submits a run, so this must be quick. Therefore the content of the corpus is not
read. Of each corpus file, the spec has size and time of change; of the tokenizer, the content of its file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gpt.components import source_digest
from gpt.config import DataConfig, Source, TokenizerKind
from gpt.config.data import SUCCESSORS
from gpt.data.prepared import FORMAT, glob_files, refuse_shared_files, split_tokens
from launch.errors import ConfigError
from launch.runs.compose import flatten
from launch.runs.folder import write_atomically

# Look-up of the files of a corpus: the running Python's library, a text, tinyshakespeare, or files that match a
# pattern.


# Excluded from the corpus of the standard library: third-party packages, tests, programs that some distributions do not
# package, and files generated for one machine.
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
    """A file of a corpus. A change of its size or time means that its content has changed."""

    path: Path
    size: int
    """Number of bytes to read: the whole file, or its first bytes."""
    mtime_ns: int
    """Unix time of the last change of the file, in nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> CorpusFile:
        """Return the file at ``path`` with its present size and time of change."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


def text_file(path: str, key: str = "data.path") -> CorpusFile:
    """Return the text file at ``path``. A relative path starts at the current folder. ``key`` is the key of the config
    that has the path, for messages.

    Raises:
        ConfigError: the file is missing, unreadable or empty.
    """
    text = Path(path)
    try:
        text = text.expanduser().absolute()
        found = CorpusFile.of(text)
        if not text.is_file() or not found.size:
            raise ConfigError(f"{key}={path}, which is no file with text in it", "a text file", f"{key}=FILE")
        with text.open("rb"):
            pass  # only the filesystem itself knows the permissions
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown ~user
        raise ConfigError(
            f"{text} cannot be read ({error})", "a text file this user may read", f"{key}=FILE"
        ) from error
    return found


def pattern_files(pattern: str, key: str = "data.path") -> tuple[CorpusFile, ...]:
    """Return the files that match a pattern and are not empty, ordered by path. ``**`` in the pattern matches any
    folders. ``key`` is the key of the config that has the pattern, for messages.

    Raises:
        ConfigError: no file matches, or the files are of several kinds.
    """
    files = [file for file in map(CorpusFile.of, filter(Path.is_file, glob_files(pattern))) if file.size]
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
    """Return the kind of a file by the end of its name: ``jsonl``, ``jsonl.gz`` or ``parquet``, else ``text``.

    Raises:
        ConfigError: the compression of the file is not supported.
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
    """Return the source files of the running Python's own library, ordered by relative path. Cached in the process."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, CorpusFile] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if _in_stdlib_corpus(s)]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and _in_stdlib_corpus(name) and path.is_file():
                found[path.relative_to(root).as_posix()] = CorpusFile.of(path)
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
    """Return the files that have the first ``limit`` bytes of all ``files`` together. The ``size`` of the last file is
    reduced if necessary. A limit of None returns all files."""
    taken, left = [], sys.maxsize if limit is None else limit
    for file in files:
        if left > 0:
            taken.append(replace(file, size=min(file.size, left)))
        left -= file.size
    return tuple(taken)


def refuse_other_shakespeare(content: bytes, where: str) -> None:
    """Raise ConfigError unless ``content`` is tinyshakespeare, on which published losses are measured. ``where`` is its
    path or URL."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ConfigError(
            f"{where} with {len(content)} bytes and sha256 {found[:12]}... is not tinyshakespeare",
            f"sha256 {SHAKESPEARE_SHA256}",
            "data=text data.path=FILE for a text of your own",
        )


def download_shakespeare(cache: Path, url: str = SHAKESPEARE_URL) -> None:
    """Download tinyshakespeare (1.1 MB) into ``cache``.

    Raises:
        ConfigError: the network fails, or the downloaded text is not tinyshakespeare.
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


# Preprocessing spec: files or dataset, tokenizer, split and file format.


FIRST_USE_BYTES = 1 << 30
"""Largest text, in bytes, that training prepares while its ranks wait. Larger texts must be prepared before."""
TRAIN_SPLIT = "train"
"""Split of a dataset on which a run trains."""
TOKENIZER_TRAIN_BYTES = 100_000_000
"""Largest number of bytes of the training text with which a SentencePiece model is trained."""
LISTED_FILES = 20
"""Largest number of files that a manifest lists by name. For more files it records number, size and one checksum."""


@dataclass(frozen=True)
class PreprocessingSpec:
    """Inputs that determine the tokens of a prepared corpus."""

    config: DataConfig
    kind: str
    """Kind of the source: ``text``, ``jsonl``, ``jsonl.gz``, ``parquet``, ``dataset``, ``synthetic`` or ``custom``."""
    files: tuple[CorpusFile, ...]
    """Files of the source; empty for a dataset, a Markov chain or a user's source."""
    identity: dict[str, Any]
    """The inputs as plain JSON, which the manifest has under the key ``spec``. Equal identities mean equal tokens."""
    val_files: tuple[CorpusFile, ...] = ()
    """Files of ``data.val_path``. If empty, a share of the corpus is used for validation."""

    @property
    def key(self) -> str:
        """Name of the prepared folder: the name of the corpus, and a hash of ``identity``."""
        return f"{self.config.title}-{hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:16]}"

    @property
    def num_bytes(self) -> int:
        """Total size of the files to read, in bytes."""
        return sum(file.size for file in (*self.files, *self.val_files))

    @property
    def has_documents(self) -> bool:
        """True if the source has ends of documents. A single text, or one text per split, has none."""
        return self.kind not in ("text", "synthetic") or max(len(self.files), len(self.val_files)) > 1

    @property
    def splits_documents(self) -> bool:
        """True if validation takes single whole documents, instead of the end of a text."""
        return self.kind not in ("text", "synthetic")

    def known_tokens(self) -> tuple[int, int] | None:
        """Return the numbers of training and of validation tokens, if they are known before the text is tokenized: for
        bytes of text files, and for a Markov chain. Otherwise None."""
        if self.kind == "synthetic":
            return split_tokens(self.config.synthetic.tokens, self.config.val_fraction)
        if self.kind == "text" and self.config.tokenizer is TokenizerKind.byte:
            if self.val_files:
                return sum(file.size for file in self.files), sum(file.size for file in self.val_files)
            return split_tokens(self.num_bytes, self.config.val_fraction)
        return None


def build_spec(config: DataConfig, cache: Path) -> PreprocessingSpec | None:
    """Return the preprocessing spec of a corpus; None if its text must be downloaded first. ``cache`` is the folder of
    the prepared corpora.

    Raises:
        ConfigError: the text or the tokenizer's file is missing.
    """
    assert config.source is not Source.tokens, "token files are not preprocessed"
    if config.source is Source.synthetic:
        chain = {
            "vocab_size": config.synthetic.vocab_size,
            "successors": SUCCESSORS,
            "tokens": config.synthetic.tokens,
            "seed": 0,
        }
        return _make_spec(config, "synthetic", (), {"synthetic": chain})
    if config.source is Source.dataset:
        dataset, subset = config.dataset_and_subset
        identity: dict[str, Any] = {
            "dataset": dataset,
            "subset": subset,
            "train_split": TRAIN_SPLIT,
            "val_split": config.val_split,
            "text_key": config.text_key,
        }
        if revision_of(config) is not None:  # omitted if None, so that corpora prepared by earlier versions are found
            identity["revision"] = revision_of(config)
        return _make_spec(config, "dataset", (), identity)
    if isinstance(config.source, str):
        identity = {
            "source": config.source,
            "source_sha256": source_digest("data.source", config.source),
            "options": dict(config.options),
        }
        return _make_spec(config, "custom", (), identity)
    files = _find_files(config, cache)
    if files is None:
        return None
    kind = file_kind(files[0].path) if config.source is Source.files else "text"
    if kind == "text":
        # Documents are cut at their ends during tokenization. A text can be cut here.
        files = take_bytes(files, config.max_bytes)
    source = _identify_files(files)
    if config.source is Source.shakespeare:  # the text is the same in any folder, so path and time do not count
        source = {"files": [[SHAKESPEARE_SHA256, files[0].size]]}
    if kind in ("jsonl", "jsonl.gz", "parquet"):
        source["text_key"] = config.text_key
    return _make_spec(config, kind, files, source, _find_val_files(config, files, kind))


def _find_val_files(config: DataConfig, files: tuple[CorpusFile, ...], kind: str) -> tuple[CorpusFile, ...]:
    """Return the files of ``data.val_path``. Raise ConfigError if one is also a training file, or is of another
    kind."""
    if config.val_path is None:
        return ()
    if config.source is Source.text:
        found: tuple[CorpusFile, ...] = (text_file(config.val_path, "data.val_path"),)
    else:
        found = pattern_files(config.val_path, "data.val_path")
        other = file_kind(found[0].path)
        if other != kind:
            raise ConfigError(
                f"data.val_path={config.val_path} with files of {other}, and data.path={config.path} of {kind}",
                "files of one kind, which are read and tokenized alike",
                f"'data.val_path=FOLDER/*.{'txt' if kind == 'text' else kind}'",
            )
    refuse_shared_files(config, [file.path for file in files], [file.path for file in found])
    return found


def revision_of(config: DataConfig) -> str | None:
    """Return the revision of a dataset on the hub; None for a local folder, which has no revision."""
    return None if config.dataset is None or Path(config.dataset).expanduser().is_dir() else config.revision


def _identify_files(files: tuple[CorpusFile, ...]) -> dict[str, Any]:
    """Return an identity of files, as plain JSON: path, size and time of change of each. For more than ``LISTED_FILES``
    files: their number, total size, and a checksum of all these values."""
    listed = [[str(f.path), f.size, f.mtime_ns] for f in files]
    if len(files) <= LISTED_FILES:
        return {"files": listed}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(f.size for f in files), "files_sha256": digest}


def _find_files(config: DataConfig, cache: Path) -> tuple[CorpusFile, ...] | None:
    """Return the training files of a source; None if tinyshakespeare must be downloaded first."""
    if config.source is Source.stdlib:
        return stdlib_files()
    if config.source is Source.shakespeare and config.path is None:
        cached = cache / SHAKESPEARE_FILE
        return (text_file(str(cached)),) if cached.is_file() else None
    assert config.path is not None, "DataConfig.validate asks for a path"
    if config.source is Source.files:
        return pattern_files(config.path)
    found = text_file(config.path)
    if config.source is Source.shakespeare:
        refuse_other_shakespeare(found.path.read_bytes(), config.path)
    return (found,)


def _make_spec(
    config: DataConfig,
    kind: str,
    files: tuple[CorpusFile, ...],
    source: dict[str, Any],
    val_files: tuple[CorpusFile, ...] = (),
) -> PreprocessingSpec:
    identity = {
        "format": FORMAT,
        "kind": kind,
        **source,
        "tokenizer": None if kind == "synthetic" else _identify_tokenizer(config),
        "max_bytes": config.max_bytes,
        "val_fraction": config.val_fraction,
        "layout": config.layout.name,
    }
    if val_files:  # the key is omitted without validation files, so that corpora prepared by earlier versions are found
        identity |= {"validation": _identify_files(val_files), "val_fraction": None}
    if config.conversation_tokens is not None:
        identity["conversation_tokens"] = config.conversation_tokens
        if kind == "text":
            raise ConfigError(
                f"data.path={config.path}, files of text",
                "files with a conversation in each line or row: .jsonl, .jsonl.gz or .parquet",
                "'data.path=FOLDER/*.jsonl'",
            )
    return PreprocessingSpec(config, kind, files, identity, val_files)


def _identify_tokenizer(config: DataConfig) -> dict[str, Any]:
    identity: dict[str, Any] = {"kind": config.tokenizer.name}
    if config.tokenizer_path is not None:
        path = Path(config.tokenizer_path).expanduser()
        try:
            if config.conversation_tokens is None:
                content = path.read_bytes()
            else:
                from gpt.data.tokenizers import read_with_chat  # imports numpy, which the login node rarely needs

                content = read_with_chat(path)
            identity["sha256"] = hashlib.sha256(content).hexdigest()
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer_path={config.tokenizer_path} cannot be read ({error})",
                f"the file of a {config.tokenizer.name} tokenizer",
                "data.tokenizer_path=FILE",
            ) from error
    elif config.tokenizer is TokenizerKind.sentencepiece:
        # A model to be trained is identified by its training text.
        identity |= {"vocab_size": config.tokenizer_vocab_size, "train_bytes": TOKENIZER_TRAIN_BYTES}
    return identity


def prepare_command(config: DataConfig, cache: Path) -> str:
    """Return the command of gpt.prepare for a corpus, as text: its preset, and every key that differs from the
    preset."""
    folder = resources.files("configs").joinpath("data")
    kind = "custom" if isinstance(config.source, str) else config.source.name
    name = config.title if folder.joinpath(f"{config.title}.yaml").is_file() else kind
    preset = OmegaConf.create(folder.joinpath(f"{name}.yaml").read_text())
    # The preset sets the name. The folder is added below only if it is not the default.
    same = {"name": config.name, "cache_dir": config.cache_dir}
    default = flatten(_plain(OmegaConf.merge(OmegaConf.structured(DataConfig), preset, same)))
    values = flatten(_plain(config))
    changed = {key: value for key, value in values.items() if value != default.get(key)}
    if changed.get("tokenizer") == TokenizerKind.sentencepiece.name and config.tokenizer_path is None:
        changed["tokenizer_vocab_size"] = values["tokenizer_vocab_size"]  # the default, too: it is a part of the model
    args = [f"data={name}", *(f"data.{key}={'null' if value is None else value}" for key, value in changed.items())]
    if cache != Path("outputs/.cache").absolute():
        args.append(f"data.cache_dir={cache}")
    # Quote everything that a shell or Hydra's grammar would split.
    return "python -m gpt.prepare " + " ".join(f"'{a}'" if set(a) & set("*?[]{}, $&;()<>") else a for a in args)


def _plain(config: Any) -> dict[str, Any]:
    """Return a config as a dictionary of plain values. An enum member becomes its name."""
    node = config if OmegaConf.is_config(config) else OmegaConf.structured(config)
    value = OmegaConf.to_container(node, enum_to_str=True)
    assert isinstance(value, dict)
    return {str(key): inner for key, inner in value.items()}
