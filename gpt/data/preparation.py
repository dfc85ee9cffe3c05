"""Preparation of a corpus: processes tokenize shards of text, which are merged into a folder with a manifest.

Imports no torch. Meanwhile the shards are in ``.NAME.parts`` next to the folder NAME:

    .NAME.parts/recipe.json   the identity of the preprocessing spec, and the number of shards
    .NAME.parts/tokenizer/    made first, trained on the text if needed
    .NAME.parts/000012.train  tokens of a shard; 000012.val those for validation
    .NAME.parts/000012.rows   its pieces; written last, so a shard with this file is complete
    .NAME.parts/whole/        the unfinished folder, renamed to NAME at the end
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from dataclasses import replace as with_values
from functools import lru_cache, partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tqdm import tqdm

from gpt.config import TokenFileFormat, TokenizerKind, is_installed
from gpt.data.prepared import (
    FORMAT,
    ITEM_BYTES,
    LLMC_HEADER_BYTES,
    LLMC_KINDS,
    MANIFEST,
    MEGATRON_CODES,
    MEGATRON_HEADER,
    MEGATRON_MAGIC,
    SPLITS,
    TOKENIZER,
    TokenSource,
    open_folder,
    read_corpus_manifest,
)
from gpt.data.shards import (
    TRAIN,
    VAL,
    WALK_TOKENS,
    Piece,
    Shard,
    chain_of,
    decode_text,
    list_shards,
    make_tokenizer,
    read_shard,
    walk,
)
from gpt.data.spec import PreprocessingSpec
from gpt.data.tokenizers import (
    ABOUT,
    CharTokenizer,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from launch.errors import ConfigError
from launch.runs.folder import read_json, write_atomically, write_json
from launch.runs.process import die_with_parent


def prepare_folder(
    spec: PreprocessingSpec, folder: Path, workers: int = 1, progress: bool = False, replace: bool = True
) -> TokenSource:
    """Prepare a corpus in ``folder`` unless it exists, and return it as a token source.

    If several processes call this at the same time, one of them prepares the corpus. A preparation that was killed
    resumes at its last finished shard.

    Args:
        spec: the inputs that determine the corpus.
        folder: the prepared folder.
        workers: number of processes that read and tokenize; 1 works in this process.
        progress: True to show a bar on standard error.
        replace: True to replace a folder that has anything but this corpus; False to raise an error.

    Raises:
        ConfigError: the text cannot be read, or ``folder`` has other content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        found = open_folder(folder, spec.identity)
        parts = folder.with_name(f".{folder.name}.parts")
        if found is not None:
            shutil.rmtree(parts, ignore_errors=True)  # a former process was killed before this deletion
            return found
        manifest = read_corpus_manifest(folder)
        if not replace and (manifest is None or manifest["spec"] != spec.identity) and any(folder.glob("*")):
            content = "something that is no prepared corpus" if manifest is None else "a corpus of other data.* keys"
            raise ConfigError(
                f"{folder} holds {content}", "an empty or a new folder", "--output FOLDER with another name"
            )
        shards = list_shards(spec)
        recipe = {"spec": spec.identity, "shards": len(shards)}
        if read_json(parts / "recipe.json") != recipe:
            shutil.rmtree(parts, ignore_errors=True)  # remains of an older version of the text
            parts.mkdir()
            write_json(parts / "recipe.json", recipe)
        if spec.kind != "synthetic" and not (parts / TOKENIZER / ABOUT).is_file():
            save_tokenizer(make_tokenizer(spec), parts / TOKENIZER)
        used = tokenize_shards(spec, shards, parts, workers, progress)
        merge_shards(spec, shards[:used], parts)
        if folder.exists():
            folder.rename(parts / "old")
        (parts / "whole").rename(folder)
        shutil.rmtree(parts)
        made = open_folder(folder)
        assert made is not None, f"{folder} was just written"
        return made


# Tokenization of shards, in this process or in several. A process keeps one piece of text and its tokens in memory.


