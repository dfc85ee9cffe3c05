"""Token files: a corpus as one flat array on disk, and the manifest beside it.

Owns the format, and that a file is written once, whole or not at all, however many processes want it. Torch-free.
Must not know where tokens come from or how they become batches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from gpt.run_folder import write_json

FORMAT = 1
TOKENIZER = "byte"
DTYPE = "uint8"  # little-endian numpy name; kept in the manifest, since larger vocabularies need wider tokens
ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class TokenFile:
    """A prepared corpus: ``tokens`` numbers of ``dtype`` in one file without a header. Can be sent to other ranks."""

    path: Path
    dtype: str
    tokens: int
    tokenizer: str
    sha256: str
    """Of the file's bytes: equal for equal training data, wherever it was prepared."""

    @property
    def num_bytes(self) -> int:
        """Size the file must have."""
        return self.tokens * ITEM_BYTES[self.dtype]

    def is_whole(self) -> bool:
        """Whether the file is there with its full size; cheap, so it is asked at every start."""
        try:
            return self.path.stat().st_size == self.num_bytes
        except FileNotFoundError:
            return False


def open_or_write(folder: Path, key: str, tokens: int, source: str, read: Callable[[], Iterator[bytes]]) -> TokenFile:
    """The token file ``key`` of ``folder``; where it is missing or cut short, ``read`` supplies its bytes.

    Several processes may ask at once: one writes, the others wait and find it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.bin"
    with FileLock(folder / f"{key}.lock"):
        found = read_manifest(path)
        if found is not None and found.is_whole():
            return found
        sha256 = _write(path, read())
        file = TokenFile(path, DTYPE, tokens, TOKENIZER, sha256)
        assert file.is_whole(), f"{path} should have {tokens} tokens"
        # Last, so that a manifest always describes a whole file.
        write_json(_manifest(path), {"format": FORMAT, "source": source, **_as_dict(file)})
        return file


def read_manifest(path: Path) -> TokenFile | None:
    """What the manifest beside ``path`` says, None where there is none that can be understood."""
    try:
        value = json.loads(_manifest(path).read_bytes())
        if value["format"] != FORMAT or value["dtype"] not in ITEM_BYTES:
            return None
        return TokenFile(path, value["dtype"], int(value["tokens"]), value["tokenizer"], value["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, chunks: Iterator[bytes]) -> str:
    """Write all chunks and give their sha256; a reader, or a crash, sees the old file or the whole new one."""
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp")  # the lock's holder is alone; a killed one's rest is overwritten
    with temporary.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return digest.hexdigest()


def _manifest(path: Path) -> Path:
    return path.with_suffix(".json")


def _as_dict(file: TokenFile) -> dict[str, Any]:
    return {"tokens": file.tokens, "dtype": file.dtype, "tokenizer": file.tokenizer, "sha256": file.sha256}
