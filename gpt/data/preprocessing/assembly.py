"""Finished units to a prepared folder: which rows of them are used, the files of each split, and the manifest.

Owns the folder's content. Streams: holds one unit's rows. Torch-free. Must not know how units are made.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.config import Layout
from gpt.data.formats.prepared import FORMAT, MANIFEST, SPLITS, TOKEN_BYTES, TOKENIZER
from gpt.data.formats.token_file import ITEM_BYTES
from gpt.data.formats.write import WrittenFile, write_meta, write_split
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.synthetic import chain_of
from gpt.data.preprocessing.units import TRAIN, VAL, Unit
from gpt.data.preprocessing.worker import ROW_DTYPE, Rows, dtype_of, vocab_of
from gpt.data.tokenizers.base import Tokenizer
from gpt.data.tokenizers.registry import about, save_tokenizer
from launch.errors import ConfigError
from launch.runs.files import write_json

COPY_BYTES = 1 << 20
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class _Plan:
    """How much of each unit is used, and what that makes."""

    rows: dict[int, int]
    """Rows of each unit."""
    tokens: list[int]
    bytes: list[int]
    documents: list[int]


def _plan(recipe: Recipe, units: list[Unit], parts: Path) -> _Plan:
    plan = _Plan({}, [0, 0], [0, 0], [0, 0])
    limits = _limits(recipe)
    used: dict[int | None, int] = {None: 0, TRAIN: 0, VAL: 0}
    for unit in units:
        rows = _rows(parts, unit.number)
        limit = limits.get(unit.split)
        if limit is not None:
            before = used[unit.split] + np.cumsum(rows["bytes"]) - rows["bytes"]
            rows = rows[before < limit]
        used[unit.split] += int(rows["bytes"].sum())
        plan.rows[unit.number] = len(rows)
        for split in (TRAIN, VAL):
            mine = rows[rows["split"] == split]
            plan.tokens[split] += int(mine["tokens"].sum())
            plan.bytes[split] += int(mine["bytes"].sum())
            plan.documents[split] += int(mine["ends"].sum())
    return plan


def _limits(recipe: Recipe) -> dict[int | None, int]:
    """Bytes that may be taken, in all or of each named split."""
    limit = recipe.config.max_bytes
    if limit is None or not recipe.splits_documents:
        return {}
    val = max(1, int(limit * recipe.config.val_fraction))
    return {None: limit, TRAIN: limit - val, VAL: val}


def _rows(parts: Path, number: int, count: int | None = None) -> Rows:
    return np.fromfile(parts / f"{number:06d}.rows", dtype=ROW_DTYPE)[:count]


def assemble(recipe: Recipe, units: list[Unit], parts: Path, tokenizer: Tokenizer | None) -> None:
    """Put the units together in ``whole``."""
    plan = _plan(recipe, units, parts)
    _refuse_empty(recipe, plan)
    whole, dtype = parts / "whole", dtype_of(recipe, tokenizer)
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    written = [
        write_split(
            recipe.config.layout,
            whole,
            SPLITS[split],
            dtype,
            plan.tokens[split],
            _chunks(parts, plan, split, dtype),
            _lengths(parts, plan, split),
        )
        for split in (TRAIN, VAL)
    ]
    if recipe.config.layout is Layout.nanogpt:
        write_meta(whole, vocab_of(recipe, tokenizer), tokenizer)
    if tokenizer is not None:
        save_tokenizer(tokenizer, whole / TOKENIZER)
        sizes = tokenizer.token_bytes()
        if sizes is not None:
            (whole / TOKEN_BYTES).write_bytes(sizes.astype("<u4").tobytes())
    write_json(whole / MANIFEST, _manifest(recipe, plan, written, dtype, tokenizer))


def _refuse_empty(recipe: Recipe, plan: _Plan) -> None:
    for split in (TRAIN, VAL):
        if not plan.tokens[split]:
            raise ConfigError(
                f"no text for {('training', 'validation')[split]}: {sum(plan.documents)} documents, "
                f"data.val_fraction={recipe.config.val_fraction}",
                "text in both splits",
                "more text, or data.val_fraction=0.5",
            )


def _chunks(parts: Path, plan: _Plan, split: int, dtype: str) -> Iterator[bytes]:
    """The tokens of a split, in order."""
    for number, count in plan.rows.items():
        rows = _rows(parts, number, count)
        left = int(rows["tokens"][rows["split"] == split].sum()) * ITEM_BYTES[dtype]
        with (parts / f"{number:06d}.{SPLITS[split]}").open("rb") as file:
            while left:
                chunk = file.read(min(COPY_BYTES, left))
                assert chunk, f"unit {number} is shorter than it says"
                left -= len(chunk)
                yield chunk


def _lengths(parts: Path, plan: _Plan, split: int) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of each document of a split; what follows the last end is one, too."""
    carried = 0
    for number, count in plan.rows.items():
        rows = _rows(parts, number, count)
        rows = rows[rows["split"] == split]
        if not len(rows):
            continue
        total = carried + np.cumsum(rows["tokens"])
        ends = total[rows["ends"] == 1]
        yield np.diff(ends, prepend=0).astype(np.int64)
        carried = int(total[-1] - (ends[-1] if len(ends) else 0))
    if carried:
        yield np.array([carried], dtype=np.int64)


def _manifest(
    recipe: Recipe, plan: _Plan, written: list[list[WrittenFile]], dtype: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    splits = {}
    for split, files in enumerate(written):
        splits[SPLITS[split]] = {
            "documents": plan.documents[split] if recipe.has_documents else None,
            "tokens": plan.tokens[split],
            "bytes": None if recipe.kind == "synthetic" else plan.bytes[split],
            "files": [asdict(file) for file in files],
        }
    content = [[file.sha256 for file in files] for files in written]
    return {
        "format": FORMAT,
        "name": recipe.config.title,
        "spec": recipe.spec,
        "layout": recipe.config.layout.name,
        "dtype": dtype,
        "vocab_size": vocab_of(recipe, tokenizer),
        "tokenizer": None if tokenizer is None else about(tokenizer),
        "entropy": chain_of(recipe.config.synthetic).entropy() if recipe.kind == "synthetic" else None,
        "splits": splits,
        "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
