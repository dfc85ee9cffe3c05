"""Merge of tokenized shards into a prepared folder: the rows that are used, the files of each split, and the manifest.

Owns the folder's content. Streams: holds one shard's rows. Torch-free. Must not know how shards are tokenized.
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

from gpt.config import TokenFileFormat
from gpt.data.formats.prepared import FORMAT, MANIFEST, SPLITS, TOKEN_BYTES, TOKENIZER
from gpt.data.formats.token_file import ITEM_BYTES
from gpt.data.formats.write import WrittenFile, write_meta, write_split
from gpt.data.preprocessing.shards import TRAIN, VAL, Shard
from gpt.data.preprocessing.spec import PreprocessingSpec
from gpt.data.preprocessing.synthetic import chain_of
from gpt.data.preprocessing.worker import ROW_DTYPE, Rows, token_dtype_for, vocab_size_for
from gpt.data.tokenizers.base import Tokenizer
from gpt.data.tokenizers.registry import describe_tokenizer, save_tokenizer
from launch.errors import ConfigError
from launch.runs.files import write_json

COPY_BYTES = 1 << 20
# Their versions go into the manifest: another release may tokenize a text otherwise.
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class _MergePlan:
    """The part of each shard that is used, and the totals of each split."""

    rows: dict[int, int]
    """Number of a shard -> how many of its rows are used, from the first."""
    tokens: list[int]
    bytes: list[int]
    documents: list[int]


def _plan(spec: PreprocessingSpec, shards: list[Shard], parts: Path) -> _MergePlan:
    plan = _MergePlan({}, [0, 0], [0, 0], [0, 0])
    limits = _split_limits(spec)
    used: dict[int | None, int] = {None: 0, TRAIN: 0, VAL: 0}
    for shard in shards:
        rows = _rows(parts, shard.number)
        limit = limits.get(shard.split)
        if limit is not None:
            before = used[shard.split] + np.cumsum(rows["bytes"]) - rows["bytes"]
            rows = rows[before < limit]
        used[shard.split] += int(rows["bytes"].sum())
        plan.rows[shard.number] = len(rows)
        for split in (TRAIN, VAL):
            mine = rows[rows["split"] == split]
            plan.tokens[split] += int(mine["tokens"].sum())
            plan.bytes[split] += int(mine["bytes"].sum())
            plan.documents[split] += int(mine["ends"].sum())
    return plan


def _split_limits(spec: PreprocessingSpec) -> dict[int | None, int]:
    """Most bytes of text to take, in all (None) or of each split that has documents of its own."""
    limit = spec.config.max_bytes  # of texts the spec has taken no more already
    if limit is None or not spec.splits_documents:
        return {}
    if spec.val_files:
        return {TRAIN: limit}
    val = max(1, int(limit * spec.config.val_fraction))
    return {None: limit, TRAIN: limit - val, VAL: val}


def _rows(parts: Path, number: int, count: int | None = None) -> Rows:
    return np.fromfile(parts / f"{number:06d}.rows", dtype=ROW_DTYPE)[:count]


def merge_shards(spec: PreprocessingSpec, shards: list[Shard], parts: Path, tokenizer: Tokenizer | None) -> None:
    """Merge tokenized shards into a complete prepared folder, ``parts/whole``.

    Raises:
        ConfigError: a split is left without text.
    """
    plan = _plan(spec, shards, parts)
    _refuse_empty(spec, plan)
    whole, dtype = parts / "whole", token_dtype_for(spec, tokenizer)
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    written = [
        write_split(
            spec.config.layout,
            whole,
            SPLITS[split],
            dtype,
            plan.tokens[split],
            _chunks(parts, plan, split, dtype),
            _lengths(parts, plan, split),
        )
        for split in (TRAIN, VAL)
    ]
    if spec.config.layout is TokenFileFormat.nanogpt:
        write_meta(whole, vocab_size_for(spec, tokenizer), tokenizer)
    if tokenizer is not None:
        save_tokenizer(tokenizer, whole / TOKENIZER)
        sizes = tokenizer.token_bytes()
        # Beside the tokens, so that bits per byte can be computed without the tokenizer's library.
        if sizes is not None:
            (whole / TOKEN_BYTES).write_bytes(sizes.astype("<u4").tobytes())
    write_json(whole / MANIFEST, _manifest(spec, plan, written, dtype, tokenizer))


def _refuse_empty(spec: PreprocessingSpec, plan: _MergePlan) -> None:
    for split in (TRAIN, VAL):
        if not plan.tokens[split] and spec.val_files:
            path = (spec.config.path, spec.config.val_path)[split]
            raise ConfigError(
                f"no text in {plan.documents[split]} documents of data.{('path', 'val_path')[split]}={path}",
                "text in both splits",
                f"another data.{('path', 'val_path')[split]}",
            )
        if not plan.tokens[split]:
            raise ConfigError(
                f"no text for {('training', 'validation')[split]}: {sum(plan.documents)} documents, "
                f"data.val_fraction={spec.config.val_fraction}",
                "text in both splits",
                "more text, or data.val_fraction=0.5",
            )


def _chunks(parts: Path, plan: _MergePlan, split: int, dtype: str) -> Iterator[bytes]:
    """Yield the tokens of a split in order, as little-endian bytes of ``dtype``."""
    for number, count in plan.rows.items():
        rows = _rows(parts, number, count)
        left = int(rows["tokens"][rows["split"] == split].sum()) * ITEM_BYTES[dtype]
        with (parts / f"{number:06d}.{SPLITS[split]}").open("rb") as file:
            while left:
                chunk = file.read(min(COPY_BYTES, left))
                assert chunk, f"shard {number} is shorter than its rows say"
                left -= len(chunk)
                yield chunk


def _lengths(parts: Path, plan: _MergePlan, split: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the tokens of each document of a split; what follows the last end is a document, too."""
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
    spec: PreprocessingSpec, plan: _MergePlan, written: list[list[WrittenFile]], dtype: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    splits = {}
    for split, files in enumerate(written):
        splits[SPLITS[split]] = {
            "documents": plan.documents[split] if spec.has_documents else None,
            "tokens": plan.tokens[split],
            "bytes": None if spec.kind == "synthetic" else plan.bytes[split],
            "files": [asdict(file) for file in files],
        }
    content = [[file.sha256 for file in files] for files in written]
    return {
        "format": FORMAT,
        "name": spec.config.title,
        "spec": spec.identity,
        "layout": spec.config.layout.name,  # the key of the config, by which earlier manifests have it
        "dtype": dtype,
        "vocab_size": vocab_size_for(spec, tokenizer),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer),
        "entropy": chain_of(spec.config.synthetic).entropy() if spec.kind == "synthetic" else None,
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
