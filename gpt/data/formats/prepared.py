"""Tokens that are there: prepared folders and their manifests, token files of others, and mixtures of both.

Owns what a run reads and what identifies it. Torch-free, reads manifests and headers only. Must not know how tokens are
made or become batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from gpt.config import DataConfig, WeightedPath
from gpt.data.formats.token_file import ITEM_BYTES, Segment, missing, open_token_files, read_token_file, split_end
from launch.errors import ConfigError

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.bin"
SPLITS = ("train", "val")
FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True)
class Split:
    """Training or validation tokens of a source."""

    segments: tuple[Segment, ...]
    num_bytes: int | None = None
    """Bytes of text that the tokens stand for, where that is known."""
    documents: int | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True)
class TokenSource:
    """One corpus in tokens. Can be sent to other ranks."""

    name: str
    folder: Path | None
    """The prepared folder; None for token files that somebody else has made."""
    train: Split
    val: Split
    vocab_size: int | None
    """Ids are below it; None where nobody says so."""
    tokenizer: dict[str, Any] | None
    """What ``gpt.data.tokenizers.base.about`` says of it."""
    sha256: str
    """Equal for equal data, wherever it was prepared; of files of others, of their ends and sizes."""
    entropy: float | None = None
    """Nats per token that no model can go below, where that is known."""
    weight: int = 1
    characters: str | None = None
    """The characters that the ids stand for, where nanoGPT's meta.pkl says so."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where its tokenizer is kept."""
        return None if self.folder is None or self.tokenizer is None else self.folder / TOKENIZER


