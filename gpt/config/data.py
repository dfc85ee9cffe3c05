"""Schema of the corpus. Imports no torch. The values are in ``configs/data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

from omegaconf import MISSING

from gpt.config.rules import check_custom_name, check_numbers
from launch.errors import ConfigError

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X] and Union[X, Y], not X | Y.
# ruff: noqa: UP007, UP045


BYTE_VOCAB = 256
NEXT_DOCUMENT = -1
"""Target of a token that ends a document; this number replaces the next token. The loss ignores every target below 0,
but only this number also marks the end of a document."""
SUCCESSORS = 8
"""Number of different tokens that can follow each token of a Markov chain, with random probabilities."""


class Source(Enum):
    """Source of the tokens.

    ``stdlib``: source code of the running Python's own library. ``text``: a text file of the user. ``shakespeare``:
    tinyshakespeare. ``files``: text, jsonl or parquet files that match a pattern. ``dataset``: a dataset that Hugging
    Face's library streams. ``synthetic``: a Markov chain of known entropy. ``tokens``: existing token files.
    """

    stdlib = "stdlib"
    text = "text"
    shakespeare = "shakespeare"
    files = "files"
    dataset = "dataset"
    synthetic = "synthetic"
    tokens = "tokens"


class TokenizerKind(Enum):
    """Kind of a token. ``byte``: a byte. ``char``: a character. ``sentencepiece``, ``hf`` (Hugging Face's tokenizers)
    and ``tiktoken``: a piece of text, by a tokenizer of this library."""

    byte = "byte"
    char = "char"
    sentencepiece = "sentencepiece"
    hf = "hf"
    tiktoken = "tiktoken"


class TokenFileFormat(Enum):
    """File format of prepared tokens.

    ``nanogpt``: train.bin and val.bin without a header, and a meta.pkl. ``llmc``: shards with the header of 1024 bytes
    that llm.c and modded-nanogpt read. ``megatron``: a .bin and an .idx for each split.
    """

    nanogpt = "nanogpt"
    llmc = "llmc"
    megatron = "megatron"


class TokenDtype(Enum):
    """Integer type of a token in a file whose header does not name the type."""

    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"


class Pack(Enum):
    """Treatment of documents that share a sequence.

    ``none``: a token attends to all earlier tokens of its sequence. ``documents``: a token attends to its own document
    only, positions begin anew at each document, and the last token of a document predicts nothing.
    """

    none = "none"
    documents = "documents"


@dataclass
class WeightedPath:
    """One source of a mixture."""

    path: str = MISSING
    """A prepared corpus or a token file, as ``data.path`` of data=tokens."""
    weight: float = 1.0
    """Share of the training samples, relative to the other weights."""


@dataclass
class SyntheticConfig:
    """Corpus of source=synthetic: a Markov chain, in which the next token depends on the last token only."""

    vocab_size: int = 64
    """Number of states of the Markov chain. Each state is one token of the vocabulary."""
    tokens: int = 4_194_304
    """Number of tokens of the whole corpus."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range."""
        check_numbers("data.synthetic.", self, ("tokens",), vocab_size=(SUCCESSORS, 4096))


@dataclass
class DataConfig:
    """Corpus of a run: its source, its tokenizer, and its validation split."""

    name: Optional[str] = None
    """Short name of the corpus, such as the name of its file in configs/data. null takes the name of the source."""
    source: Union[Source, str] = MISSING
    """Name of a built-in source. Or a function of your own, as ``package.module:function`` or as an entry point of the
    group ``gpt.source``: it receives this config and yields documents. See docs/components.md."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings for a source of your own, which reads this dictionary as ``config.options``."""
    path: Optional[str] = None
    """Files of the corpus. source=text: a text file. source=shakespeare: a text file; null downloads it. source=files:
    a pattern of files (text, .jsonl, .jsonl.gz or .parquet). source=tokens: a prepared folder, a .bin, a Megatron
    prefix, or a pattern of shards; null with ``sources``. null with the other built-in sources. A source of your own
    may read the path."""
    val_path: Optional[str] = None
    """Separate validation files, of the same kind as ``path``, for source=text, files and tokens; training then uses
    all of ``path``. null keeps ``val_fraction`` of the corpus for validation. With source=tokens, null takes the
    val.bin next to train.bin if there is one."""
    sources: list[WeightedPath] = field(default_factory=list)
    """source=tokens only: several paths with weights, instead of ``path``."""
    dataset: Optional[str] = None
    """source=dataset only: the dataset's name on the Hugging Face hub, or a folder that load_dataset reads. NAME:SUBSET
    names one of its configurations, if it has several. Other sources do not read it."""
    revision: Optional[str] = None
    """source=dataset only: commit, tag or branch of the dataset on the hub; null takes the newest, which may change.
    Not for a folder."""
    val_split: Optional[str] = None
    """source=dataset only: name of the split to validate on. null keeps ``val_fraction`` of the documents of the split
    ``train`` for validation, and trains on the other documents."""
    text_key: str = "text"
    """Field (jsonl), column (parquet) or feature (dataset) with a document's text, or a conversation's messages."""
    conversation_tokens: Optional[int] = None
    """Length, in tokens, of the training sequences of conversations; null means that documents are texts. Each sequence
    is filled with whole conversations; a longer conversation is cut. Only tokens of the assistant's answers count in
    the loss. ``model.block_size`` must be a multiple of this length."""
    max_bytes: Optional[int] = None
    """Read at most this many bytes of text, rounded up to whole documents if the source has documents; null reads all.
    The files of ``val_path`` are always read whole."""
    val_fraction: float = 0.1
    """Share of the corpus kept for validation, if ``val_path`` is null: the end of a text, or documents chosen by a
    hash of their position."""
    tokenizer: TokenizerKind = TokenizerKind.byte
    tokenizer_path: Optional[str] = None
    """An existing tokenizer: tokenizer.json (hf), .model (sentencepiece), ranks.json of a prepared corpus (tiktoken).
    null trains a sentencepiece model on the corpus, and takes GPT-2's tokenizer for tiktoken. byte and char read no
    file."""
    tokenizer_vocab_size: int = 16384
    """Number of ids of a SentencePiece model that is trained on the corpus."""
    layout: TokenFileFormat = TokenFileFormat.nanogpt
    """Format of the prepared files. All formats contain the same tokens."""
    token_dtype: Optional[TokenDtype] = None
    """source=tokens only: width of tokens in files without a header; null means uint16, as nanoGPT writes them."""
    stream: bool = False
    """Tokenize the text during training, without ``gpt.prepare``. Every rank reads and tokenizes all of the text. Not
    possible with the sources synthetic and tokens."""
    shuffle_buffer: int = 1024
    """stream=true only: number of consecutive sequences that are shuffled together, 1 to 1,000,000; 1 keeps the order.
    Each rank has up to twice as many sequences in memory."""
    pack: Pack = Pack.none
    """Treatment of documents that share a sequence. ``documents`` needs a token that ends a document."""
    document_end: Optional[int] = None
    """pack=documents only: id of the token that ends a document. null takes the end token of the tokenizer, which
    ``gpt.prepare`` writes after each document."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    cache_dir: Optional[str] = None
    """Folder of the prepared corpora, shared by all nodes; null means <output_dir>/.cache."""

    @property
    def title(self) -> str:
        """Name of the corpus: ``name``, or if that is None the name of the source."""
        return self.name or (self.source.rpartition(":")[2] if isinstance(self.source, str) else self.source.name)

    @property
    def dataset_and_subset(self) -> tuple[str | None, str | None]:
        """Name or folder of the dataset, and the name of its configuration, each None if it is not given."""
        if self.dataset is None or Path(self.dataset).expanduser().is_dir():
            return self.dataset, None
        name, _, subset = self.dataset.partition(":")
        return name, subset or None

    def __post_init__(self) -> None:
        # OmegaConf keeps a name as a string if a field also accepts strings.
        if isinstance(self.source, str) and self.source in Source.__members__:
            self.source = Source[self.source]

    def validate(self) -> None:
        """Raise ConfigError if a key is missing, out of its range, or does not fit the source."""
        if isinstance(self.source, str):
            check_custom_name("data.source", self.source, Source.__members__)
        elif self.options:
            raise ConfigError(
                f"data.options={self.options} with data={self.title}",
                "settings for a source of your own only, which is their only reader",
                "data.options={}, or data=custom data.source=PACKAGE.MODULE:FUNCTION",
            )
        for source, key, expected, fix in NEEDED:
            if self.source is source and not getattr(self, key):
                raise ConfigError(f"data={self.title} without data.{key}", expected, fix)
        for key, (sources, expected, fix) in SOURCES_OF_KEY.items():
            value = getattr(self, key)
            is_own = key == "path" and isinstance(self.source, str)  # a function of the user may read it
            if value and self.source not in sources and not is_own:
                raise ConfigError(f"data.{key}={value} with data={self.title}, which does not read it", expected, fix)
        sizes = (260, 1_000_000)
        positive = ("max_bytes", "conversation_tokens")
        check_numbers("data.", self, positive, val_fraction=(0.0001, 0.5), tokenizer_vocab_size=sizes)
        check_numbers("data.", self, at_least_0=("document_end",), shuffle_buffer=(1, 1_000_000))
        if self.document_end is not None and self.pack is Pack.none:
            raise ConfigError(
                f"data.document_end={self.document_end} with data.pack=none, which does not read it",
                "documents to be packed",
                f"data.pack=documents data.document_end={self.document_end}, or data.document_end=null",
            )
        self.synthetic.validate()
        self._validate_tokenizer()
        self._validate_tokens()
        self._validate_stream()
        self._validate_conversations()

    def _validate_tokenizer(self) -> None:
        kind, path = self.tokenizer, self.tokenizer_path
        if kind is TokenizerKind.hf and not path:
            raise ConfigError(
                "data.tokenizer=hf without data.tokenizer_path",
                "a file of the tokenizers library",
                "data.tokenizer=hf data.tokenizer_path=FOLDER/tokenizer.json",
            )
        if path and kind in (TokenizerKind.byte, TokenizerKind.char):
            raise ConfigError(
                f"data.tokenizer_path={path} with data.tokenizer={kind.name}, which reads no file",
                "a tokenizer that is kept in one",
                "data.tokenizer=hf (or sentencepiece, tiktoken), or no data.tokenizer_path",
            )

    def _validate_stream(self) -> None:
        if not self.stream:
            return
        kind, is_local = self.tokenizer, self.dataset is not None and Path(self.dataset).expanduser().is_dir()
        prepared = "data.stream=false, after python -m gpt.prepare with the same data.* keys"
        refused = (
            (
                self.source in (Source.tokens, Source.synthetic),
                f"data={self.title}, whose tokens are not made of text",
                "text",
                "data.stream=false",
            ),
            (
                kind is TokenizerKind.char or (kind is TokenizerKind.sentencepiece and not self.tokenizer_path),
                f"data.tokenizer={kind.name}, which first reads all of the text",
                "bytes, or a tokenizer that exists",
                f"data.tokenizer=sentencepiece data.tokenizer_path=FILE.model, or {prepared}",
            ),
            (
                self.max_bytes is not None and (isinstance(self.source, str) or self.source in DOCUMENT_SOURCES),
                f"data.max_bytes={self.max_bytes} of documents",
                "all of them",
                f"data.max_bytes=null, or {prepared}",
            ),
            (
                self.source is Source.dataset and self.revision is None and not is_local,
                f"data.dataset={self.dataset} without data.revision, which may change between two starts",
                "a commit of the hub, so that a resumed run continues in the same text",
                "data.revision=COMMIT",
            ),
        )
        for is_refused, found, expected, fix in refused:
            if is_refused:
                raise ConfigError(f"data.stream=true with {found}", expected, fix)

    def _validate_conversations(self) -> None:
        is_read = self.source in DOCUMENT_SOURCES and self.tokenizer is TokenizerKind.hf and not self.stream
        if self.conversation_tokens is not None and not (is_read and self.layout is TokenFileFormat.nanogpt):
            raise ConfigError(
                f"data.conversation_tokens={self.conversation_tokens} with data={self.title} data.stream={self.stream}"
                f" data.tokenizer={self.tokenizer.name} data.layout={self.layout.name}",
                "files or a dataset, prepared in our own token files by a tokenizer of transformers",
                "data=chat data.path=FILE data.tokenizer_path=FOLDER/tokenizer.json, without the other keys",
            )

    def _validate_tokens(self) -> None:
        if self.source is not Source.tokens:
            return
        if bool(self.path) == bool(self.sources):
            raise ConfigError(
                "data=tokens with " + ("both data.path and data.sources" if self.path else "no data.path"),
                "one path, or several with weights",
                "data=tokens data.path=FOLDER, or 'data.sources=[{path: A, weight: 0.7}, {path: B, weight: 0.3}]'",
            )
        if self.sources and self.val_path:
            raise ConfigError(
                "data.val_path with data.sources",
                "the validation files of each source in its folder",
                "data.val_path=null",
            )
        for i, source in enumerate(self.sources):
            if not 0 < source.weight < float("inf"):
                raise ConfigError(
                    f"data.sources[{i}].weight={source.weight}", "a number above 0", f"data.sources[{i}].weight=1"
                )


DOCUMENT_SOURCES = (Source.files, Source.dataset)
NEEDED = (
    (Source.text, "path", "the path of a text file", "data=text data.path=FILE"),
    (Source.files, "path", "a pattern of files", "'data.path=FOLDER/*.jsonl'"),
    (Source.dataset, "dataset", "the name of a dataset", "data=tinystories, or data.dataset=NAME"),
)
"""Each row: a source, a key that the source requires, and two texts of the ConfigError that is raised without this key:
``expected`` and ``fix`` (the text to type)."""
SOURCES_OF_KEY: dict[str, tuple[tuple[Source, ...], str, str]] = {
    "path": (
        (Source.text, Source.shakespeare, Source.files, Source.tokens),
        "a source with files of your own: data=text, data=files or data=tokens",
        "data=text data.path=FILE, or data.path=null",
    ),
    "val_path": (
        (Source.text, Source.files, Source.tokens),
        "a text, files or tokens, which validate on files of their own; a dataset has data.val_split",
        "data=text data.path=FILE, or data.val_path=null",
    ),
    "revision": ((Source.dataset,), "a dataset of the hub, which alone has revisions", "data.revision=null"),
    "sources": ((Source.tokens,), "data=tokens, which mixes prepared corpora", "data=tokens"),
}
"""Key -> the sources that read the key, and two texts of the ConfigError that is raised if another source is chosen:
``expected`` and ``fix`` (the text to type)."""
