"""Sizes of the corpus of a run, the check that it fits the model, and its opened tokens. Also the check of the tasks of
lm-eval.

Imports no torch and is quick, because the launcher makes the checks on the login node before it submits a job.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpt.config import BYTE_VOCAB, DataConfig, ModelConfig, Source
from gpt.data.prepared import Tokens, find_document_end, largest_id_seen, open_folder, open_tokens
from gpt.data.spec import FIRST_USE_BYTES, build_spec, prepare_command
from launch.errors import ConfigError, closest
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class SourceSize:
    """Size of one source of a corpus. Samples never cross files."""

    name: str
    train: tuple[int, ...]
    """Number of tokens of each training file."""
    val: tuple[int, ...]
    """Number of tokens of each validation file."""
    weight: int = 1
    """Weight of the source in a mixture: a whole number, relative to the other weights."""


@dataclass(frozen=True)
class Corpus:
    """Description of a corpus before training."""

    name: str
    sources: tuple[SourceSize, ...]
    """Sizes of the sources of the corpus; empty for a stream, whose size is unknown before the text is read."""
    tokenizer: str
    """Kind of the tokenizer, such as ``byte`` or ``tiktoken``; ``synthetic`` or ``unknown`` without a tokenizer."""
    vocab_size: int | None
    """Number of token ids. If no file states it, the largest id that was found plus 1; None if unknown."""
    entropy: float | None
    """Lowest possible loss of any model, in nats per token; None if unknown."""
    sequence: int = 1
    """Number that must divide ``block_size``: the length, in tokens, of the sequences that conversations were packed
    into; 1 for texts."""

    @property
    def train_tokens(self) -> int:
        """Number of training tokens, over all sources."""
        return sum(sum(source.train) for source in self.sources)

    @property
    def val_tokens(self) -> int:
        """Number of validation tokens, over all sources."""
        return sum(sum(source.val) for source in self.sources)

    @property
    def tokens(self) -> int:
        """Number of tokens, training and validation."""
        return self.train_tokens + self.val_tokens

    def __str__(self) -> str:
        floor = "" if self.entropy is None else f", entropy {self.entropy:.4f} nats per token"
        return f"{self.name}: {f'{self.tokens:,}' if self.sources else 'a stream of'} {self.tokenizer} tokens{floor}"


def describe_corpus(config: DataConfig, cache: Path) -> Corpus:
    """Return the description of the corpus of a config. It comes from the token files of ``data=tokens``, from the
    prepared folder in ``cache``, or from the text if the corpus is not prepared yet.

    Raises:
        ConfigError: the text is missing, the corpus must be prepared before training, or documents are packed and no
            token that ends a document is known.
    """
    name, spec, tokens = str(config.path or config.title), None, None
    if config.source is Source.tokens:
        name, tokens = config.title, open_tokens(config)
    elif config.stream:
        from gpt.data.order import look_at_stream

        tokens = look_at_stream(config, cache)
    elif (spec := build_spec(config, cache)) is not None:
        prepared = open_folder(cache / spec.key, spec.identity)
        tokens = None if prepared is None else Tokens((prepared,))
    if tokens is not None:
        find_document_end(config, tokens)
        return describe_tokens(name, tokens)
    # Training itself prepares a small corpus whose size is known here. Any other corpus is refused now, because a later
    # refusal would stop a job that has started.
    known = spec.known_tokens() if spec is not None and spec.num_bytes <= FIRST_USE_BYTES else None
    if known is None:
        raise ConfigError(
            f"data={config.title} with data.tokenizer={config.tokenizer.name} is not prepared in {cache}",
            "a corpus of this size, or with this tokenizer, that was prepared before training",
            prepare_command(config, cache),
        )
    find_document_end(config, None)
    tokenizer, vocab_size, entropy = "byte", BYTE_VOCAB, None
    if config.source is Source.synthetic:
        from gpt.data.shards import chain_of

        tokenizer, vocab_size = "synthetic", config.synthetic.vocab_size
        entropy = chain_of(config.synthetic).entropy()
    source = SourceSize(config.title, (known[0],), (known[1],))
    return Corpus(name, (source,), tokenizer, vocab_size, entropy)


def describe_tokens(name: str, tokens: Tokens) -> Corpus:
    """Return the description of opened token files, as a corpus called ``name``."""
    sources, sizes = [], []
    for source in tokens.sources:
        train = tuple(segment.tokens for segment in source.train.segments)
        val = tuple(segment.tokens for segment in source.val.segments)
        if not source.is_streamed:
            sources.append(SourceSize(source.name, train, val, source.weight))
        sizes.append(source.vocab_size if source.vocab_size is not None else largest_id_seen(source) + 1)
    first = tokens.sources[0]  # all sources of a mixture have one tokenizer
    kind = first.tokenizer["kind"] if first.tokenizer is not None else "synthetic" if first.entropy else "unknown"
    entropy = first.entropy if len(tokens.sources) == 1 else None  # unknown for a mixture: not the mean of its sources
    sequence = math.lcm(*(source.conversation_tokens or 1 for source in tokens.sources))
    return Corpus(name, tuple(sources), str(kind), max(sizes), entropy, sequence)


def num_windows(tokens: int, block_size: int) -> int:
    """Return the number of samples in a file of ``tokens`` tokens: windows of ``block_size`` tokens without overlap.

    The last target needs one more token after its window.
    """
    return max(0, (tokens - 1) // block_size)


def check_fit(corpus: Corpus, model: ModelConfig, eval_sequences: int = 1) -> None:
    """Raise ConfigError if a corpus does not fit a model: the model's vocabulary lacks a token id, ``block_size`` would
    cut conversations (``Corpus.sequence``), or a split has too few tokens.

    ``eval_sequences`` is the number of validation samples of an evaluation.
    """
    if corpus.vocab_size is not None and model.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} with {corpus.tokenizer} tokens of {corpus.name}",
            f"room for all {corpus.vocab_size} ids",
            f"model.vocab_size={corpus.vocab_size}",
        )
    if model.block_size % corpus.sequence:
        raise ConfigError(
            f"model.block_size={model.block_size} with conversations that fill sequences of {corpus.sequence} tokens",
            "sequences that do not cut conversations",
            f"model.block_size={corpus.sequence}, or gpt.prepare with data.conversation_tokens={model.block_size}",
        )
    for source in corpus.sources:
        longest = min(max(source.train, default=0), max(source.val, default=0))
        if longest <= model.block_size:
            of = f" of {source.name}" if len(corpus.sources) > 1 else ""
            raise ConfigError(
                f"a corpus of {sum(source.train)} training and {sum(source.val)} validation tokens{of}",
                f"at least model.block_size + 1 = {model.block_size + 1} tokens in each",
                f"a longer text, or model.block_size={max(1, longest - 1)}",
            )
    if not corpus.sources:  # the first start of a stream reads as many validation tokens as needed, or refuses
        return
    samples = _val_samples(corpus, model.block_size)
    if eval_sequences > samples:
        raise ConfigError(
            f"eval.sequences={eval_sequences}, but {corpus.val_tokens} validation tokens make {samples}"
            f" sequences of {model.block_size}",
            "an evaluation that uses no sequence twice",
            (f"eval.sequences={samples}, or " if samples else "")
            + "more text to validate on: a larger data.val_fraction, or a longer data.val_path",
        )


def _val_samples(corpus: Corpus, block_size: int) -> int:
    """Return the number of validation samples that a corpus has before a sample repeats. A mixture of sources takes
    samples from each source in proportion to its weight. So the source that is used up first decides."""
    available = [sum(num_windows(tokens, block_size) for tokens in source.val) for source in corpus.sources]
    if len(available) == 1:
        return available[0]
    from gpt.data.order import max_samples  # imports numpy, which the login node needs only for a mixture

    return max_samples(available, [source.weight for source in corpus.sources])


def ensure_tokens(config: DataConfig, cache: Path, val_tokens: int = 0) -> Tokens:
    """Return the tokens of the corpus of a config. A small corpus that is not prepared yet is prepared in ``cache``.

    With ``data.stream`` the training tokens are made during training. This call then makes only the first
    ``val_tokens`` validation tokens, in ``cache``. Without ``data.stream``, ``val_tokens`` has no effect.

    Raises:
        ConfigError: the text is missing or changed during reading, the corpus must be prepared before training, or
            ``cache`` is not writable.
    """
    if config.source is Source.tokens:
        return open_tokens(config)
    if config.stream:
        from gpt.data.order import open_stream

        try:
            return open_stream(config, cache, val_tokens)
        except OSError as error:
            raise unwritable_folder_error(cache, error) from error
    describe_corpus(config, cache)  # raises for a corpus that must be prepared beforehand
    spec = build_spec(config, cache)
    assert spec is not None, "describe_corpus refuses what has to be downloaded"
    from gpt.data import preparation

    try:
        folder = cache / spec.key
        return Tokens((open_folder(folder, spec.identity) or preparation.prepare_folder(spec, folder),))
    except (OSError, NotImplementedError) as error:  # filelock raises NotImplementedError on filesystems without locks
        raise unwritable_folder_error(cache, error) from error


def unwritable_folder_error(folder: Path, error: Exception) -> ConfigError:
    """Return the error for a folder in which no corpus can be prepared; ``error`` is the reason."""
    return ConfigError(
        f"tokens cannot be written in {folder} ({error})",
        "a folder with room that all nodes share",
        "data.cache_dir=FOLDER",
    )


def keep_tokenizer(tokens: Tokens, folder: RunFolder) -> None:
    """Copy the tokenizer of the tokens, if known, into the run's folder, so that tokens can be decoded later."""
    if tokens.tokenizer_folder is not None:
        shutil.copytree(tokens.tokenizer_folder, folder.tokenizer, dirs_exist_ok=True)


