"""The order of the training samples, and the samples of a corpus that is tokenized during training.

Imports no torch. The order is a pure function of (index, number of samples, seed), without saved state. A change of
this function would change the order of the samples in runs that resume.

Every epoch is a permutation of its own, computed one index at a time in constant memory: a Feistel network (Luby and
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions") over the smallest even number
of bits that covers all samples, but at least 6 bits. The network is applied again until the result is the index of a
sample (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). With more than 16 samples, the network
permutes fewer than four times as many numbers as there are samples. So an index then needs under four evaluations on
average. Round function and keys use the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpt.config import DataConfig
from gpt.data.preparation import encode_piece, token_dtype_for
from gpt.data.prepared import TOKENIZER, Split, Tokens, TokenSource, read_token_file
from gpt.data.shards import TRAIN, VAL, list_shards, make_tokenizer, read_shard
from gpt.data.spec import PreprocessingSpec, build_spec, prepare_command
from gpt.data.tokenizers import ABOUT, Tokenizer, describe_tokenizer, load_tokenizer, save_tokenizer
from launch.errors import ConfigError
from launch.runs.folder import read_json, write_atomically, write_json

MAX_SAMPLES = 1 << 62
ROUNDS = 8  # four make a pseudorandom permutation of a large domain; small domains need more
MIN_HALF_BITS = 3  # below 64 values the orders of a few samples are measurably uneven
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
Uint64s = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def sample_position(index: npt.ArrayLike, num_samples: int, seed: int) -> tuple[Integers, Integers]:
    """Return two arrays for training samples: their epochs, and their positions in the corpus. Both are int64 with the
    shape of ``index``. In an epoch every position from 0 to ``num_samples - 1`` occurs exactly once.

    Args:
        index: numbers of samples in the order of training, counted from 0 through all epochs; any shape.
        num_samples: number of samples in one epoch, 1 to 2^62.
        seed: seed of the order.
    """
    assert 1 <= num_samples <= MAX_SAMPLES, f"num_samples={num_samples}"
    running = np.asarray(index, dtype=np.int64)
    assert running.size == 0 or running.min() >= 0, "a sample's running number is never negative"
    epoch, offset = np.divmod(running, num_samples)
    position = permute(offset.ravel().astype(np.uint64), num_samples, epoch.ravel().astype(np.uint64), seed)
    return epoch, position.astype(np.int64).reshape(running.shape)


def permute(offset: Uint64s, num_samples: int, epoch: Uint64s, seed: int) -> Uint64s:
    """Return the position in the corpus of each training sample, (N,). In each epoch the positions are a permutation of
    the numbers below ``num_samples``.

    Args:
        offset: number of each sample within its epoch, counted from 0 in the order of training, (N,).
        num_samples: number of samples in one epoch.
        epoch: epoch of each sample, (N,).
        seed: seed of the order.
    """
    half_bits = max(MIN_HALF_BITS, -(-(num_samples - 1).bit_length() // 2))
    # Keys of every round, (ROUNDS, N), for each entry's epoch: a batch may reach into the next epoch.
    start = _mix(_mix(np.full_like(epoch, seed) + _GOLDEN) ^ epoch)
    keys = _mix(start + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN)
    position = _feistel(offset, keys, half_bits)
    outside = np.flatnonzero(position >= num_samples)
    while outside.size:
        position[outside] = _feistel(position[outside], keys[:, outside], half_bits)
        outside = outside[position[outside] >= num_samples]
    return position


def _feistel(value: Uint64s, keys: Uint64s, half_bits: int) -> Uint64s:
    """Return the result of a Feistel network for each value, (N,): a permutation of all numbers of 2 * ``half_bits``
    bits. ``keys`` has the keys of each round, (ROUNDS, N)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(word: Uint64s) -> Uint64s:
    """Return the result of SplitMix64's finalizer for each word: a permutation of all 64-bit numbers."""
    for shift, factor in _MIX:
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return word ^ (word >> np.uint64(31))


