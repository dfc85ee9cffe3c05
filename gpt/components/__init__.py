"""Classes and functions of the user, which the config names: their import, checks, and counts of parameters, FLOPs and
memory.

    model.norm=mypkg.norms:MyNorm         a class of a module that Python finds: installed, or in the current folder
    model.norm=dyt                        an entry point of the group gpt.norm

Imports no torch by itself. Torch is imported only when a class of the user is imported, or its parameters and FLOPs are
counted. A model of built-in parts has no such class.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gpt.config.model import CACHED, ModelConfig
from gpt.config.optim import ADAMW, MUON, SCHEDULE_FREE, OptimConfig
from launch.errors import ConfigError, closest

# Counts of a part of the user (parameters, FLOPs, memory), and its attribute ``parallel``.


KINDS_OF_PARALLELISM = {
    **dict.fromkeys(("norm", "ffn"), ("tp", "cp", "pp")),
    **dict.fromkeys(("position", "attention"), ("pp",)),
}
"""Part of the model -> values that the attribute ``parallel`` of a user's class may contain. Norms and feed-forward
layers compute each token alone, so each rank of tp and cp computes its own tokens. Attention and positions would need
the tokens of other ranks."""


@dataclass(frozen=True)
class PartCounts:
    """Shapes of parameters, FLOPs, and bytes of activations of one module of a user's class.

    FLOPs and bytes are those of one sequence of ``block_size`` tokens.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name of a parameter within the part -> its shape."""
    flops: int = 0
    """FLOPs of a forward pass."""
    saved: dict[str, int] = field(default_factory=dict)
    """Precision of matrix products, ``fp32`` or ``half`` (16 bits) -> bytes of the activations that the backward pass
    needs in this precision, including the input of the part."""
    products: dict[str, int] = field(default_factory=dict)
    """Precision of matrix products, ``fp32`` or ``half`` (16 bits) -> bytes of the results of these products. Selective
    recomputation keeps these results."""
    parallel: tuple[str, ...] = ()
    """Kinds of parallelism that the class states to support, such as ``tp``."""
    on_heads: bool = False
    """True for positions that are applied to queries and keys, not to the embedding."""


NOTHING = PartCounts()


@dataclass(frozen=True)
class StateBytes:
    """Size of an optimizer's state: a number of bytes for each element, and a number of bytes for each parameter."""

    per_element: float
    """Bytes for each element of a matrix."""
    per_tensor: int
    """Bytes for each parameter tensor, whatever its size: a count of steps."""


# Import of a part by its name, with a ConfigError if no class fits. Imports the user's module, and torch with it.
#
# B batch, T time, D width, H heads, C head width.


def load_part(key: str, name: str) -> Any:
    """Import and return the user's class ``name``, a subclass of torch.nn.Module. ``key`` is the key of the config that
    names the class, such as ``model.norm``.

    Raises:
        ConfigError: the class is missing, or is no torch module.
    """
    import torch

    found = load_object(key, name)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ConfigError(
            f"{key}={name}, which is {kind_text(found)}", "a subclass of torch.nn.Module", f"{key}=MODULE:CLASS"
        )
    return found


def load_object(key: str, name: str) -> Any:
    """Import and return the object ``name``: ``module:attribute``, or an entry point of the group ``gpt.<last word of
    key>``. ``key`` is the key of the config that names the object.

    Raises:
        ConfigError: the entry point, module or attribute is missing, or the import of the module fails.
    """
    module_name, attribute = split_name(key, name)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise missing_module(key, name, module_name, error.name) from error
        raise ConfigError(
            f"{key}={name}, and {module_name} fails: {type(error).__name__}: {error}",
            "a module that can be imported",
            f'the module repaired: python -c "import {module_name}"',
        ) from error
    for word in attribute.split("."):
        if not hasattr(found, word):
            likely = (closest(word, [known for known in vars(found) if not known.startswith("_")]) or ["CLASS"])[0]
            raise ConfigError(
                f"{key}={name}, and {module_name} has no {attribute}",
                "a name that the module has",
                f"{key}={module_name}:{likely}",
            )
        found = getattr(found, word)
    return found