# Tasks of lm-eval (``eval.tasks``, the extra ``eval``): a check that lm-eval knows them, and the loaded tasks with
# their documents.


TEXTLESS = ("synthetic", "unknown", "char")
"""Kinds of tokenizers that cannot encode every text, so that tasks of lm-eval cannot use them."""


def check_tasks(tasks: Sequence[str], tokenizer: str) -> None:
    """Raise ConfigError if lm-eval does not know one of ``tasks``, or the tokenizer of the corpus cannot encode them.

    Args:
        tasks: names of tasks, and YAML files.
        tokenizer: kind of the tokenizer, as in ``Corpus.tokenizer``.
    """
    if tasks and tokenizer in TEXTLESS:
        raise ConfigError(
            f"eval.tasks=[{','.join(tasks)}] with {tokenizer} tokens",
            "a corpus whose tokenizer encodes any text",
            "data=text data.path=FILE data.tokenizer=byte, or eval.tasks=[]",
        )
    for task in tasks:
        if not Path(task).is_file() and task not in (known := task_manager(tuple(tasks)).all_tasks):
            raise ConfigError(
                f"eval.tasks with {task}, which is no task of lm-eval, and no file",
                "names that `lm-eval ls tasks` prints, or YAML files (FOLDER/NAME.yaml)",
                f"eval.tasks=[{(closest(task, known) or ['hellaswag'])[0]}]",
            )


