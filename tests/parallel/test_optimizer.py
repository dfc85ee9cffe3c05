"""AdamW steps the shards of DTensors bit for bit as torch steps the DTensors, and plain parameters beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.parallel.engine import AdamW
from tests.support.distributed import run_distributed

SHAPES = {"rows": (6, 5), "uneven rows": (5, 3), "replica": (4,)}
OURS, TORCHS = AdamW, torch.optim.AdamW


class FusedSteps(TorchDispatchMode):
    """Counts the fused steps, and those among them that were given a DTensor."""

    made, on_dtensors = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation._schema.name.startswith("aten::_fused_adam"):
            self.made += 1
            self.on_dtensors += any(isinstance(tensor, DTensor) for tensor in tree_leaves((args, kwargs)))
        return operation(*args, **(kwargs or {}))


def steps(
    kind: type[torch.optim.AdamW], with_plain: bool, sum_is_due: bool = False
) -> tuple[dict[str, list[Tensor]], FusedSteps]:
    """Parameter and moments after three steps, by name, each whole."""
    mesh = init_device_mesh("cpu", (2,))
    drawn = torch.Generator().manual_seed(7)
    placements = {name: Replicate() if name == "replica" else Shard(0) for name in SHAPES}

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=drawn)
        return distribute_tensor(values, mesh, [placements[name]]) if name in placements else values

    shapes = SHAPES | ({"plain": (3, 3)} if with_plain else {})
    parameters = {name: nn.Parameter(draw(name, shape)) for name, shape in shapes.items()}
    optimizer = kind(parameters.values(), lr=0.01, weight_decay=0.1, fused=True)
    with FusedSteps() as seen:
        for _ in range(3):
            for name, parameter in parameters.items():
                parameter.grad = draw(name, shapes[name])
                if sum_is_due and name == "replica":  # one half is each rank's, and no bit is lost
                    half = 0.5 * parameter.grad.to_local()  # type: ignore[attr-defined]
                    parameter.grad = DTensor.from_local(half, mesh, [Partial()])
            optimizer.step()
    found = {}
    for name, parameter in parameters.items():
        tensors = [parameter, *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        assert [isinstance(tensor, DTensor) for tensor in tensors] == [name in placements] * 3
        found[name] = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return found, seen


def step_both(rank: int, size: int) -> None:
    theirs, seen_by_torch = steps(TORCHS, False)
    ours, seen = steps(OURS, False)
    assert (seen_by_torch.made, seen.made) == (seen_by_torch.on_dtensors, 3), "it is DTensors that torch steps"
    assert seen.on_dtensors == 0
    for name, tensors in theirs.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], tensors, strict=True)), name
    due, _ = steps(OURS, False, sum_is_due=True)
    assert all(torch.equal(a, b) for a, b in zip(due["replica"], theirs["replica"], strict=True))
    beside, seen = steps(OURS, True)
    assert (seen.made, seen.on_dtensors) == (3, 0), "one step for all"
    assert all(tensor.any() for tensor in beside["plain"])


def test_shards_are_stepped_as_torch_steps_dtensors() -> None:
    run_distributed(step_both, 2)