def split_name(key: str, name: str) -> tuple[str, str]:
    """Return the names of the module and of the attribute to which ``name`` refers. ``name`` is ``module:attribute``,
    or the name of an entry point. ``key`` is the key of the config that has it. Nothing is imported.

    Raises:
        ConfigError: the name has no colon, and no installed package has an entry point of this name.
    """
    if ":" not in name:
        group = f"gpt.{key.rpartition('.')[2]}"
        there = entry_points(group=group)
        if name not in there.names:
            raise ConfigError(
                f"{key}={name}",
                f"a name of ours, package.module:Class, or an entry point of the group {group} "
                f"({', '.join(sorted(there.names)) or 'no installed package has one'})",
                f"{key}=PACKAGE.MODULE:CLASS",
            )
        name = there[name].value
    module, _, attribute = name.partition(":")
    return module, attribute


def missing_module(key: str, name: str, module: str, missing: str) -> ConfigError:
    """Return the error for an object of the user whose module cannot be imported.

    Args:
        key: key of the config that names the object.
        name: value of this key.
        module: name of the module that has the object.
        missing: name of the module that Python does not find: ``module`` itself, or a module that it imports.
    """
    return ConfigError(
        f"{key}={name}, and there is no module {missing}",
        "a module that Python can import here and on the nodes",
        f"pip install -e FOLDER, or PYTHONPATH=FOLDER, where FOLDER holds {module.partition('.')[0]}",
    )


def kind_text(found: Any) -> str:
    """Return text for messages: ``the class NAME`` for a class, ``a TYPE`` for any other object."""
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"


def load_source(key: str, name: str) -> Any:
    """Import and return the user's function ``name``, which takes a DataConfig and yields documents. ``key`` is the key
    of the config that names the function.

    Raises:
        ConfigError: the function cannot be imported, or is no function.
    """
    found = load_object(key, name)
    if not callable(found):
        raise ConfigError(f"{key}={name}, which is {kind_text(found)}", "a function", f"{key}=MODULE:FUNCTION")
    return found


def source_digest(key: str, name: str) -> str:
    """Return the SHA-256, in hexadecimal digits, of the source file of a user's object. ``name`` and ``key`` as in
    ``split_name``. The module of the object is not imported.

    Raises:
        ConfigError: the module is missing, or has no file.
    """
    module, _ = split_name(key, name)
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a parent package is missing
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise missing_module(key, name, module, module)
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def build_custom_optimizer(config: OptimConfig, groups: Any) -> Any:
    """Build and return the user's optimizer that ``config`` names.

    ``groups`` are torch's parameter groups, each with its ``weight_decay``.

    The constructor receives ``optim.options``, and lr, betas and eps of the config if it accepts them. A step that the
    run skips (see gpt.parallel.optimizer.skipping) does not reach the optimizer.

    Raises:
        ConfigError: the class is missing, is no optimizer of torch, or refuses its arguments.
    """
    import torch

    key, name = "optim.optimizer", config.optimizer
    found = load_object(key, name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"{key}={name}, which is {kind_text(found)}", "a subclass of torch.optim.Optimizer", f"{key}=MODULE:CLASS"
        )
    takes = inspect.signature(found).parameters
    ours = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    given = {argument: value for argument, value in ours.items() if argument in takes} | dict(config.options)

    class Skippable(found):  # type: ignore[valid-type, misc]
        """The user's optimizer, with a way to skip a step: ``step`` does nothing while the attribute ``found_inf`` is a
        tensor with a value other than 0. torch's fused optimizers have the same attribute."""

        def step(self, closure: Any = None) -> Any:
            skip = getattr(self, "found_inf", None)
            if skip is None:
                return super().step(closure)
            if skip.item():
                return None
            del self.found_inf  # torch's own unfused optimizers refuse this attribute
            try:
                return super().step(closure)
            finally:
                self.found_inf: Any = skip

    try:
        return Skippable(groups, **given)
    except (TypeError, ValueError) as error:
        options = ", ".join(argument for argument in takes if argument not in ("params", *ours))
        raise ConfigError(
            f"{key}={name} with {given}: {error}",
            f"arguments that it takes; optim.options may hold {options or 'none'}",
            f"'optim.options={{{(options or 'KEY').split(', ')[0]}: VALUE}}', or none",
        ) from error


# Counts of the parts. B batch, T time, D width, H heads, C head width.


