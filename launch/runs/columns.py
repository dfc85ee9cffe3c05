"""Step records of one rank as columns: numbers of chosen fields, without a dictionary for each record.

Owns the fast way through a file that ``launch.runs.records`` wrote, and proves line by line where it may be taken: any
other line is parsed as JSON. A report of a thousand ranks reads gigabytes. Must not know what the numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.runs.records import is_record

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BLOCK = 1 << 18
"""Bytes that are looked at together."""
NUMBER = 26
"""Bytes that a number is looked for in; a double takes at most 24, and what ends it one."""
START = b'{"step": '
NEWLINE, COMMA, BACKSLASH, OPEN, CLOSE = b"\n,\\{}"


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
    lines = np.flatnonzero(block.are_plain)
    at = block.starts[lines]
    for index, name in enumerate(names):
        is_there, at, is_certain = block.locate(b'"' + name.encode() + b'": ', lines, at)
        begins = at + (len(name) + 4) * is_there
        known, values, lengths = block.numbers(begins, as_integers=index < 2)
        at, is_read = begins + lengths * is_there, (lengths > 0) | ~known
        is_certain &= is_read | ~is_there
        if index < 2:
            is_certain &= is_there & known
        part.known[lines, index], part.values[lines, index] = known & is_there, np.where(is_there, values, np.nan)
        if not is_certain.all():
            block.are_plain[lines[~is_certain]] = False
            lines, at = lines[is_certain], at[is_certain]
    is_read = block.are_plain
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
        self._inner: list[Integers] = []
        if np.count_nonzero(text >= OPEN) != 2 * len(self.starts):  # no other byte of a record is as large
            self._find_mappings(text)
        if np.count_nonzero(text == BACKSLASH):  # what quotes mean then is for a parser to say
            self.are_plain[:] = False

    def _find_mappings(self, text: npt.NDArray[np.uint8]) -> None:
        """Find what lies in mappings inside of records; a line whose braces do not match one another is not plain."""
        braces = [np.flatnonzero(text == brace) for brace in (OPEN, CLOSE)]
        limits = np.append(self.starts, len(text))
        opened, closed = (np.diff(np.searchsorted(places, limits)) for places in braces)
        self.are_plain &= (opened == closed) & (opened <= 2)
        has_mapping = self.are_plain & (opened == 2)
        first = [np.searchsorted(places, self.starts[has_mapping]) for places in braces]
        self._inner = [braces[0][first[0] + 1], braces[1][first[1]]]

    def locate(self, key: bytes, lines: Integers, near: Integers) -> tuple[Flags, Integers, Flags]:
        """Find a key in lines: whether it is there, where (else ``near``), and whether that is certain.

        ``near`` is where the key before was found. Lines have it at few distances from there, as few numbers differ in
        their digits: the distance that one line shows is tried on all that are left.
        """
        at, is_there = near.copy(), np.zeros(len(lines), np.bool_)
        if self.data.find(key) < 0:
            return is_there, at, np.ones(len(lines), np.bool_)
        left = np.arange(len(lines))
        while len(left):
            line = lines[left[len(left) // 2]]
            found = self.data.find(key, self.starts[line], self.ends[line])
            if found < 0:
                break
            places = np.minimum(near[left] + (found - near[left[len(left) // 2]]), len(self.data))
            is_here = self._windows(places, len(key)) == key
            hits = left[is_here]
            is_there[hits], at[hits] = True, places[is_here]
            left = left[~is_here]
        for index in left.tolist():
            found = self.data.find(key, self.starts[lines[index]], self.ends[lines[index]])
            if found >= 0:
                is_there[index], at[index] = True, found
        is_inside = (at > self.starts[lines]) & (at < self.ends[lines])
        return is_there, at, (is_inside & self._is_outside(at)) | ~is_there

    def _is_outside(self, at: Integers) -> Flags:
        """Tell which places lie in no mapping inside of a record."""
        if not self._inner or not len(self._inner[0]):
            return np.ones(len(at), np.bool_)
        before = np.searchsorted(self._inner[0], at) - 1
        return (before < 0) | (at > self._inner[1][before])

    def numbers(self, at: Integers, as_integers: bool) -> tuple[Flags, Floats, Integers]:
        """Read the values that start there: which are numbers, these (NaN for others), and how long their text is.

        The length is 0 where a number is none, or not as Python writes it.
        """
        windows = self._windows(at, NUMBER).view(np.uint8).reshape(len(at), NUMBER)
        first = windows[:, 0]
        # Also NaN, Infinity and -Infinity, as Python writes them.
        known = ((first >= ord("0")) & (first <= ord("9"))) | (first == ord("-"))
        known |= (first == ord("N")) | (first == ord("I"))
        values, lengths = np.full(len(at), np.nan), np.zeros(len(at), np.int64)
        if not known.any():
            return known, values, lengths
        lengths = (windows == COMMA).argmax(axis=1)
        size = int(lengths.max())
        if size == 0:
            return known, values, lengths
        is_text = np.arange(size) < lengths[:, None]
        text = windows[:, :size] * is_text
        if as_integers:
            lengths[((text - np.uint8(ord("0")) > 9) & is_text).any(axis=1)] = 0
        lengths[~known] = 0
        is_read = lengths > 0
        try:
            values[is_read] = text[is_read].view(f"S{size}").ravel().astype(np.float64)
        except ValueError:
            lengths[:] = 0
        return known, values, lengths

    def _windows(self, at: Integers, size: int) -> npt.NDArray[np.bytes_]:
        """The ``size`` bytes from each place."""
        every = np.ndarray((len(self.bytes) - size + 1,), f"S{size}", self.bytes, strides=(1,))  # type: ignore[call-overload]
        found: npt.NDArray[np.bytes_] = every[at]
        return found
