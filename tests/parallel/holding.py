"""What a rank holds for training, in bytes, asked of the tensors that its engine has made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gpt.run import Run


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Parameters, gradients and optimizer state of this rank after a step."""
    parameters = list(run.engine.module.parameters())
    state = run.engine.optimizer.state  # type: ignore[attr-defined]
    moments = [tensor for of_parameter in state.values() for tensor in of_parameter.values()]
    return storages(parameters), storages(p.grad for p in parameters if p.grad is not None), storages(moments)


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of the storages under these tensors, each once; of a sharded one this rank's."""
    local: Iterable[Tensor] = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())
