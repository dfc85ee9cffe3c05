"""Token files of nanoGPT, llm.c and Megatron, prepared folders and their manifests, and the token sources of a run.

Imports no torch, and reads only manifests and headers.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpt.config import DataConfig, Pack, WeightedPath
from launch.errors import ConfigError

# Readers of token files. They read headers only.
#
# - nanoGPT: no header; numpy's ``tofile`` of uint16 (nanoGPT, data/*/prepare.py).
# - llm.c and modded-nanogpt: a header of 256 int32. The first are magic number, version and number of tokens:
#   20240520 and 1 for uint16, 20240801 and 7 for uint32 (llm.c, dev/data/data_common.py).
# - Megatron: the tokens in NAME.bin without a header, and NAME.idx with the width of a token and the length of every
#   sequence (Megatron-LM, megatron/core/datasets/indexed_dataset.py).


ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "int64": 8}
"""Numpy name of an integer type -> bytes of a number. All files are little-endian."""
HEADERLESS_DTYPE = "uint16"
LLMC_HEADER_BYTES = 1024
LLMC_KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
"""Numpy name of a token's integer type -> the magic number and the version in the header of a file of llm.c."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, code of the dtype, number of sequences and of documents
MEGATRON_CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens in a file."""

    path: Path
    dtype: str
    """Numpy name of the integer type of a token."""
    offset: int
    """Byte of the file at which the first token begins."""
    tokens: int
    """Number of tokens."""
    file_bytes: int
    """Size that the whole file must have, in bytes."""

    def is_whole(self) -> bool:
        """Return True if the file exists and has the size ``file_bytes``."""
        try:
            return self.path.stat().st_size == self.file_bytes
        except FileNotFoundError:
            return False

    def slice(self, start: int, stop: int) -> Segment:
        """Return the segment with the tokens of this one from index ``start`` up to, but not including, ``stop``."""
        return replace(self, offset=self.offset + start * ITEM_BYTES[self.dtype], tokens=stop - start)


def open_token_files(path: str, dtype: str | None = None, key: str = "data.path") -> tuple[Segment, ...]:
    """Return the tokens of all token files that ``path`` names, in the order of the names of the files.

    Args:
        path: a file, the prefix of the two files of Megatron, or a pattern of files.
        dtype: numpy name of the integer type in files without a header; None means uint16.
        key: key of the config that has the path, for messages.

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
    """Return the error that no token files were found. ``place`` is the path where they were expected, and ``path`` the
    value of the config's key ``key`` that has led there."""
    return ConfigError(
        f"{key}={path}, but there are no tokens in {place}",
        "a folder of gpt.prepare, a .bin file, a Megatron prefix, or a pattern of shards",
        f"{key}=FOLDER",
    )


def read_token_file(path: Path, dtype: str | None = None) -> Segment:
    """Return the tokens of a token file, whose format is recognized by its header. Only the header is read.

    ``dtype`` is the numpy name of the integer type in files without a header; None means uint16.

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


def split_tokens(tokens: int, val_fraction: float) -> tuple[int, int]:
    """Return the numbers of training and of validation tokens into which ``tokens`` tokens are split. The validation
    tokens are the last ones, at least one."""
    val = min(tokens, max(1, int(tokens * val_fraction)))
    return tokens - val, val


def split_end(segments: tuple[Segment, ...], tokens: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Split segments before their last ``tokens`` tokens. Return the segments of the tokens before, and those of the
    last tokens."""
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
    """Return the paths that a pattern matches, sorted. A relative pattern starts at the current folder."""
    place = Path(pattern).expanduser().absolute()
    # Path.glob accepts only relative patterns.
    return sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))


# Sources of a run: prepared folders and their manifests, other token files, and mixtures.


FORMAT = 2
KIND_BIT = 28
"""Number of bits of a token's id in a file of conversations. The higher bits of the token have its kind: 0 for tokens
of answers, else ``NEW_DOCUMENT`` or ``CONTEXT``."""
NEW_DOCUMENT, CONTEXT = 1, 2
"""Kinds of tokens that the loss ignores as targets: the first token of a conversation, and other tokens outside of
answers. As a target such a token is replaced by its kind with a minus sign."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "val")
FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True)
class Split:
    """Training or validation tokens of a source."""

    segments: tuple[Segment, ...]
    num_bytes: int | None = None
    """Bytes of the text from which the tokens were made; None if unknown."""
    documents: int | None = None
    """Number of documents; None for a text without documents, or if unknown."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the split."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True)
