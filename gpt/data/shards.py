"""Split a corpus into shards of some megabytes of text, and read their text. Also make the Markov chain of a synthetic
corpus, and the tokenizer of a corpus.

Imports no torch.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpt.components import load_source
from gpt.config import DataConfig, TokenizerKind
from gpt.config.data import SUCCESSORS, SyntheticConfig
from gpt.data.prepared import split_tokens
from gpt.data.spec import TOKENIZER_TRAIN_BYTES, TRAIN_SPLIT, CorpusFile, PreprocessingSpec, revision_of
from gpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HfTokenizer,
    Tokenizer,
    import_library,
    load_gpt2,
    read_tokenizer,
    read_with_chat,
    train_sentencepiece,
)
from launch.errors import ConfigError

# Corpus of known entropy: a seeded Markov chain, whose entropy is a floor for the loss.
#
# The next token depends only on the last one. So one token of context suffices, and the cross-entropy of the best model
# is the chain's entropy rate (Shannon 1948, "A Mathematical Theory of Communication", section 7):
#
#     H = sum_i pi_i sum_j -p_ij ln p_ij        with pi P = pi


WALK_TOKENS = 1 << 20
"""Largest number of tokens of one walk through a Markov chain. The corpus consists of independent walks, so that
several processes can make it."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """A Markov chain of V states, each with S possible next states."""

    successors: npt.NDArray[np.int64]
    """Possible next states of each state, (V, S). The S states of a row differ from one another."""
    probabilities: Floats
    """Probabilities of the next states in ``successors``, (V, S); the sum of a row is 1."""

    def transition(self) -> Floats:
        """Return the transition matrix, (V, V): the probability of state j after state i."""
        matrix = np.zeros((len(self.successors), len(self.successors)))
        np.put_along_axis(matrix, self.successors, self.probabilities, axis=1)
        return matrix

    def stationary(self) -> Floats:
        """Return the stationary distribution of the states, (V,): the solution of pi P = pi that sums to one."""
        states = len(self.successors)
        equations = np.vstack([self.transition().T - np.eye(states), np.ones(states)])
        return np.asarray(np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0])

    def entropy(self) -> float:
        """Return the entropy rate, in nats per token."""
        surprise = -np.log(self.probabilities)
        return float(self.stationary() @ (self.probabilities * surprise).sum(axis=1))


@lru_cache(maxsize=4)
def make_chain(vocab_size: int, successors: int = SUCCESSORS) -> Chain:
    """Return the chain with ``vocab_size`` states, and ``successors`` possible next states of each. It is the same at
    every call."""
    key = _uniform(0, vocab_size * vocab_size).reshape(vocab_size, vocab_size)
    # One successor of a state is the next state, so that every state is reachable from every other.
    key[np.arange(vocab_size), (np.arange(vocab_size) + 1) % vocab_size] = -1.0
    chosen = np.argsort(key, axis=1, kind="stable")[:, :successors]
    # Exponential variates, normalized, are uniform on the simplex (Devroye 1986, chapter XI.4).
    # The thousandth keeps every probability above zero, whose logarithm the entropy takes.
    weight = -np.log1p(-_uniform(1, vocab_size * successors)).reshape(vocab_size, successors) + 1e-3
    return Chain(chosen, weight / weight.sum(axis=1, keepdims=True))


def chain_of(config: SyntheticConfig) -> Chain:
    """Return the Markov chain from which the synthetic corpus of a config is drawn."""
    return make_chain(config.vocab_size)


def walk(config: SyntheticConfig, number: int) -> npt.NDArray[np.uint32]:
    """Return the tokens of the walk ``number`` of a synthetic corpus, counted from 0, (tokens,)."""
    tokens = min(WALK_TOKENS, config.tokens - number * WALK_TOKENS)
    chain = chain_of(config)
    cumulative = [row[:-1].tolist() for row in np.cumsum(chain.probabilities, axis=1)]
    successors = chain.successors.tolist()
    chances = _uniform(2 + number, tokens).tolist()
    state = min(int(np.searchsorted(np.cumsum(chain.stationary()), chances[0], side="right")), config.vocab_size - 1)
    states = np.empty(tokens, dtype=np.uint32)
    states[0] = state
    for t in range(1, tokens):
        state = successors[state][bisect_right(cumulative[state], chances[t])]
        states[t] = state
    return states


def _uniform(stream: int, count: int) -> Floats:
    """Return ``count`` pseudorandom numbers from 0 to below 1, (count,), which are the same in every release of numpy.

    ``stream`` is the number of a sequence of random numbers; two sequences are independent. numpy guarantees that its
    bit generators do not change, but not the numbers that its distributions draw.
    """
    raw = np.random.PCG64(np.random.SeedSequence([0, stream])).random_raw(count)
    return np.asarray((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


# Shards: parts of a corpus of some megabytes each. One process tokenizes one shard at a time.
#
# A killed preparation keeps its finished shards.


PIECE_BYTES = 1 << 20
"""Approximate size, in bytes, of the pieces in which a text is tokenized. A piece ends at the end of a line."""
SHARD_BYTES = 64 << 20  # large enough to pay for a process, and small enough to lose when killed
LINE_SEARCH_BYTES = 1 << 16
"""Number of bytes in which the end of a line is searched, where a piece can end. If no line ends within them, the piece
ends between two characters."""
TRAIN, VAL = 0, 1


class TextPart(NamedTuple):
    """Part of the text of a corpus that can be read alone, such as some row groups of a parquet file."""

    path: str
    """Path of the file that has the part. For a dataset it is the name of a split, for a user's source the name of the
    source, and for a Markov chain it is empty."""
    start: int
    """Index at which the part begins. It counts bytes in a text or jsonl file, row groups in a parquet file, files in a
    dataset, and walks through a Markov chain."""
    stop: int
    """Index of the first byte, row group or walk after the part. A part of a dataset is one file; for it, ``stop`` is
    the number of files in the whole split."""
    split: int | None = None
    """TRAIN or VAL; None if the split is chosen for each document."""
    size: int = SHARD_BYTES
    """Size in bytes. Small parts are joined into one shard of up to SHARD_BYTES. A part of unknown size has the default
    value, and so is a shard of its own."""
    ends: bool = True
    """True if a document ends at the end of the part; used for text files only."""
    mtime_ns: int = 0
    """Time of the last change of the file, in nanoseconds."""


@dataclass(frozen=True)
class Shard:
    """Parts of a corpus that one process tokenizes together, of about SHARD_BYTES."""

    number: int
    """Number of the shard in the order of the corpus, from 0."""
    parts: tuple[TextPart, ...]
    first: int = 0
    """Number of the first shard that comes from the same files as this one. The shards of ``data.val_path`` come first
    in the corpus, so for them it is 0. For all other shards it is the number of shards of ``data.val_path``."""

    @property
    def split(self) -> int | None:
        """TRAIN or VAL; None if the split is chosen for each document."""
        return self.parts[0].split


def list_shards(spec: PreprocessingSpec) -> list[Shard]:
    """Return the shards of a corpus, in the order of its tokens."""
    config = spec.config
    if spec.kind == "synthetic":
        walks = -(-config.synthetic.tokens // WALK_TOKENS)  # the last walk is shorter
        return _group(TextPart("", i, i + 1) for i in range(walks))
    if spec.kind == "custom":  # only the user's function knows where its documents are
        return _group([TextPart(str(config.source), 0, 0)])
    if spec.kind == "dataset":
        splits = [(TRAIN_SPLIT, TRAIN if config.val_split else None)]
        splits += [(config.val_split, VAL)] if config.val_split else []
        counts = [open_dataset(config, name).num_shards for name, _ in splits]
        # The library can start to read at each file.
        places = zip(splits, counts, strict=True)
        return _group(TextPart(name, i, count, split) for (name, split), count in places for i in range(count))
    if not spec.val_files:
        border, _ = split_tokens(spec.num_bytes, config.val_fraction)
        return _group(_split_files(spec, spec.files, None, border))
    val = _group(_split_files(spec, spec.val_files, VAL, 0))
    return _group(_split_files(spec, spec.files, TRAIN, spec.num_bytes), val)


def _group(parts: Iterable[TextPart], before: Iterable[Shard] = ()) -> list[Shard]:
    """Join consecutive parts of one split into shards of up to SHARD_BYTES. Return a list: the shards ``before``, and
    after them the new shards."""
    groups: list[list[TextPart]] = []
    size = 0
    for part in parts:
        if not groups or groups[-1][0].split != part.split or size + part.size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    first = len(shards := list(before))
    return shards + [Shard(first + i, tuple(group), first) for i, group in enumerate(groups)]


def _split_files(
    spec: PreprocessingSpec, files: Iterable[CorpusFile], split: int | None, val_start: int
) -> Iterator[TextPart]:
    """Yield the parts into which files are split, in order.

    Args:
        spec: spec of the corpus.
        files: files of one kind.
        split: TRAIN or VAL; None if the split is chosen for each document.
        val_start: number of the first byte, in all text files together, that is for validation.
    """
    if spec.kind == "text":
        yield from _split_texts(spec, files, val_start)
        return
    for file in files:
        path, mtime_ns = str(file.path), file.mtime_ns
        if spec.kind == "parquet":
            with readable(path), import_library("pyarrow.parquet").ParquetFile(path) as opened:
                groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
            for i, group in enumerate(groups):
                yield TextPart(path, i, i + 1, split, group.total_byte_size, mtime_ns=mtime_ns)
            continue
        step = file.size if spec.kind == "jsonl.gz" else SHARD_BYTES  # gzip can be read only from its beginning
        for start in range(0, file.size, step):
            stop = min(start + step, file.size)
            yield TextPart(path, start, stop, split, stop - start, mtime_ns=mtime_ns)


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Return a context in which every error of reading becomes a ConfigError that names ``where``: errors of files,
    libraries, the network or the user's function."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be read ({type(error).__name__}: {error})",
            "a file that this user may read, or a dataset on the hub and a network, to the end",
            "the same command again, which continues where it ended; or another data.path or data.dataset",
        ) from error


def _split_texts(spec: PreprocessingSpec, files: Iterable[CorpusFile], val_start: int) -> Iterator[TextPart]:
    """Yield the parts of text files, of about PIECE_BYTES each. No part has both training and validation text.
    ``val_start`` as in ``_split_files``."""
    exact = spec.config.tokenizer is TokenizerKind.byte
    passed = 0
    for file in files:
        nominal = {*range(PIECE_BYTES, file.size, PIECE_BYTES)}
        here = val_start - passed
        border = _character_start(file, here) if 0 < here < file.size and not exact else here
        # A piece that ends inside a line would be tokenized differently from the whole text, except by bytes.
        cuts = nominal if exact else {_line_start(file, cut) for cut in nominal}
        # Pieces are small, so a piece shortened by the validation cut does no harm.
        end = file.size if exact else _whole_characters(file)
        places = sorted({0, end, *(place for place in (border, *cuts) if 0 < place < end)})
        for start, stop in pairwise(places):
            split = TRAIN if start < border else VAL
            yield TextPart(str(file.path), start, stop, split, stop - start, stop == end, file.mtime_ns)
        passed += file.size


def _line_start(file: CorpusFile, place: int) -> int:
    """Return the index of the first byte, from the index ``place`` on, at which a line begins. If no line ends within
    LINE_SEARCH_BYTES, return that of the first byte at which a character begins."""
    with readable(file.path), file.path.open("rb") as stream:
        stream.seek(place - 1)
        near = stream.read(LINE_SEARCH_BYTES)
    line = place + near.find(b"\n")
    return line if near.find(b"\n") >= 0 and line < file.size else _character_start(file, place)


def _character_start(file: CorpusFile, place: int) -> int:
    """Return the index of the first byte, from the index ``place`` on, at which a character of UTF-8 begins."""
    with file.path.open("rb") as stream:
        stream.seek(place)
        near = stream.read(3)
    inside = next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), len(near))
    return min(place + inside, file.size)


def _whole_characters(file: CorpusFile) -> int:
    """Return the size of a text file in bytes, without an incomplete last character, which ``data.max_bytes`` may
    leave."""
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - 3))
        last = stream.read(min(3, file.size))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(last)
    return file.size - len(decoder.getstate()[0])  # the bytes that wait for the rest of a character


@lru_cache(maxsize=4)
def _open_stream(dataset: str, revision: str | None, subset: str | None, split: str) -> Any:
    """Return a split of a dataset of Hugging Face's library as a stream; cached, since reading does not change it.
    ``subset`` names a configuration of the dataset; None for its only one. A ``revision`` of None is the newest."""
    datasets = import_library("datasets")
    datasets.config.TORCH_AVAILABLE = False  # otherwise its streams load torch, which costs seconds in every process
    return datasets.load_dataset(dataset, name=subset, revision=revision, split=split, streaming=True)


def open_dataset(config: DataConfig, split: str) -> Any:
    """Return a split of the dataset of a config as a stream of Hugging Face's library.

    Raises:
        ConfigError: the dataset is unreachable, or has no such split.
    """
    revision = revision_of(config)
    with readable(f"the split {split} of the dataset {config.dataset}{f' at {revision}' if revision else ''}"):
        dataset, subset = config.dataset_and_subset
        return _open_stream(str(dataset), revision, subset, split)


# Readers of a shard's text: texts, jsonl and parquet files, and datasets streamed by Hugging Face's library.
#
# A reader keeps one piece of a text or one document in memory.


class Piece(NamedTuple):
    """Piece of text that is tokenized at once."""

    split: int
    """TRAIN or VAL."""
    data: bytes
    """The text as UTF-8, or unchanged bytes of a text file. Of a conversation: JSON, ``[place of the row,
    messages]``."""
    ends: bool
    """True if a document ends with the piece."""


def read_shard(spec: PreprocessingSpec, shard: Shard) -> Iterator[Piece]:
    """Yield the pieces of text of a shard.

    Raises:
        ConfigError: a file is unreadable, has the wrong format, or has changed since the spec was made.
    """
    count = 0
    for part in shard.parts:
        with readable(f"{part.path}, from {part.start} to {part.stop},"):
            if spec.kind == "text":
                assert shard.split is not None
                yield Piece(shard.split, _read_range(part), part.ends)
                continue
            for text in _documents(spec, part):
                split = shard.split
                if split is None:
                    split = VAL if is_validation(shard.number, count, spec.config.val_fraction) else TRAIN
                count += 1
                # JSON may contain lone surrogates, which UTF-8 cannot encode.
                yield Piece(split, text.encode("utf-8", "replace"), True)


def decode_text(data: bytes, shard: Shard) -> str:
    """Return the text of a piece from its bytes. ``shard`` names the file in the error.

    Raises:
        ConfigError: the bytes are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shard.parts[0].path} is not UTF-8 ({error.reason})",
            "UTF-8, for a tokenizer other than bytes",
            "data.tokenizer=byte, or the text converted with iconv",
        ) from error


