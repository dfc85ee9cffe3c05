"""A small model under DDP or FSDP2, trained for real, and its state as comparable text. Used by ranks in the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WIDTH = 10  # not a multiple of 4: the last rank's shard is smaller


class Trained:
    """A model and AdamW on ``dist``'s default group; another seed gives other weights."""

    def __init__(self, strategy: str, seed: int, lr: float = 0.01) -> None:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
        model: nn.Module = layers
        if strategy == "ddp":
            model = DistributedDataParallel(layers)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (layers[0], layers[3], layers):
                fully_shard(part, mesh=mesh)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(self, number: int) -> None:
        """One update on data that only the step's number decides."""
        data = torch.Generator().manual_seed(number)
        self.model(torch.randn(4, WIDTH, generator=data)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """The state dict that a checkpoint takes."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def take(self, state: dict[str, Any]) -> None:
        """Put a loaded state dict into model and optimizer."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def digests(self) -> dict[str, str]:
        """Name to digest of every whole tensor and every number of the state, the same however it is sharded."""
        return dict(_digests("", self.state()))


def _digests(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _digests(f"{name}/{key}", value[key])
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _digests(f"{name}/{number}", entry)
    elif isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        yield name, f"{tuple(whole.shape)} {hashlib.sha256(whole.detach().numpy().tobytes()).hexdigest()}"
    else:
        yield name, repr(value)
