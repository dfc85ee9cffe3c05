"""Units of text to units of tokens, in this process or in several.

Owns what a unit leaves behind, and the processes. A process holds a piece of text and its tokens, and dies with the one
that started it. Torch-free. Must not know what becomes of the units.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt.config import TokenizerKind
from gpt.data.formats.prepared import SPLITS, TOKENIZER
from gpt.data.formats.write import token_dtype
from gpt.data.preprocessing.readers import decode, read_unit
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.synthetic import WALK_TOKENS, walk
from gpt.data.preprocessing.units import TRAIN, VAL, Unit
from gpt.data.tokenizers.base import Tokenizer
from gpt.data.tokenizers.registry import load_tokenizer
from launch.process import die_with_parent
from launch.runs.files import write_json

PROGRESS_S = 0.5

ROW = struct.Struct("<4q")
ROW_DTYPE = np.dtype([("split", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("ends", "<i8")])
"""What a unit remembers of each piece: its split, its size, and whether a document ends with it."""
Rows = npt.NDArray[np.void]


@dataclass
class _Work:
    """What a process needs to do units; in a pool, set once in each."""

    recipe: Recipe
    parts: Path
    tokenizer: Tokenizer | None
    dtype: str
    advance: Callable[[int], None]

    def do(self, unit: Unit) -> None:
        """Tokenize one unit and keep it."""
        stem = self.parts / f"{unit.number:06d}"
        kept = {name: _Kept(stem.with_suffix(f".{name}")) for name in (*SPLITS, "rows")}
        num_bytes = 0
        for split, ids, size, ends in self._tokens(unit):
            kept[SPLITS[split]].write(ids.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes())
            kept["rows"].write(ROW.pack(split, len(ids), size, ends))
            num_bytes += size
            self.advance(size)
        sums = {name: file.close() for name, file in kept.items()}
        # Last, so that a unit with it is whole.
        write_json(stem.with_suffix(".json"), {"sha256": sums, "bytes": num_bytes})

    def _tokens(self, unit: Unit) -> Iterator[tuple[int, npt.NDArray[Any], int, bool]]:
        """Split, ids, bytes of text and end of a document, of each piece."""
        if self.recipe.kind == "synthetic":
            yield from self._walk(unit)
            return
        assert self.tokenizer is not None
        exact = self.tokenizer.kind is TokenizerKind.byte
        for piece in read_unit(self.recipe, unit):
            data = piece.data
            if piece.ends and self.tokenizer.eot is None and self.recipe.splits_documents:
                data += b"\n"
            ids: npt.NDArray[Any] = (
                np.frombuffer(data, np.uint8) if exact else self.tokenizer.encode(decode(data, unit))
            )
            if piece.ends and self.tokenizer.eot is not None and self.recipe.has_documents:
                ids = np.append(ids, np.uint32(self.tokenizer.eot))
            yield piece.split, ids, len(data), piece.ends

    def _walk(self, unit: Unit) -> Iterator[tuple[int, npt.NDArray[Any], int, bool]]:
        ids = walk(self.recipe.config.synthetic, unit.number)
        known = self.recipe.known_tokens()
        assert known is not None
        cut = min(max(known[0] - unit.number * WALK_TOKENS, 0), len(ids))
        for split, part in ((TRAIN, ids[:cut]), (VAL, ids[cut:])):
            if len(part):
                yield split, part, len(part), False


class _Kept:
    """A file of a unit: hashed as it is written, and there only when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return self._digest.hexdigest()


_work: _Work | None = None


def _start_worker(recipe: Recipe, parts: Path, dtype: str, parent: int, counter: Synchronized[int]) -> None:
    """Make a pool's process ready: it ends with its parent, and has a tokenizer of its own."""
    global _work
    die_with_parent(parent)

    def advance(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    tokenizer = None if recipe.kind == "synthetic" else load_tokenizer(parts / TOKENIZER)
    _work = _Work(recipe, parts, tokenizer, dtype, advance)


def _do_in_worker(unit: Unit) -> None:
    assert _work is not None
    _work.do(unit)


def do_units(
    recipe: Recipe, units: list[Unit], parts: Path, tokenizer: Tokenizer | None, workers: int, progress: bool
) -> int:
    """Do the units that are not done yet. Returns how many are used: with ``data.max_bytes`` perhaps not all."""
    dtype = dtype_of(recipe, tokenizer)
    with tqdm(
        desc=recipe.config.title,
        total=recipe.num_bytes if recipe.kind in ("text", "jsonl") else None,
        unit="B" if recipe.kind != "synthetic" else "token",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        done = {unit.number: size for unit in units if (size := _kept(parts, unit.number)) is not None}
        bar.update(sum(done.values()))
        left = [unit for unit in units if unit.number not in done]
        if workers > 1 and len(left) > 2:  # a process takes longer to start than a unit or two to do
            _in_pool(recipe, left, done, parts, dtype, workers, bar)
        else:

            def advance(size: int) -> None:
                bar.update(size)

            work = _Work(recipe, parts, tokenizer, dtype, advance)
            for unit in left:
                if _enough(recipe, done, unit):
                    break
                work.do(unit)
                done[unit.number] = _size(parts, unit.number)
    return next((n for n in range(len(units)) if n not in done), len(units))


def _in_pool(
    recipe: Recipe, left: list[Unit], done: dict[int, int], parts: Path, dtype: str, workers: int, bar: tqdm[Any]
) -> None:
    """Do units in several processes, in order as far as they go."""
    context = get_context("spawn")  # forked processes would share the locks of the libraries' threads
    counter: Synchronized[int] = context.Value("q", 0)
    shown, waiting, started = 0, iter(left), dict[Future[None], Unit]()
    with ProcessPoolExecutor(
        min(workers, len(left)), context, _start_worker, (recipe, parts, dtype, os.getpid(), counter)
    ) as pool:
        more = True
        while more or started:
            while more and len(started) < 2 * workers:
                unit = next(waiting, None)
                more = unit is not None and not _enough(recipe, done, unit)
                if more and unit is not None:
                    started[pool.submit(_do_in_worker, unit)] = unit
            finished, _ = wait(started, timeout=PROGRESS_S, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                number = started.pop(future).number
                done[number] = _size(parts, number)
            bar.update(counter.value - shown)
            shown = counter.value


def _enough(recipe: Recipe, done: dict[int, int], unit: Unit) -> bool:
    """Whether the units before this one already hold ``data.max_bytes``; texts are cut before they get here."""
    limit = recipe.config.max_bytes
    if limit is None or not recipe.splits_documents or unit.split is not None:
        return False
    before = [done.get(number) for number in range(unit.number)]
    return None not in before and sum(size for size in before if size is not None) >= limit


def _kept(parts: Path, number: int) -> int | None:
    """Bytes of text of a unit that was finished earlier; None where there is none, or it was damaged."""
    stem = parts / f"{number:06d}"
    try:
        told = json.loads(stem.with_suffix(".json").read_bytes())
        for name, expected in told["sha256"].items():
            with stem.with_suffix(f".{name}").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
        return int(told["bytes"])
    except (OSError, ValueError, KeyError):
        return None


def _size(parts: Path, number: int) -> int:
    return int(json.loads((parts / f"{number:06d}.json").read_bytes())["bytes"])


def vocab_of(recipe: Recipe, tokenizer: Tokenizer | None) -> int:
    return recipe.config.synthetic.vocab_size if tokenizer is None else tokenizer.vocab_size


def dtype_of(recipe: Recipe, tokenizer: Tokenizer | None) -> str:
    return token_dtype(recipe.config.layout, vocab_of(recipe, tokenizer))
