"""Preparation of a corpus: shards of text are tokenized by several processes and merged into a folder with a manifest.

Owns the steps, the finished work that a killed preparation leaves, and that a folder is there whole or not at all.
Meanwhile the shards lie in ``.NAME.parts`` beside the folder; each is kept with its checksums, and verified before it
is used again. Torch-free. Must not know of batches.

    .NAME.parts/recipe.json   the identity of the preprocessing spec
    .NAME.parts/units.json    the number of shards
    .NAME.parts/tokenizer/    made first, from the text where it is trained
    .NAME.parts/000012.json   a finished shard: checksums of 000012.train, 000012.val and 000012.rows
    .NAME.parts/whole/        the folder in the making, renamed to NAME at the end
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from gpt.data.formats.prepared import TOKENIZER, TokenSource, open_folder, read_manifest
from gpt.data.preprocessing.merge import merge_shards
from gpt.data.preprocessing.shards import list_shards
from gpt.data.preprocessing.spec import PreprocessingSpec
from gpt.data.preprocessing.train_tokenizer import make_tokenizer
from gpt.data.preprocessing.worker import tokenize_shards
from gpt.data.tokenizers.base import ABOUT, Tokenizer
from gpt.data.tokenizers.registry import load_tokenizer, save_tokenizer
from launch.errors import ConfigError
from launch.runs.files import write_json

READ_BYTES = 1 << 22


def prepare(
    spec: PreprocessingSpec, folder: Path, workers: int = 1, progress: bool = False, replace: bool = True
) -> TokenSource:
    """Prepare a corpus in ``folder``, or return the one that is there. Several callers at once make it once.

    A preparation that was killed goes on where it stopped.

    Args:
        workers: processes that read and tokenize; 1 does it in this one.
        progress: show a bar on standard error.
        replace: replace a folder that holds no whole corpus; off for a folder that the user named.

    Raises:
        ConfigError: the text cannot be read, or ``folder`` holds something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        found = _find_prepared(spec, folder, replace)
        parts = folder.with_name(f".{folder.name}.parts")
        if found is not None:
            shutil.rmtree(parts, ignore_errors=True)  # killed just before it was done with them
            return found
        _open_parts(spec, parts)
        tokenizer = None if spec.kind == "synthetic" else _keep_tokenizer(spec, parts)
        shards = list_shards(spec)
        _refuse_other_shards(parts, len(shards))
        used = tokenize_shards(spec, shards, parts, tokenizer, workers, progress)
        merge_shards(spec, shards[:used], parts, tokenizer)
        _move_into_place(parts, folder)
        made = open_folder(folder)
        assert made is not None, f"{folder} was just written"
        return made


def _find_prepared(spec: PreprocessingSpec, folder: Path, replace: bool) -> TokenSource | None:
    manifest = read_manifest(folder)
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
    """Keep the finished shards of an equal spec, or begin with an empty folder."""
    identity = parts / "recipe.json"  # the names on disk stay, so that a preparation that was killed goes on
    try:
        same = json.loads(identity.read_bytes()) == spec.identity
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(parts, ignore_errors=True)  # the rest of an older version of the text
        parts.mkdir()
        write_json(identity, spec.identity)


def _refuse_other_shards(parts: Path, count: int) -> None:
    """Raise ConfigError where a dataset has other files now than when the shards that are kept were made."""
    earlier = parts / "units.json"
    if not earlier.is_file():
        write_json(earlier, count)
    elif json.loads(earlier.read_bytes()) != count:
        raise ConfigError(
            f"{parts} was begun with {earlier.read_text().strip()} shards, and now there are {count}",
            "the same source as when the preparation was begun",
            f"rm -r {parts}, to begin again",
        )


def _keep_tokenizer(spec: PreprocessingSpec, parts: Path) -> Tokenizer:
    """Make the tokenizer once, and read it back as the processes and a later run of the command do."""
    folder = parts / TOKENIZER
    if not (folder / ABOUT).is_file():
        save_tokenizer(make_tokenizer(spec), folder)
    return load_tokenizer(folder)


def _move_into_place(parts: Path, folder: Path) -> None:
    """Give the finished folder its name; an earlier one, damaged or of an older version, is deleted."""
    old = parts / "old"
    if folder.exists():
        folder.rename(old)
    (parts / "whole").rename(folder)
    shutil.rmtree(parts)


def verify(folder: Path, advance: Callable[[int], None] = lambda size: None) -> list[str]:
    """List the files of a prepared folder whose checksum is not the manifest's; ``advance`` gets bytes as they pass."""
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} was opened before"
    bad = []
    for split in manifest["splits"].values():
        for file in split["files"]:
            if _checksum(folder / file["name"], advance) != file["sha256"]:
                bad.append(file["name"])
    return bad


def _checksum(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
