"""Writer of a folder that transformers loads: weights in shards, their index, config.json, and checksums.

Owns the files and their names, and the one torch file. Must not know where the model comes from, nor when a folder is
complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt.config import ModelConfig
from gpt.conversion.adapter import StateDictAdapter
from gpt.conversion.inspect import INDEX, SINGLE
from gpt.conversion.source import plain_model
from gpt.conversion.state_dict import SUMS, sum_files


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int) -> int:
    """Write ``tensors`` into one safetensors file, or several with an index; returns the bytes they take.

    A shard is closed before the tensor that would exceed ``max_shard_bytes``; a larger tensor has a shard of its own.
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
        # The library writes for nobody but the owner; who may read the folder may read what is in it.
        (folder / f"{i}.part").chmod(folder.stat().st_mode & 0o666)
        (folder / f"{i}.part").rename(folder / name)
    if len(shards) > 1:
        where = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
    return total


def shard_name(index: int, count: int) -> str:
    """Name of a file of weights, as transformers gives it."""
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
    # Said also where there are none: the defaults are ids of somebody else's tokenizer.
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    described = {"architectures": [adapter.architecture], "model_type": adapter.name, **adapter.write_config(config)}
    name = str(dtype).removeprefix("torch.")
    extra = {"torch_dtype": name, "use_cache": True, "initializer_range": 0.02, "exported_from": origin}
    write_json(folder / "config.json", {**described, **special, **extra})
    write_json(folder / "generation_config.json", special)


def write_sums(folder: Path) -> None:
    """Write the sha256 of every file into SHA256SUMS, which ``sha256sum -c`` checks, and ``init_from``, too."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sum_files(files).items()))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_torch_file(
    path: Path, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, origin: dict[str, Any]
) -> None:
    """Write a model into one file of ``torch.save``, synced to disk, with the config it is rebuilt from."""
    contents = {
        "model_config": plain_model(config),
        "exported_from": origin,
        "model": {name: tensor.to(dtype) for name, tensor in state.items()},
    }
    with path.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
