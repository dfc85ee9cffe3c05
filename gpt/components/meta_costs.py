"""Measurement of the user's parts on tensors without memory: parameters, FLOPs, and bytes for a backward pass.

B batch, T time, D width, H heads, C head width. The parts are built on the meta device, as in training. They run on
fake tensors, which have only shapes and dtypes: no memory and no arithmetic, for any size of the model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gpt.components import KINDS_OF_PARALLELISM, PartCounts, StateBytes, build_custom_optimizer, load_part
from gpt.config.model import ModelConfig
from gpt.config.optim import OptimConfig
from launch.errors import ConfigError


@dataclass(frozen=True)
class Use:
    """Arguments and input shape with which the model uses a part."""

    key: str
    name: str
    arguments: tuple[int, ...]
    """Arguments of the constructor after the config."""
    shape: tuple[int, ...]
    """Shape of the input of one sequence, without B."""
    extra: tuple[Any, ...] = ()
    """Arguments of ``forward`` after the input."""


def answer(request: str) -> dict[str, Any]:
    """Measure the parts of a model or an optimizer that a request in JSON names. Return the answer as JSON values.

    Raises:
        ConfigError: a part cannot be used.
    """
    asked = json.loads(request)
    if "optim" in asked:
        optim = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), asked["optim"]))
        assert isinstance(optim, OptimConfig)
        return asdict(count_optimizer(optim))
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), asked["model"]))
    assert isinstance(model, ModelConfig)
    return {name: asdict(count_part(model, use)) for name, use in uses(model).items()}


def count_optimizer(optim: OptimConfig) -> StateBytes:
    """Measure the state of an optimizer by a step on two small matrices.

    Raises:
        ConfigError: the optimizer cannot be constructed, or its step fails.
    """
    matrices = [nn.Parameter(torch.zeros(64 * rows, 64)) for rows in (1, 2)]
    for matrix in matrices:
        matrix.grad = torch.full_like(matrix, 1e-3)
    optimizer = build_custom_optimizer(optim, [{"params": matrices, "weight_decay": optim.weight_decay}])
    try:
        optimizer.step()
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"optim.optimizer={optim.optimizer} fails in a step over two matrices: {type(error).__name__}: {error}",
            "an optimizer that steps any parameters with gradients",
            "the class repaired; docs/components.md has an example",
        ) from error
    small, large = (
        sum(value.nbytes for value in optimizer.state[matrix].values() if torch.is_tensor(value)) for matrix in matrices
    )
    slope = (large - small) / (matrices[1].numel() - matrices[0].numel())
    return StateBytes(slope, round(small - slope * matrices[0].numel()))


def uses(model: ModelConfig) -> dict[str, Use]:
    """Return how the model uses each part of the user, by the keys of ``facts.part_counts``."""
    custom, hidden = model.custom_parts, (model.block_size, model.n_embd)
    heads = (model.block_size, model.n_head + model.kv_heads, model.head_dim)
    found: dict[str, Use] = {}
    if name := custom.get("norm"):
        found["norm"] = Use("norm", name, (model.n_embd,), hidden)
        if model.qk_norm and "attention" not in custom:
            found["head_norm"] = Use("norm", name, (model.head_dim,), heads)
    if name := custom.get("position"):
        on_heads = getattr(load_part("model.position", name), "on_heads", False)
        found["position"] = Use("position", name, (), heads if on_heads else hidden, (0,))
    if name := custom.get("attention"):
        found["attention"] = Use("attention", name, (), hidden, (None,))
    if name := custom.get("ffn"):
        found["ffn"] = Use("ffn", name, (), hidden)
    return found


def count_part(model: ModelConfig, use: Use) -> PartCounts:
    """Measure one part.

    Raises:
        ConfigError: the part cannot be built on the meta device, run, or sharded.
    """
    kind = load_part(f"model.{use.key}", use.name)

    def make() -> nn.Module:
        module: nn.Module = kind(model, *use.arguments)
        return module

    with explained(use, "is built on the meta device"), torch.device("meta"):
        module = make()
    check_state(use, module)
    with explained(use, f"is given a tensor of {('B', *use.shape)}"):
        one, two = ([run(make, use, sequences, half) for half in (False, True)] for sequences in (1, 2))
    # Two sequences minus one: casts of weights, counted elsewhere, do not grow with the tokens.
    saved, products = ([after[i] - before[i] for before, after in zip(one, two, strict=True)] for i in (1, 2))
    given = getattr(kind, "forward_flops", None)
    return PartCounts(
        shapes={name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
        flops=one[0][0] if given is None else int(given(model)),
        saved=dict(zip(("fp32", "half"), saved, strict=True)),
        fixed=one[0][1] - saved[0],  # in fp32 nothing is cast
        products=dict(zip(("fp32", "half"), products, strict=True)),
        parallel=stated_parallelism(use, kind),
        on_heads=use.key == "position" and len(use.shape) == 3,
    )


def run(make: Callable[[], nn.Module], use: Use, sequences: int, half: bool) -> tuple[int, int, int]:
    """Run a part forward on fake tensors of ``sequences`` sequences, with ``half`` in bf16.

    Return FLOPs, bytes saved for the backward pass, and bytes of the results of matrix products.

    Raises:
        ValueError: the result has another shape than the input.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        module = make()
        x = torch.empty(sequences, *use.shape, requires_grad=True)
        weights = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
        counter, products = FlopCounterMode(display=False), ProductBytes()
        autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
        with counter, products, autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x, *use.extra)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise ValueError(f"it gives {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__} instead")
        return (
            counter.get_total_flops(),
            sum(size for storage, size in saved.items() if storage not in weights),
            products.bytes,
        )


