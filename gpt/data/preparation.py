"""Preparation of a corpus: shards are tokenized and merged into a folder with a manifest. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from gpt.config import TokenFileFormat
from gpt.config.train import is_installed
from gpt.data.prepared import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKEN_BYTES,
    TOKENIZER,
    TokenSource,
    open_folder,
    read_corpus_manifest,
)
from gpt.data.shards import TRAIN, VAL, Shard, chain_of, list_shards
from gpt.data.spec import PreprocessingSpec
from gpt.data.token_file import ITEM_BYTES, WrittenFile, write_split
from gpt.data.tokenizers import ABOUT, CharTokenizer, Tokenizer, describe_tokenizer, load_tokenizer, save_tokenizer
from gpt.data.worker import ROW_DTYPE, Rows, make_tokenizer, token_dtype_for, tokenize_shards, vocab_size_for
from launch.errors import ConfigError
from launch.runs.files import write_json

# Merge of tokenized shards into a prepared folder: the used rows, the files of each split, and the manifest.
#
# The merge keeps the rows of one shard in memory at a time.


COPY_BYTES = 1 << 20
# The manifest records their versions, because another release may tokenize a text differently.
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class _MergePlan:
    """Used rows of each shard; numbers of tokens, bytes of text and documents of the two splits, (train, val)."""

    rows: dict[int, int]
    """Number of a shard -> number of its rows that are used, from the first."""
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
    """Return the largest number of bytes of text by split; empty without a limit.

    The key None limits shards whose documents are divided between both splits.
    """
    limit = spec.config.max_bytes  # the spec already limits single texts
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
        ConfigError: a split has no text.
    """
    plan = _plan(spec, shards, parts)
    _refuse_empty(spec, plan)
    whole, dtype, layout = parts / "whole", token_dtype_for(spec, tokenizer), spec.config.layout
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    written = []
    for split, name in enumerate(SPLITS):
        chunks, lengths = _chunks(parts, plan, split, dtype), _lengths(parts, plan, split)
        written.append(write_split(layout, whole / name, dtype, plan.tokens[split], chunks, lengths))
    if layout is TokenFileFormat.nanogpt:
        # nanoGPT's train.py reads the vocabulary size, its sample.py the characters.
        meta: dict[str, object] = {"vocab_size": vocab_size_for(spec, tokenizer)}
        if isinstance(tokenizer, CharTokenizer):
            meta |= {"stoi": dict(tokenizer.ids), "itos": dict(enumerate(tokenizer.characters))}
        (whole / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=4))  # readable by any Python since 3.4
    if tokenizer is not None:
        save_tokenizer(tokenizer, whole / TOKENIZER)
        sizes = tokenizer.token_bytes()
        # Written next to the tokens, so that bits per byte can be computed without the tokenizer's library.
        if sizes is not None:
            (whole / TOKEN_BYTES).write_bytes(sizes.astype("<u4").tobytes())
    write_json(whole / MANIFEST, _manifest(spec, plan, written, dtype, tokenizer))


def _refuse_empty(spec: PreprocessingSpec, plan: _MergePlan) -> None:
    for split in (TRAIN, VAL):
        if plan.tokens[split]:
            continue
        found = f"no text for {('training', 'validation')[split]}: {sum(plan.documents)} documents, "
        found += f"data.val_fraction={spec.config.val_fraction}"
        fix = "more text, or data.val_fraction=0.5"
        if spec.val_files:
            key = ("path", "val_path")[split]
            found = f"no text in {plan.documents[split]} documents of data.{key}={getattr(spec.config, key)}"
            fix = f"another data.{key}"
        raise ConfigError(found, "text in both splits", fix)


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
    """Yield the number of tokens of each document of a split. Tokens after the last end form one more."""
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
    versions = {name: metadata.version(name) for name in LIBRARIES if is_installed(name)}
    return {
        "format": FORMAT,
        "name": spec.config.title,
        "spec": spec.identity,
        "layout": spec.config.layout.name,  # named after the key of the config, as in earlier manifests
        "dtype": dtype,
        "vocab_size": vocab_size_for(spec, tokenizer),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer),
        "entropy": chain_of(spec.config.synthetic).entropy() if spec.kind == "synthetic" else None,
        "splits": splits,
        "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "versions": {"python": platform.python_version(), **versions},
    }


