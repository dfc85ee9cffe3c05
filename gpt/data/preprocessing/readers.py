"""Readers of the text of a shard: texts, jsonl and parquet files, and datasets streamed by Hugging Face's library.

Owns the formats, and the refusal of a file that changes while it is read. Torch-free; holds a piece of a text or one
document at a time. Must not know of tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt.components.load import load_source
from gpt.config import DataConfig
from gpt.data.preprocessing.files import unreadable_file_error
from gpt.data.preprocessing.shards import TRAIN, VAL, Part, Shard, open_dataset
from gpt.data.preprocessing.spec import PreprocessingSpec
from gpt.data.tokenizers.subword import import_library
from launch.errors import ConfigError


class Piece(NamedTuple):
    """Text that is tokenized at once, as UTF-8 or whatever bytes the file holds."""

    split: int
    data: bytes
    ends: bool
    """True where a document ends with the piece."""


def read_shard(spec: PreprocessingSpec, shard: Shard) -> Iterator[Piece]:
    """Read the text of a shard, piece by piece.

    Raises:
        ConfigError: a file cannot be read, is not what it should be, or has changed since it was looked up.
    """
    if spec.kind == "text":
        for part in shard.parts:
            assert shard.split is not None
            yield Piece(shard.split, _read_range(part), part.ends)
        return
    count = 0
    for part in shard.parts:
        for text in _documents(spec, part):
            split = shard.split
            if split is None:
                split = VAL if is_validation(shard.number, count, spec.config.val_fraction) else TRAIN
            count += 1
            # JSON may hold lone surrogates, which UTF-8 does not have.
            yield Piece(split, text.encode("utf-8", "replace"), True)


def decode(data: bytes, shard: Shard) -> str:
    """Decode the text of a piece.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shard.parts[0].path} is not UTF-8 ({error.reason})",
            "UTF-8, for a tokenizer other than bytes",
            "data.tokenizer=byte, or the text converted with iconv",
        ) from error


def is_validation(shard: int, document: int, fraction: float) -> bool:
    """Decide by a hash of a document's place whether validation takes it, so that every process decides alike."""
    digest = hashlib.blake2b(f"{shard}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _documents(spec: PreprocessingSpec, part: Part) -> Iterator[str]:
    if spec.kind == "custom":
        yield from _read_custom(spec.config)
    elif spec.kind == "dataset":
        yield from _read_dataset(spec.config, part)
    elif spec.kind == "parquet":
        yield from _read_parquet(part, spec.config.text_key)
    else:
        yield from _read_jsonl(part, spec.config.text_key, packed=spec.kind == "jsonl.gz")


def _read_custom(config: DataConfig) -> Iterator[str]:
    """Texts of a function of the user's."""
    name = str(config.source)
    documents = load_source("data.source", name)(config)
    while True:
        try:
            text = next(documents, None)
        except Exception as error:  # of the user's function
            raise ConfigError(
                f"data.source={name} fails: {type(error).__name__}: {error}",
                "a generator of documents, which ends where they do",
                "the function repaired, and the same command again",
            ) from error
        if text is None:
            return
        if not isinstance(text, str):
            raise ConfigError(
                f"data.source={name} yields a {type(text).__name__}", "a document at a time, a str", "yield text"
            )
        yield text


def _read_range(part: Part) -> bytes:
    path = Path(part.path)
    try:
        with path.open("rb") as stream:
            stream.seek(part.start)
            data = stream.read(part.stop - part.start)
            _refuse_change(path, part, len(data) == part.stop - part.start)
    except OSError as error:
        raise unreadable_file_error(path, error) from error
    return data


def _refuse_change(path: Path, part: Part, complete: bool = True) -> None:
    if not complete or path.stat().st_mtime_ns != part.mtime_ns:
        raise ConfigError(f"{path} changed while it was read", "a text that holds still", "the same command again")


def _read_jsonl(part: Part, key: str, packed: bool) -> Iterator[str]:
    """Texts of the lines that begin in the part; a line that began before belongs to the part before."""
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
        raise unreadable_file_error(path, error) from error


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
    parquet = import_library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            if key not in names:
                raise missing_column_error(path, key, names)
            for batch in opened.iter_batches(batch_size=256, row_groups=range(part.start, part.stop), columns=[key]):
                # A null is a row without text.
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        _refuse_change(path, part)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):  # which is a ValueError, too
            raise
        raise unreadable_file_error(path, error) from error


def missing_column_error(where: object, key: str, names: Iterable[str]) -> ConfigError:
    names = list(names)
    return ConfigError(
        f"{where} has no column data.text_key={key}",
        f"one of {', '.join(names)}",
        f"data.text_key={names[0] if names else 'NAME'}",
    )


def _read_dataset(config: DataConfig, part: Part) -> Iterator[str]:
    """Texts of file ``start`` of ``stop`` of the dataset's split that ``path`` names."""
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
            raise missing_column_error(
                config.dataset, config.text_key, (k for k, v in row.items() if isinstance(v, str))
            )
        yield text
