"""Training windows of a corpus that is tokenized while it is read (``data.stream=true``), without a prepared folder.

Imports no torch. The order is a pure function of the seed and the number of a sample, as that of prepared tokens:

1. Shards follow one another, in another order in each epoch.
2. The tokens of their training text form one endless sequence, which is cut into windows. The end of a file or of the
   corpus is inside a window, so no token is left out and none comes twice in an epoch.
3. Every ``data.shuffle_buffer`` windows are one buffer, with an order of its own.

A buffer is known by its ``TextPlace``. A checkpoint has the place of one buffer, from which reading continues.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpt.config import DataConfig
from gpt.data.order import sample_position
from gpt.data.preparation import encode_piece, make_tokenizer, token_dtype_for
from gpt.data.prepared import TOKENIZER, Split, Tokens, TokenSource
from gpt.data.shards import TRAIN, VAL, list_shards, read_shard
from gpt.data.spec import PreprocessingSpec, build_spec, prepare_command
from gpt.data.token_file import read_token_file
from gpt.data.tokenizers import ABOUT, Tokenizer, describe_tokenizer, load_tokenizer, save_tokenizer
from launch.errors import ConfigError
from launch.runs.folder import read_json, write_atomically, write_json

Ids = npt.NDArray[np.int64]


class TextPlace(NamedTuple):
    """Place of a token in the training text."""

    turn: int
    """Number of the shard, counted on through all epochs."""
    piece: int
    """Number of the piece in its shard."""
    skip: int
    """Tokens of the piece before the place."""


class Stream:
    """Training windows by number. Ascending numbers are quick; others begin again at a buffer of known place.

    Args:
        spec: the text to read.
        tokenizer: makes the tokens.
        block_size: tokens of a window, T, without the last target.
        seed: seed of the order.
    """

    def __init__(self, spec: PreprocessingSpec, tokenizer: Tokenizer, block_size: int, seed: int) -> None:
        self._spec, self._tokenizer, self._block_size, self._seed = spec, tokenizer, block_size, seed
        self._size = spec.config.shuffle_buffer
        self._shards = [shard for shard in list_shards(spec) if shard.split != VAL]
        self._places = {0: TextPlace(0, 0, 0)}
        """Number of a buffer -> place of its first token."""
        self._buffers: dict[int, list[Ids]] = {}
        """The buffer in use, and the following one, which fills meanwhile."""
        self._made = 0
        """Number of the next window."""
        self._windows = self._windows_from(self._places[0])

    def read(self, index: int) -> Ids:
        """Return the window of the sample with this running number, (T + 1,), including the last target.

        Raises:
            ConfigError: the text cannot be read, has changed, or has nothing to train on.
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
        """Return what ``restore`` needs to continue at the sample ``index``: number and place of a buffer, as JSON."""
        number = max(known for known in list(self._places) if known <= index // self._size)
        return [number, *self._places[number]]

    def restore(self, state: list[int]) -> None:
        """Learn the place of a buffer from ``state``, so that reading can begin there. No text is read."""
        number, *place = state
        self._places[number] = TextPlace(*place)

    def _windows_from(self, place: TextPlace) -> Iterator[tuple[TextPlace, Ids]]:
        """Yield place and tokens, (T + 1,), of every window from ``place`` on."""
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
        """Yield turn, number and tokens of every piece of training text from that of ``place`` on."""
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
    """Return the source of a stream: its tokenizer and the first ``tokens`` validation tokens, kept in ``cache``.

    The first call reads the text until it has these tokens.

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
    """Return the source of a stream without validation tokens. Of local files the first document is read.

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
    """Return the source of a stream, whose training split has no files."""
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
    """Read the first ``tokens`` tokens of the validation split, (tokens,), and the bytes of text that they stand for.

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
    """Return the preprocessing spec of a stream.

    Raises:
        ConfigError: a file is missing.
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
