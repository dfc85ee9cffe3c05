"""Writer of a folder that transformers loads: tokenizer, weights, config, index and checksums."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt.config import ModelConfig, TokenizerKind
from gpt.conversion.adapter import StateDictAdapter
from gpt.conversion.source import INDEX, SINGLE, plain_model
from gpt.conversion.state_dict import SUMS, sum_files
from gpt.data.tokenizers import CharTokenizer, Tokenizer
from launch.runs.folder import RunFolder

# Tokenizer of a run, as ``AutoTokenizer`` loads it: a tokenizer.json in the format of the tokenizers library.
#
# Byte and character tokenizers are converted, a tokenizer.json is copied. The other two kinds have a file format of
# their own library; this file is copied unchanged. These functions import no torch.


def write_tokenizer(tokenizer: Tokenizer, run: RunFolder, folder: Path, block_size: int) -> str:
    """Write the tokenizer of ``run`` into ``folder``. Return a line about it for the model card."""
    if tokenizer.kind in (TokenizerKind.sentencepiece, TokenizerKind.tiktoken):
        # Only the library of such a tokenizer reads its file.
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
        "clean_up_tokenization_spaces": False,  # true would drop spaces before punctuation when decoding
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.eot is not None:
        about["eos_token"] = find_token_text(content, tokenizer.eot)
    write_json(folder / "tokenizer_config.json", about)
    return f"{tokenizer.kind.name}, {tokenizer.vocab_size} ids; `AutoTokenizer` reads it"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON, with readable non-Latin characters."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_level_tokenizer() -> dict[str, Any]:
    """Return a byte-pair encoding without any pair, whose ids are bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": []}
    return tokenizer_json(model, level, level)


def byte_letters() -> list[str]:
    """Return the character that the library writes for each byte: the byte itself if printable, else from U+0100 on.

    As in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, others = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in printable else 0x100 + others))
        others += byte not in printable
    return letters


def character_tokenizer(known: str) -> dict[str, Any]:
    """Return a tokenizer whose words are the characters of ``known``. Any other character is an error."""
    model: dict[str, Any] = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(known)}, "unk_token": "<unk>"}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return tokenizer_json(model, each, {"type": "Fuse"})


def tokenizer_json(model: dict[str, Any], before: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """Build a tokenizer.json from exactly these parts."""
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
    """Return the text of the token ``number`` of a tokenizer.json; None if no token has this id."""
    for token in content.get("added_tokens", []):
        if token["id"] == number:
            return str(token["content"])
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    return next((text for text, i in pairs if i == number), None)


# Weights in shards, their index, config.json, and checksums.


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int) -> int:
    """Write ``tensors`` into one safetensors file, or several with an index. Return the bytes of the tensors.

    A shard is closed before the tensor that would exceed ``max_shard_bytes``. A larger tensor has its own shard.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = parameters = 0

    def close() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        tensor = tensor.to(dtype)
        if pending and size + tensor.nbytes > max_shard_bytes:
            close()
        pending[name] = tensor
        size, total, parameters = size + tensor.nbytes, total + tensor.nbytes, parameters + tensor.numel()
    close()
    names = [shard_name(i, len(shards)) for i in range(len(shards))]
    for i, name in enumerate(names):
        # The library creates files that only the owner can read. Use the permissions of the folder instead.
        (folder / f"{i}.part").chmod(folder.stat().st_mode & 0o666)
        (folder / f"{i}.part").rename(folder / name)
    if len(shards) > 1:
        where = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
    return total


def shard_name(index: int, count: int) -> str:
    """Return the name of a file of weights, as in transformers."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_configs(
    folder: Path,
    adapter: StateDictAdapter,
    config: ModelConfig,
    dtype: torch.dtype,
    eot: int | None,
    origin: dict[str, Any],
) -> None:
    """Write config.json and generation_config.json; ``eot`` is the id that ends a text."""
    # Written even if None, because the defaults are ids of another tokenizer.
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    described = {"architectures": [adapter.architecture], "model_type": adapter.name, **adapter.write_config(config)}
    name = str(dtype).removeprefix("torch.")
    extra = {"torch_dtype": name, "use_cache": True, "initializer_range": 0.02, "exported_from": origin}
    write_json(folder / "config.json", {**described, **special, **extra})
    write_json(folder / "generation_config.json", special)


def write_sums(folder: Path) -> None:
    """Write the sha256 of every file into SHA256SUMS, which ``sha256sum -c`` and ``init_from`` check."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sum_files(files).items()))


def write_torch_file(
    path: Path, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, origin: dict[str, Any]
) -> None:
    """Write a model and its config into one file of ``torch.save``, synced to disk."""
    contents = {
        "model_config": plain_model(config),
        "exported_from": origin,
        "model": {name: tensor.to(dtype) for name, tensor in state.items()},
    }
    with path.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
