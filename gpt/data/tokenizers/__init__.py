"""Tokenizers, from text to ids and back: their interface, and the two that need no library. Imports no torch."""

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

# Interface of a tokenizer, and the tokenizers of bytes and characters. ``subword`` has those of other libraries.


Ids = npt.NDArray[np.uint32]
ABOUT = "about.json"


class Tokenizer(Protocol):
    """Interface of all tokenizers. Two tokenizers of the same kind with the same ``payload`` are equal."""

    @property
    def kind(self) -> TokenizerKind:
        """Kind of the tokenizer."""

    @property
    def payload(self) -> bytes:
        """Content of the tokenizer's file; empty if the tokenizer has no file."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; they run from 0 to ``vocab_size - 1``."""

    @property
    def eot(self) -> int | None:
        """Id that ends a document; None if the tokenizer has none, and documents end with a newline."""

    def encode(self, text: str) -> Ids:
        """Encode ``text`` as ids, (N,). Special tokens are never added, and their names in the text are plain text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text. Bytes that are no UTF-8, as in a truncated character, become U+FFFD."""

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """Return the UTF-8 bytes of each id, (vocab_size,); None if the number depends on neighboring ids."""


class ByteTokenizer:
    """Tokenizer whose tokens are the bytes of UTF-8."""

    kind = TokenizerKind.byte
    payload = b""
    vocab_size = BYTE_VOCAB
    eot = None

    def encode(self, text: str) -> Ids:
        """Encode ``text`` as its bytes, (N,)."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode bytes. Bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each id, (256,): always one."""
        return np.ones(self.vocab_size, dtype=np.int64)


class CharTokenizer:
    """Tokenizer of characters (Unicode code points), numbered in their order, as in nanoGPT's shakespeare_char."""

    kind = TokenizerKind.char
    eot = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(characters)
        assert len(set(self.characters)) == len(self.characters), "every character once"

    @property
    def payload(self) -> bytes:
        """Characters as a JSON string, in the order of their ids."""
        return json.dumps(self.characters).encode()

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.characters)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Mapping of a character to its id."""
        return {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> Ids:
        """Encode ``text`` as the numbers of its characters, (N,).

        Raises:
            ConfigError: ``text`` has a character that the corpus lacks.
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
        """Decode numbers of characters."""
        return "".join(self.characters[int(i)] for i in ids)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each character, (vocab_size,). A lone surrogate counts three, although UTF-8 cannot
        encode it."""
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], dtype=np.int64)


FILES = {
    TokenizerKind.byte: None,
    TokenizerKind.char: "characters.json",
    TokenizerKind.sentencepiece: "sentencepiece.model",
    TokenizerKind.hf: "tokenizer.json",
    TokenizerKind.tiktoken: "ranks.json",
}
"""Kind of a tokenizer -> name of the file with its payload; None if it has no payload."""


def checksum(tokenizer: Tokenizer) -> str:
    """Return the sha256 of kind and payload. It is equal for tokenizers that give every text the same ids."""
    # The zero byte separates the name from the payload.
    return hashlib.sha256(tokenizer.kind.name.encode() + b"\0" + tokenizer.payload).hexdigest()