ROW_DTYPE = np.dtype([("split", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("ends", "<i8")])
"""Record of a tokenized piece of text: its split, its number of tokens, and the bytes of its text. ``ends`` is 1 if a
document ends with the piece, 2 if the piece is a conversation that was cut, else 0."""
Rows = npt.NDArray[np.void]


def tokenize_shards(spec: PreprocessingSpec, shards: Sequence[Shard], parts: Path, workers: int, progress: bool) -> int:
    """Tokenize the unfinished shards into the folder ``parts``, in ``workers`` processes. Return the number of shards
    that the corpus uses: all, or with ``data.max_bytes`` the first ones. ``progress`` is True to show a bar."""
    # Every task carries the spec. Shards name their files, and one of several files has documents.
    light = with_values(spec, files=spec.files[:2], val_files=spec.val_files[:2])
    tokenize, sizes = partial(_tokenize_shard, light, parts), list[int]()
    with ExitStack() as stack:
        total = spec.num_bytes if spec.kind in ("text", "jsonl") else None
        bar = stack.enter_context(
            tqdm(desc=spec.config.title, total=total, unit="B", unit_scale=True, disable=not progress)
        )
        made: Iterator[int] = map(tokenize, shards)
        if workers > 1 and len(shards) > 2:  # starting a process takes longer than tokenizing a shard or two
            # Forked processes would share the locks of the libraries' threads.
            pool = ProcessPoolExecutor(min(workers, len(shards)), get_context("spawn"), die_with_parent, (os.getpid(),))
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error, or when the text suffices
            made = (future.result() for future in [pool.submit(tokenize, shard) for shard in shards])
        for shard in shards:
            if _has_enough_text(spec, shard, sum(sizes[shard.first :])):
                break
            sizes.append(next(made))
            bar.update(sizes[-1])
    return len(sizes)


def _has_enough_text(spec: PreprocessingSpec, shard: Shard, before: int) -> bool:
    """Return True if the corpus does not need the shard ``shard``, because the shards before it already have
    ``data.max_bytes`` bytes of text. ``before`` is the number of these bytes, counted from the shard ``shard.first``.

    Two kinds of shards can give True: a shard whose documents are divided between both splits, and a training shard if
    ``data.val_path`` is set. Every other shard gives False. Text files always give False, because ``build_spec`` has
    already cut their text.
    """
    if spec.config.max_bytes is None or not spec.splits_documents or shard.split is VAL:
        return False
    if shard.split is TRAIN and not spec.val_files:  # validation shards of a dataset come after its training shards
        return False
    return before >= spec.config.max_bytes


def _tokenize_shard(spec: PreprocessingSpec, parts: Path, shard: Shard) -> int:
    """Tokenize one shard into the folder ``parts``, unless it is finished. Return the bytes of its text."""
    stem = parts / f"{shard.number:06d}"
    if not stem.with_suffix(".rows").is_file():
        tokenizer = open_tokenizer(spec, parts)
        dtype, rows = np.dtype(token_dtype_for(spec, tokenizer)).newbyteorder("<"), []
        with ExitStack() as stack:
            files = [stack.enter_context(stem.with_suffix(f".{name}").open("wb")) for name in SPLITS]
            for split, ids, size, ends in _tokens(spec, shard, tokenizer):
                files[split].write(ids.astype(dtype).tobytes())
                rows.append((split, len(ids), size, ends))
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        write_atomically(stem.with_suffix(".rows"), np.array(rows, ROW_DTYPE).tobytes())
    return int(_read_rows(parts, shard)["bytes"].sum())


def _read_rows(parts: Path, shard: Shard) -> Rows:
    return np.fromfile(parts / f"{shard.number:06d}.rows", dtype=ROW_DTYPE)


def open_tokenizer(spec: PreprocessingSpec, parts: Path) -> Tokenizer | None:
    """Return the tokenizer that a preparation has saved in the folder ``parts``; None for a Markov chain, which needs
    none."""
    return None if spec.kind == "synthetic" else _load_once(parts / TOKENIZER, (parts / TOKENIZER / ABOUT).read_bytes())


@lru_cache(maxsize=1)
def _load_once(folder: Path, about: bytes) -> Tokenizer:
    return load_tokenizer(folder)  # ``about`` has its checksum: another preparation may have the same folder


def _tokens(
    spec: PreprocessingSpec, shard: Shard, tokenizer: Tokenizer | None
) -> Iterator[tuple[int, npt.NDArray[Any], int, int]]:
    """Yield four values for each piece of a shard: its split, its token ids, the number of bytes of its text, and
    ``ends`` of ``ROW_DTYPE``. For a Markov chain ``tokenizer`` is None, and each token counts as one byte."""
    if tokenizer is None:
        ids, known = walk(spec.config.synthetic, shard.number), spec.known_tokens()
        assert known is not None
        cut = min(max(known[0] - shard.number * WALK_TOKENS, 0), len(ids))
        yield from ((split, part, len(part), False) for split, part in ((TRAIN, ids[:cut]), (VAL, ids[cut:])))
        return
    if spec.config.conversation_tokens is not None:
        from gpt.data.conversations import encode_conversations  # a template needs jinja2, which other corpora do not

        yield from encode_conversations(read_shard(spec, shard), tokenizer, spec.config.conversation_tokens)
        return
    for piece in read_shard(spec, shard):
        yield piece.split, *encode_piece(spec, tokenizer, piece, shard), piece.ends


def encode_piece(
    spec: PreprocessingSpec, tokenizer: Tokenizer, piece: Piece, shard: Shard
) -> tuple[npt.NDArray[Any], int]:
    """Return the token ids of a piece, (N,), and the number of bytes of its text.

    If a document ends with the piece, the token that ends documents is added. A tokenizer without such a token gets a
    newline instead, which counts as a byte of text.

    Raises:
        ConfigError: the text is not UTF-8, which the tokenizer needs.
    """
    data = piece.data
    if piece.ends and tokenizer.eot is None and spec.splits_documents:
        data += b"\n"
    exact = tokenizer.kind is TokenizerKind.byte  # also accepts bytes that are no UTF-8
    tokens: npt.NDArray[Any] = np.frombuffer(data, np.uint8) if exact else tokenizer.encode(decode_text(data, shard))
    if piece.ends and tokenizer.eot is not None and spec.has_documents:
        tokens = np.append(tokens, np.uint32(tokenizer.eot))
    return tokens, len(data)


def vocab_size_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> int:
    """Return the vocabulary size of a corpus: that of its tokenizer, or of a Markov chain if ``tokenizer`` is None."""
    return spec.config.synthetic.vocab_size if tokenizer is None else tokenizer.vocab_size


def token_dtype_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> str:
    """Return the numpy name of the integer type in which the tokens of a corpus are stored. ``tokenizer`` is None for a
    Markov chain."""
    if spec.config.conversation_tokens is not None:
        return "uint32"
    return token_dtype(spec.config.layout, vocab_size_for(spec, tokenizer))


# Writers of token files: one split in the format of nanoGPT, llm.c or Megatron. They keep one piece in memory at a
# time.


LLMC_SHARD_TOKENS = 100_000_000  # as in llm.c's fineweb.py
MEGATRON_SEQUENCE_LIMIT = 1 << 31  # lengths are int32
UINT16_VOCAB = 1 << 16


@dataclass(frozen=True)
class WrittenFile:
    """Entry in the manifest for one file of a split."""

    name: str
    tokens: int
    """Number of tokens; 0 for an index file of Megatron."""
    size: int
    """Size in bytes."""
    sha256: str


def token_dtype(layout: TokenFileFormat, vocab_size: int) -> str:
    """Return the numpy name of the integer type for tokens of a vocabulary: of 16 bits if all ids fit, else of 32.
    ``layout`` decides whether the type of 32 bits has a sign."""
    if vocab_size <= UINT16_VOCAB:
        return "uint16"
    return "int32" if layout is TokenFileFormat.megatron else "uint32"


def write_split(
    layout: TokenFileFormat,
    stem: Path,
    dtype: str,
    tokens: int,
    chunks: Iterable[bytes],
    lengths: npt.NDArray[np.int64],
) -> list[WrittenFile]:
    """Write the token files of one split. Return their entries for the manifest.

    Args:
        layout: format of the files.
        stem: folder and beginning of the names of the files, such as ``FOLDER/train``.
        dtype: numpy name of the integer type of a token.
        tokens: number of tokens in ``chunks``.
        chunks: bytes of the tokens, as little-endian ``dtype``.
        lengths: number of tokens of each document, (documents,), for the index of Megatron.
    """
    if layout is TokenFileFormat.llmc:
        return list(_write_llmc(stem, dtype, tokens, chunks))
    written = [_write_file(stem.with_suffix(".bin"), chunks, tokens)]
    assert written[0].size == tokens * ITEM_BYTES[dtype], f"{stem}: {written[0].size} bytes for {tokens} tokens"
    if layout is TokenFileFormat.megatron:
        written.append(_write_file(stem.with_suffix(".idx"), _megatron_index(dtype, lengths), 0))
    return written


def _write_file(path: Path, chunks: Iterable[bytes | memoryview], tokens: int) -> WrittenFile:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, tokens, size, digest.hexdigest())


