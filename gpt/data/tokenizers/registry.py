"""Saving and loading of tokenizers of every kind. Imports no torch, and a tokenizer's library only for that tokenizer.

A tokenizer is saved next to its corpus and in the run folder. So the tokens of a run can be decoded after its corpus is
gone.
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
    """Return the description of a tokenizer in manifests and ``about.json``: kind, vocab_size, eot and checksum."""
    return {
        "kind": tokenizer.kind.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "checksum": checksum(tokenizer),
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer into ``folder``. ``about.json`` comes last, so a folder with it is complete."""
    name = FILES[tokenizer.kind]
    if name is not None:
        write_atomically(folder / name, tokenizer.payload)
    write_json(folder / ABOUT, describe_tokenizer(tokenizer))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer saved in ``folder``.

    Raises:
        ConfigError: the tokenizer is missing or damaged, or its library is not installed.
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
    """Build the tokenizer of ``kind`` from ``payload``, the content of its file."""
    if kind is TokenizerKind.byte:
        return ByteTokenizer()
    if kind is TokenizerKind.char:
        return CharTokenizer(json.loads(payload))
    from gpt.data.tokenizers import subword  # imports the libraries of the extra

    return subword.from_payload(kind, payload)


def load_run_tokenizer(folder: RunFolder) -> Tokenizer:
    """Load the tokenizer of a run, which every run keeps in its folder.

    Raises:
        ConfigError: the run has none, as with token files made by another program.
    """
    return load_tokenizer(folder.tokenizer)
