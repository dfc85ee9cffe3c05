"""The tensors of a checkpoint, read by torch's own converter rather than by our code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def read_weights(run: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer of the checkpoint of a step, flattened."""
    file = scratch / "whole.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step_{step:08d}", file)
    flat: dict[str, torch.Tensor] = {}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{prefix}/{key}")

    walk(torch.load(file, weights_only=False), "")
    return flat


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys() and len(one) > 10
    return [name for name in one if not torch.equal(one[name], other[name])]
