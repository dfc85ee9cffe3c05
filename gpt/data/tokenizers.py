"""Tokenizers: bytes, characters, and those of three libraries (the extra ``data``).

Imports no torch. The library of a tokenizer is imported only when this tokenizer is used. A tokenizer is saved next to
its corpus and in the run folder, so that the tokens of a run can be decoded after its corpus is deleted.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt.config.data import BYTE_VOCAB, TokenizerKind
from launch.errors import ConfigError
from launch.runs.environment import install_command
from launch.runs.folder import write_atomically, write_json

Ids = npt.NDArray[np.uint32]
ABOUT = "about.json"


class Tokenizer(Protocol):
    """Interface of all tokenizers. Tokenizers of the same kind with the same ``payload`` are equal."""

    kind: TokenizerKind
    payload: bytes
    """Content of the tokenizer's file; empty if the tokenizer has no file."""
    vocab_size: int
    """Number of ids; they run from 0 to ``vocab_size - 1``."""
    eot: int | None
    """Id that ends a document; None if the tokenizer has none, and documents end with a newline."""

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, (N,). No special tokens are added, and their names in the text are plain text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Bytes that are not UTF-8, as in a truncated character, become U+FFFD."""


class ByteTokenizer:
    """Tokenizer whose tokens are the bytes of UTF-8."""

    kind = TokenizerKind.byte
    payload = b""
    vocab_size = BYTE_VOCAB
    eot: int | None = None

    def encode(self, text: str) -> Ids:
        """Return the bytes of ``text`` in UTF-8, (N,)."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of bytes. Bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")


