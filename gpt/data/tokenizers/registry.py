"""Saving and loading of tokenizers of every kind.

Owns the folder a tokenizer is saved in, beside a corpus and in a run folder, so that a run can be decoded long after
its corpus is gone. Torch-free; loads a tokenizer's library only for that tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

from gpt.config.data import TokenizerKind
from gpt.data.tokenizers import ABOUT, FILES, ByteTokenizer, CharTokenizer, Tokenizer, checksum
from launch.errors import ConfigError
from launch.runs.files import write_atomically, write_json
from launch.runs.folder import RunFolder


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str | int | None]:
    """Describe a tokenizer as manifests and ``about.json`` do: kind, vocab_size, eot and checksum."""
    return {
        "kind": tokenizer.kind.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "checksum": checksum(tokenizer),
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer into ``folder``; ``about.json`` comes last, so that a folder with it is whole."""
    name = FILES[tokenizer.kind]
    if name is not None:
        write_atomically(folder / name, tokenizer.payload)
    write_json(folder / ABOUT, describe_tokenizer(tokenizer))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer saved in ``folder``.

    Raises:
        ConfigError: there is none, it was damaged, or its library is not installed.
    """
    try:
        saved = json.loads((folder / ABOUT).read_bytes())
        kind = TokenizerKind[saved["kind"]]
        name = FILES[kind]
        payload = b"" if name is None else (folder / name).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer in {folder} ({type(error).__name__}: {error})",
            "a folder that a preparation or a run has saved its tokenizer in",
            "python -m gpt.prepare data=NAME, or the folder of another run",
        ) from error
    tokenizer = from_payload(kind, payload)
    if checksum(tokenizer) != saved["checksum"]:
        raise ConfigError(
            f"the tokenizer in {folder} is not the one that was saved there (its checksum differs)",
            f"sha256 {saved['checksum']}",
            "the file from a backup, or python -m gpt.prepare data=NAME again",
        )
    return tokenizer


def from_payload(kind: TokenizerKind, payload: bytes) -> Tokenizer:
    """Build the tokenizer of ``kind`` whose file holds ``payload``."""
    if kind is TokenizerKind.byte:
        return ByteTokenizer()
    if kind is TokenizerKind.char:
        return CharTokenizer(json.loads(payload))
    from gpt.data.tokenizers import subword  # imports the libraries of the extra, which bytes and characters need not

    return subword.from_payload(kind, payload)


def load_run_tokenizer(folder: RunFolder) -> Tokenizer:
    """Load the tokenizer a run was trained with, which every run keeps in its folder.

    Raises:
        ConfigError: the run does not know it, as with token files that somebody else has made.
    """
    return load_tokenizer(folder.tokenizer)