@cache
def task_manager(tasks: tuple[str, ...]) -> Any:
    """Return lm-eval's ``TaskManager``. If all ``tasks`` are files, the manager has no index of lm-eval's own tasks,
    because reading this index takes seconds."""
    from lm_eval.tasks import TaskManager  # slow to import

    return TaskManager(include_defaults=any(Path(task).suffix != ".yaml" for task in tasks))


def load_tasks(tasks: Sequence[str]) -> Any:
    """Return the tasks as lm-eval loads them, with their documents, which it may download.

    Raises:
        ConfigError: a task cannot be loaded, runs code that the model writes, or needs a model that reads pictures.
    """
    try:
        loaded = task_manager(tuple(tasks)).load(list(tasks))
        if any(
            getattr(task, kind, False) for task in loaded["tasks"].values() for kind in ("UNSAFE_CODE", "MULTIMODAL")
        ):
            raise ValueError("a task runs code that the model writes, or shows it pictures")
    except Exception as error:  # of lm-eval, of the library of data sets, or of the task's own code
        raise ConfigError(
            f"eval.tasks=[{','.join(tasks)}] cannot be loaded ({type(error).__name__}: {error})",
            "tasks of text without code, whose data sets are on this machine or can be downloaded",
            "HF_HOME=FOLDER of a machine that has downloaded them, or eval.tasks=[]",
        ) from error
    return loaded
