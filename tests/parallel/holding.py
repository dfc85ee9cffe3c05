"""What a rank holds for training, in bytes, asked of the tensors that its engine has made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpt.loss import autocast
from gpt.run import Run


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Parameters, gradients and optimizer state of this rank after a step."""
    parameters = list(run.engine.module.parameters())
    state = run.engine.optimizer.state  # type: ignore[attr-defined]
    moments = [tensor for of_parameter in state.values() for tensor in of_parameter.values()]
    return storages(parameters), storages(p.grad for p in parameters if p.grad is not None), storages(moments)


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of the storages under these tensors, each once; of a sharded one this rank's."""
    return sum({s.data_ptr(): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}.values())


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def saved_bytes(run: Run) -> int:
    """What autograd keeps of a forward pass over a micro-batch, the parameters and buffers of this rank not counted."""
    module = run.engine.module
    own = {local(t).untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other one takes its address
        return tensor

    alive: list[Tensor] = []
    tokens_BT = torch.zeros(run.batch.micro, run.config.model.block_size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(run.config, tokens_BT.device):
        module(tokens_BT)
    return sum(kept.values())
