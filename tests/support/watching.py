"""Modes that watch what a piece of training asks of the device and of other ranks, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
