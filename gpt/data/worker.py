"""Tokenization of shards by several processes, and the tokenizer that is trained on them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt.config import TokenizerKind
from gpt.data.prepared import SPLITS, TOKENIZER
from gpt.data.shards import TRAIN, VAL, WALK_TOKENS, Shard, decode_text, list_shards, read_shard, walk
from gpt.data.spec import PreprocessingSpec
from gpt.data.token_file import HashedFile, token_dtype
from gpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_gpt2,
    load_tokenizer,
    read_tokenizer,
    train_sentencepiece,
)
from launch.process import die_with_parent
from launch.runs.files import write_json

# Tokenization of shards, in this process or in several.
#
# A process keeps one piece of text and its tokens in memory, and ends together with its parent.


ROW_DTYPE = np.dtype([("split", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("ends", "<i8")])
"""Record of a tokenized piece: its split, number of tokens, bytes of text, and 1 if a document ends with it."""
Rows = npt.NDArray[np.void]


@dataclass
class _ShardTokenizer:
    """Inputs that a process needs to tokenize shards. In a pool, each process sets them once."""

    spec: PreprocessingSpec
    parts: Path
    tokenizer: Tokenizer | None
    advance: Callable[[int], object]
    """Function that is called with the bytes of text of each piece."""

    def tokenize(self, shard: Shard) -> int:
        """Tokenize one shard; write its tokens, a ``ROW_DTYPE`` row for each piece, and checksums.

        Return the bytes of text of the shard.
        """
        # The names are unique to this process, so a process left from a killed command never writes into the same
        # files. A file gets its final name when it is complete.
        stem, dtype = self.parts / f"{shard.number:06d}", np.dtype(token_dtype_for(self.spec, self.tokenizer))
        names = (*SPLITS, "rows")
        files = {name: HashedFile(stem.with_suffix(f".{name}.{os.getpid()}.tmp")) for name in names}
        num_bytes = 0
        for split, ids, size, ends in self._tokens(shard):
            files[SPLITS[split]].write(ids.astype(dtype.newbyteorder("<")).tobytes())
            files["rows"].write(np.array((split, len(ids), size, ends), ROW_DTYPE).tobytes())
            num_bytes += size
            self.advance(size)
        sums = {name: file.close() for name, file in files.items()}
        for name, file in files.items():
            file.path.replace(stem.with_suffix(f".{name}"))
        # Written last, so a shard with this file is complete.
        write_json(stem.with_suffix(".json"), {"sha256": sums, "bytes": num_bytes})
        return num_bytes

    def _tokens(self, shard: Shard) -> Iterator[tuple[int, npt.NDArray[Any], int, bool]]:
        """Yield for each piece: split, ids, bytes of text, and True if a document ends with it."""
        if self.spec.kind == "synthetic":
            yield from self._walk(shard)
            return
        assert self.tokenizer is not None
        exact = self.tokenizer.kind is TokenizerKind.byte  # also accepts bytes that are no UTF-8
        for piece in read_shard(self.spec, shard):
            data = piece.data
            if piece.ends and self.tokenizer.eot is None and self.spec.splits_documents:
                data += b"\n"
            ids: npt.NDArray[Any] = (
                np.frombuffer(data, np.uint8) if exact else self.tokenizer.encode(decode_text(data, shard))
            )
            if piece.ends and self.tokenizer.eot is not None and self.spec.has_documents:
                ids = np.append(ids, np.uint32(self.tokenizer.eot))
            yield piece.split, ids, len(data), piece.ends

    def _walk(self, shard: Shard) -> Iterator[tuple[int, npt.NDArray[Any], int, bool]]:
        ids = walk(self.spec.config.synthetic, shard.number)
        known = self.spec.known_tokens()
        assert known is not None
        cut = min(max(known[0] - shard.number * WALK_TOKENS, 0), len(ids))
        for split, part in ((TRAIN, ids[:cut]), (VAL, ids[cut:])):
            if len(part):
                yield split, part, len(part), False


_work: _ShardTokenizer | None = None


def _start_worker(spec: PreprocessingSpec, parts: Path, parent: int) -> None:
    """Initialize a process of the pool. It ends with its parent, and has its own tokenizer."""
    global _work
    die_with_parent(parent)
    tokenizer = None if spec.kind == "synthetic" else load_tokenizer(parts / TOKENIZER)
    _work = _ShardTokenizer(spec, parts, tokenizer, lambda size: None)


def _tokenize_in_worker(shard: Shard) -> int:
    assert _work is not None
    return _work.tokenize(shard)


def tokenize_shards(
    spec: PreprocessingSpec, shards: list[Shard], parts: Path, tokenizer: Tokenizer | None, workers: int, progress: bool
) -> int:
    """Tokenize the unfinished shards. Return the number of shards used: with ``data.max_bytes`` maybe not all."""
    with tqdm(
        desc=spec.config.title,
        total=spec.num_bytes if spec.kind in ("text", "jsonl") else None,
        unit="B" if spec.kind != "synthetic" else "token",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        sizes = {shard.number: _read_finished_size(parts, shard.number) for shard in shards}
        done = {number: size for number, size in sizes.items() if size is not None}
        bar.update(sum(done.values()))
        left = [shard for shard in shards if shard.number not in done]
        needed = takewhile(lambda shard: not _has_enough_text(spec, done, shard), left)
        if workers > 1 and len(left) > 2:  # starting a process takes longer than tokenizing a shard or two
            started = dict[Future[int], int]()
            context = get_context("spawn")  # forked processes would share the locks of the libraries' threads
            with ProcessPoolExecutor(
                min(workers, len(left)), context, _start_worker, (spec, parts, os.getpid())
            ) as pool:
                # The queue is short, because with data.max_bytes the shards after the limit are not needed.
                while True:
                    for shard in islice(needed, 2 * workers - len(started)):
                        started[pool.submit(_tokenize_in_worker, shard)] = shard.number
                    if not started:
                        break
                    for future in wait(started, return_when=FIRST_COMPLETED).done:
                        number = started.pop(future)
                        done[number] = future.result()  # raises the error of the process here
                        bar.update(done[number])
        else:
            work = _ShardTokenizer(spec, parts, tokenizer, bar.update)
            for shard in needed:
                done[shard.number] = work.tokenize(shard)
    return next((n for n in range(len(shards)) if n not in done), len(shards))


def _has_enough_text(spec: PreprocessingSpec, done: dict[int, int], shard: Shard) -> bool:
    """Return True if the shards before this one already contain ``data.max_bytes`` of text.

    Always False for a source without documents, because ``build_spec`` has already cut its text.
    """
    limit = spec.config.max_bytes
    if limit is None or not spec.splits_documents or shard.split is VAL:
        return False
    if shard.split is TRAIN and not spec.val_files:  # validation shards of a dataset come after its training shards
        return False
    before = [done.get(number) for number in range(shard.first, shard.number)]
    return None not in before and sum(size for size in before if size is not None) >= limit


def _read_finished_size(parts: Path, number: int) -> int | None:
    """Return the bytes of text of a shard that was finished earlier; None if it is unfinished or damaged."""
    stem = parts / f"{number:06d}"
    try:
        saved = json.loads(stem.with_suffix(".json").read_bytes())
        for name, expected in saved["sha256"].items():
            with stem.with_suffix(f".{name}").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
        return int(saved["bytes"])
    except (OSError, ValueError, KeyError):
        return None


def vocab_size_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> int:
    """Return the vocabulary size of a corpus: that of the tokenizer, or the states of a Markov chain without one."""
    return spec.config.synthetic.vocab_size if tokenizer is None else tokenizer.vocab_size


def token_dtype_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> str:
    """Return the numpy name of the integer type of a corpus's tokens."""
    return token_dtype(spec.config.layout, vocab_size_for(spec, tokenizer))