def _write_llmc(stem: Path, dtype: str, tokens: int, chunks: Iterable[bytes]) -> Iterator[WrittenFile]:
    more, rest = iter(chunks), memoryview(b"")

    def shard(count: int) -> Iterator[bytes | memoryview]:
        nonlocal rest
        yield struct.pack("<iii", *LLMC_KINDS[dtype], count).ljust(LLMC_HEADER_BYTES, b"\0")
        left = count * ITEM_BYTES[dtype]
        while left:
            rest = rest or memoryview(next(more))
            piece, rest = rest[:left], rest[left:]
            left -= len(piece)
            yield piece

    for number, first in enumerate(range(0, max(1, tokens), LLMC_SHARD_TOKENS)):
        count = min(tokens - first, LLMC_SHARD_TOKENS)
        yield _write_file(stem.with_name(f"{stem.name}_{number:06d}.bin"), shard(count), count)


def _megatron_index(dtype: str, lengths: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the bytes of Megatron's index, in which every document is one sequence. ``lengths`` are the numbers of
    tokens of the documents."""
    if lengths.max(initial=0) >= MEGATRON_SEQUENCE_LIMIT:
        raise ConfigError(
            f"data.layout=megatron with a document of {lengths.max():,} tokens",
            f"documents of less than {MEGATRON_SEQUENCE_LIMIT:,} tokens, which the format has room for",
            "data.layout=llmc",
        )
    after = np.cumsum(lengths)
    yield MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, MEGATRON_CODES[dtype], len(lengths), len(lengths) + 1)
    yield lengths.astype("<i4").tobytes()
    yield ((after - lengths) * ITEM_BYTES[dtype]).astype("<i8").tobytes()
    yield np.arange(len(lengths) + 1).astype("<i8").tobytes()


# Merge of tokenized shards into a prepared folder: the used rows, the files of each split, and the manifest.


COPY_BYTES = 1 << 20
# The manifest records their versions, because another release may tokenize a text differently.
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass(frozen=True)
class _SplitRows:
    """The tokenized pieces of which one split of a corpus consists."""

    shards: list[tuple[Shard, int]]
    """Shards in order. With each shard comes the number of tokens that this split takes from it."""
    rows: Rows
    """Records of the pieces in order (``ROW_DTYPE``)."""

    @property
    def tokens(self) -> int:
        return int(self.rows["tokens"].sum())

    @property
    def documents(self) -> int:
        return int((self.rows["ends"] > 0).sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each document, (documents,). Tokens after the last end of a document are one more
        document."""
        after = np.cumsum(self.rows["tokens"])
        ends = after[(self.rows["ends"] == 1) | (np.arange(len(after)) == len(after) - 1)]
        return np.diff(ends, prepend=0)


def _used_rows(spec: PreprocessingSpec, shards: Iterable[Shard], parts: Path) -> list[_SplitRows]:
    """Return two items, for training and for validation: the pieces of ``shards`` that belong to this split.

    ``data.max_bytes`` limits the text of a corpus; the pieces after the limit are left out (``_split_limits``).
    ``parts`` is the folder of the tokenized shards.
    """
    limits, used = _split_limits(spec), Counter[int | None]()
    found: list[list[tuple[Shard, Rows]]] = [[], []]
    for shard in shards:
        rows = _read_rows(parts, shard)
        if shard.split in limits:
            before = used[shard.split] + np.cumsum(rows["bytes"]) - rows["bytes"]
            rows = rows[before < limits[shard.split]]
        used[shard.split] += int(rows["bytes"].sum())
        for split in (TRAIN, VAL):
            found[split].append((shard, rows[rows["split"] == split]))
    return [
        _SplitRows(
            [(shard, int(rows["tokens"].sum())) for shard, rows in mine], np.concatenate([rows for _, rows in mine])
        )
        for mine in found
    ]


def _split_limits(spec: PreprocessingSpec) -> dict[int | None, int]:
    """Return split of a shard -> largest number of bytes of text that the corpus uses from all shards of this split
    together.

    The key is TRAIN or VAL, or None for shards whose documents are divided between both splits. Shards of a split that
    is missing in the result have no limit. The result is empty without ``data.max_bytes``, and for text files, whose
    text ``build_spec`` has already cut.
    """
    limit = spec.config.max_bytes  # the spec already limits single texts
    if limit is None or not spec.splits_documents:
        return {}
    if spec.val_files:
        return {TRAIN: limit}
    val = max(1, int(limit * spec.config.val_fraction))
    return {None: limit, TRAIN: limit - val, VAL: val}


def merge_shards(spec: PreprocessingSpec, shards: Sequence[Shard], parts: Path) -> None:
    """Write a complete prepared folder, ``parts/whole``, from tokenized shards.

    Raises:
        ConfigError: a split has no text.
    """
    splits, tokenizer, layout = _used_rows(spec, shards, parts), open_tokenizer(spec, parts), spec.config.layout
    for name, split in zip(("train", "validate"), splits, strict=True):
        if not split.tokens:
            raise ConfigError(
                f"no text to {name} on: {split.documents} documents, data.val_fraction={spec.config.val_fraction}",
                "text in both splits",
                "more text, or data.val_fraction=0.5, or data.val_path=FILE",
            )
    whole, dtype = parts / "whole", token_dtype_for(spec, tokenizer)
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    written = [
        write_split(layout, whole / name, dtype, split.tokens, _chunks(parts, name, split, dtype), split.lengths)
        for name, split in zip(SPLITS, splits, strict=True)
    ]
    if layout is TokenFileFormat.nanogpt:
        # nanoGPT's train.py reads the vocabulary size, its sample.py the characters.
        meta: dict[str, object] = {"vocab_size": vocab_size_for(spec, tokenizer)}
        if isinstance(tokenizer, CharTokenizer):
            meta |= {"stoi": dict(tokenizer.ids), "itos": dict(enumerate(tokenizer.characters))}
        (whole / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=4))  # readable by any Python since 3.4
    if tokenizer is not None:
        save_tokenizer(tokenizer, whole / TOKENIZER)
    write_json(whole / MANIFEST, _manifest(spec, splits, written, tokenizer))


