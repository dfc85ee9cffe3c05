"""Parts written by the user: classes that the config names. They are imported, checked and counted.

    model.norm=mypkg.norms:MyNorm         a class of a module that Python finds: installed, or in the current folder
    model.norm=dyt                        an entry point of the group gpt.norm

Imports no torch by itself. Importing a class of the user imports torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gpt.config.optim import OptimConfig
from launch.errors import ConfigError, closest

# Counts of a part of the user (parameters, FLOPs, memory), and its attribute ``parallel``.


KINDS_OF_PARALLELISM = {
    **dict.fromkeys(("norm", "ffn"), ("tp", "cp", "pp")),
    **dict.fromkeys(("position", "attention"), ("pp",)),
}
"""Values that a part may have in its attribute ``parallel``. Norms and feed-forward layers compute tokens one by one,
so each rank of tp and cp computes its own. Attention and positions would need the tokens of other ranks."""


@dataclass(frozen=True)
class PartCounts:
    """Shapes, FLOPs and bytes of one use of a part.

    Counts that grow with the tokens are for one sequence of ``block_size`` tokens.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name of a parameter within the part -> its shape."""
    flops: int = 0
    """FLOPs of a forward pass."""
    saved: dict[str, int] = field(default_factory=dict)
    """``fp32`` or ``half`` -> bytes of activations that the backward pass needs, including the part's input."""
    products: dict[str, int] = field(default_factory=dict)
    """``fp32`` or ``half`` -> bytes of the results of matrix products."""
    parallel: tuple[str, ...] = ()
    """Kinds of parallelism that the class declares to support."""
    on_heads: bool = False
    """True for positions that are applied to queries and keys, not to the embedding."""


NOTHING = PartCounts()


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state."""

    per_element: float
    """Bytes for each element of a matrix."""
    per_tensor: int
    """Bytes for each parameter, such as a count of steps."""


# Import of a part by its name, with a ConfigError if no class fits. Imports the user's module, and torch with it.
#
# B batch, T time, D width, H heads, C head width.


def load_part(key: str, name: str) -> Any:
    """Return the class of torch modules named ``name``, for the part ``key`` of a model.

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
    """Return the object named by ``module:attribute``, or by an entry point of the group ``gpt.<last word of key>``.

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
    """Return module and attribute of a name. A name without a colon is looked up as an entry point.

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
    """Return the error for a name whose module, or a module imported by it, is missing."""
    return ConfigError(
        f"{key}={name}, and there is no module {missing}",
        "a module that Python can import here and on the nodes",
        f"pip install -e FOLDER, or PYTHONPATH=FOLDER, where FOLDER holds {module.partition('.')[0]}",
    )


def kind_text(found: Any) -> str:
    """Describe an object for a message: ``the class NAME``, or ``a TYPE``."""
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"


def load_source(key: str, name: str) -> Any:
    """Return the function of a data source, which takes the config of the data and returns an iterator of documents.

    Raises:
        ConfigError: the function is missing.
    """
    found = load_object(key, name)
    if not callable(found):
        raise ConfigError(f"{key}={name}, which is {kind_text(found)}", "a function", f"{key}=MODULE:FUNCTION")
    return found


def source_digest(key: str, name: str) -> str:
    """Return the SHA-256 of the file of a user's module, without running it. Changed code makes another corpus.

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
    """Return the user's optimizer that ``config`` names, over parameter groups that have their weight decay.

    The constructor receives ``optim.options``, and lr, betas and eps of the config if it accepts them. A step that the
    run skips (see gpt.parallel.engine.skipping) does not reach the optimizer.

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
        """The user's optimizer, which skips a step if ``found_inf`` is set, as torch's fused optimizers do."""

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
