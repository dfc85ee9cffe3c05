"""Writers of token files: one split in the format of nanoGPT, llm.c or Megatron.

Owns the bytes of these files (described in ``gpt.data.formats.token_file``, which reads them). Streams: holds one
piece at a time. Must not know where tokens come from; writes into a folder that nobody reads yet.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from gpt.config import TokenFileFormat
from gpt.data.formats.token_file import (
    ITEM_BYTES,
    LLMC_HEADER_BYTES,
    LLMC_KINDS,
    MEGATRON_CODES,
    MEGATRON_HEADER,
    MEGATRON_MAGIC,
)
from gpt.data.tokenizers.base import CharTokenizer, Tokenizer

LLMC_SHARD_TOKENS = 100_000_000  # as in llm.c's fineweb.py
MEGATRON_SEQUENCE_LIMIT = 1 << 30  # lengths are int32
UINT16_VOCAB = 1 << 16

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WrittenFile:
    """Entry of the manifest for one file of a split."""

    name: str
    tokens: int
    """Number of tokens; 0 for a file that holds none, such as an index."""
    size: int
    sha256: str


def token_dtype(layout: TokenFileFormat, vocab_size: int) -> str:
    """Choose the integer that holds a token: 16 bits where the vocabulary allows; Megatron knows no unsigned 32."""
    if vocab_size <= UINT16_VOCAB:
        return "uint16"
    return "int32" if layout is TokenFileFormat.megatron else "uint32"


def write_split(
    layout: TokenFileFormat,
    folder: Path,
    split: str,
    dtype: str,
    tokens: int,
    chunks: Iterable[bytes],
    lengths: Iterable[Lengths],
) -> list[WrittenFile]:
    """Write the files of ``split`` into ``folder``.

    Args:
        layout: the format of the files.
        split: ``train`` or ``val``, the beginning of their names.
        dtype: numpy name of a token's integer.
        tokens: number of tokens in ``chunks``; llm.c has it in a header before them.
        chunks: the tokens, as little-endian ``dtype``.
        lengths: tokens of each document, in order; used by Megatron's index only.
    """
    if layout is TokenFileFormat.llmc:
        return list(_write_llmc(folder, split, dtype, tokens, chunks))
    written = [_write_file(folder / f"{split}.bin", chunks, dtype)]
    if layout is TokenFileFormat.megatron:
        written.append(_write_file(folder / f"{split}.idx", _megatron_index(dtype, lengths), None))
    assert written[0].tokens == tokens, f"{split}: {written[0].tokens} tokens, expected {tokens}"
    return written


def write_meta(folder: Path, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Write nanoGPT's ``meta.pkl``: its train.py takes the vocabulary from it, its sample.py the characters."""
    meta: dict[str, object] = {"vocab_size": vocab_size}
    if isinstance(tokenizer, CharTokenizer):
        meta |= {"stoi": dict(tokenizer.ids), "itos": dict(enumerate(tokenizer.characters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=4))  # any Python since 3.4 reads it


class _HashedFile:
    """A file whose sha256 is computed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def _write_file(path: Path, chunks: Iterable[bytes], dtype: str | None) -> WrittenFile:
    file = _HashedFile(path)
    for chunk in chunks:
        file.write(chunk)
    return WrittenFile(path.name, file.size // ITEM_BYTES[dtype] if dtype else 0, file.size, file.close())


def _write_llmc(folder: Path, split: str, dtype: str, tokens: int, chunks: Iterable[bytes]) -> Iterator[WrittenFile]:
    magic, version = LLMC_KINDS[dtype]
    portions, left, number = _Portions(chunks), tokens, 0
    while left or not number:
        count = min(left, LLMC_SHARD_TOKENS)
        path = folder / f"{split}_{number:06d}.bin"
        file = _HashedFile(path)
        file.write(struct.pack("<iii", magic, version, count).ljust(LLMC_HEADER_BYTES, b"\0"))
        for piece in portions.take(count * ITEM_BYTES[dtype]):
            file.write(piece)
        yield WrittenFile(path.name, count, file.size, file.close())
        left, number = left - count, number + 1


class _Portions:
    """The bytes of ``chunks``, taken in portions of any size without joining them in memory."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def take(self, size: int) -> Iterator[memoryview]:
        """Yield exactly ``size`` bytes, in pieces."""
        while size:
            if not self._rest:
                self._rest = memoryview(next(self._chunks))
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            yield piece


def _megatron_index(dtype: str, lengths: Iterable[Lengths]) -> Iterator[bytes]:
    """Yield Megatron's index: every document is a sequence of its own; one too long for the format is several."""
    sizes = np.concatenate([np.zeros(0, dtype=np.int64), *lengths])
    counts = np.maximum(1, -(-sizes // MEGATRON_SEQUENCE_LIMIT))
    if (counts > 1).any():
        sizes = np.concatenate([_split_length(size, count) for size, count in zip(sizes, counts, strict=True)])
    yield MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, MEGATRON_CODES[dtype], len(sizes), len(counts) + 1)
    yield sizes.astype("<i4").tobytes()
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
    yield (starts * ITEM_BYTES[dtype]).astype("<i8").tobytes()
    yield np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]).astype("<i8").tobytes()


def _split_length(size: int, count: int) -> Lengths:
    """Split a length into ``count`` parts within the limit."""
    parts = np.full(count, MEGATRON_SEQUENCE_LIMIT, dtype=np.int64)
    parts[-1] = size - MEGATRON_SEQUENCE_LIMIT * (count - 1)
    return parts
