"""Making a prepared corpus: units of text to tokens in several processes, then one folder with a manifest.

Owns the steps, what is kept when a preparation is killed, and that a folder is there whole or not at all. While it goes
on, the units lie in ``.NAME.parts`` beside the folder; each is kept with its checksums, and verified before it is used
again. Torch-free. Must not know of batches.

    .NAME.parts/recipe.json   what is being prepared
    .NAME.parts/tokenizer/    made first, from the text where it is learned
    .NAME.parts/000012.json   a finished unit: checksums of 000012.train, 000012.val and 000012.rows
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
from gpt.data.preprocessing.assembly import assemble
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.train_tokenizer import make_tokenizer
from gpt.data.preprocessing.units import cut_units
from gpt.data.preprocessing.worker import do_units
from gpt.data.tokenizers.base import ABOUT, Tokenizer
from gpt.data.tokenizers.registry import load_tokenizer, save_tokenizer
from launch.errors import ConfigError
from launch.runs.files import write_json

READ_BYTES = 1 << 22


def prepare(
    recipe: Recipe, folder: Path, workers: int = 1, progress: bool = False, replace: bool = True
) -> TokenSource:
    """The prepared corpus in ``folder``: found there, gone on with, or made. Several callers at once make it once.

    Args:
        workers: processes that read and tokenize; 1 does it in this one.
        progress: show a bar on standard error.
        replace: whether a folder that holds no whole corpus may be replaced; a folder of the user's own may not.

    Raises:
        ConfigError: the text cannot be read, or ``folder`` holds something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        found = _find(recipe, folder, replace)
        parts = folder.with_name(f".{folder.name}.parts")
        if found is not None:
            shutil.rmtree(parts, ignore_errors=True)  # killed just before it was done with them
            return found
        _open_parts(recipe, parts)
        tokenizer = None if recipe.kind == "synthetic" else _tokenizer(recipe, parts)
        units = cut_units(recipe)
        _refuse_other_units(parts, len(units))
        used = do_units(recipe, units, parts, tokenizer, workers, progress)
        assemble(recipe, units[:used], parts, tokenizer)
        _put_in_place(parts, folder)
        made = open_folder(folder)
        assert made is not None, f"{folder} was just written"
        return made


def _find(recipe: Recipe, folder: Path, replace: bool) -> TokenSource | None:
    manifest = read_manifest(folder)
    if manifest is not None and manifest["spec"] == recipe.spec:
        return open_folder(folder)
    if not replace and folder.is_dir() and any(folder.iterdir()):
        what = "something that is no prepared corpus"
        if manifest is not None:
            theirs, ours = manifest["spec"], recipe.spec
            key = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
            what = f"a corpus prepared with {key}={theirs.get(key)}, and now {key}={ours.get(key)}"
        raise ConfigError(f"{folder} holds {what}", "an empty or a new folder", "--to FOLDER with another name")
    return None


def _open_parts(recipe: Recipe, parts: Path) -> None:
    """Go on with what there is, or begin."""
    told = parts / "recipe.json"
    try:
        same = json.loads(told.read_bytes()) == recipe.spec
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(parts, ignore_errors=True)  # the rest of an older version of the text
        parts.mkdir()
        write_json(told, recipe.spec)


def _refuse_other_units(parts: Path, count: int) -> None:
    """A dataset may have been cut differently since the units that are kept were made."""
    told = parts / "units.json"
    if not told.is_file():
        write_json(told, count)
    elif json.loads(told.read_bytes()) != count:
        raise ConfigError(
            f"{parts} was begun with {told.read_text().strip()} units, and now there are {count}",
            "the same source as when the preparation was begun",
            f"rm -r {parts}, to begin again",
        )


def _tokenizer(recipe: Recipe, parts: Path) -> Tokenizer:
    folder = parts / TOKENIZER
    if not (folder / ABOUT).is_file():
        save_tokenizer(make_tokenizer(recipe), folder)
    return load_tokenizer(folder)


def _put_in_place(parts: Path, folder: Path) -> None:
    """Rename the whole folder to where it belongs; what lay there, damaged or of an older version, goes."""
    old = parts / "old"
    if folder.exists():
        folder.rename(old)
    (parts / "whole").rename(folder)
    shutil.rmtree(parts)


def verify(folder: Path, advance: Callable[[int], None] = lambda size: None) -> list[str]:
    """Names of the files of a prepared folder whose checksum is not the manifest's."""
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} was opened before"
    bad = []
    for told in manifest["splits"].values():
        for file in told["files"]:
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