# Preparation: several processes tokenize shards of text, which are then merged into a folder with a manifest.
#
# Meanwhile the shards are in ``.NAME.parts`` next to the folder. Each has checksums, and is verified before it is
# reused.
#
#     .NAME.parts/recipe.json   the identity of the preprocessing spec
#     .NAME.parts/units.json    the number of shards
#     .NAME.parts/tokenizer/    made first, trained on the text if needed
#     .NAME.parts/000012.json   a finished shard: checksums of 000012.train, 000012.val and 000012.rows
#     .NAME.parts/whole/        the unfinished folder, renamed to NAME at the end


def prepare_folder(
    spec: PreprocessingSpec, folder: Path, workers: int = 1, progress: bool = False, replace: bool = True
) -> TokenSource:
    """Prepare a corpus in ``folder``, or return the existing one. Of several simultaneous callers, one prepares it.

    A killed preparation resumes at its last finished shard.

    Args:
        spec: the inputs that determine the corpus.
        folder: the prepared folder.
        workers: number of processes that read and tokenize; 1 works in this process.
        progress: show a bar on standard error.
        replace: replace a folder without a whole corpus; False for a folder that the user named.

    Raises:
        ConfigError: the text cannot be read, or ``folder`` has other content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        found = _find_prepared(spec, folder, replace)
        parts = folder.with_name(f".{folder.name}.parts")
        if found is not None:
            shutil.rmtree(parts, ignore_errors=True)  # a former process was killed before this deletion
            return found
        _open_parts(spec, parts)
        tokenizer = None
        if spec.kind != "synthetic":
            if not (parts / TOKENIZER / ABOUT).is_file():
                save_tokenizer(make_tokenizer(spec), parts / TOKENIZER)
            tokenizer = load_tokenizer(parts / TOKENIZER)  # from its file, as the processes and a later command do
        shards = list_shards(spec)
        _refuse_other_shards(parts, len(shards))
        used = tokenize_shards(spec, shards, parts, tokenizer, workers, progress)
        merge_shards(spec, shards[:used], parts, tokenizer)
        _move_into_place(parts, folder)
        made = open_folder(folder)
        assert made is not None, f"{folder} was just written"
        return made


def _find_prepared(spec: PreprocessingSpec, folder: Path, replace: bool) -> TokenSource | None:
    manifest = read_corpus_manifest(folder)
    if manifest is not None and manifest["spec"] == spec.identity:
        return open_folder(folder)
    if not replace and folder.is_dir() and any(folder.iterdir()):
        content = "something that is no prepared corpus"
        if manifest is not None:
            there, asked = manifest["spec"], spec.identity
            key = next(k for k in {**there, **asked} if there.get(k) != asked.get(k))
            content = f"a corpus prepared with {key}={there.get(key)}, and now {key}={asked.get(key)}"
        raise ConfigError(f"{folder} holds {content}", "an empty or a new folder", "--output FOLDER with another name")
    return None


def _open_parts(spec: PreprocessingSpec, parts: Path) -> None:
    """Keep the finished shards in ``parts`` if they have the same spec; otherwise empty the folder."""
    identity = parts / "recipe.json"  # file names stay the same, so that a killed preparation can resume
    try:
        same = json.loads(identity.read_bytes()) == spec.identity
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(parts, ignore_errors=True)  # remains of an older version of the text
        parts.mkdir()
        write_json(identity, spec.identity)


def _refuse_other_shards(parts: Path, count: int) -> None:
    """Raise ConfigError if the corpus now has another number of shards than when its preparation began."""
    earlier = parts / "units.json"
    if not earlier.is_file():
        write_json(earlier, count)
    elif json.loads(earlier.read_bytes()) != count:
        raise ConfigError(
            f"{parts} was begun with {earlier.read_text().strip()} shards, and now there are {count}",
            "the same source as when the preparation was begun",
            f"rm -r {parts}, to begin again",
        )


def _move_into_place(parts: Path, folder: Path) -> None:
    """Rename the finished ``parts/whole`` to ``folder``. An earlier, damaged or outdated ``folder`` is deleted."""
    old = parts / "old"
    if folder.exists():
        folder.rename(old)
    (parts / "whole").rename(folder)
    shutil.rmtree(parts)
