"""Writer of a run's tokenizer as ``AutoTokenizer`` loads it: a tokenizer.json in the format of the tokenizers library.

Owns the translation. Bytes and characters are written out here, a tokenizer.json is copied; for the two kinds whose
libraries have a format of their own the file is copied as it is, to be read by these libraries. Torch-free.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gpt.config import TokenizerKind
from gpt.data.tokenizers.base import CharTokenizer, Tokenizer
from launch.runs.folder import RunFolder


def write_tokenizer(tokenizer: Tokenizer, run: RunFolder, folder: Path, block_size: int) -> str:
    """Write the tokenizer of ``run`` into ``folder``; returns a line about it for the model card."""
    if tokenizer.kind in (TokenizerKind.sentencepiece, TokenizerKind.tiktoken):
        # These libraries have a format of their own, which they alone read.
        shutil.copytree(run.tokenizer, folder / "tokenizer")
        return f"{tokenizer.kind.name}, in `tokenizer/`, for the library of that name; `AutoTokenizer` does not read it"
    if tokenizer.kind is TokenizerKind.byte:
        content = byte_level_tokenizer()
    elif isinstance(tokenizer, CharTokenizer):
        content = character_tokenizer(tokenizer.characters)
    else:
        content = json.loads(tokenizer.payload)
    write_json(folder / "tokenizer.json", content)
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # true would drop spaces before punctuation, on decoding
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.eot is not None:
        about["eos_token"] = find_token_text(content, tokenizer.eot)
    write_json(folder / "tokenizer_config.json", about)
    return f"{tokenizer.kind.name}, {tokenizer.vocab_size} ids; `AutoTokenizer` reads it"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON, other scripts than Latin left readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_level_tokenizer() -> dict[str, Any]:
    """Describe a byte-pair encoding without any pair, whose ids are bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": []}
    return tokenizer_json(model, level, level)


def byte_letters() -> list[str]:
    """List the letter that the library writes for each byte: itself where it is printable, else from U+0100 on.

    As in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, others = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in printable else 0x100 + others))
        others += byte not in printable
    return letters


def character_tokenizer(known: str) -> dict[str, Any]:
    """Describe a tokenizer whose words are the characters of ``known``; any other character is an error."""
    model: dict[str, Any] = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(known)}, "unk_token": "<unk>"}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return tokenizer_json(model, each, {"type": "Fuse"})


def tokenizer_json(model: dict[str, Any], before: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """Build a tokenizer.json of these parts and no others."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def find_token_text(content: dict[str, Any], number: int) -> str | None:
    """Find the text of a token of a tokenizer.json by its id; None where no token has it."""
    for token in content.get("added_tokens", []):
        if token["id"] == number:
            return str(token["content"])
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    return next((text for text, i in pairs if i == number), None)
