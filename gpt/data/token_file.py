"""Token files of nanoGPT, llm.c and Megatron: readers and writers of one sequence of token ids. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.config import TokenFileFormat
from launch.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Lengths = npt.NDArray[np.int64]

# Readers of token files. They read headers only.
#
# - nanoGPT: no header; numpy's ``tofile`` of uint16 (nanoGPT, data/*/prepare.py).
# - llm.c and modded-nanogpt: a header of 256 int32. The first are magic number, version and number of tokens:
#   20240520 and 1 for uint16, 20240801 and 7 for uint32 (llm.c, dev/data/data_common.py).
# - Megatron: the tokens in NAME.bin without a header, and NAME.idx with the width of a token and the length of every
#   sequence (Megatron-LM, megatron/core/datasets/indexed_dataset.py).


ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "int64": 8}
"""Numpy name of an integer type -> its bytes. All files are little-endian."""
HEADERLESS_DTYPE = "uint16"
LLMC_HEADER_BYTES = 1024
LLMC_KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
"""Numpy name of a token's integer type -> magic number and version of the header."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, code of the dtype, number of sequences and of documents
MEGATRON_CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


@dataclass(frozen=True)
class Segment:
    """Part of a token file: ``tokens`` numbers of ``dtype`` from byte ``offset`` on. Can be sent to other ranks."""

    path: Path
    dtype: str
    offset: int
    tokens: int
    file_bytes: int
    """Required size of the whole file, in bytes."""

    def is_whole(self) -> bool:
        """Return True if the file exists with its full size. The check is cheap and runs at every start."""
        try:
            return self.path.stat().st_size == self.file_bytes
        except FileNotFoundError:
            return False

    def slice(self, start: int, stop: int) -> Segment:
        """Return the segment of the tokens from ``start`` up to, but not including, ``stop``."""
        return replace(self, offset=self.offset + start * ITEM_BYTES[self.dtype], tokens=stop - start)


def open_token_files(path: str, dtype: str | None = None, key: str = "data.path") -> tuple[Segment, ...]:
    """Open the token files at ``path``, in the order of their names. ``key`` names the setting in messages.

    Raises:
        ConfigError: no file exists, or a file is invalid.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return (read_token_file(place, dtype),)
    if place.with_name(f"{place.name}.idx").is_file():
        return (read_token_file(place.with_name(f"{place.name}.bin"), dtype),)
    shards = [shard for shard in glob_files(path) if shard.suffix != ".idx" and shard.is_file()]
    if not shards:
        raise missing_tokens_error(path, place, key)
    return tuple(read_token_file(shard, dtype) for shard in shards)


def missing_tokens_error(path: str, place: Path, key: str = "data.path") -> ConfigError:
    """Return the error for a path, set by ``key``, without token files."""
    return ConfigError(
        f"{key}={path}, but there are no tokens in {place}",
        "a folder of gpt.prepare, a .bin file, a Megatron prefix, or a pattern of shards",
        f"{key}=FOLDER",
    )


def read_token_file(path: Path, dtype: str | None = None) -> Segment:
    """Read the header of a token file and recognize its format. ``dtype`` is for files without a header.

    Raises:
        ConfigError: the file cannot be read, or its size contradicts its header.
    """
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    try:
        size = path.stat().st_size
        index = path.with_suffix(".idx")
        if index.is_file():
            return _read_megatron(path, index, size)
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error})", "a token file this user may read", "data.path=FILE"
        ) from error
    if len(head) == 12:
        magic, version, tokens = struct.unpack("<iii", head)
        for kind, (known, its_version) in LLMC_KINDS.items():
            if magic == known:
                return _read_llmc(path, size, kind, version == its_version, tokens)
    return _whole_file(path, size, dtype or HEADERLESS_DTYPE)


def _whole_file(path: Path, size: int, dtype: str) -> Segment:
    if size % ITEM_BYTES[dtype] or not size:
        raise ConfigError(
            f"{path} has {size} bytes, which are not whole {dtype} tokens",
            f"a file of {dtype} without a header (or with that of llm.c, or an .idx beside it)",
            "data.token_dtype=uint8 (or uint16, uint32), or another file",
        )
    return Segment(path, dtype, 0, size // ITEM_BYTES[dtype], size)


def _read_llmc(path: Path, size: int, dtype: str, known_version: bool, tokens: int) -> Segment:
    expected = LLMC_HEADER_BYTES + tokens * ITEM_BYTES[dtype]
    if not known_version or tokens < 1 or size != expected:
        raise ConfigError(
            f"{path} has the header of llm.c for {tokens} {dtype} tokens, and {size} bytes",
            f"version {LLMC_KINDS[dtype][1]} and {expected} bytes",
            "the file copied again: it was cut short, or is none of tokens",
        )
    return Segment(path, dtype, LLMC_HEADER_BYTES, tokens, size)


def _read_megatron(path: Path, index: Path, size: int) -> Segment:
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEADER.size)
    magic, version, code, sequences, documents = MEGATRON_HEADER.unpack(head.ljust(MEGATRON_HEADER.size, b"\0"))
    dtype = next((name for name, its_code in MEGATRON_CODES.items() if its_code == code), None)
    expected = MEGATRON_HEADER.size + 12 * sequences + 8 * documents
    # Multimodal indices have one more byte for each sequence.
    whole = index.stat().st_size in (expected, expected + sequences)
    if magic != MEGATRON_MAGIC or version != 1 or dtype is None or not whole:
        raise ConfigError(
            f"{index} is no whole index of Megatron: version {version}, dtype code {code}, {sequences} sequences",
            f"{MEGATRON_MAGIC!r}, version 1, a dtype code among {sorted(MEGATRON_CODES.values())}, {expected} bytes",
            f"the two files copied again, or {path} moved to a folder of its own, where it has no index",
        )
    return _whole_file(path, size, dtype)


def split_end(segments: tuple[Segment, ...], tokens: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Split off the last ``tokens`` tokens. Return the segments before them, and the segments that contain them."""
    before: list[Segment] = []
    after: list[Segment] = []
    left = tokens
    for segment in reversed(segments):
        taken = min(left, segment.tokens)
        if taken < segment.tokens:
            before.insert(0, segment.slice(0, segment.tokens - taken))
        if taken:
            after.insert(0, segment.slice(segment.tokens - taken, segment.tokens))
        left -= taken
    return tuple(before), tuple(after)


