"""Step records of one rank as columns: numbers of chosen fields, without a dictionary for each record.

Owns the fast way through a file that ``launch.runs.records`` wrote, and proves line by line where it may be taken: any
other line is parsed as JSON. A report of a thousand ranks reads gigabytes. Must not know what the numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.runs.records import is_record

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BLOCK = 1 << 20
"""Bytes that are looked at together."""
NUMBER = 25
"""Bytes that a number takes at most: a double 24."""
FEW = 8
"""Lines of one layout in a block below which a parser of JSON takes no longer."""
START = b'{"step": '
NEWLINE, COMMA, QUOTE, COLON, OPEN, CLOSE, UNDERSCORE = b'\n,":{}_'


@dataclass(frozen=True)
class RecordColumns:
    """Records of one rank in step order, each step once; arrays of [records]. A number that is unknown is NaN."""

    steps: Integers
    attempts: Integers
    known: Mapping[str, Flags]
    """Field -> where a record has a number there."""
    values: Mapping[str, Floats]
    last: dict[str, Any]
    """The record of the last step, whole."""

    def __len__(self) -> int:
        return len(self.steps)


def read_columns(path: Path, fields: Sequence[str], *, every: bool = False) -> RecordColumns | None:
    """Read the numbers of ``fields`` from the records of one rank; None where there is no record.

    The same records count as for ``records.read_records``: lines torn by a crash are passed over, and of a step that
    was done again the record of the later attempt counts; with ``every`` all are there, as the file has them.
    """
    names = tuple(dict.fromkeys(("step", "attempt", *fields)))
    parts, offset = [], 0
    for block in _blocks(path):
        part = _read_block(block, names)
        part.starts += offset
        parts.append(part)
        offset += len(block)
    if not any(len(part.starts) for part in parts):
        return None
    values = np.concatenate([part.values for part in parts])
    known = np.concatenate([part.known for part in parts])
    starts = np.concatenate([part.starts for part in parts])
    if not every and not (np.diff(values[:, 0]) > 0).all():
        kept = latest_records(values[:, 0], values[:, 1])
        values, known, starts = values[kept], known[kept], starts[kept]
    with path.open("rb") as file:
        file.seek(int(starts[-1]))
        last = json.loads(file.readline())
    return RecordColumns(
        steps=values[:, 0].astype(np.int64),
        attempts=values[:, 1].astype(np.int64),
        known={name: known[:, index] for index, name in enumerate(names)},
        values={name: values[:, index] for index, name in enumerate(names)},
        last=last,
    )


def latest_records(steps: Floats, attempts: Floats) -> Integers:
    """Indices of the records that count, by step: of the latest attempt, and of its lines the last."""
    order = np.lexsort((np.arange(len(steps)), attempts, steps))
    is_last: Integers = order[np.append(np.diff(steps[order]) > 0, True)]
    return is_last


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, some hundred KB at a time; a last line without its end is a line. No file: nothing."""
    try:
        file = path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        rest = b""
        while read := file.read(BLOCK):
            block = rest + read if rest else read
            end = block.rfind(b"\n") + 1
            if end:
                yield block[:end]
            rest = block[end:]
        if rest:
            yield rest


@dataclass
class _Part:
    """Records of some lines, in their order: where each starts, and its fields, [records, fields]."""

    starts: Integers
    known: Flags
    values: Floats


def _read_block(data: bytes, names: tuple[str, ...]) -> _Part:
    """Read the records among some whole lines; the first two of ``names`` are step and attempt."""
    block = _Block(data)
    shape = (len(block.starts), len(names))
    part = _Part(block.starts, np.zeros(shape, np.bool_), np.full(shape, np.nan))
    is_read = np.zeros(len(block.starts), np.bool_)
    for layout in block.layouts(names):
        lines, is_certain = layout.lines, np.ones(len(layout.lines), np.bool_)
        for index, name in enumerate(names):
            if name in layout.places:
                known, values, is_sure = block.numbers(*layout.places[name], as_integers=index < 2)
                part.known[lines, index], part.values[lines, index] = known, values
                is_certain &= is_sure & known if index < 2 else is_sure
            elif index < 2:
                is_certain[:] = False
        is_read[lines] = is_certain
    for line in np.flatnonzero(~is_read).tolist():
        is_read[line] = _parse(data[block.starts[line] : block.ends[line]], names, part.known[line], part.values[line])
    return part if is_read.all() else _Part(part.starts[is_read], part.known[is_read], part.values[is_read])


