"""Token sources of a run: prepared folders and their manifests, other token files, and mixtures.

Imports no torch, and reads only manifests and headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpt.config import DataConfig, Pack, WeightedPath
from gpt.data.token_file import ITEM_BYTES, Segment, missing_tokens_error, open_token_files, read_token_file, split_end
from launch.errors import ConfigError

FORMAT = 2
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

    @property
    def tokens(self) -> int:
        """Number of tokens of the split."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True)
class TokenSource:
    """One tokenized corpus. Can be sent to other ranks."""

    name: str
    folder: Path | None
    """The prepared folder; None for token files made by another program."""
    train: Split
    val: Split
    vocab_size: int | None
    """Number of token ids; None for token files made by another program."""
    tokenizer: dict[str, Any] | None
    """Description of its tokenizer, as ``gpt.data.tokenizers.describe_tokenizer`` returns it."""
    sha256: str
    """Checksum of the data. For a prepared folder, it does not depend on where the folder was prepared.

    For token files made by another program, it covers each file's name, size, beginning and end.
    """
    entropy: float | None = None
    """Lowest possible loss of any model, in nats per token; None if unknown."""
    weight: int = 1

    @property
    def is_streamed(self) -> bool:
        """True if training makes its tokens itself. A prepared folder always has training tokens."""
        return self.tokenizer is not None and not self.train.segments

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the source's tokenizer; None if unknown."""
        return None if self.folder is None or self.tokenizer is None else self.folder / TOKENIZER


@dataclass(frozen=True)
class Tokens:
    """Tokens of a run: one source, or several with weights. Can be sent to other ranks."""

    sources: tuple[TokenSource, ...]

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
        """List the sources as ``environment.json`` records them."""
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
    """Return the id of the token that ends a document; None without packing.

    ``tokens`` is None for a text that is tokenized at its first use; such a text has no token that ends a document.

    Raises:
        ConfigError: documents are packed, and no such token is known.
    """
    if config.pack is Pack.none or config.document_end is not None:
        return config.document_end
    ends = {end_of_source(source) for source in (tokens.sources if tokens is not None else ())}
    end = ends.pop() if len(ends) == 1 else None
    if end is None:
        raise ConfigError(
            f"data.pack=documents with data={config.title}, whose tokens do not show where a document ends",
            "a corpus prepared from documents, by a tokenizer with a token for their end; or the id of that token",
            "data.document_end=ID, or data.pack=none",
        )
    return end


def end_of_source(source: TokenSource) -> int | None:
    """Return the id that ends each document of a source; None if the source has no documents, or no such id."""
    return None if source.tokenizer is None or source.train.documents is None else source.tokenizer["eot"]


def read_corpus_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a prepared folder; None if it is missing, or has another version."""
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
        return value if value["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_folder(folder: Path, identity: dict[str, Any] | None = None) -> TokenSource | None:
    """Open a prepared corpus; None if it does not exist, one of its files is missing or truncated, or its spec has
    another ``identity`` than the given one."""
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
    )


def open_tokens(config: DataConfig) -> Tokens:
    """Open the sources of ``data=tokens``.

    Raises:
        ConfigError: a source is missing, or the sources do not fit together.
    """
    paths = config.sources or [WeightedPath(str(config.path))]
    weights = whole_weights([source.weight for source in paths])
    sources = [_open_source(source.path, config, weight) for source, weight in zip(paths, weights, strict=True)]
    _refuse_other_tokenizers(sources)
    return Tokens(tuple(sources))


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the proportion of ``weights``, as written: 0.1 is a tenth.

    Weights with a sum above 2^30 are rounded to a billionth of their sum, but never to zero.
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
    """Return the training and the validation files of token files made by another program.

    They are train.bin and val.bin of a folder, two paths, or one path whose last tokens become the validation split.
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
    tokens = sum(segment.tokens for segment in train)
    return split_end(train, min(tokens, max(1, int(tokens * config.val_fraction))))


def refuse_shared_files(config: DataConfig, train: Sequence[Path], val: Sequence[Path]) -> None:
    """Raise ConfigError if a file to validate on is also one to train on."""
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
    """Return the largest token id in the first and last 65,536 bytes of every file. Other ids may be larger."""
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
    """Return the sha256 of a file's size, beginning and end. It distinguishes files without reading gigabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        tail = file.read()
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
