"""Messages between ranks as JSON in tensors, and calls that fail on all ranks if they fail on one."""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launch.errors import ConfigError

# Values that ranks send each other, as JSON in tensors: reading a value from the network runs no code.
#
# torch's own collectives of objects unpickle received bytes. An attacker between two ranks could turn these into any
# program.


PACKAGES = ("gpt", "launch")
"""Packages whose dataclasses and enums can be sent."""


def all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks of a gloo group, in the order of ranks, on every rank. Collective.

    Raises:
        TypeError: the value has a type that cannot be sent; raised before any message.
    """
    return [decode_value(message) for message in gather_bytes(encode_value(value), group)]


def broadcast(message: bytes, group: dist.ProcessGroup | None) -> bytes:
    """Return the ``message`` of rank 0 on all ranks of a gloo group. The argument of other ranks is ignored.
    Collective."""
    size = torch.tensor(len(message))
    dist.broadcast(size, src=0, group=group)
    sent = as_tensor(message.ljust(int(size), b" ")[: int(size)])
    dist.broadcast(sent, src=0, group=group)
    return sent.numpy().tobytes()


def gather_bytes(message: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """Return the messages of all ranks of a gloo group, in the order of ranks, on every rank. Collective. The
    messages may differ in length."""
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor(len(message)), group=group)
    longest = max(int(size) for size in sizes)
    received = [torch.empty(longest, dtype=torch.uint8) for _ in range(ranks)]
    dist.all_gather(received, as_tensor(message.ljust(longest, b" ")), group=group)
    return [padded[: int(size)].numpy().tobytes() for padded, size in zip(received, sizes, strict=True)]


def as_tensor(message: bytes) -> torch.Tensor:
    """Return a new uint8 tensor with the bytes of a message, (N,)."""
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def encode_value(value: Any) -> bytes:
    """Return a value as JSON bytes, for ``decode_value``.

    Raises:
        TypeError: the value, or a value inside it, has a type that cannot be sent.
    """
    return json.dumps(to_plain(value)).encode()


def decode_value(message: bytes) -> Any:
    """Return the value that was passed to ``encode_value``, with the same types.

    Raises:
        ValueError: ``message`` is no result of ``encode_value``.
    """
    return from_plain(json.loads(message))


def to_plain(value: Any) -> Any:
    """Return a value as JSON types. Numbers, texts, lists and None stay. A value of another type becomes a dictionary
    of one entry: a kind of ``KINDS`` -> the content.

    Raises:
        TypeError: the value, or a value inside it, has a type that cannot be sent.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_plain(entry) for entry in value]
    for kind, (cls, write, _) in KINDS.items():
        if type(value) is cls or (cls is not tuple and isinstance(value, cls)):  # no NamedTuple becomes a plain tuple
            return {kind: to_plain(write(value))}
    raise AssertionError("the last kind takes or refuses every value")