# Tokenizer of a corpus: built in, read from a file, or trained on the text. Texts are streamed.


SAMPLED_SHARDS = 16  # spread over the corpus, since its beginning may have one language or one source
LINE_CHARACTERS = 1000  # SentencePiece ignores lines of more than 4192 bytes


def make_tokenizer(spec: PreprocessingSpec) -> Tokenizer:
    """Make the tokenizer of a spec.

    Raises:
        ConfigError: its file or its library is missing, or the text is not UTF-8.
    """
    config = spec.config
    if config.tokenizer is TokenizerKind.byte:
        return ByteTokenizer()
    if config.tokenizer is TokenizerKind.char:
        return CharTokenizer(sorted(_characters(spec)))
    if config.tokenizer_path is not None:
        return read_tokenizer(config.tokenizer, Path(config.tokenizer_path).expanduser())
    if config.tokenizer is TokenizerKind.tiktoken:
        return load_gpt2()
    assert config.tokenizer is TokenizerKind.sentencepiece, "DataConfig.validate asks for a path"
    return train_sentencepiece(_sample_lines(spec), config.tokenizer_vocab_size)


def _characters(spec: PreprocessingSpec) -> set[str]:
    """Return the characters of the whole corpus, including validation, so that every text can be encoded."""
    found = {"\n"} if spec.splits_documents else set()  # a newline ends a document
    for shard in list_shards(spec):
        for piece in read_shard(spec, shard):
            found.update(decode_text(piece.data, shard))
    return found


def _sample_lines(spec: PreprocessingSpec) -> Iterator[str]:
    """Yield lines of the training text, sampled over the whole corpus, up to ``data.tokenizer_train_bytes``."""
    shards = [shard for shard in list_shards(spec) if shard.split in (None, TRAIN)]
    step = max(1, len(shards) // SAMPLED_SHARDS)
    chosen = shards[::step][:SAMPLED_SHARDS]
    for shard in chosen:
        left = spec.config.tokenizer_train_bytes // len(chosen)
        for piece in read_shard(spec, shard):
            if piece.split != TRAIN:
                continue
            text = decode_text(piece.data, shard)[:left]
            left -= len(piece.data)
            for line in text.splitlines(keepends=True):
                yield from (line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS))
            if left <= 0:
                break
