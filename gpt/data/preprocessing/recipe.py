"""What makes a prepared corpus: the files or the dataset, the tokenizer, the split, the layout, and nothing else.

Owns the identity of a preparation, and what is known of its tokens before there are any. Torch-free and quick: looks
files up and reads none but the tokenizer's. Must not know how the work is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gpt.config import BYTE_VOCAB, DataConfig, Source, TokenizerKind
from gpt.data.formats.prepared import FORMAT
from gpt.data.preprocessing.files import (
    SHAKESPEARE_SHA256,
    CorpusFile,
    file_kind,
    first_bytes,
    pattern_files,
    shakespeare_file,
    stdlib_files,
    text_file,
)
from launch.errors import ConfigError

FIRST_USE_BYTES = 1 << 30
"""More than so much text is prepared beforehand, not while ranks wait for it."""


LISTED_FILES = 20


@dataclass(frozen=True)
class Recipe:
    """All that the tokens of a prepared corpus follow from."""

    config: DataConfig
    kind: str
    """``text``, ``jsonl``, ``jsonl.gz``, ``parquet``, ``dataset`` or ``synthetic``."""
    files: tuple[CorpusFile, ...]
    spec: dict[str, Any]
    """The same for the same tokens; what the manifest records."""

    @property
    def key(self) -> str:
        """Name of the prepared folder: the same as long as the recipe is."""
        return f"{self.config.title}-{hashlib.sha256(json.dumps(self.spec).encode()).hexdigest()[:16]}"

    @property
    def num_bytes(self) -> int:
        """Size of the files that are read."""
        return sum(file.size for file in self.files)

    @property
    def has_documents(self) -> bool:
        """Whether the source says where a document ends; a single text has no such places."""
        return self.kind not in ("text", "synthetic") or len(self.files) > 1

    @property
    def splits_documents(self) -> bool:
        """Whether validation is made of whole documents, picked one by one, instead of the end of a text."""
        return self.kind not in ("text", "synthetic")

    def known_tokens(self) -> tuple[int, int] | None:
        """Training and validation tokens, where that is known without making them: of bytes and of a Markov chain."""
        if self.kind == "synthetic":
            return split_tokens(self.config.synthetic.tokens, self.config.val_fraction)
        if self.kind == "text" and self.config.tokenizer is TokenizerKind.byte:
            return split_tokens(self.num_bytes, self.config.val_fraction)
        return None

    def on_first_use(self) -> bool:
        """Whether training prepares it by itself: quickly done, and nothing that can be refused is left to find out."""
        return self.known_tokens() is not None and self.num_bytes <= FIRST_USE_BYTES


def split_tokens(tokens: int, val_fraction: float) -> tuple[int, int]:
    """Number of training and of validation tokens; the training tokens come first."""
    val = min(tokens, max(1, int(tokens * val_fraction)))
    return tokens - val, val


def recipe_of(config: DataConfig, cache: Path) -> Recipe | None:
    """The recipe of a corpus; None where its text has to be downloaded first.

    Raises:
        ConfigError: the text or the tokenizer's file is not there.
    """
    assert config.source is not Source.tokens, "tokens that are there need no recipe"
    if config.source is Source.synthetic:
        return _recipe(config, "synthetic", (), {"synthetic": _plain(config.synthetic)})
    if config.source is Source.dataset:
        keys = ("dataset", "subset", "train_split", "val_split", "text_key")
        return _recipe(config, "dataset", (), {key: getattr(config, key) for key in keys})
    files = _find_files(config, cache)
    if files is None:
        return None
    kind = file_kind(files[0].path) if config.source is Source.files else "text"
    if kind == "text":
        files = first_bytes(files, config.max_bytes)
    told = _files_spec(files)
    if config.source is Source.shakespeare:  # the same wherever it lies
        told = {"files": [[SHAKESPEARE_SHA256, files[0].size]]}
    if kind in ("jsonl", "jsonl.gz", "parquet"):
        told["text_key"] = config.text_key
    return _recipe(config, kind, files, told)


def _files_spec(files: tuple[CorpusFile, ...]) -> dict[str, Any]:
    """What tells these files from others, without their names where they are many."""
    listed = [[str(f.path), f.size, f.mtime_ns] for f in files]
    if len(files) <= LISTED_FILES:
        return {"files": listed}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(f.size for f in files), "files_sha256": digest}


def _find_files(config: DataConfig, cache: Path) -> tuple[CorpusFile, ...] | None:
    if config.source is Source.stdlib:
        return stdlib_files()
    if config.source is Source.shakespeare:
        found = shakespeare_file(config.path, cache)
        return None if found is None else (found,)
    assert config.path is not None, "DataConfig.validate asks for a path"
    return (text_file(config.path),) if config.source is Source.text else pattern_files(config.path)


def _recipe(config: DataConfig, kind: str, files: tuple[CorpusFile, ...], told: dict[str, Any]) -> Recipe:
    spec = {
        "format": FORMAT,
        "kind": kind,
        **told,
        "tokenizer": None if kind == "synthetic" else _tokenizer_spec(config),
        "max_bytes": config.max_bytes,
        "val_fraction": config.val_fraction,
        "layout": config.layout.name,
    }
    return Recipe(config, kind, files, spec)


def _tokenizer_spec(config: DataConfig) -> dict[str, Any]:
    told: dict[str, Any] = {"kind": config.tokenizer.name}
    if config.tokenizer_path is not None:
        path = Path(config.tokenizer_path).expanduser()
        try:
            told["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer_path={config.tokenizer_path} cannot be read ({error})",
                f"the file of a {config.tokenizer.name} tokenizer",
                "data.tokenizer_path=FILE",
            ) from error
    elif config.tokenizer is TokenizerKind.sentencepiece:
        told |= {"vocab_size": config.tokenizer_vocab_size, "train_bytes": config.tokenizer_train_bytes}
    return told


def known_vocab(config: DataConfig) -> int | None:
    """Ids of the tokens, where that is known before there are any."""
    if config.source is Source.synthetic:
        return config.synthetic.vocab_size
    return BYTE_VOCAB if config.tokenizer is TokenizerKind.byte else None


def prepare_command(config: DataConfig, cache: Path) -> str:
    """What to type to prepare a corpus: its preset, and every key that differs from it."""
    folder = resources.files("configs").joinpath("data")
    preset = folder.joinpath(f"{config.title}.yaml")
    base: Any = OmegaConf.structured(DataConfig)
    name = config.title if preset.is_file() else config.source.name
    text = folder.joinpath(f"{name}.yaml")
    if text.is_file():
        base = OmegaConf.merge(base, OmegaConf.create(text.read_text()))
    default, here = _plain(base), _plain(OmegaConf.structured(config))
    words = [f"data={name}"]
    default["name"], default["cache_dir"] = here["name"], here["cache_dir"]  # told otherwise, or not at all
    words += [f"{key}={value}" for key, value in _changed(default, here, "data.")]
    if cache != Path("outputs/.cache").absolute():
        words.append(f"data.cache_dir={cache}")
    return "python -m gpt.prepare " + " ".join(f"'{w}'" if set(w) & set("*?[]{}, $&;()<>") else w for w in words)


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, enums by their names."""
    node = config if OmegaConf.is_config(config) else OmegaConf.structured(config)
    value = OmegaConf.to_container(node, enum_to_str=True)
    assert isinstance(value, dict)
    return {str(key): inner for key, inner in value.items()}


def _changed(default: dict[str, Any], here: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in here.items():
        if isinstance(value, dict):
            yield from _changed(default[key], value, f"{prefix}{key}.")
        elif value != default.get(key):
            yield prefix + key, "null" if value is None else value


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))
