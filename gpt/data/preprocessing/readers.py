"""Reading the text of a unit: texts, jsonl and parquet files, and datasets that Hugging Face's library streams.

Owns the formats, and that a file which changes while it is read is noticed. Torch-free; holds a piece of a text or one
document at a time. Must not know of tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt.config import DataConfig
from gpt.data.preprocessing.files import unreadable
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.units import TRAIN, VAL, Part, Unit, open_dataset
from gpt.data.tokenizers.subword import library
from launch.errors import ConfigError


class Piece(NamedTuple):
    """Some text, as UTF-8 or whatever bytes the file holds."""

    split: int
    data: bytes
    ends: bool
    """Whether a document ends with it."""


def read_unit(recipe: Recipe, unit: Unit) -> Iterator[Piece]:
    """The text of a unit, piece by piece.

    Raises:
        ConfigError: a file cannot be read, is not what it should be, or has changed since it was looked up.
    """
    if recipe.kind == "text":
        for part in unit.parts:
            assert unit.split is not None
            yield Piece(unit.split, _read_range(part), part.ends)
        return
    count = 0
    for part in unit.parts:
        for text in _documents(recipe, part):
            split = unit.split
            if split is None:
                split = VAL if is_validation(unit.number, count, recipe.config.val_fraction) else TRAIN
            count += 1
            yield Piece(split, text.encode("utf-8", "replace"), True)


def decode(data: bytes, unit: Unit) -> str:
    """The text of a piece.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{unit.parts[0].path} is not UTF-8 ({error.reason})",
            "UTF-8, for a tokenizer other than bytes",
            "data.tokenizer=byte, or the text converted with iconv",
        ) from error


def is_validation(unit: int, document: int, fraction: float) -> bool:
    """Whether a document is kept for validation: a hash of its place, so that any process knows."""
    digest = hashlib.blake2b(f"{unit}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _documents(recipe: Recipe, part: Part) -> Iterator[str]:
    if recipe.kind == "dataset":
        yield from _read_dataset(recipe.config, part)
    elif recipe.kind == "parquet":
        yield from _read_parquet(part, recipe.config.text_key)
    else:
        yield from _read_jsonl(part, recipe.config.text_key, packed=recipe.kind == "jsonl.gz")


def _read_range(part: Part) -> bytes:
    path = Path(part.path)
    try:
        with path.open("rb") as stream:
            stream.seek(part.start)
            data = stream.read(part.stop - part.start)
            _refuse_change(path, part, len(data) == part.stop - part.start)
    except OSError as error:
        raise unreadable(path, error) from error
    return data


def _refuse_change(path: Path, part: Part, complete: bool = True) -> None:
    if not complete or path.stat().st_mtime_ns != part.mtime_ns:
        raise ConfigError(f"{path} changed while it was read", "a text that holds still", "the same command again")


def _read_jsonl(part: Part, key: str, packed: bool) -> Iterator[str]:
    """The lines that begin in the part."""
    path = Path(part.path)
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            place = part.start
            if place:
                stream.seek(place - 1)
                place += len(stream.readline()) - 1
            while packed or place < part.stop:
                line = stream.readline()
                if not line:
                    break
                if line.strip():
                    yield _text_of(line, key, path, place)
                place += len(line)
        _refuse_change(path, part)
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error


def _text_of(line: bytes, key: str, path: Path, place: int) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{path}, at byte {place}: {error}",
            "a JSON object in every line",
            "the file repaired, or another data.path",
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        has = ", ".join(k for k, v in value.items() if isinstance(v, str)) if isinstance(value, dict) else "none"
        raise ConfigError(
            f"{path}, at byte {place}: no text under data.text_key={key}",
            f"one of the fields of text that the line has ({has})",
            f"data.text_key={has.split(', ')[0] or 'NAME'}",
        )
    return str(value[key])


def _read_parquet(part: Part, key: str) -> Iterator[str]:
    path = Path(part.path)
    parquet = library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            if key not in names:
                raise _no_column(path, key, names)
            for batch in opened.iter_batches(batch_size=256, row_groups=range(part.start, part.stop), columns=[key]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        _refuse_change(path, part)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(path, error) from error


def _no_column(where: object, key: str, names: Iterable[str]) -> ConfigError:
    names = list(names)
    return ConfigError(
        f"{where} has no column data.text_key={key}",
        f"one of {', '.join(names)}",
        f"data.text_key={names[0] if names else 'NAME'}",
    )


def _read_dataset(config: DataConfig, part: Part) -> Iterator[str]:
    """Shard ``start`` of ``stop`` of the split named ``path``."""
    stream = iter(open_dataset(config, part.path).shard(num_shards=part.stop, index=part.start))
    while True:
        try:
            row = next(stream, None)
        except Exception as error:  # of the library, of the network, of the file's format
            raise ConfigError(
                f"the dataset {config.dataset} broke off in shard {part.start} of {part.stop} "
                f"({type(error).__name__}: {error})",
                "a stream that can be read to its end",
                "the same command again, which goes on where it stopped",
            ) from error
        if row is None:
            return
        text = row.get(config.text_key)
        if not isinstance(text, str):
            raise _no_column(config.dataset, config.text_key, (k for k, v in row.items() if isinstance(v, str)))
        yield text
