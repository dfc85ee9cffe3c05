"""Tokenization of shards by several processes, and the tokenizer that is trained on them."""

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
from gpt.data.prepared import SPLITS, TOKENIZER
from gpt.data.preprocessing.shards import TRAIN, VAL, Shard, decode, list_shards, read_shard
from gpt.data.preprocessing.spec import PreprocessingSpec
from gpt.data.preprocessing.synthetic import WALK_TOKENS, walk
from gpt.data.token_file import token_dtype
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gpt.data.tokenizers.registry import load_tokenizer
from gpt.data.tokenizers.subword import load_gpt2, read_tokenizer, train_sentencepiece
from launch.process import die_with_parent
from launch.runs.files import write_json

# Tokenization of shards, in this process or in several.
#
# A process holds a piece of text and its tokens, and dies with the one that started it. Torch-free.


PROGRESS_S = 0.5

ROW = struct.Struct("<4q")
ROW_DTYPE = np.dtype([("split", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("ends", "<i8")])
"""Record of a tokenized piece: its split, its tokens, its bytes of text, and 1 where a document ends with it."""
Rows = npt.NDArray[np.void]


@dataclass
class _ShardTokenizer:
    """The inputs that a process needs to tokenize shards; in a pool, set once in each."""

    spec: PreprocessingSpec
    parts: Path
    tokenizer: Tokenizer | None
    dtype: str
    advance: Callable[[int], None]

    def tokenize(self, shard: Shard) -> None:
        """Tokenize one shard and keep its tokens, its rows and their checksums."""
        stem = self.parts / f"{shard.number:06d}"
        files = {name: _ShardFile(stem.with_suffix(f".{name}")) for name in (*SPLITS, "rows")}
        num_bytes = 0
        for split, ids, size, ends in self._tokens(shard):
            files[SPLITS[split]].write(ids.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes())
            files["rows"].write(ROW.pack(split, len(ids), size, ends))
            num_bytes += size
            self.advance(size)
        sums = {name: file.close() for name, file in files.items()}
        # Written last: a shard that has this file is whole.
        write_json(stem.with_suffix(".json"), {"sha256": sums, "bytes": num_bytes})

    def _tokens(self, shard: Shard) -> Iterator[tuple[int, npt.NDArray[Any], int, bool]]:
        """Yield the split, ids, bytes of text and end of a document of each piece."""
        if self.spec.kind == "synthetic":
            yield from self._walk(shard)
            return
        assert self.tokenizer is not None
        exact = self.tokenizer.kind is TokenizerKind.byte  # takes bytes that are no UTF-8, too
        for piece in read_shard(self.spec, shard):
            data = piece.data
            if piece.ends and self.tokenizer.eot is None and self.spec.splits_documents:
                data += b"\n"
            ids: npt.NDArray[Any] = (
                np.frombuffer(data, np.uint8) if exact else self.tokenizer.encode(decode(data, shard))
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


class _ShardFile:
    """A file of a tokenized shard: hashed as it is written, and given its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A name of this process's own: one left over from a killed command never writes into the same file.
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


_work: _ShardTokenizer | None = None


def _start_worker(spec: PreprocessingSpec, parts: Path, dtype: str, parent: int, counter: Synchronized[int]) -> None:
    """Initialize a process of the pool: it ends with its parent, and has a tokenizer of its own."""
    global _work
    die_with_parent(parent)

    def advance(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    tokenizer = None if spec.kind == "synthetic" else load_tokenizer(parts / TOKENIZER)
    _work = _ShardTokenizer(spec, parts, tokenizer, dtype, advance)


def _tokenize_in_worker(shard: Shard) -> None:
    assert _work is not None
    _work.tokenize(shard)


def tokenize_shards(
    spec: PreprocessingSpec, shards: list[Shard], parts: Path, tokenizer: Tokenizer | None, workers: int, progress: bool
) -> int:
    """Tokenize the shards that are not done yet; returns how many are used, with ``data.max_bytes`` perhaps not all."""
    dtype = token_dtype_for(spec, tokenizer)
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
        if workers > 1 and len(left) > 2:  # a process takes longer to start than a shard or two to do
            _tokenize_in_pool(spec, left, done, parts, dtype, workers, bar)
        else:

            def advance(size: int) -> None:
                bar.update(size)

            work = _ShardTokenizer(spec, parts, tokenizer, dtype, advance)
            for shard in left:
                if _has_enough_text(spec, done, shard):
                    break
                work.tokenize(shard)
                done[shard.number] = _size(parts, shard.number)
    return next((n for n in range(len(shards)) if n not in done), len(shards))


def _tokenize_in_pool(
    spec: PreprocessingSpec,
    left: list[Shard],
    done: dict[int, int],
    parts: Path,
    dtype: str,
    workers: int,
    bar: tqdm[Any],
) -> None:
    """Tokenize shards in several processes, started in order; adds the bytes of each to ``done``."""
    context = get_context("spawn")  # forked processes would share the locks of the libraries' threads
    counter: Synchronized[int] = context.Value("q", 0)
    shown, waiting, started = 0, iter(left), dict[Future[None], Shard]()
    with ProcessPoolExecutor(
        min(workers, len(left)), context, _start_worker, (spec, parts, dtype, os.getpid(), counter)
    ) as pool:
        more = True
        while more or started:
            # No more ahead than that: with data.max_bytes the shards after the limit are not needed.
            while more and len(started) < 2 * workers:
                shard = next(waiting, None)
                more = shard is not None and not _has_enough_text(spec, done, shard)
                if more and shard is not None:
                    started[pool.submit(_tokenize_in_worker, shard)] = shard
            finished, _ = wait(started, timeout=PROGRESS_S, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises here what was raised there
                number = started.pop(future).number
                done[number] = _size(parts, number)
            bar.update(counter.value - shown)
            shown = counter.value


def _has_enough_text(spec: PreprocessingSpec, done: dict[int, int], shard: Shard) -> bool:
    """Tell whether the shards before this one hold ``data.max_bytes``; texts are cut before they get here."""
    limit = spec.config.max_bytes
    if limit is None or not spec.splits_documents or shard.split is VAL:
        return False
    if shard.split is TRAIN and not spec.val_files:  # of a dataset, whose shards of validation come after these
        return False
    before = [done.get(number) for number in range(shard.first, shard.number)]
    return None not in before and sum(size for size in before if size is not None) >= limit


def _read_finished_size(parts: Path, number: int) -> int | None:
    """Bytes of text of a shard that was finished earlier; None where it was not, or was damaged since."""
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


def _size(parts: Path, number: int) -> int:
    return int(json.loads((parts / f"{number:06d}.json").read_bytes())["bytes"])


def vocab_size_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> int:
    """Vocabulary size of a corpus: the tokenizer's, or the states of a Markov chain, which has none."""
    return spec.config.synthetic.vocab_size if tokenizer is None else tokenizer.vocab_size


def token_dtype_for(spec: PreprocessingSpec, tokenizer: Tokenizer | None) -> str:
    """Numpy name of the integers that hold the tokens of a corpus."""
    return token_dtype(spec.config.layout, vocab_size_for(spec, tokenizer))


# The tokenizer of a corpus: built in, read from a file, or trained on the text.
#
# Torch-free; streams.


SAMPLED_SHARDS = 16  # spread over the corpus, since its beginning may be in one language or of one source
LINE_CHARACTERS = 1000  # SentencePiece leaves out lines of more than 4192 bytes


def make_tokenizer(spec: PreprocessingSpec) -> Tokenizer:
    """Make the tokenizer that a spec asks for.

    Raises:
        ConfigError: its file or its library is not there, or the text is not UTF-8.
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
    """Collect the characters of the corpus, validation included, so that every text of it has ids."""
    found = {"\n"} if spec.splits_documents else set()  # ends a document
    for shard in list_shards(spec):
        for piece in read_shard(spec, shard):
            found.update(decode(piece.data, shard))
    return found


def _sample_lines(spec: PreprocessingSpec) -> Iterator[str]:
    """Yield lines of the training text, from places all over the corpus, up to ``data.tokenizer_train_bytes``."""
    shards = [shard for shard in list_shards(spec) if shard.split in (None, TRAIN)]
    step = max(1, len(shards) // SAMPLED_SHARDS)
    chosen = shards[::step][:SAMPLED_SHARDS]
    for shard in chosen:
        left = spec.config.tokenizer_train_bytes // len(chosen)
        for piece in read_shard(spec, shard):
            if piece.split != TRAIN:
                continue
            text = decode(piece.data, shard)[:left]
            left -= len(piece.data)
            for line in text.splitlines(keepends=True):
                yield from (line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS))
            if left <= 0:
                break
