"""The tokenizer of a corpus: built in, read from a file, or trained on the text.

Owns the choice of the text that a tokenizer is trained on. Torch-free; streams. Must not know what becomes of the
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpt.config import TokenizerKind
from gpt.data.preprocessing.readers import decode, read_shard
from gpt.data.preprocessing.shards import TRAIN, list_shards
from gpt.data.preprocessing.spec import PreprocessingSpec
from gpt.data.tokenizers.base import ByteTokenizer, CharTokenizer, Tokenizer
from gpt.data.tokenizers.subword import load_gpt2, read_tokenizer, train_sentencepiece

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