def sample_source(index: Integers, weights: Sequence[int]) -> tuple[Integers, Integers]:
    """Return two arrays, (N,), for samples of a mixture: the index of each sample's source, and the sample's number in
    this source. The samples of a source have the numbers 0, 1, 2, ... without gaps.

    Of the first n samples of the mixture, floor(n * weight / total weight) belong to the first source. The second
    source and all later ones share the remaining samples by the same rule, and so on.

    Args:
        index: numbers of the samples in the mixture, from 0, (N,).
        weights: whole weights of the sources, with a sum below 2^31.
    """
    source = np.full(len(index), len(weights) - 1, dtype=np.int64)
    left = np.asarray(index, dtype=np.int64).copy()
    open_ = np.arange(len(index))
    # Split the first source from all later ones, then the second from the rest, and so on.
    for number, weight in enumerate(weights[:-1]):
        total = sum(weights[number:])
        before, after = _share(left[open_], weight, total), _share(left[open_] + 1, weight, total)
        taken = after > before
        source[open_[taken]] = number
        left[open_[taken]] = before[taken]
        left[open_[~taken]] -= before[~taken]
        open_ = open_[~taken]
    return source, left


def samples_per_source(samples: int, weights: Sequence[int]) -> list[int]:
    """Return the number of samples of each source among the first ``samples`` samples of a mixture."""
    found, left = [], samples
    for number, weight in enumerate(weights[:-1]):
        found.append(int(_share(np.array([left], dtype=np.int64), weight, sum(weights[number:]))[0]))
        left -= found[-1]
    return [*found, left]