@lru_cache(maxsize=CACHED)
def part_counts(model: ModelConfig) -> Mapping[str, PartCounts]:
    """Return shapes, FLOPs and bytes of the user's classes in a model, by part of the model.

    The possible keys are ``norm``, ``head_norm``, ``position``, ``attention`` and ``ffn``. The result has those keys
    whose part is a class of the user. ``head_norm`` has the FLOPs and bytes of the norms of queries and keys together,
    and the shapes of one norm.

    Raises:
        ConfigError: a class cannot be imported, does not take the arguments of its kind of part, or fails.
    """
    custom, hidden = model.custom_parts, (model.block_size, model.n_embd)
    heads = (model.block_size, model.n_head + model.kv_heads, model.head_dim)
    found: dict[str, PartCounts] = {}
    if "norm" in custom:
        found["norm"] = count_part(model, "norm", hidden, model.n_embd)
        if model.qk_norm and "attention" not in custom:
            found["head_norm"] = count_part(model, "norm", heads, model.head_dim)
    if name := custom.get("position"):
        on_heads = getattr(load_part("model.position", name), "on_heads", False)
        found["position"] = count_part(model, "position", heads if on_heads else hidden)
    return found | {key: count_part(model, key, hidden) for key in ("attention", "ffn") if key in custom}