def _parse(text: bytes, names: tuple[str, ...], known: Flags, values: Floats) -> bool:
    """Read one line as JSON into its row; False where it is no record."""
    known[:], values[:] = False, np.nan
    try:
        record = json.loads(text)
    except ValueError:
        return False
    if not isinstance(record, dict) or not is_record(record):
        return False
    for index, name in enumerate(names):
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            known[index], values[index] = True, value
    return True


@dataclass
class _Layout:
    """Lines with the same keys in the same order, and where the values of these start and how long they are."""

    lines: Integers
    places: Mapping[str, tuple[Integers, Integers]]


class _Block:
    """Some whole lines as an array of bytes, and which of them are records as Python writes them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.bytes = np.frombuffer(data + b" " * 64, np.uint8)  # room to look ahead from the last byte
        text = self.bytes[: len(data)]
        ends = np.flatnonzero(text == NEWLINE)
        self.ends = ends if data.endswith(b"\n") else np.append(ends, len(data))
        self.starts = np.concatenate(([0], self.ends[:-1] + 1))
        self.are_plain = (self._windows(self.starts, len(START)) == START) & (self.bytes[self.ends - 1] == CLOSE)
        self._inner: tuple[Integers, Integers] | None = None
        if np.count_nonzero(text >= OPEN) != 2 * len(self.starts):  # no other byte of a record is as large
            self._inner = self._find_mappings(text)
        if data.find(b"\\") >= 0:  # what quotes mean then is for a parser to say
            self.are_plain[:] = False

    def _find_mappings(self, text: npt.NDArray[np.uint8]) -> tuple[Integers, Integers]:
        """Begin and end of the mapping inside of each line, -1 without one. A line whose braces do not match one
        another, or with more than one, is not plain."""
        braces = [np.flatnonzero(text == brace) for brace in (OPEN, CLOSE)]
        limits = np.append(self.starts, len(text))
        opened, closed = (np.diff(np.searchsorted(places, limits)) for places in braces)
        self.are_plain &= (opened == closed) & (opened <= 2)
        lines = np.flatnonzero(self.are_plain & (opened == 2))
        begins, ends = np.full(len(self.starts), -1), np.full(len(self.starts), -1)
        begins[lines] = braces[0][np.searchsorted(braces[0], self.starts[lines]) + 1]
        ends[lines] = braces[1][np.searchsorted(braces[1], self.starts[lines])]
        return begins, ends

    def layouts(self, names: Sequence[str]) -> Iterator[_Layout]:
        """Yield the plain lines by their layout; lines of a rare one are left to a parser.

        Lines with as many quotes are compared with the first of them: the places of mappings and the lengths of all
        keys, and the keys that are as long as one of ``names``, which no other could be.
        """
        sizes = {len(name.encode()) for name in names}
        quotes = np.flatnonzero(self.bytes[: len(self.data)] == QUOTE)
        first = np.searchsorted(quotes, np.append(self.starts, len(self.data)))
        counts = np.where(self.are_plain, np.diff(first), 0)
        for count in np.unique(counts).tolist():
            lines = np.flatnonzero(counts == count)
            if count and count % 2 == 0 and len(lines) >= FEW:
                yield self._layout(lines, quotes[first[lines][:, None] + np.arange(count)], sizes)

    def _layout(self, lines: Integers, quotes: Integers, sizes: Container[int]) -> _Layout:
        """The layout of the first of some lines, and those of them that have it.

        Args:
            lines: with as many quotes each.
            quotes: where these are, [lines, quotes].
            sizes: lengths of the keys that are looked for.
        """
        same = np.ones(len(lines), np.bool_)
        inside = range(0)
        if self._inner is not None:
            bounds = [places[lines] for places in self._inner]
            at = [(quotes < bound[:, None]).sum(axis=1) for bound in bounds]
            same &= (at[0] == at[0][0]) & (at[1] == at[1][0]) & ((bounds[0] < 0) == (bounds[0][0] < 0))
            inside = range(int(at[0][0]), int(at[1][0]))
        columns: dict[str, int] = {}
        of_keys = []
        for column in range(0, quotes.shape[1], 2):
            if column in inside:
                continue
            begin, end = int(quotes[0, column]), int(quotes[0, column + 1])
            if self.data[end : end + 3] != b'": ':
                same &= self.bytes[quotes[:, column + 1] + 1] != COLON  # text, and no key in any line
                continue
            of_keys.append(column)
            if end - begin - 1 in sizes:
                key = self.data[begin : end + 3]
                same &= self._windows(quotes[:, column], len(key)) == key
                columns[key[1:-3].decode(errors="replace")] = column
        widths = quotes[:, 1::2] - quotes[:, ::2]
        if (different := widths != widths[0]).any():
            same &= ~different[:, np.array(of_keys) // 2].any(axis=1)
        lines, quotes = lines[same], quotes[same]
        # A value ends two bytes before the next key, and the last one before the brace that closes the line.
        stops = np.column_stack((quotes[:, 2::2] - 2, self.ends[lines] - 1))
        places = {}
        for name, column in columns.items():
            begins = quotes[:, column + 1] + 3
            places[name] = begins, stops[:, column // 2] - begins
        return _Layout(lines, places)

    def numbers(self, at: Integers, lengths: Integers, *, as_integers: bool) -> tuple[Flags, Floats, Flags]:
        """Read the values that start there and are so long: which are numbers, these (NaN for others), and whether
        that is certain, as it is for numbers as Python writes them and for everything that is none."""
        first = self.bytes[at]
        # Also NaN, Infinity and -Infinity, as Python writes them.
        known = ((first >= ord("0")) & (first <= ord("9"))) | (first == ord("-"))
        known |= (first == ord("N")) | (first == ord("I"))
        values = np.full(len(at), np.nan)
        stop = self.bytes[at + np.maximum(lengths, 0)]
        is_whole = (lengths > 0) & (lengths <= NUMBER) & ((stop == COMMA) | (stop == CLOSE))
        chosen = np.flatnonzero(known & is_whole)
        if not len(chosen):
            return known, values, ~known
        all_of_them = len(chosen) == len(at)
        begins, sizes = (at, lengths) if all_of_them else (at[chosen], lengths[chosen])
        size = int(sizes.max())
        text = self._windows(begins, size).view(np.uint8).reshape(len(begins), size)
        if int(sizes.min()) < size:
            text = text * (np.arange(size) < sizes[:, None])
        if as_integers and ((text - np.uint8(ord("0")) > 9) & (text != 0)).any():
            return known, values, ~known
        try:
            values[chosen] = self._parsed(text)
        except ValueError:
            return known, values, ~known
        return known, values, is_whole | ~known

    def _parsed(self, text: npt.NDArray[np.uint8]) -> Floats:
        """The numbers that are written in [numbers, bytes], filled up with zeros; ValueError where one is none."""
        if (text == UNDERSCORE).any():
            raise ValueError("an underscore, which Python's float takes and JSON does not")
        all_same = bool((text == text[0]).all())
        rows = np.ascontiguousarray(text[:1] if all_same else text)
        found: Floats = rows.view(f"S{text.shape[1]}").ravel().astype(np.float64)
        return np.repeat(found, len(text)) if all_same else found

    def _windows(self, at: Integers, size: int) -> npt.NDArray[np.bytes_]:
        """The ``size`` bytes from each place."""
        every = np.ndarray((len(self.bytes) - size + 1,), f"S{size}", self.bytes, strides=(1,))  # type: ignore[call-overload]
        found: npt.NDArray[np.bytes_] = every[at]
        return found