def from_plain(plain: Any) -> Any:
    """Return the value that was passed to ``to_plain``, from its result. Raise ValueError if a kind is unknown."""
    if isinstance(plain, list):
        return [from_plain(entry) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of value that ranks send")
    return KINDS[kind][2](from_plain(content))


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype with a name such as ``float32``. Raise ValueError if there is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return found


def write_tensor(tensor: torch.Tensor) -> list[Any]:
    """Return a tensor as ``[dtype, shape, bytes in base64]``."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(content).decode()]


def read_tensor(content: list[Any]) -> torch.Tensor:
    """Return the tensor that ``write_tensor`` has encoded, on the CPU. Raise ValueError if the dtype is unknown."""
    name, shape, data = content
    found = dtype_of(name)
    flat = as_tensor(base64.b64decode(data)).view(found) if data else torch.empty(0, dtype=found)
    return flat.reshape(shape)


def write_dataclass(value: Any) -> list[Any]:
    """Return an instance of a dataclass as ``[class, [[field, value], ...]]``. Raise TypeError for any other value."""
    name = name_of(value)
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{name} cannot be sent to other ranks")
    return [name, [[field.name, getattr(value, field.name)] for field in dataclasses.fields(value) if field.init]]


def name_of(value: Any) -> str:
    """Return the class of a value as ``module:class``. Raise TypeError if the class is not of this project."""
    cls = type(value)
    if cls.__module__.split(".")[0] not in PACKAGES:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} cannot be sent to other ranks")
    return f"{cls.__module__}:{cls.__name__}"


def find_class(name: str, is_right: Callable[[type], bool]) -> Any:
    """Return the class of this project with the name ``module:class``, if ``is_right`` returns True for it.

    Raises:
        ValueError: this project has no class of this name and kind.
    """
    module, _, own = name.partition(":")
    if module.split(".")[0] in PACKAGES:
        found = getattr(importlib.import_module(module), own, None)
        if isinstance(found, type) and is_right(found):
            return found
    raise ValueError(f"{name!r} is no dataclass or enum of {' or '.join(PACKAGES)}")


KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "set": (set, sorted, set),
    "dict": (dict, lambda value: [[key, entry] for key, entry in value.items()], dict),
    "path": (Path, str, Path),
    "tensor": (torch.Tensor, write_tensor, read_tensor),
    "refusal": (ConfigError, lambda error: [error.found, error.expected, error.fix], lambda texts: ConfigError(*texts)),
    "enum": (
        enum.Enum,
        lambda value: [name_of(value), value.name],
        lambda content: find_class(content[0], lambda cls: issubclass(cls, enum.Enum))[content[1]],
    ),
    "dataclass": (
        object,
        write_dataclass,
        lambda content: find_class(content[0], dataclasses.is_dataclass)(**dict(content[1])),
    ),
}
"""Kind of a value -> its class, and the functions that turn a value into a simpler one and back."""


# Collectives that succeed or fail on all ranks alike: a failure of one rank is raised on every rank, so no rank waits.


T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A save or a load failed on at least one rank. It is raised on every rank, with the error of the lowest rank that
    failed."""


def run_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Call ``action`` on every rank. Return the results of all ranks, in the order of ranks, on every rank. Collective.

    Args:
        action: a function whose result ``encode_value`` accepts.
        group: gloo group of the ranks; None means the default group.

    Raises:
        CheckpointError: ``action`` failed on some rank; raised on every rank.
    """
    cause: BaseException | None = None
    try:
        outcome = encode_value((action(), None))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is a BaseException
        outcome, cause = encode_value((None, explain(error))), error
    outcomes = [decode_value(message) for message in gather_bytes(outcome, group)]
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise CheckpointError(f"rank {rank}: {failure}") from cause
    return [result for result, _ in outcomes]


def run_on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Call ``action`` on rank 0 only, and return its result on every rank. Collective.

    Raises:
        CheckpointError: ``action`` failed; raised on every rank.
    """
    first = dist.get_rank(group) == 0
    results: list[T | None] = run_on_all_ranks(lambda: action() if first else None, group)
    return results[0]  # type: ignore[return-value]


def first_failure(own: str | None, group: dist.ProcessGroup | None) -> str:
    """Return ``rank N: ERROR`` for the lowest rank that has failed, on every rank. Collective.

    Call this only if at least one rank has failed.

    Args:
        own: error of this rank as text; None if this rank has not failed.
        group: gloo group of the ranks.
    """
    return next(f"rank {rank}: {text}" for rank, text in enumerate(all_gather(own, group)) if text is not None)


def explain(error: BaseException) -> str:
    """Return an error as text: one line with its type and message, an empty line, and the traceback."""
    cause = error
    # DCP wraps the errors of all ranks; the first error's own line says more than the wrapper's.
    if isinstance(error, CheckpointException) and error.failures:
        cause = error.failures[min(error.failures)][0]
    line = "".join(traceback.format_exception_only(type(cause), cause)).strip()
    return f"{line}\n\n{''.join(traceback.format_exception(error))}"