def glob_files(pattern: str) -> list[Path]:
    """List the paths that an absolute or relative ``pattern`` matches, sorted."""
    place = Path(pattern).expanduser().absolute()
    # Path.glob accepts only relative patterns.
    return sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))


# Writers of token files: one split in the format of nanoGPT, llm.c or Megatron. They keep one piece in memory at a
# time.


LLMC_SHARD_TOKENS = 100_000_000  # as in llm.c's fineweb.py
MEGATRON_SEQUENCE_LIMIT = 1 << 31  # lengths are int32
UINT16_VOCAB = 1 << 16


@dataclass(frozen=True)
class WrittenFile:
    """Entry of one file of a split in the manifest."""

    name: str
    tokens: int
    """Number of tokens; 0 for a file without tokens, such as an index."""
    size: int
    sha256: str


def token_dtype(layout: TokenFileFormat, vocab_size: int) -> str:
    """Choose the integer type of a token: 16 bits if the vocabulary allows. Megatron has no unsigned 32 bits."""
    if vocab_size <= UINT16_VOCAB:
        return "uint16"
    return "int32" if layout is TokenFileFormat.megatron else "uint32"


def write_split(
    layout: TokenFileFormat, stem: Path, dtype: str, tokens: int, chunks: Iterable[bytes], lengths: Lengths
) -> list[WrittenFile]:
    """Write the files of one split.

    Args:
        layout: the format of the files.
        stem: folder and beginning of the file names, such as ``FOLDER/train``.
        dtype: numpy name of a token's integer.
        tokens: number of tokens in ``chunks``; llm.c writes it into a header.
        chunks: the tokens, as little-endian ``dtype``.
        lengths: tokens of each document, in order, (documents,); used by Megatron's index only.
    """
    if layout is TokenFileFormat.llmc:
        return list(_write_llmc(stem, dtype, tokens, chunks))
    written = [_write_file(stem.with_suffix(".bin"), chunks, tokens)]
    assert written[0].size == tokens * ITEM_BYTES[dtype], f"{stem}: {written[0].size} bytes for {tokens} tokens"
    if layout is TokenFileFormat.megatron:
        written.append(_write_file(stem.with_suffix(".idx"), _megatron_index(dtype, lengths), 0))
    return written


def _write_file(path: Path, chunks: Iterable[bytes | memoryview], tokens: int) -> WrittenFile:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, tokens, size, digest.hexdigest())


def _write_llmc(stem: Path, dtype: str, tokens: int, chunks: Iterable[bytes]) -> Iterator[WrittenFile]:
    more, rest = iter(chunks), memoryview(b"")

    def shard(count: int) -> Iterator[bytes | memoryview]:
        nonlocal rest
        yield struct.pack("<iii", *LLMC_KINDS[dtype], count).ljust(LLMC_HEADER_BYTES, b"\0")
        left = count * ITEM_BYTES[dtype]
        while left:
            rest = rest or memoryview(next(more))
            piece, rest = rest[:left], rest[left:]
            left -= len(piece)
            yield piece

    for number, first in enumerate(range(0, max(1, tokens), LLMC_SHARD_TOKENS)):
        count = min(tokens - first, LLMC_SHARD_TOKENS)
        yield _write_file(stem.with_name(f"{stem.name}_{number:06d}.bin"), shard(count), count)


def _megatron_index(dtype: str, lengths: Lengths) -> Iterator[bytes]:
    """Yield Megatron's index, in which every document is one sequence."""
    import numpy as np  # imported here, so that the look-up of a corpus stays quick

    if lengths.max(initial=0) >= MEGATRON_SEQUENCE_LIMIT:
        raise ConfigError(
            f"data.layout=megatron with a document of {lengths.max():,} tokens",
            f"documents of less than {MEGATRON_SEQUENCE_LIMIT:,} tokens, which the format has room for",
            "data.layout=llmc",
        )
    after = np.cumsum(lengths)
    yield MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, MEGATRON_CODES[dtype], len(lengths), len(lengths) + 1)
    yield lengths.astype("<i4").tobytes()
    yield ((after - lengths) * ITEM_BYTES[dtype]).astype("<i8").tobytes()
    yield np.arange(len(lengths) + 1).astype("<i8").tobytes()
