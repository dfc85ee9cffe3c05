"""What a run trains on, as the login node and training ask for it: is it there, does it fit, and the tokens themselves.

Owns the questions: what is known of a corpus before there are tokens, what is refused, and which corpora training may
prepare by itself. Torch-free and quick, since the login node asks it before submitting. Must not know how tokens become
batches.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gpt.config import DataConfig, ModelConfig, Source
from gpt.data.formats.prepared import Tokens, TokenSource, largest_id_seen, open_folder, open_tokens, read_manifest
from gpt.data.order import largest
from gpt.data.preprocessing.recipe import Recipe, known_vocab, prepare_command, recipe_of
from launch.errors import ConfigError
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class Part:
    """What is known of one source: tokens of each run of them that is read by itself."""

    name: str
    train: tuple[int, ...]
    val: tuple[int, ...]
    weight: int = 1


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus before training."""

    name: str
    parts: tuple[Part, ...]
    tokenizer: str
    """What makes its tokens, in a word."""
    vocab_size: int | None
    """Ids are below it; None where nobody says so."""
    entropy: float | None
    """Nats per token that no model can go below, where that is known."""

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(sum(part.train) for part in self.parts)

    @property
    def val_tokens(self) -> int:
        """Validation tokens of all sources."""
        return sum(sum(part.val) for part in self.parts)

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.train_tokens + self.val_tokens

    def __str__(self) -> str:
        floor = "" if self.entropy is None else f", entropy {self.entropy:.4f} nats per token"
        return f"{self.name}: {self.tokens:,} {self.tokenizer} tokens{floor}"


def describe(config: DataConfig, cache: Path) -> Corpus:
    """What is known of the corpus, from its manifest or from the text that it will be made of.

    Raises:
        ConfigError: the text is not there, or it has to be prepared before training.
    """
    if config.source is Source.tokens:
        return described(config.title, open_tokens(config))
    recipe = recipe_of(config, cache)
    found = None if recipe is None else _prepared(recipe, cache)
    if found is not None:
        return described(str(config.path or config.title), Tokens((found,)))
    known = recipe.known_tokens() if recipe is not None and recipe.on_first_use() else None
    if known is None:
        raise ConfigError(
            f"data={config.title} with data.tokenizer={config.tokenizer.name} is not prepared in {cache}",
            "a corpus of this size, or with this tokenizer, that was prepared before training",
            prepare_command(config, cache),
        )
    name = str(config.path or config.title)
    tokenizer = "byte" if config.source is not Source.synthetic else "synthetic"
    entropy = None
    if config.source is Source.synthetic:
        from gpt.data.preprocessing.synthetic import chain_of

        entropy = chain_of(config.synthetic).entropy()
    part = Part(config.title, (known[0],), (known[1],))
    return Corpus(name, (part,), tokenizer, known_vocab(config), entropy)


def _prepared(recipe: Recipe, cache: Path) -> TokenSource | None:
    folder = cache / recipe.key
    manifest = read_manifest(folder)
    return open_folder(folder) if manifest is not None and manifest["spec"] == recipe.spec else None


def described(name: str, tokens: Tokens) -> Corpus:
    """What is known of tokens that are there."""
    parts, sizes = [], []
    for source in tokens.sources:
        train = tuple(segment.tokens for segment in source.train.segments)
        val = tuple(segment.tokens for segment in source.val.segments)
        parts.append(Part(source.name, train, val, source.weight))
        sizes.append(source.vocab_size if source.vocab_size is not None else largest_id_seen(source) + 1)
    first = tokens.sources[0]
    kind = first.tokenizer["kind"] if first.tokenizer is not None else "synthetic" if first.entropy else "unknown"
    if first.characters is not None:
        kind = "char"
    entropy = first.entropy if len(tokens.sources) == 1 else None
    return Corpus(name, tuple(parts), str(kind), max(sizes), entropy)


def num_windows(tokens: int, block_size: int) -> int:
    """Samples in a run of tokens: windows of ``block_size`` that do not overlap, each with its next token as target."""
    return max(0, (tokens - 1) // block_size)


def check_fit(corpus: Corpus, model: ModelConfig, eval_sequences: int = 1) -> None:
    """Raise ConfigError unless the model has room for the ids, and the splits hold the samples asked of them."""
    _check_vocabulary(corpus, model.vocab_size)
    for part in corpus.parts:
        _check_size(corpus, part, model.block_size)
    samples = _val_samples(corpus, model.block_size)
    if eval_sequences > samples:
        raise ConfigError(
            f"eval.sequences={eval_sequences}, but {corpus.val_tokens} validation tokens make {samples}"
            f" sequences of {model.block_size}",
            "an evaluation that uses no sequence twice",
            f"eval.sequences={samples} (or a larger data.val_fraction)",
        )


def _val_samples(corpus: Corpus, block_size: int) -> int:
    """Validation samples that can be used without repeating one, in the proportions of a mixture."""
    available = [sum(num_windows(tokens, block_size) for tokens in part.val) for part in corpus.parts]
    if len(available) == 1:
        return available[0]

    return largest(available, [part.weight for part in corpus.parts])


def _check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    needed = corpus.vocab_size
    if needed is not None and vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size={vocab_size} with {corpus.tokenizer} tokens of {corpus.name}",
            f"room for all {needed} ids",
            f"model.vocab_size={needed}",
        )


def _check_size(corpus: Corpus, part: Part, block_size: int) -> None:
    if not (max(part.train, default=0) > block_size and max(part.val, default=0) > block_size):
        smaller = max(1, min(max(part.train, default=0), max(part.val, default=0)) - 1)
        of = f" of {part.name}" if len(corpus.parts) > 1 else ""
        raise ConfigError(
            f"a corpus of {sum(part.train)} training and {sum(part.val)} validation tokens{of}",
            f"at least model.block_size + 1 = {block_size + 1} tokens in each",
            f"a longer text, or model.block_size={smaller}",
        )


def prepare(config: DataConfig, cache: Path) -> Tokens:
    """The tokens of the corpus, prepared in ``cache`` by the first caller where training may do so itself.

    Raises:
        ConfigError: as ``describe`` does; the folder cannot be written; the text changed while it was read.
    """
    if config.source is Source.tokens:
        return open_tokens(config)
    describe(config, cache)
    recipe = recipe_of(config, cache)
    assert recipe is not None, "describe refuses what has to be downloaded"
    from gpt.data.preprocessing import prepare as preparation

    try:
        return Tokens((_prepared(recipe, cache) or preparation.prepare(recipe, cache / recipe.key),))
    except (OSError, NotImplementedError) as error:  # the latter from filelock, on filesystems without locks
        raise cannot_write(cache, error) from error


def cannot_write(folder: Path, error: Exception) -> ConfigError:
    """The refusal of a folder for prepared corpora."""
    return ConfigError(
        f"tokens cannot be written in {folder} ({error})",
        "a folder with room that all nodes share",
        "data.cache_dir=FOLDER",
    )


def keep_tokenizer(tokens: Tokens, folder: RunFolder) -> None:
    """Copy the tokenizer, where it is known, into the run's folder, to decode the run without its corpus."""
    from gpt.data.tokenizers.base import CharTokenizer
    from gpt.data.tokenizers.registry import save_tokenizer

    source = tokens.tokenizer_folder
    characters = next((s.characters for s in tokens.sources if s.characters is not None), None)
    if source is not None:
        shutil.copytree(source, folder.tokenizer, dirs_exist_ok=True)
    elif characters is not None:
        save_tokenizer(CharTokenizer(characters), folder.tokenizer)