def _chunks(parts: Path, name: str, split: _SplitRows, dtype: str) -> Iterator[bytes]:
    """Yield the bytes of the tokens of a split in order, as little-endian ``dtype``. ``name`` is that of the split."""
    for shard, tokens in split.shards:
        left = tokens * ITEM_BYTES[dtype]
        with (parts / f"{shard.number:06d}.{name}").open("rb") as file:
            while left:
                chunk = file.read(min(COPY_BYTES, left))
                assert chunk, f"shard {shard.number} is shorter than its rows say"
                left -= len(chunk)
                yield chunk


def _manifest(
    spec: PreprocessingSpec,
    splits: Sequence[_SplitRows],
    written: Sequence[Sequence[WrittenFile]],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    is_text = tokenizer is not None and spec.config.conversation_tokens is None  # bytes of answers alone are unknown
    versions = {name: metadata.version(name) for name in LIBRARIES if is_installed(name)}
    sums = json.dumps([[file.sha256 for file in files] for files in written])
    return {
        "format": FORMAT,
        "name": spec.config.title,
        "spec": spec.identity,
        "layout": spec.config.layout.name,
        "dtype": token_dtype_for(spec, tokenizer),
        "vocab_size": vocab_size_for(spec, tokenizer),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer),
        "entropy": chain_of(spec.config.synthetic).entropy() if tokenizer is None else None,
        "splits": {
            name: {
                "tokens": split.tokens,
                "bytes": int(split.rows["bytes"].sum()) if is_text else None,
                "documents": split.documents if spec.has_documents else None,
                "cut": int((split.rows["ends"] == 2).sum()),
                "without_answer": int((split.rows["tokens"] == 0).sum()),
                "files": [asdict(file) for file in files],
            }
            for name, split, files in zip(SPLITS, splits, written, strict=True)
        },
        "sha256": hashlib.sha256(sums.encode()).hexdigest(),
        "versions": {"python": platform.python_version(), **versions},
    }