@dataclass(frozen=True)
class Tokens:
    """What a run trains on: one source, or several with weights. Can be sent to other ranks."""

    sources: tuple[TokenSource, ...]

    @property
    def sha256(self) -> str:
        """Identity of the data, mixture included."""
        if len(self.sources) == 1:
            return self.sources[0].sha256
        return _digest([[source.sha256, source.weight] for source in self.sources])

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer is kept, None where it is not known."""
        return next((s.tokenizer_folder for s in self.sources if s.tokenizer_folder is not None), None)

    def as_dict(self) -> list[dict[str, Any]]:
        """The sources as ``environment.json`` records them."""
        return [
            {
                "name": source.name,
                "weight": source.weight,
                "train_tokens": source.train.tokens,
                "val_tokens": source.val.tokens,
                "tokenizer": source.tokenizer,
                "entropy": source.entropy,
                "sha256": source.sha256,
            }
            for source in self.sources
        ]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None where there is none that can be understood."""
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
        return value if value["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_folder(folder: Path) -> TokenSource | None:
    """A prepared corpus; None where there is none, or a file of it is missing or cut short."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    splits = {}
    try:
        for name in SPLITS:
            told = manifest["splits"][name]
            files = [read_token_file(folder / f["name"], manifest["dtype"]) for f in told["files"] if f["tokens"]]
            if [f.tokens for f in files] != [f["tokens"] for f in told["files"] if f["tokens"]]:
                return None
            splits[name] = Split(tuple(files), told["bytes"], told["documents"])
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
    """The token files of ``data=tokens``.

    Raises:
        ConfigError: they are not there, or do not fit together.
    """
    asked = config.sources or [WeightedPath(str(config.path))]
    weights = whole_weights([source.weight for source in asked])
    opened = [_open_source(source.path, config, weight) for source, weight in zip(asked, weights, strict=True)]
    _refuse_other_tokenizers(opened)
    return Tokens(tuple(opened))


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of ``weights``, taken as they are written: 0.1 is a tenth.

    Weights that need a sum above 2^30 are rounded to a billionth of their sum, none to nothing.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    assert exact and min(exact) > 0, "DataConfig.validate asks for it"
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    whole = [w // math.gcd(*whole) for w in whole]
    if sum(whole) > 1 << 30:  # products of two must fit 63 bits
        whole = [max(1, round(f / sum(exact) * 10**9)) for f in exact]
    return tuple(whole)


def _open_source(path: str, config: DataConfig, weight: int) -> TokenSource:
    place = Path(path).expanduser().absolute()
    if (place / MANIFEST).is_file():
        found = open_folder(place)
        if found is None:
            raise ConfigError(
                f"{place} has a manifest, but its files are missing, cut short, or of another version",
                "the folder as gpt.prepare has left it",
                f"python -m gpt.prepare ... --to {place}, after the folder is moved away",
            )
        return TokenSource(**{**found.__dict__, "weight": weight})
    dtype = config.token_dtype.name if config.token_dtype else None
    train, val = _foreign_splits(place, path, config, dtype)
    vocab_size, characters = _nanogpt_meta(train[0].path.with_name("meta.pkl"))
    return TokenSource(
        name=place.name,
        folder=None,
        train=Split(train),
        val=Split(val),
        vocab_size=vocab_size,
        tokenizer=None,
        sha256=_digest([[s.path.name, s.offset, s.tokens, _fingerprint(s.path)] for s in (*train, *val)]),
        weight=weight,
        characters=characters,
    )


def _foreign_splits(
    place: Path, path: str, config: DataConfig, dtype: str | None
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Training and validation files of others: nanoGPT's pair in a folder, two paths, or one path that is cut."""
    if place.is_dir():
        pair = [place / "train.bin", place / "val.bin"]
        if not all(p.is_file() for p in pair):
            raise missing(path, place / "train.bin")
        return (read_token_file(pair[0], dtype),), (read_token_file(pair[1], dtype),)
    train = open_token_files(path, dtype)
    if config.val_path:
        return train, open_token_files(config.val_path, dtype)
    beside = train[0].path.with_name("val.bin")
    if len(train) == 1 and train[0].path.name == "train.bin" and beside.is_file():
        return train, (read_token_file(beside, dtype),)
    tokens = sum(segment.tokens for segment in train)
    return split_end(train, min(tokens, max(1, int(tokens * config.val_fraction))))


def _refuse_other_tokenizers(sources: Sequence[TokenSource]) -> None:
    known = [source for source in sources if source.tokenizer is not None]
    for source in known[1:]:
        assert source.tokenizer is not None and known[0].tokenizer is not None
        if source.tokenizer["checksum"] != known[0].tokenizer["checksum"]:
            raise ConfigError(
                f"{source.name} has the tokenizer {source.tokenizer['kind']} ({source.tokenizer['checksum'][:12]}...), "
                f"{known[0].name} {known[0].tokenizer['kind']} ({known[0].tokenizer['checksum'][:12]}...)",
                "one tokenizer for all sources of a mixture",
                f"python -m gpt.prepare ... data.tokenizer={known[0].tokenizer['kind']} "
                f"data.tokenizer_path={known[0].folder}/{TOKENIZER}/FILE",
            )


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; whatever could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a file of plain values")


def read_meta(file: IO[bytes]) -> dict[str, Any]:
    """nanoGPT's meta.pkl.

    Raises:
        pickle.UnpicklingError: it holds more than plain values.
    """
    value = _PlainUnpickler(file).load()
    return value if isinstance(value, dict) else {}


def _nanogpt_meta(meta: Path) -> tuple[int | None, str | None]:
    """Size of the vocabulary and its characters, where ``meta`` is there and says so."""
    if not meta.is_file():
        return None, None
    try:
        with meta.open("rb") as file:
            told = read_meta(file)
        size, names = told.get("vocab_size"), told.get("itos")
        if size is not None and isinstance(names, dict) and set(names) == set(range(size)):
            return int(size), "".join(names[i] for i in range(size))
        return (None if size is None else int(size)), None
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{meta} cannot be read ({error})",
            "nanoGPT's meta.pkl: a dictionary with vocab_size",
            f"mv {meta} {meta}.old",
        ) from error


def largest_id_seen(source: TokenSource) -> int:
    """The largest id among the first and last 65,536 bytes of every file; quick, and no promise for the rest."""
    import numpy as np  # here, so that looking up a corpus of bytes stays as quick as it is

    largest = 0
    for segment in (*source.train.segments, *source.val.segments):
        width = ITEM_BYTES[segment.dtype]
        count = min(segment.tokens, FINGERPRINT_BYTES // width)
        for first in {segment.offset, segment.offset + (segment.tokens - count) * width}:
            ids = np.fromfile(segment.path, dtype=np.dtype(segment.dtype).newbyteorder("<"), count=count, offset=first)
            largest = max(largest, int(ids.max(initial=0)))
    return largest


def _fingerprint(path: Path) -> str:
    """What tells a file from another one without reading it all: size, beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        tail = file.read()
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
