"""What a rank holds for training, in bytes, asked of the tensors that its engine has made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpt.loss import autocast
from gpt.run import Run


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Parameters, gradients and optimizer state of this rank, after a step and another backward pass."""
    ds = getattr(run.engine, "ds", None)
    parameters = list(run.engine.module.parameters())
    gradients: list[int] = []
    tokens_BT = torch.zeros(run.batch.per_rank, run.config.model.block_size, dtype=torch.long)
    run.engine.backward(tokens_BT, tokens_BT, lambda: gradients.append(whole_gradients(parameters)))
    if ds is None:
        state = run.engine.optimizer.state  # type: ignore[attr-defined]
        return storages(parameters), whole_gradients(parameters), storages(tensors_of(state))
    weights, reduced, optimizer = held_by_deepspeed(ds, parameters)
    return weights, max(reduced + whole_gradients(parameters), *gradients), optimizer


def held_by_deepspeed(ds: Any, parameters: list[Any]) -> tuple[int, int, int]:
    """Weights, gradients beside those of the parameters, and optimizer state with masters."""
    zero, stage = ds.optimizer, ds.zero_optimization_stage()
    cut_weights = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    weights = storages(p.data for p in parameters) + storages(cut_weights)
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    masters = [tensor for name in names for tensor in tensors_of(getattr(zero, name, []))] if stage else []
    flat = [tensor.grad for tensor in masters if tensor.grad is not None]
    cut = tensors_of(getattr(zero, "averaged_gradients", {}))
    reduced = storages(flat) or sum(tensor.numel() * tensor.element_size() for tensor in cut)
    return weights, reduced, storages([*masters, *tensors_of(ds.basic_optimizer.state)])


def whole_gradients(parameters: Iterable[Any]) -> int:
    """Bytes of the gradients that the parameters have."""
    return storages(p.grad for p in parameters if p.grad is not None)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists and dictionaries."""
    if torch.is_tensor(value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in tensors_of(part)]


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
        module(run.engine.own(tokens_BT))  # type: ignore[attr-defined]  # of engines that share sequences
    return sum(kept.values())
