"""The index of a state's tensors as JSON: which there are, of which shape, and in which chunks.

torch.distributed.checkpoint writes its index as a pickle, whose reading can run code; what comes over a network must
not. Must not know where the bytes of a tensor are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)


def encode_index(metadata: Metadata) -> dict[str, Any]:
    """Turn an index into plain JSON; None stands for what is no tensor."""
    return {
        name: None
        if isinstance(entry, BytesStorageMetadata)
        else [
            str(entry.properties.dtype).removeprefix("torch."),
            list(entry.size),
            [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks],
        ]
        for name, entry in metadata.state_dict_metadata.items()
    }


def decode_index(plain: dict[str, Any]) -> Metadata:
    """Turn back what ``encode_index`` made, without the places of the bytes.

    Raises:
        ValueError: it names a type of tensors that there is not.
    """
    return Metadata({name: _decode_entry(entry) for name, entry in plain.items()})


def _decode_entry(entry: list[Any] | None) -> TensorStorageMetadata | BytesStorageMetadata:
    if entry is None:
        return BytesStorageMetadata()
    name, size, chunks = entry
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    found = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), found)