def max_samples(available: Sequence[int], weights: Sequence[int]) -> int:
    """Return the largest n for which the first n samples of a mixture need at most ``available[i]`` samples of each
    source i."""
    low, high = 0, sum(available)  # bisection works, because the need of each source never falls as the samples grow
    while low < high:
        middle = (low + high + 1) // 2
        if all(c <= a for c, a in zip(samples_per_source(middle, weights), available, strict=True)):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class PassedOver:
    """Batches that no step of a run uses. A run that has diverged goes back to a checkpoint (it rolls back), and then
    skips the batches that did harm."""

    ranges: tuple[tuple[int, int], ...] = ()
    """Ranges of skipped batches, each as the numbers of its first and its last batch. Batches are counted from 1. The
    ranges are in ascending order, and at least one batch that is used lies between two ranges."""

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> PassedOver:
        """Return the object with the given ranges. Each range is a pair of a first and a last batch, as a checkpoint or
        an event stores it."""
        return cls(tuple((first, last) for first, last in ranges))

    def batch_of(self, step: int) -> int:
        """Return the number of the batch that a step uses. Both are counted from 1."""
        number = step
        for first, last in self.ranges:
            if first > number:
                break
            number += last - first + 1
        return number

    def including(self, batches: Iterable[int]) -> PassedOver:
        """Return an object that passes over the batches of this one, and those with the numbers ``batches``."""
        numbers = sorted({*batches, *(number for first, last in self.ranges for number in range(first, last + 1))})
        ranges: list[tuple[int, int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], number
            else:
                ranges.append((number, number))
        return PassedOver(tuple(ranges))


def _share(n: Integers, weight: int, total: int) -> Integers:
    """Return floor(n * weight / total) for each n, without overflow."""
    whole, rest = np.divmod(n, total)
    return np.asarray(whole * weight + rest * weight // total)


# A corpus that is tokenized while it is read (``data.stream=true``), without a prepared folder:
#
# 1. Shards follow one another, in another order in each epoch.
# 2. The tokens of their training text form one endless sequence, which is cut into windows. The end of a file or of the
#    corpus is inside a window, so no token is left out and none comes twice in an epoch.
# 3. Every ``data.shuffle_buffer`` windows are one buffer, with an order of its own.
#
# A buffer is known by its ``TextPlace``. A checkpoint has the place of one buffer, from which reading continues.


Ids = npt.NDArray[np.int64]


class TextPlace(NamedTuple):
    """Place of a token in the training text of a stream, which is a corpus that is tokenized during training."""

    turn: int
    """Number of shards that training reads before the shard of the token. It counts through all epochs."""
    piece: int
    """Number of the piece of text in its shard, from 0."""
    skip: int
    """Number of tokens of the piece before the place."""


class Stream:
    """Training samples of a corpus that is tokenized while it is read.

    The text is cut into windows, and each window is a sample. ``data.shuffle_buffer`` consecutive windows are a buffer,
    and samples are shuffled only within their buffer. Reading samples with ascending indices is fast. For a lower
    index, reading begins again at an earlier buffer.

    Args:
        spec: the text to read.
        tokenizer: tokenizer of the text.
        block_size: tokens of a sample, T, without the last target.
        seed: seed of the order.
    """

    def __init__(self, spec: PreprocessingSpec, tokenizer: Tokenizer, block_size: int, seed: int) -> None:
        self._spec, self._tokenizer, self._block_size, self._seed = spec, tokenizer, block_size, seed
        self._size = spec.config.shuffle_buffer
        self._shards = [shard for shard in list_shards(spec) if shard.split != VAL]
        self._places = {0: TextPlace(0, 0, 0)}
        """Number of a buffer -> place of its first token."""
        self._buffers: dict[int, list[Ids]] = {}
        """Number of a buffer -> ids of its windows, (T + 1,) each. It has the buffer from which samples are taken, and
        the following buffer, which is filled at the same time."""
        self._made = 0
        """Number of windows read so far, which is the number of the next window."""
        self._windows = self._windows_from(self._places[0])

    def read(self, index: int) -> Ids:
        """Return the ids of a sample: its tokens and the last target, (T + 1,). ``index`` counts through all epochs.

        Raises:
            ConfigError: the text cannot be read, has changed, or has no training text.
        """
        number = index // self._size
        if number not in self._buffers:
            start = max(known for known in list(self._places) if known <= number)
            if not start * self._size <= self._made <= number * self._size:
                self._made, self._windows = start * self._size, self._windows_from(self._places[start])
                self._buffers = {}
        while self._made < index + self._size:  # as many ahead as a buffer has, so that no step waits for a whole one
            place, window = next(self._windows)
            into = self._made // self._size
            if self._made % self._size == 0:
                self._places[into], self._buffers[into] = place, []
            self._buffers[into].append(window)
            self._made += 1
            self._buffers = {n: buffer for n, buffer in self._buffers.items() if n >= min(number, into)}
        _, chosen = sample_position(index, self._size, self._seed)
        return self._buffers[number][int(chosen)].astype(np.int64)

    def state(self, index: int) -> list[int]:
        """Return where reading can begin in order to reach the sample ``index``, as plain JSON: the number of a buffer
        and its place, [number, turn, piece, skip]. Among the buffers whose places are known, it is the last one that
        does not come after the sample. The method ``restore`` takes this list."""
        number = max(known for known in list(self._places) if known <= index // self._size)
        return [number, *self._places[number]]

    def restore(self, state: list[int]) -> None:
        """Note the place of the buffer in ``state``, so that ``read`` can begin at this buffer. ``state`` is a result
        of the method ``state``. No text is read here."""
        number, *place = state
        self._places[number] = TextPlace(*place)

    def _windows_from(self, place: TextPlace) -> Iterator[tuple[TextPlace, Ids]]:
        """Yield the place and the ids, (T + 1,), of every window from ``place`` on, without end."""
        pieces = deque[tuple[int, int, Ids]]()
        coming, skip = self._pieces_from(place), place.skip
        while True:
            while sum(len(ids) for *_, ids in pieces) - skip <= self._block_size:
                pieces.append(next(coming))
            while skip >= len(pieces[0][2]):
                skip -= len(pieces.popleft()[2])
            turn, number, first = pieces[0]
            parts = [first[skip : skip + self._block_size + 1], *(ids for *_, ids in list(pieces)[1:])]
            yield TextPlace(turn, number, skip), np.concatenate(parts)[: self._block_size + 1]
            skip += self._block_size

    def _pieces_from(self, place: TextPlace) -> Iterator[tuple[int, int, Ids]]:
        """Yield ``turn``, ``piece`` (see ``TextPlace``) and ids of every piece of training text from ``place`` on,
        without end."""
        first, empty = place.piece, 0
        for turn in count(place.turn):
            if empty >= len(self._shards):
                raise _nothing_to("train", self._spec.config)
            empty += 1
            _, chosen = sample_position(turn, len(self._shards), self._seed)
            shard = self._shards[int(chosen)]
            for number, piece in enumerate(read_shard(self._spec, shard)):
                if number >= first and piece.split == TRAIN:
                    ids, _ = encode_piece(self._spec, self._tokenizer, piece, shard)
                    if len(ids):
                        empty = 0
                        yield turn, number, ids
            first = 0


def open_stream(config: DataConfig, cache: Path, tokens: int) -> Tokens:
    """Return the opened corpus of a config with ``data.stream``: its tokenizer and its first ``tokens`` validation
    tokens. The training tokens are made later, by ``Stream``.

    The first call reads the text until it has these validation tokens, and writes them into ``cache``.

    Raises:
        ConfigError: the text cannot be read, or has fewer validation tokens.
    """
    spec = stream_spec(config, cache)
    folder = cache / f"{spec.key}.stream"
    if not (folder / TOKENIZER / ABOUT).is_file():
        save_tokenizer(make_tokenizer(spec), folder / TOKENIZER)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    file, about = folder / f"val_{tokens}.bin", folder / f"val_{tokens}.json"
    dtype = token_dtype_for(spec, tokenizer)
    if not about.is_file():
        ids, num_bytes = read_validation(spec, tokenizer, tokens)
        write_atomically(file, ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        write_json(about, {"bytes": num_bytes})
    val = Split((read_token_file(file, dtype),), read_json(about)["bytes"])
    return Tokens((describe_source(spec, tokenizer, folder, val),))


def look_at_stream(config: DataConfig, cache: Path) -> Tokens:
    """Return the corpus of a config with ``data.stream``, without any tokens, for checks before training. The first
    piece of text is read and tokenized as a check, except if the source is a dataset (``data.dataset``).

    Raises:
        ConfigError: a file is missing, the first document cannot be read, or the tokenizer is not usable.
    """
    spec = stream_spec(config, cache)
    tokenizer = make_tokenizer(spec)
    if spec.kind != "dataset":  # the hub may be slow, and the first start reads it
        shard = list_shards(spec)[0]
        for piece in islice(read_shard(spec, shard), 1):
            encode_piece(spec, tokenizer, piece, shard)
    return Tokens((describe_source(spec, tokenizer, None, Split(())),))


def describe_source(spec: PreprocessingSpec, tokenizer: Tokenizer, folder: Path | None, val: Split) -> TokenSource:
    """Return a stream as a token source, whose training split has no files.

    ``val`` is its validation split. ``folder`` is the folder with its tokenizer and validation tokens; None if they are
    not written.
    """
    about = describe_tokenizer(tokenizer)
    return TokenSource(
        name=spec.config.title,
        folder=folder,
        train=Split((), documents=0 if spec.has_documents else None),  # documents are not counted
        val=val,
        vocab_size=tokenizer.vocab_size,
        tokenizer=about,
        sha256=hashlib.sha256(json.dumps([spec.identity, about["checksum"]]).encode()).hexdigest(),
    )


def read_validation(spec: PreprocessingSpec, tokenizer: Tokenizer, tokens: int) -> tuple[Ids, int]:
    """Return the first ``tokens`` token ids of the validation split, (tokens,), and an estimate of the bytes of their
    text.

    Raises:
        ConfigError: the split has fewer tokens, or the text cannot be read.
    """
    found, num_bytes, num_tokens = list[Ids](), 0, 0
    for shard in list_shards(spec):
        for piece in read_shard(spec, shard) if shard.split != TRAIN else ():
            if piece.split == VAL:
                ids, size = encode_piece(spec, tokenizer, piece, shard)
                found.append(ids)
                num_bytes, num_tokens = num_bytes + size, num_tokens + len(ids)
            if num_tokens >= tokens:
                return np.concatenate(found)[:tokens], round(num_bytes * tokens / num_tokens)
    raise _nothing_to("validate", spec.config, f"{num_tokens} tokens, and eval.sequences needs {tokens}")


def stream_spec(config: DataConfig, cache: Path) -> PreprocessingSpec:
    """Return the preprocessing spec of a config with ``data.stream``. ``cache`` is the folder of the prepared corpora.

    Raises:
        ConfigError: a file is missing, or the text must be downloaded first.
    """
    spec = build_spec(config, cache)
    if spec is None:
        raise ConfigError(
            f"data={config.title} with data.stream=true, whose text is not on this machine",
            "a text that exists",
            f"{prepare_command(config, cache)}, which downloads it",
        )
    return spec


def _nothing_to(verb: str, config: DataConfig, found: str = "none in the whole corpus") -> ConfigError:
    return ConfigError(
        f"too little text to {verb} on: {found} (data.val_fraction={config.val_fraction})",
        "text in both splits",
        "more text, a smaller eval.sequences, another data.val_fraction, or data.val_path=FILE",
    )