class ProductBytes(TorchDispatchMode):
    """Sum of the bytes of the results of all operations that have FLOPs: matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            results = out if isinstance(out, tuple | list) else (out,)
            self.bytes += sum(r.numel() * r.element_size() for r in results if isinstance(r, Tensor))
        return out


@contextmanager
def explained(use: Use, when: str) -> Iterator[None]:
    """Turn every exception of a part into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"model.{use.key}={use.name} fails when it {when}: {type(error).__name__}: {error}",
            "a part that keeps the shape of its input, and whose operations do not look at values (.item(), .tolist())",
            "the class repaired; docs/components.md has one of each kind",
        ) from error


def check_state(use: Use, module: nn.Module) -> None:
    """Raise ConfigError for parameters without dimension, and for unsaved buffers without ``reset_buffers``."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"model.{use.key}={use.name} has the parameter {scalars[0]} without a dimension",
            "parameters of at least one dimension, which FSDP can shard",
            f"self.{scalars[0]} = nn.Parameter(torch.empty(1))",
        )
    persistent = module.state_dict().keys()
    tables = [name for name, _ in module.named_buffers() if name not in persistent]
    if tables and not hasattr(module, "reset_buffers"):
        raise ConfigError(
            f"model.{use.key}={use.name} has the buffer {tables[0]}, which no checkpoint holds, and no reset_buffers()",
            "a method that fills such buffers in place: models are built without memory first",
            "def reset_buffers(self), which computes them",
        )


def stated_parallelism(use: Use, kind: Any) -> tuple[str, ...]:
    """Read the class attribute ``parallel``: the kinds of parallelism that a part supports.

    Raises:
        ConfigError: the attribute has a value that parts of its kind cannot have.
    """
    stated, able = tuple(getattr(kind, "parallel", ())), KINDS_OF_PARALLELISM[use.key]
    wrong = [word for word in stated if word not in able]
    if wrong:
        raise ConfigError(
            f"model.{use.key}={use.name} says parallel = {stated!r}",
            f"of {', '.join(able)} those that it can be computed under",
            f"parallel = {tuple(word for word in stated if word in able)!r}",
        )
    return stated


def main() -> int:
    """Read the request of ``answer`` from standard input. Print its result as the last line of standard output.

    Prints the refusal instead if a part cannot be used. Returns 0 in both cases.
    """
    try:
        told = answer(sys.stdin.read())
    except ConfigError as error:
        told = {"refused": [error.found, error.expected, error.fix]}
    print("\n" + json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