class CharTokenizer:
    """Tokenizer of characters (Unicode code points), numbered in their order, as in nanoGPT's shakespeare_char."""

    kind = TokenizerKind.char
    eot: int | None = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(characters)
        self.payload = json.dumps(self.characters).encode()  # in the order of their ids
        self.vocab_size = len(self.characters)
        assert len(set(self.characters)) == len(self.characters), "every character once"

    @cached_property
    def ids(self) -> dict[str, int]:
        """Character -> its id."""
        return {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> Ids:
        """Return the ids of the characters of ``text``, (N,).

        Raises:
            ConfigError: ``text`` has a character that the corpus lacks.
        """
        try:
            return np.fromiter(map(self.ids.__getitem__, text), dtype=np.uint32, count=len(text))
        except KeyError as error:
            raise ConfigError(
                f"the character {error.args[0]!r}, which the corpus of this tokenizer does not have",
                f"one of its {self.vocab_size} characters",
                "a text without it, or another data.tokenizer",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return "".join(self.characters[int(i)] for i in ids)


FILES = {
    TokenizerKind.byte: None,
    TokenizerKind.char: "characters.json",
    TokenizerKind.sentencepiece: "sentencepiece.model",
    TokenizerKind.hf: "tokenizer.json",
    TokenizerKind.tiktoken: "ranks.json",
}
"""Kind of a tokenizer -> name of the file with its payload; None if it has no payload."""


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """Return the sha256, in hexadecimal digits, of the kind and the payload of a tokenizer."""
    # The zero byte separates the name from the payload.
    return hashlib.sha256(tokenizer.kind.name.encode() + b"\0" + tokenizer.payload).hexdigest()


END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""Possible names of the token that ends a document, in the order in which they are tried."""
GPT2_ENCODING = "gpt2"


def import_library(name: str) -> Any:
    """Import an optional library, and return its module.

    Raises:
        ConfigError: the library is not installed. The message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the library {name} is not installed ({error})", "the extra 'data'", install_command("data")
        ) from error


class SentencePieceTokenizer:
    """Tokenizer of SentencePiece (arXiv 1808.06226). ``payload`` is the content of a .model file."""

    kind = TokenizerKind.sentencepiece

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self._model = import_library("sentencepiece").SentencePieceProcessor(model_proto=payload)
        self.vocab_size = int(self._model.get_piece_size())
        end = int(self._model.eos_id())
        self.eot = end if end >= 0 else None

    def encode(self, text: str) -> Ids:
        """Return the ids of the pieces of ``text``, (N,)."""
        return np.asarray(self._model.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Control pieces have no text."""
        return str(self._model.decode([int(i) for i in ids]))


CHAT = "chat"
"""Key that ``read_with_chat`` adds to a tokenizer.json, for the chat template and special tokens."""


class HfTokenizer:
    """Tokenizer of Hugging Face's tokenizers library. ``payload`` is the content of a tokenizer.json, maybe with a chat
    template (``read_with_chat``)."""

    kind = TokenizerKind.hf

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        try:
            content = json.loads(payload)
            self.chat: dict[str, str] = content.pop(CHAT, {})
            content |= {"truncation": None, "padding": None}  # which some files set, for batches
            self.model = import_library("tokenizers").Tokenizer.from_str(json.dumps(content))
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(
                f"a file that is no tokenizer.json ({error})",
                "a file that the tokenizers library has written",
                "data.tokenizer_path=FOLDER/tokenizer.json",
            ) from error
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        names = (self.chat.get("eos_token", ""), *END_NAMES)
        ends = (name for name in names if self.model.token_to_id(name) is not None)
        self.end_name: str | None = next(ends, None)
        self.eot: int | None = None if self.end_name is None else self.model.token_to_id(self.end_name)

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, (N,). Unlike with other tokenizers, names of added tokens in the text become
        these tokens."""
        return np.asarray(self.model.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens have no text."""
        return str(self.model.decode([int(i) for i in ids]))


def read_with_chat(path: Path) -> bytes:
    """Return the content of a tokenizer.json, with the chat template and special tokens under the key ``CHAT``.

    These are in ``chat_template.jinja`` and ``tokenizer_config.json`` in the same folder, as transformers writes them.

    Raises:
        ConfigError: there is no template, or a file is damaged.
    """
    config, own = (path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja"))
    try:
        content = json.loads(path.read_bytes())
        about = json.loads(config.read_bytes())
        content[CHAT] = {"chat_template": own.read_text() if own.is_file() else about["chat_template"]}
        for name in ("bos_token", "eos_token"):
            if token := about.get(name):
                content[CHAT][name] = token if isinstance(token, str) else token["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"no chat template beside {path} ({type(error).__name__}: {error})",
            f"the template in {own.name} or {config.name}, as in the folder of an instruction-tuned model",
            f"a file {own}, or data.tokenizer_path=FOLDER/tokenizer.json",
        ) from error
    return json.dumps(content).encode()


class TiktokenTokenizer:
    """Tokenizer of tiktoken. ``payload`` is JSON with name, pattern, ranks and special tokens of an encoding."""

    kind = TokenizerKind.tiktoken

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        saved = json.loads(payload)
        ranks = {base64.b64decode(token): rank for rank, token in saved["ranks"]}
        self._model = import_library("tiktoken").Encoding(
            saved["name"], pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens=saved["special_tokens"]
        )
        self.vocab_size = int(self._model.n_vocab)
        self.eot: int | None = saved["special_tokens"].get("<|endoftext|>")

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, (N,)."""
        return np.asarray(self._model.encode_ordinary(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens such as ``<|endoftext|>`` have no text."""
        special = set(self._model._special_tokens.values())
        return str(self._model.decode([i for i in map(int, ids) if i not in special], errors="replace"))


def tiktoken_payload(encoding: Any) -> bytes:
    """Return the payload of ``TiktokenTokenizer`` for a ``tiktoken.Encoding``, which then need not be downloaded
    again."""
    ranks = sorted((rank, base64.b64encode(token).decode()) for token, rank in encoding._mergeable_ranks.items())
    content = {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": ranks,
    }
    return json.dumps(content).encode()


def load_gpt2() -> TiktokenTokenizer:
    """Return the tokenizer of GPT-2. tiktoken downloads its vocabulary, unless it is in TIKTOKEN_CACHE_DIR.

    Raises:
        ConfigError: the vocabulary is not cached and cannot be downloaded.
    """
    tiktoken = import_library("tiktoken")
    try:
        encoding = tiktoken.get_encoding(GPT2_ENCODING)
    except Exception as error:  # from requests, and tiktoken's own ValueError for a wrong checksum
        raise ConfigError(
            f"tiktoken cannot fetch the vocabulary of {GPT2_ENCODING} ({type(error).__name__}: {error})",
            "a network, or TIKTOKEN_CACHE_DIR=FOLDER with the files that tiktoken has cached on another machine",
            "data.tokenizer=tiktoken data.tokenizer_path=FOLDER/tokenizer/ranks.json of a corpus prepared elsewhere",
        ) from error
    return TiktokenTokenizer(tiktoken_payload(encoding))


def read_tokenizer(kind: TokenizerKind, path: Path) -> Tokenizer:
    """Return the tokenizer in a file of the user: a SentencePiece model, a tokenizer.json, or the ranks.json of a
    prepared corpus.

    Raises:
        ConfigError: the file is not one of this kind.
    """
    try:
        return from_payload(kind, path.read_bytes())
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.tokenizer_path={path} is no {kind.name} tokenizer ({type(error).__name__}: {error})",
            {
                TokenizerKind.sentencepiece: "a SentencePiece .model file",
                TokenizerKind.hf: "a tokenizer.json",
                TokenizerKind.tiktoken: "the ranks.json of a prepared corpus",
            }[kind],
            "data.tokenizer_path=FILE",
        ) from error


def train_sentencepiece(lines: Iterator[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a byte-pair model of SentencePiece, and return the tokenizer. It can encode every text, and
    decode(encode(text)) equals the text.

    Args:
        lines: short texts to train on; SentencePiece ignores lines of more than 4192 bytes.
        vocab_size: number of ids, including 256 bytes and three control pieces.

    Raises:
        ConfigError: the text has too few different pieces, or the library is not installed.
    """
    model = io.BytesIO()
    try:
        import_library("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # a character that is no piece becomes its bytes, never "unknown"
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            # Separate pieces for characters that the trainer would ignore or change in its lines.
            user_defined_symbols=["\n", "\r", "\t"],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"data.tokenizer_vocab_size={vocab_size}, which SentencePiece cannot learn from this text",
            f"a size within the limits that it names ({error})",
            "data.tokenizer_vocab_size=SIZE, or another data.path",
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str | int | None]:
    """Return the description of a tokenizer for manifests: kind, vocab_size, eot and checksum, as plain JSON."""
    return {
        "kind": tokenizer.kind.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "checksum": tokenizer_checksum(tokenizer),
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into ``folder``: its payload, and as the last file ``about.json``."""
    name = FILES[tokenizer.kind]
    if name is not None:
        write_atomically(folder / name, tokenizer.payload)
    write_json(folder / ABOUT, describe_tokenizer(tokenizer))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that ``save_tokenizer`` has written into ``folder``.

    Raises:
        ConfigError: the tokenizer is missing or damaged, or its library is not installed.
    """
    try:
        saved = json.loads((folder / ABOUT).read_bytes())
        kind = TokenizerKind[saved["kind"]]
        name = FILES[kind]
        payload = b"" if name is None else (folder / name).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer in {folder} ({type(error).__name__}: {error})",
            "a folder that a preparation or a run has saved its tokenizer in",
            "python -m gpt.prepare data=NAME, or the folder of another run",
        ) from error
    tokenizer = from_payload(kind, payload)
    if tokenizer_checksum(tokenizer) != saved["checksum"]:
        raise ConfigError(
            f"the tokenizer in {folder} is not the one that was saved there (its checksum differs)",
            f"sha256 {saved['checksum']}",
            "the file from a backup, or python -m gpt.prepare data=NAME again",
        )
    return tokenizer


def from_payload(kind: TokenizerKind, payload: bytes) -> Tokenizer:
    """Return the tokenizer of a kind with this payload, the content of its file."""
    if kind is TokenizerKind.byte:
        return ByteTokenizer()
    if kind is TokenizerKind.char:
        return CharTokenizer(json.loads(payload))
    kinds = (SentencePieceTokenizer, HfTokenizer, TiktokenTokenizer)
    return next(each for each in kinds if each.kind is kind)(payload)
