"""Tokenizers: text to token ids and back, and how one is kept beside a corpus and in a run folder.

Owns what every tokenizer can be asked, the two that need no library (bytes and characters), and the folder a tokenizer
is saved in, so that a run can be decoded long after its corpus is gone. Torch-free. Must not know where text comes from
or how tokens are stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpt.config.data import BYTE_VOCAB, TokenizerKind
from launch.errors import ConfigError

Ids = npt.NDArray[np.uint32]
ABOUT = "about.json"


class Tokenizer(Protocol):
    """What every tokenizer can be asked. ``payload`` is all there is to know of it: two with the same are equal."""

    @property
    def kind(self) -> TokenizerKind:
        """Which of the tokenizers it is."""

    @property
    def payload(self) -> bytes:
        """The content of its file; empty where it has nothing to remember."""

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to ``vocab_size - 1``."""

    @property
    def eot(self) -> int | None:
        """The id that ends a document; None where there is none, and documents end in a newline instead."""

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, (N,); special tokens are never added, and their names in the text are just text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no UTF-8, as in a character cut in half, become U+FFFD."""

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """Bytes of UTF-8 each id stands for, (vocab_size,); None where that depends on the ids around it."""


class ByteTokenizer:
    """Tokens are the bytes of UTF-8."""

    kind = TokenizerKind.byte
    payload = b""
    vocab_size = BYTE_VOCAB
    eot = None

    def encode(self, text: str) -> Ids:
        """The bytes of ``text``."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these bytes."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """One each."""
        return np.ones(self.vocab_size, dtype=np.int64)


class CharTokenizer:
    """Tokens are characters (Unicode code points), numbered in their order, as in nanoGPT's shakespeare_char."""

    kind = TokenizerKind.char
    eot = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(characters)
        assert len(set(self.characters)) == len(self.characters), "every character once"

    @property
    def payload(self) -> bytes:
        """The characters as a JSON string, in the order of their ids."""
        return json.dumps(self.characters).encode()

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.characters)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Character -> id."""
        return {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> Ids:
        """The numbers of the characters of ``text``.

        Raises:
            ConfigError: a character that the corpus does not have.
        """
        try:
            return np.fromiter(map(self.ids.__getitem__, text), dtype=np.uint32, count=len(text))
        except KeyError as error:
            raise ConfigError(
                f"the character {error.args[0]!r}, which the corpus of this tokenizer does not have",
                f"one of its {self.vocab_size} characters",
                "a text without it, or another data.tokenizer",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The characters with these numbers."""
        return "".join(self.characters[int(i)] for i in ids)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """One to four each. A lone surrogate, which UTF-8 does not have, counts three."""
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], dtype=np.int64)


FILES = {
    TokenizerKind.byte: None,
    TokenizerKind.char: "characters.json",
    TokenizerKind.sentencepiece: "sentencepiece.model",
    TokenizerKind.hf: "tokenizer.json",
    TokenizerKind.tiktoken: "ranks.json",
}
"""Name of the file that holds the payload."""


def checksum(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give every text the same ids."""
    return hashlib.sha256(tokenizer.kind.name.encode() + b"\0" + tokenizer.payload).hexdigest()