class TokenSource:
    """A tokenized corpus: its token files, tokenizer and checksum."""

    name: str
    folder: Path | None
    """The prepared folder; None for token files made by another program."""
    train: Split
    val: Split
    vocab_size: int | None
    """Number of token ids; None for token files made by another program."""
    tokenizer: dict[str, Any] | None
    """Description of the tokenizer of the corpus, a result of ``describe_tokenizer``; None without a tokenizer, or if
    unknown."""
    sha256: str
    """SHA-256 of the token files of a prepared folder; for token files made by another program, of the name, size,
    beginning and end of each file."""
    entropy: float | None = None
    """Lowest possible loss of any model, in nats per token; None if unknown."""
    weight: int = 1
    """Weight in a mixture of sources."""
    conversation_tokens: int | None = None
    """``data.conversation_tokens`` with which conversations were prepared; None for texts. Tokens of conversations have
    kinds (``KIND_BIT``)."""

    @property
    def is_streamed(self) -> bool:
        """True if the training tokens are made during training (``data.stream``), and are in no file."""
        return self.tokenizer is not None and not self.train.segments

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the source's tokenizer; None if unknown."""
        return None if self.folder is None or self.tokenizer is None else self.folder / TOKENIZER


@dataclass(frozen=True)
class Tokens:
    """Tokens of a run: one source, or a mixture of several."""

    sources: tuple[TokenSource, ...]

    @property
    def are_conversations(self) -> bool:
        """True if the sources are conversations, whose tokens have kinds."""
        return self.sources[0].conversation_tokens is not None

    @property
    def sha256(self) -> str:
        """Checksum of the data, including the weights of a mixture."""
        if len(self.sources) == 1:
            return self.sources[0].sha256
        return _digest([[source.sha256, source.weight] for source in self.sources])

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that all sources share; None if no source has one."""
        return next((s.tokenizer_folder for s in self.sources if s.tokenizer_folder is not None), None)

    def as_dict(self) -> list[dict[str, Any]]:
        """Return a list of the sources as plain JSON, for ``environment.json``."""
        return [
            {
                "name": source.name,
                "weight": source.weight,
                "train_tokens": None if source.is_streamed else source.train.tokens,
                "val_tokens": source.val.tokens,
                "tokenizer": source.tokenizer,
                "entropy": source.entropy,
                "sha256": source.sha256,
            }
            for source in self.sources
        ]


def find_document_end(config: DataConfig, tokens: Tokens | None) -> int | None:
    """Return the id of the token that ends a document, for packing; None if documents are not packed, or if they are
    conversations, which need no such token.

    ``tokens`` are the opened tokens of the corpus; None for a text that is not tokenized yet, which has no such token.

    Raises:
        ConfigError: documents are packed, and no such token is known.
    """
    is_known = config.document_end is not None or (tokens is not None and tokens.are_conversations)
    if config.pack is Pack.none or is_known:
        return config.document_end
    ends = {
        None if source.tokenizer is None or source.train.documents is None else source.tokenizer["eot"]
        for source in (tokens.sources if tokens is not None else ())
    }
    end = ends.pop() if len(ends) == 1 else None
    if end is None:
        raise ConfigError(
            f"data.pack=documents with data={config.title}, whose tokens do not show where a document ends",
            "a corpus prepared from documents, by a tokenizer with a token for their end; or the id of that token",
            "data.document_end=ID, or data.pack=none",
        )
    return end


def read_corpus_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a prepared folder; None if it is missing, or of another version."""
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
        return value if value["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_folder(folder: Path, identity: dict[str, Any] | None = None) -> TokenSource | None:
    """Return the corpus in a prepared folder; None if it does not exist, or a file is missing or truncated.

    If ``identity`` is given, also None if the corpus was prepared with another ``PreprocessingSpec.identity``.
    """
    manifest = read_corpus_manifest(folder)
    if manifest is None or (identity is not None and manifest["spec"] != identity):
        return None
    splits = {}
    try:
        for name in SPLITS:
            split = manifest["splits"][name]
            listed = [file for file in split["files"] if file["tokens"]]  # an index has no tokens
            files = [read_token_file(folder / file["name"], manifest["dtype"]) for file in listed]
            if [file.tokens for file in files] != [file["tokens"] for file in listed]:
                return None
            splits[name] = Split(tuple(files), split["bytes"], split["documents"])
    except ConfigError:
        return None
    return TokenSource(
        name=manifest["name"],
        folder=folder,
        train=splits["train"],
        val=splits["val"],
        vocab_size=manifest["vocab_size"],
        tokenizer=manifest["tokenizer"],
        sha256=manifest["sha256"],
        entropy=manifest["entropy"],
        conversation_tokens=manifest["spec"].get("conversation_tokens"),
    )


def open_tokens(config: DataConfig) -> Tokens:
    """Return the tokens of ``data=tokens``: the source ``data.path``, or the mixture ``data.sources``.

    Raises:
        ConfigError: a source is missing, or the sources have different tokenizers.
    """
    paths = config.sources or [WeightedPath(str(config.path))]
    weights = whole_weights([source.weight for source in paths])
    sources = [_open_source(source.path, config, weight) for source, weight in zip(paths, weights, strict=True)]
    _refuse_other_tokenizers(sources)
    return Tokens(tuple(sources))


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers with the same proportions as ``weights``. The float 0.1 counts as exactly a
    tenth.

    If the sum of these numbers exceeds 2^30, each is rounded to a billionth of the sum, but never to zero.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # through the text, because the float 0.1 is no exact tenth
    assert exact and min(exact) > 0, "DataConfig.validate asks for it"
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    whole = [w // math.gcd(*whole) for w in whole]
    if sum(whole) > 1 << 30:  # products of two sums must fit into 63 bits
        whole = [max(1, round(f / sum(exact) * 10**9)) for f in exact]
    return tuple(whole)


def _open_source(path: str, config: DataConfig, weight: int) -> TokenSource:
    place = Path(path).expanduser().absolute()
    if place.is_dir() and config.val_path:
        raise ConfigError(
            f"data.val_path={config.val_path} with the folder data.path={path}",
            "the folder, which has tokens to validate on, or files for each",
            f"data.val_path=null, or data.path={place}/train.bin",
        )
    if (place / MANIFEST).is_file():
        prepared = open_folder(place)
        if prepared is None:
            raise ConfigError(
                f"{place} has a manifest, but its files are missing, cut short, or of another version",
                "the folder as gpt.prepare has left it",
                f"python -m gpt.prepare ... --output {place}, after the folder is moved away",
            )
        return replace(prepared, weight=weight)
    dtype = config.token_dtype.name if config.token_dtype else None
    train, val = _foreign_splits(place, path, config, dtype)
    return TokenSource(
        name=place.name,
        folder=None,
        train=Split(train),
        val=Split(val),
        vocab_size=None,
        tokenizer=None,
        sha256=_digest([[s.path.name, s.offset, s.tokens, _fingerprint(s.path)] for s in (*train, *val)]),
        weight=weight,
    )


def _foreign_splits(
    place: Path, path: str, config: DataConfig, dtype: str | None
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the training and the validation segments of token files that another program has made.

    In a folder they are train.bin and val.bin. Otherwise they are the files of ``path`` and those of ``data.val_path``.
    Without ``data.val_path`` a val.bin next to a single train.bin is used, or else the last tokens of the files.

    Args:
        place: absolute path of ``path``.
        path: ``data.path``, or the path of a source of a mixture.
        config: config of the corpus.
        dtype: numpy name of the integer type in files without a header; None means uint16.

    Raises:
        ConfigError: a file is missing or invalid, or is in both splits.
    """
    if place.is_dir():
        pair = [place / "train.bin", place / "val.bin"]
        if not all(p.is_file() for p in pair):
            raise missing_tokens_error(path, place / "train.bin")
        return (read_token_file(pair[0], dtype),), (read_token_file(pair[1], dtype),)
    train = open_token_files(path, dtype)
    if config.val_path:
        val = open_token_files(config.val_path, dtype, "data.val_path")
        refuse_shared_files(config, [segment.path for segment in train], [segment.path for segment in val])
        return train, val
    beside = train[0].path.with_name("val.bin")
    if len(train) == 1 and train[0].path.name == "train.bin" and beside.is_file():
        return train, (read_token_file(beside, dtype),)
    return split_end(train, split_tokens(sum(segment.tokens for segment in train), config.val_fraction)[1])


def refuse_shared_files(config: DataConfig, train: Sequence[Path], val: Sequence[Path]) -> None:
    """Raise ConfigError if a path is in both ``train`` and ``val``."""
    both = sorted({path.resolve() for path in train} & {path.resolve() for path in val})
    if both:
        raise ConfigError(
            f"{both[0]} is in data.path={config.path} and in data.val_path={config.val_path}",
            "other files to validate on than to train on",
            "data.val_path=null, which keeps a part of the training files, or another data.val_path",
        )


def _refuse_other_tokenizers(sources: Sequence[TokenSource]) -> None:
    known = [(source.name, source.tokenizer) for source in sources if source.tokenizer is not None]
    if len({tokenizer["checksum"] for _, tokenizer in known}) > 1:
        raise ConfigError(
            "a mixture with several tokenizers: "
            + ", ".join(f"{name} {found['kind']} ({found['checksum'][:12]})" for name, found in known),
            "one tokenizer for all sources of a mixture",
            "python -m gpt.prepare ... data.tokenizer_path=FILE, the tokenizer of one of the sources",
        )


def largest_id_seen(source: TokenSource) -> int:
    """Return the largest token id in the first and the last 65,536 bytes of every file of a source. Ids elsewhere in
    the files may be larger."""
    import numpy as np  # imported here, so that the look-up of a corpus of bytes stays quick

    largest = 0
    for segment in (*source.train.segments, *source.val.segments):
        width = ITEM_BYTES[segment.dtype]
        count = min(segment.tokens, FINGERPRINT_BYTES // width)
        for first in {segment.offset, segment.offset + (segment.tokens - count) * width}:
            ids = np.fromfile(segment.path, dtype=np.dtype(segment.dtype).newbyteorder("<"), count=count, offset=first)
            largest = max(largest, int(ids.max(initial=0)))
    return largest


def _fingerprint(path: Path) -> str:
    """Return the sha256 of a file's size, first and last 65,536 bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        tail = file.read()
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