def is_validation(shard: int, document: int, fraction: float) -> bool:
    """Return True if a document is for validation, by a hash of the number of its shard and its number in the shard,
    both from 0. ``fraction`` is the share of such documents."""
    digest = hashlib.blake2b(f"{shard}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _documents(spec: PreprocessingSpec, part: TextPart) -> Iterator[str]:
    """Yield the documents of a part of a source."""
    path, key = Path(part.path), spec.config.text_key
    if spec.kind == "custom":
        for text in load_source("data.source", part.path)(spec.config):
            if not isinstance(text, str):
                raise TypeError(f"it yields a {type(text).__name__} instead of a document, a str")
            yield text
    elif spec.kind == "dataset":  # file ``part.start`` (of ``part.stop``) of the split ``part.path``
        for row in open_dataset(spec.config, part.path).shard(num_shards=part.stop, index=part.start):
            yield _text_of(row, spec.config, f"the dataset {spec.config.dataset}")
    elif spec.kind == "parquet":
        with import_library("pyarrow.parquet").ParquetFile(path) as opened:
            if key not in opened.schema_arrow.names:
                raise missing_column_error(str(path), spec.config, opened.schema_arrow.names)
            for batch in opened.iter_batches(batch_size=256, row_groups=range(part.start, part.stop), columns=[key]):
                # A null is a row without text.
                texts = (text for text in batch.column(0).to_pylist() if text is not None)
                yield from (_text_of({key: text}, spec.config, f"{path}, row group {part.start}") for text in texts)
        _refuse_change(path, part)
    else:
        yield from _read_jsonl(path, part, spec.config)


def _read_range(part: TextPart) -> bytes:
    path = Path(part.path)
    with path.open("rb") as stream:
        stream.seek(part.start)
        data = stream.read(part.stop - part.start)
    _refuse_change(path, part, len(data) == part.stop - part.start)
    return data


def _refuse_change(path: Path, part: TextPart, complete: bool = True) -> None:
    if not complete or path.stat().st_mtime_ns != part.mtime_ns:
        raise ConfigError(f"{path} changed while it was read", "a text that holds still", "the same command again")


def _read_jsonl(path: Path, part: TextPart, config: DataConfig) -> Iterator[str]:
    """Yield the texts of the lines of a jsonl file that begin inside of ``part``."""
    packed = part.path.endswith(".gz")
    with gzip.open(path, "rb") if packed else path.open("rb") as stream:
        place = part.start
        if place:
            stream.seek(place - 1)
            place += len(stream.readline()) - 1
        after = f" after byte {place}" if place else ""
        for number in count(1):
            line = stream.readline() if packed or place < part.stop else b""
            if not line:
                break
            if line.strip():
                where = f"{path}, line {number}{after}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"no JSON in {where}: {error}") from error
                yield _text_of(value, config, where)
            place += len(line)
    _refuse_change(path, part)


def _text_of(row: Any, config: DataConfig, where: str) -> str:
    """Return the text of a row of a jsonl file, parquet file or dataset. If the corpus has conversations, return the
    row's conversation as JSON ``[where, messages]``. ``where`` describes the place of the row, for errors."""
    text = row.get(config.text_key) if isinstance(row, dict) else None
    if not isinstance(text, str if config.conversation_tokens is None else list):
        raise missing_column_error(where, config, row if isinstance(row, dict) else ())
    return text if isinstance(text, str) else json.dumps([where, text])


def missing_column_error(where: str, config: DataConfig, names: Iterable[str]) -> ConfigError:
    """Return the error for a row that has neither text nor a conversation under ``data.text_key``. ``where`` describes
    the place of the row, and ``names`` are the names of its columns or fields."""
    what = "text" if config.conversation_tokens is None else "list of messages"
    return ConfigError(
        f"{where} has no {what} under data.text_key={config.text_key}",
        f"a name among {', '.join(names) or 'fields of a JSON object'} that has one",
        "data.text_key=NAME",
    )


# Tokenizer of a corpus: built in, read from a file, or trained on the text. Texts are streamed.


SAMPLED_SHARDS = 16  # spread over the corpus, since its beginning may have one language or one source
LINE_CHARACTERS = 1000  # SentencePiece ignores lines of more than 4192 bytes


def make_tokenizer(spec: PreprocessingSpec) -> Tokenizer:
    """Return the tokenizer of a corpus: built in, read from a file, or trained on the text.

    Raises:
        ConfigError: its file or its library is missing, or the text is not UTF-8.
    """
    config = spec.config
    if config.tokenizer is TokenizerKind.byte:
        return ByteTokenizer()
    if config.tokenizer is TokenizerKind.char:
        # The characters of the whole corpus, including validation. A newline ends a document.
        found = {"\n"} if spec.splits_documents else set()
        for shard in list_shards(spec):
            found.update(*(decode_text(piece.data, shard) for piece in read_shard(spec, shard)))
        return CharTokenizer(sorted(found))
    if config.tokenizer_path is not None:
        path = Path(config.tokenizer_path).expanduser()
        is_chat = config.conversation_tokens is not None
        return HfTokenizer(read_with_chat(path)) if is_chat else read_tokenizer(config.tokenizer, path)
    if config.tokenizer is TokenizerKind.tiktoken:
        return load_gpt2()
    assert config.tokenizer is TokenizerKind.sentencepiece, "DataConfig.validate asks for a path"
    return train_sentencepiece(_sample_lines(spec), config.tokenizer_vocab_size)


def _sample_lines(spec: PreprocessingSpec) -> Iterator[str]:
    """Yield lines of the training text, sampled over the whole corpus, up to ``TOKENIZER_TRAIN_BYTES``."""
    shards = [shard for shard in list_shards(spec) if shard.split in (None, TRAIN)]
    chosen = shards[:: max(1, len(shards) // SAMPLED_SHARDS)][:SAMPLED_SHARDS]
    for shard in chosen:
        left = TOKENIZER_TRAIN_BYTES // len(chosen)
        for piece in read_shard(spec, shard):
            if piece.split != TRAIN:
                continue
            text = decode_text(piece.data, shard)[:left]
            left -= len(piece.data)
            for line in text.splitlines(keepends=True):
                yield from (line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS))
            if left <= 0:
                break
