"""One file of ``torch.save`` with a model in it: for who wants to load it with nothing but torch.

    file = torch.load("model.pt", weights_only=True)
    model = GPT(...)                                    # file["model_config"] has the values of ModelConfig
    model.load_state_dict(file["model"])

Owns the layout of that file. Tensors bear our names, so every model fits. ``init_from`` reads it back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.config import ModelConfig
from gpt.conversion.source import plain_model


def write_torch_file(
    path: Path, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, origin: dict[str, Any]
) -> None:
    """Write ``path``, synced to disk."""
    contents = {
        "model_config": plain_model(config),
        "exported_from": origin,
        "model": {name: tensor.to(dtype) for name, tensor in state.items()},
    }
    with path.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
