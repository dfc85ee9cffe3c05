"""The tokenizer a recipe asks for: found, read from a file, or learned from the text.

Owns which text a tokenizer learns from. Torch-free; streams. Must not know what becomes of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpt.config import TokenizerKind
from gpt.data.preprocessing.readers import decode, read_unit
from gpt.data.preprocessing.recipe import Recipe
from gpt.data.preprocessing.units import TRAIN, cut_units
from gpt.data.tokenizers.base import ByteTokenizer, CharTokenizer, Tokenizer
from gpt.data.tokenizers.subword import load_gpt2, read_tokenizer, train_sentencepiece

SAMPLED_UNITS = 16
LINE_CHARACTERS = 1000  # SentencePiece leaves out lines of more than 4192 bytes


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a recipe.

    Raises:
        ConfigError: its file or its library is not there, or the text is not UTF-8.
    """
    config = recipe.config
    if config.tokenizer is TokenizerKind.byte:
        return ByteTokenizer()
    if config.tokenizer is TokenizerKind.char:
        return CharTokenizer(sorted(_characters(recipe)))
    if config.tokenizer_path is not None:
        return read_tokenizer(config.tokenizer, Path(config.tokenizer_path).expanduser())
    if config.tokenizer is TokenizerKind.tiktoken:
        return load_gpt2()
    assert config.tokenizer is TokenizerKind.sentencepiece, "DataConfig.validate asks for a path"
    return train_sentencepiece(_sample_lines(recipe), config.tokenizer_vocab_size)


def _characters(recipe: Recipe) -> set[str]:
    """All characters of the corpus, validation included, so that every text of it has ids."""
    found = {"\n"} if recipe.splits_documents else set()  # ends a document
    for unit in cut_units(recipe):
        for piece in read_unit(recipe, unit):
            found.update(decode(piece.data, unit))
    return found


def _sample_lines(recipe: Recipe) -> Iterator[str]:
    """Lines of the training text, from places all over the corpus, up to ``data.tokenizer_train_bytes``."""
    units = [unit for unit in cut_units(recipe) if unit.split in (None, TRAIN)]
    step = max(1, len(units) // SAMPLED_UNITS)
    chosen = units[::step][:SAMPLED_UNITS]
    for unit in chosen:
        left = recipe.config.tokenizer_train_bytes // len(chosen)
        for piece in read_unit(recipe, unit):
            if piece.split != TRAIN:
                continue
            text = decode(piece.data, unit)[:left]
            left -= len(piece.data)
            for line in text.splitlines(keepends=True):
                yield from (line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS))
            if left <= 0:
                break
