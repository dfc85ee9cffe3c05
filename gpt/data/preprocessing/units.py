"""Cutting the work of a preparation into units.

A unit is some megabytes of text that one process turns into tokens; it is what is kept when a preparation is killed.
Owns where the cuts are: the units of a recipe are always the same ones, however many processes there are. Torch-free.
Must not know of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from gpt.config import DataConfig, TokenizerKind
from gpt.data.preprocessing.files import CorpusFile, unreadable
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.synthetic import num_walks
from gpt.data.tokenizers.subword import library
from launch.errors import ConfigError

PIECE_BYTES = 1 << 20
"""A text is tokenized in pieces of about this size, cut at the ends of lines."""
UNIT_BYTES = 64 << 20
LINE_SEARCH_BYTES = 1 << 16
TRAIN, VAL = 0, 1


class Part(NamedTuple):
    """A stretch of one source: bytes of a text or jsonl file, row groups of a parquet file, a shard, or a walk."""

    path: str
    start: int
    stop: int
    ends: bool
    """Whether a document ends with it (text)."""
    mtime_ns: int


@dataclass(frozen=True)
class Unit:
    """What one process does in one go."""

    number: int
    split: int | None
    """TRAIN or VAL; None where documents are dealt out one by one."""
    parts: tuple[Part, ...]


def cut_units(recipe: Recipe) -> list[Unit]:
    """All units of a recipe, in the order of the tokens."""
    if recipe.kind == "synthetic":
        walks = range(num_walks(recipe.config.synthetic.tokens))
        return [Unit(i, None, (Part("", i, i + 1, False, 0),)) for i in walks]
    if recipe.kind == "dataset":
        return _dataset_units(recipe.config)
    if recipe.kind == "text":
        return _group(_text_parts(recipe))
    if recipe.kind == "parquet":
        return _group((None, part, size) for file in recipe.files for part, size in _row_groups(file))
    whole = recipe.kind == "jsonl.gz"
    return _group((None, part, part.stop - part.start) for file in recipe.files for part in _ranges(file, whole))


def _group(parts: Iterable[tuple[int | None, Part, int]]) -> list[Unit]:
    """Neighbours of the same split together, up to the size of a unit."""
    units: list[Unit] = []
    waiting: list[Part] = []
    size, split = 0, None
    for its_split, part, its_size in parts:
        if waiting and (its_split != split or size + its_size > UNIT_BYTES):
            units.append(Unit(len(units), split, tuple(waiting)))
            waiting, size = [], 0
        waiting.append(part)
        size, split = size + its_size, its_split
    if waiting:
        units.append(Unit(len(units), split, tuple(waiting)))
    return units


def _text_parts(recipe: Recipe) -> Iterator[tuple[int, Part, int]]:
    """Pieces of texts one after the other, with a cut where validation begins."""
    exact = recipe.config.tokenizer is TokenizerKind.byte
    val_start = recipe.num_bytes - min(recipe.num_bytes, max(1, int(recipe.num_bytes * recipe.config.val_fraction)))
    passed = 0
    for file in recipe.files:
        nominal = {*range(PIECE_BYTES, file.size, PIECE_BYTES)}
        here = val_start - passed
        border = _character_start(file, here) if 0 < here < file.size and not exact else here
        cuts = nominal if exact else {_line_start(file, cut) for cut in nominal}
        # Pieces are small, so one that a cut for validation has made smaller does no harm.
        end = file.size if exact else _whole_characters(file)
        places = sorted({0, end, *(place for place in (border, *cuts) if 0 < place < end)})
        for start, stop in pairwise(places):
            split = TRAIN if start < border else VAL
            yield split, Part(str(file.path), start, stop, stop == end, file.mtime_ns), stop - start
        passed += file.size


def _line_start(file: CorpusFile, place: int) -> int:
    """The first beginning of a line from ``place`` on, or of a character where there is no line near."""
    try:
        with file.path.open("rb") as stream:
            stream.seek(place - 1)
            near = stream.read(LINE_SEARCH_BYTES)
    except OSError as error:
        raise unreadable(file.path, error) from error
    line = place + near.find(b"\n")
    return line if near.find(b"\n") >= 0 and line < file.size else _character_start(file, place)


def _character_start(file: CorpusFile, place: int) -> int:
    """The first beginning of a character from ``place`` on; UTF-8's continuation bytes are 10xxxxxx."""
    with file.path.open("rb") as stream:
        stream.seek(place)
        near = stream.read(3)
    inside = next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), len(near))
    return min(place + inside, file.size)


def _whole_characters(file: CorpusFile) -> int:
    """Where the last whole character ends: ``data.max_bytes`` may cut one in half."""
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - 3))
        last = stream.read(min(3, file.size))
    for back in range(1, len(last) + 1):
        byte = last[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character, whose high bits say how many there are
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return file.size - back if needed > back else file.size
    return file.size


def _ranges(file: CorpusFile, whole: bool) -> Iterator[Part]:
    step = file.size if whole else UNIT_BYTES
    for start in range(0, file.size, step):
        yield Part(str(file.path), start, min(start + step, file.size), True, file.mtime_ns)


def _row_groups(file: CorpusFile) -> Iterator[tuple[Part, int]]:
    parquet = library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file.path) as opened:
            told = opened.metadata
            for i in range(told.num_row_groups):
                part = Part(str(file.path), i, i + 1, True, file.mtime_ns)
                yield part, told.row_group(i).total_byte_size
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise unreadable(file.path, error) from error


def _dataset_units(config: DataConfig) -> list[Unit]:
    splits = [(config.train_split, TRAIN if config.val_split else None)]
    splits += [(config.val_split, VAL)] if config.val_split else []
    found: list[tuple[str, int | None, int, int]] = []
    for name, split in splits:
        shards = open_dataset(config, name).num_shards
        found += [(name, split, i, shards) for i in range(shards)]
    return [Unit(n, split, (Part(name, i, shards, True, 0),)) for n, (name, split, i, shards) in enumerate(found)]


@lru_cache(maxsize=4)
def _stream(dataset: str, subset: str | None, split: str) -> Any:
    """A stream is only a description: reading from one leaves it as it was."""
    datasets = library("datasets")
    datasets.config.TORCH_AVAILABLE = False  # its streams would load torch, seconds in every process, for nothing
    return datasets.load_dataset(dataset, name=subset, split=split, streaming=True)


def open_dataset(config: DataConfig, split: str) -> Any:
    """A split of a dataset as a stream.

    Raises:
        ConfigError: it cannot be reached, or there is no such split.
    """
    try:
        return _stream(str(config.dataset), config.subset, split)
    except ConfigError:
        raise
    except Exception as error:  # the library's errors have no common class
        raise ConfigError(
            f"the split {split} of the dataset {config.dataset} cannot be opened ({type(error).__name__}: {error})",
            "a network, a dataset of this name, and a split that it has",
            "data.dataset=FOLDER of files downloaded elsewhere, or another data.train_split or data.val_split",
        ) from error