def count_part(model: ModelConfig, key: str, shape: tuple[int, ...], *arguments: int) -> PartCounts:
    """Build the user's class for one part on the meta device, call it once, and return its shapes, FLOPs and bytes.

    A class may state its own numbers, which are then returned: ``forward_flops(config)`` returns the FLOPs of a forward
    pass, and ``saved_bytes(config, width)`` the bytes that are kept for the backward pass. ``width`` is the number of
    bytes of a number in matrix products: 2 or 4. Without ``forward_flops``, each element of a matrix counts two FLOPs a
    token. Without ``saved_bytes``, the backward pass is assumed to keep the input and twice the results of the
    matrices.

    Args:
        model: the config of the model.
        key: field of the config that names the part.
        shape: shape of the input for one sequence, without the batch dimension.
        arguments: arguments of the constructor after the config.

    Raises:
        ConfigError: the part cannot be built, changes the shape of its input, or cannot be sharded.
    """
    import torch

    name = model.custom_parts[key]
    kind = load_part(f"model.{key}", name)
    after = {"position": (0,), "attention": (None,)}.get(key, ())
    try:
        with torch.device("meta"), torch.no_grad():
            module = kind(model, *arguments)
            x = torch.empty(1, *shape)
            y = module(x, *after)
            if not isinstance(y, torch.Tensor) or y.shape != x.shape:
                raise ValueError(f"it gives {tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__}")
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"model.{key}={name} fails on a tensor of {('B', *shape)}: {type(error).__name__}: {error}",
            "a part that keeps the shape of its input, and whose operations do not look at values (.item(), .tolist())",
            "the class repaired; docs/components.md has one of each kind",
        ) from error
    check_state(f"model.{key}={name}", module)
    matrices = [parameter.shape for parameter in module.parameters() if parameter.dim() > 1]
    tokens, widths = model.block_size, {"fp32": 4, "half": 2}
    # The result of an attention kernel is as wide as the model.
    results = tokens * (sum(rows for rows, *_ in matrices) + model.n_embd * (key == "attention"))
    saved = {word: 4 * math.prod(shape) + 2 * width * results for word, width in widths.items()}
    if hasattr(kind, "saved_bytes"):
        share = math.prod(shape) / (tokens * model.n_embd) if key == "norm" else 1  # a norm of heads has another width
        saved = {word: math.ceil(share * kind.saved_bytes(model, width)) for word, width in widths.items()}
    stated = hasattr(kind, "forward_flops")
    return PartCounts(
        shapes={name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
        flops=int(kind.forward_flops(model)) if stated else 2 * tokens * sum(map(math.prod, matrices)),
        saved=saved,
        products={word: width * results for word, width in widths.items()},
        parallel=stated_parallelism(key, name, kind),
        on_heads=key == "position" and len(shape) == 3,
    )


def check_state(part: str, module: Any) -> None:
    """Raise ConfigError if a parameter of ``module`` is a scalar tensor, or if a buffer is not in the state dict and
    the class has no method ``reset_buffers``. ``part`` is ``KEY=NAME`` of the class, for messages."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"{part} has the parameter {scalars[0]} without a dimension",
            "parameters of at least one dimension, which FSDP can shard",
            f"self.{scalars[0]} = nn.Parameter(torch.empty(1))",
        )
    persistent = module.state_dict().keys()
    tables = [name for name, _ in module.named_buffers() if name not in persistent]
    if tables and not hasattr(module, "reset_buffers"):
        raise ConfigError(
            f"{part} has the buffer {tables[0]}, which no checkpoint holds, and no reset_buffers()",
            "a method that fills such buffers in place: models are built without memory first",
            "def reset_buffers(self), which computes them",
        )


def stated_parallelism(key: str, name: str, kind: Any) -> tuple[str, ...]:
    """Return the attribute ``parallel`` of a user's class ``kind``: the kinds of parallelism that the class supports;
    empty if it has no such attribute. ``key`` is the part of the model, and ``name`` the name of the class, for
    messages.

    Raises:
        ConfigError: the attribute has a kind of parallelism that is not possible for this part of the model
            (``KINDS_OF_PARALLELISM``).
    """
    stated, able = tuple(getattr(kind, "parallel", ())), KINDS_OF_PARALLELISM[key]
    if not set(stated) <= set(able):
        raise ConfigError(
            f"model.{key}={name} says parallel = {stated!r}",
            f"of {', '.join(able)} those that it can be computed under",
            f"parallel = {tuple(word for word in stated if word in able)!r}",
        )
    return stated


OWNERS = (
    ("attention", r"blocks\.\d+\.attention\.(.+)"),
    ("norm", r"(?:norm|blocks\.\d+\.(?:attention_norm|ffn_norm|attention\.query_norm|attention\.key_norm))\.(.+)"),
    ("position", r"(?:position|blocks\.\d+\.attention\.rope)\.(.+)"),
    ("ffn", r"blocks\.\d+\.ffn\.(.+)"),
)
"""Pairs: a part of the model, and a pattern for the names of its tensors. A tensor belongs to the first part that is a
class of the user and whose pattern matches. So norms and positions inside the user's attention belong to the
attention."""


def owner_of(name: str, model: ModelConfig) -> tuple[str, str] | None:
    """Return the user's class that has the tensor ``name`` of a model, as two texts: the field of the config, and the
    name of the tensor inside the class. None if the tensor belongs to a built-in part."""
    custom = model.custom_parts
    for key, pattern in OWNERS if custom else ():
        if key in custom and (found := re.fullmatch(pattern, name)):
            return key, found.group(1)
    return None


# State of an optimizer.


def optimizer_state(optim: OptimConfig) -> StateBytes:
    """Return the bytes of the state of the optimizer that ``optim`` names. The state of a user's optimizer is measured
    after one step.

    AdamW has two moments of each element, and a count of steps of each parameter. The result for Muon is that of the
    parameters that it leaves to AdamW. Schedule-free AdamW has one moment and the newest weights, and no count.

    Raises:
        ConfigError: the user's optimizer cannot be imported, refuses its arguments, or fails.
    """
    if optim.optimizer in (ADAMW, MUON, SCHEDULE_FREE):
        return StateBytes(8, 0 if optim.optimizer == SCHEDULE_FREE else 4)
    numbers = {key: value for key, value in asdict(optim).items() if not isinstance(value, Enum)}
    return _state_after_step(json.dumps(numbers, sort_keys=True))


@lru_cache(maxsize=16)
def _state_after_step(optim_json: str) -> StateBytes:
    import torch

    optim = OptimConfig(**json.loads(optim_json))
    matrix = torch.nn.Parameter(torch.zeros(64, 64))
    matrix.grad = torch.full_like(matrix, 1e-3)
    optimizer = build_custom_optimizer(optim, [{"params": [matrix], "weight_decay": optim.weight_decay}])
    try:
        optimizer.step()
    except Exception as error:  # raised by the user's class
        raise ConfigError(
            f"optim.optimizer={optim.optimizer} fails in a step over a matrix: {type(error).__name__}: {error}",
            "an optimizer that steps any parameters with gradients",
            "the class repaired; docs/components.md has an example",
        ) from error
    tensors = [value for value in optimizer.state[matrix].values() if torch.is_tensor(value)]
    whole = [tensor.nbytes for tensor in tensors if tensor.numel() >= matrix.numel()]
    return StateBytes(sum(whole) / matrix.numel(), sum(tensor.nbytes for tensor in tensors) - sum(whole))
