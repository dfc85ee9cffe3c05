"""The schema of the corpus. Torch-free; its values are in ``configs/data``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from gpt.config.checks import require_positive, require_range
from gpt.errors import ConfigError

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


BYTE_VOCAB = 256


class Source(Enum):
    """Where the text comes from: the running Python's own library source, or a text file of the user's."""

    stdlib = "stdlib"
    text = "text"


class TokenizerKind(Enum):
    """What a token is: a byte, a character, or a piece of a word that one of three libraries has learned."""

    byte = "byte"
    char = "char"
    sentencepiece = "sentencepiece"
    hf = "hf"
    tiktoken = "tiktoken"


@dataclass
class DataConfig:
    """The corpus. Tokens are bytes: 256 ids, nothing to download."""

    source: Source = MISSING
    path: Optional[str] = None
    """The text file; source=text only."""
    max_bytes: Optional[int] = None
    """Read at most so many bytes of the corpus; null reads all of it."""
    val_fraction: float = 0.1
    """Share of the corpus, at its end, that is kept for validation."""
    cache_dir: Optional[str] = None
    """Where the token file is written once; null means <output_dir>/.cache. Shared by all nodes."""

    def validate(self) -> None:
        """Raise ConfigError where the corpus is not fully described."""
        if self.source is Source.text and not self.path:
            raise ConfigError("data=text without data.path", "the path of a text file", "data=text data.path=FILE")
        require_range("data.val_fraction", self.val_fraction, 0.001, 0.5)
        if self.max_bytes is not None:
            require_positive("data.max_bytes", self.max_bytes)
