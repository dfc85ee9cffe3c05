"""What a piece of training does on a rank: operations, waits for the device, and the bytes that it holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpt.model.loss import autocast
from gpt.training.run import Run

READ_ON_HOST = (
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.equal.default",
)
"""Operations whose result the host needs to go on, for its value or for the shape."""


class Operations(TorchDispatchMode):
    """Records the operations that ``is_one`` says are of interest, by name."""

    def __init__(self, is_one: Callable[[str, Sequence[Any], Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.is_one = is_one
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_one(str(func), args, kwargs):
            self.found.append(str(func))
        return func(*args, **kwargs)


def makes_the_host_wait(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for an operation after which the host has waited for the device: CUDA copies pageable memory so as well."""
    if name == "aten._to_copy.default" and kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type
        return there != args[0].device.type and not kwargs.get("non_blocking")
    if name == "aten.copy_.default":
        return args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
    return name in READ_ON_HOST and kwargs.get("output_size") is None


def host_waits(call: Callable[[torch.device], object]) -> list[str]:
    """Run ``call`` with a GPU that is not there (its tensors have shapes but no values); the waits of the host."""
    with FakeTensorMode(allow_non_fake_inputs=True), Operations(makes_the_host_wait) as seen:
        call(torch.device("cuda:0"))
    return seen.found


def elements_of(*values: Any) -> int:
    """Elements of the largest tensor among arguments or results."""
    return max((x.numel() for x in tree_leaves(values) if isinstance(x, Tensor)), default=0)


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Parameters, gradients and optimizer state of this rank, after a step and another backward pass."""
    ds = getattr(run.engine, "ds", None)
    parameters = list(run.engine.module.parameters())
    gradients: list[int] = []
    tokens_BT = torch.zeros(run.batch.per_rank, run.config.model.block_size, dtype=torch.long)
    run.engine.backward(tokens_BT, tokens_BT, lambda: gradients.append(whole_gradients(parameters)))
    if ds is None:
        state = run.engine.optimizer.state  # type: ignore[attr-defined]
        stepped = run.engine.trained.parameters()  # type: ignore[attr-defined]
        return storages(parameters), whole_gradients(stepped), storages(tensors_of(state))
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


class Alive(TorchDispatchMode):
    """The storages that operations have made, for as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                self.storages[local(tensor).untyped_storage()] = None
        return made


def living_bytes(run: Run) -> int:
    """Bytes that are left after a forward pass over a micro-batch, beside parameters and buffers.

    That is what its backward pass needs, whether autograd or selective recomputation keeps it, and the logits.
    """
    module, alive = run.engine.module, Alive()
    own = {local(t).untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    tokens_BT = torch.arange(run.config.model.block_size).repeat(run.batch.micro, 1)
    with alive, autocast(run.config, tokens_BT.device):
        given = run.engine.local_tokens(tokens_BT) if hasattr(run.engine, "local_tokens") else tokens_BT
        logits_BTV = module(given)
    assert logits_BTV.requires_grad
    gc.collect()
    return sum(s.nbytes() for s in alive.storages if s.data_ptr() not in own)
