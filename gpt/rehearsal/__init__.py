"""Parts of a rehearsal: the findings about one rank, and the recorder that collects them.

A rehearsal runs the training steps of a rank on fake tensors, which have shapes but no values (``gpt.rehearse``).

``Recorder`` records the operations of torch in this process: collectives, places where the host waits for the device,
and the memory of tensors. It works on real tensors and on fake ones, so that the collectives of a rehearsal can be
compared with those of a real run.
"""

from __future__ import annotations

import sys
import sysconfig
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpt.model import layers
from gpt.parallel.distributed import World

# Findings about one rank.


class Collective(NamedTuple):
    """A call of a collective on one rank, or one side of a transfer between two ranks: a send or a receive."""

    operation: str
    """Name of the operation in torch: ``allreduce``, ``all_gather_into_tensor``, ``send``, ..."""
    group: str
    """Name of the group of ranks. It is the same on all ranks of the group."""
    dtype: str
    """Dtype of the tensors."""
    bytes: int
    """Number of bytes that the rank gives to a collective, or that it sends or receives in a transfer."""
    peer: int | None
    """Other rank of a transfer; None for a collective."""
    place: str
    """``file:line`` of the call."""
    batched: bool
    """True for a transfer in a batch (``batch_isend_irecv``)."""

    @property
    def content(self) -> tuple[str, str, int]:
        """The three values of a collective that must be the same on all ranks of a group: operation, dtype and
        bytes."""
        return self.operation, self.dtype, self.bytes

    def __str__(self) -> str:
        return f"{self.operation} of {self.bytes:,} bytes in {self.dtype} at {self.place}"


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks that communicate."""

    label: str
    """Axis of the mesh, or ``world`` for all ranks."""
    ranks: tuple[int, ...]
    """Numbers of the ranks."""


PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, REST = "parameters", "gradients", "optimizer", "activations", "rest"
PARTS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, REST)
"""Parts of a rank's memory. Activations are the tensors that autograd saves, without parameters; ``REST`` is all other
memory."""


@dataclass
class RankRehearsal:
    """Findings about one rank in the second step of its rehearsal. The object is sent between processes, so it has no
    tensors."""

    rank: int
    kind: str
    """Text on the place of the rank in the mesh."""
    memory: dict[str, int] = field(default_factory=dict)
    """Part of the memory (``PARTS``) -> bytes at the peak of the step."""
    largest: dict[str, int] = field(default_factory=dict)
    """Line of code (``file:line``) -> bytes that this line has allocated and that are in memory at the peak of the
    step. Only ``ACTIVATIONS`` and ``REST`` count."""
    collectives: list[Collective] = field(default_factory=list)
    """All collectives and transfers in order: of the set-up, of the first step, and of the second step."""
    in_step: int = 0
    """Index in ``collectives`` of the first one of the second step."""
    groups: dict[str, RankGroup] = field(default_factory=dict)
    """Name of a group -> the group, for all groups in ``collectives``."""
    waits: dict[str, int] = field(default_factory=dict)
    """Line of code where the host waits for the device in the step -> number of waits."""
    expected_waits: dict[str, int] = field(default_factory=dict)
    """As ``waits``, but for waits that cannot be avoided. An example is the wait for the number of rows of each expert,
    if experts have no ``capacity_factor``."""
    doubts: list[str] = field(default_factory=list)
    """Lines of text on findings that stop no step, but are seldom intended, such as a linear layer that is computed
    twice."""
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name of a part (parameters, gradients or optimizer state) -> dtype -> bytes of this part in this dtype."""

    @property
    def peak(self) -> int:
        """Bytes of the rank at the peak of the step."""
        return sum(self.memory.values())


# The line of our code, or of the user's, that called an operation.


LIBRARIES = (
    *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")),
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    "<",
)
"""Beginnings of the paths of files that do not count as code of this project or of the user: libraries, and the
rehearsal itself."""
ROOT = Path(__file__).parents[2]
HELPERS = (layers.linear.__code__, layers.Linear.forward.__code__, World.all_reduce.__code__)
"""Code objects of small functions. If one of these calls an operation of torch, the line of its caller is recorded
instead."""


@cache
def place_of(path: str) -> str | None:
    """Return the path of a source file, relative to this project if it is inside; None for the code of a library."""
    if path.startswith(LIBRARIES):
        return None
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


def calling_line() -> str:
    """Return ``file:line`` of the innermost caller that is code of this project or of the user; ``torch`` if there is
    none."""
    frame = sys._getframe(1)
    while frame is not None:
        place = place_of(frame.f_code.co_filename)
        if place is not None and frame.f_code not in HELPERS:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


# Memory: the storages that exist at each moment, found by the results of all operations.


@dataclass
class MemoryBlock:
    """Memory of one storage of tensors."""

    bytes: int
    born: int
    """Number of the operation that has allocated the storage."""
    place: str
    """``file:line`` of this operation."""
    kind: str = REST
    """Part of the memory to which the storage belongs, one of ``PARTS``."""
    died: float = float("inf")
    """Number of the last operation before the storage was freed; infinity while it is not freed."""
    storage: weakref.ref[torch.UntypedStorage] | None = None
    """Weak reference to the storage, whose callback sets ``died``; None before it is set."""


class MemoryRecord:
    """Record of the memory of all storages of tensors that torch's operations return. The overhead of an allocator does
    not count."""

    def __init__(self) -> None:
        self.now = 0
        """Number of operations that were recorded so far."""
        self._blocks: list[MemoryBlock] = []
        self._block_of: Any = WeakIdKeyDictionary()

    def add(self, results: Any) -> None:
        """Record the storages of the tensors in ``results``, which one operation has returned."""
        self.now += 1
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage not in self._block_of:
                    self._open(storage, calling_line(), REST)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Record that the size of ``storage`` has changed. FSDP frees gathered parameters by setting the size to 0."""
        before = self._block_of.get(storage)
        if before is not None:
            self.now += 1
            before.died = self.now
            self._open(storage, before.place, before.kind)

    def name(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Assign the memory of ``tensors`` to ``kind``, one of ``PARTS``, unless it was assigned to another part
        before."""
        for tensor in tensors:
            if tensor is not None:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                block = self._block_of.get(local.untyped_storage())
                if block is not None and block.kind == REST:
                    block.kind = kind

    def peak(self, since: int) -> dict[tuple[str, str], int]:
        """Return (part of the memory, ``file:line``) -> bytes, at the moment of the highest total after the operation
        with the number ``since``."""
        changes = []
        for block in self._blocks:
            if block.died > since:
                changes += [(max(block.born, since), 0, block.bytes), (block.died, 1, -block.bytes)]
        total, highest, moment = 0, 0, since
        for when, _, change in sorted(changes):  # at the same moment births come first: operands live until the end
            total += change
            if total > highest:
                highest, moment = total, int(when)
        found: Counter[tuple[str, str]] = Counter()
        for block in self._blocks:
            if block.born <= moment <= block.died and block.died > since:
                found[block.kind, block.place] += block.bytes
        return dict(found)

    def _open(self, storage: torch.UntypedStorage, place: str, kind: str) -> None:
        block = MemoryBlock(storage.nbytes(), self.now, place, kind)

        def end(_: object) -> None:
            block.died = min(block.died, self.now)

        block.storage = weakref.ref(storage, end)
        self._blocks.append(block)
        self._block_of[storage] = block


# Collectives, as operations of torch.distributed (c10d, functional, DTensor's).


COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
"""Namespaces of torch's operations that communicate."""


Call = tuple[dist.ProcessGroup, list[Tensor], int | None]
"""Communication of one rank: (group, tensors that this rank sends or receives, peer). The peer is the other rank of a
transfer, as its index in the group; None for a collective."""


def read_call(space: str, operation: str, args: Sequence[Any]) -> Call | None:
    """Return the group, the tensors and the peer of an operation that communicates, from its arguments ``args``; None
    for an operation without a group.

    ``space`` and ``operation`` are the namespace and the name of the operation. Operations of c10d take the group as an
    object, directly after their tensors. Other operations take the name of the group. If an operation takes results and
    inputs, the inputs come after the results, and the inputs are returned.
    """
    if space == "c10d":
        place = next(i for i, arg in enumerate(args) if isinstance(arg, torch.ScriptObject))
        group: Any = dist.ProcessGroup.unbox(args[place])
        given = args[place - 1]
    else:
        names = [arg for arg in args if isinstance(arg, str)]
        if not names:
            return None
        group = c10d._resolve_process_group(cast(Any, names[-1]))
        given = args[0]
    peer = int(args[2]) if operation in ("send", "recv_") else None
    return group, [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)], peer


HOST_READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")
"""Names of operations for whose result the host waits. ``item``, ``tolist`` and ``bool`` of a tensor call them."""
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default")
"""Names of matrix products."""


def in_backward() -> bool:
    """Return True inside of a backward pass, also while it recomputes activations."""
    return bool(torch._C._current_graph_task_id() != -1)


class Recorder(TorchDispatchMode):
    """Records collectives, waits, matrix products and memory. Use it through ``recording``, which also records batches
    of transfers and changes of the sizes of storages."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.groups: dict[str, RankGroup] = {}
        """``Collective.group`` -> the group."""
        self.waits: Counter[str] = Counter()
        """``file:line`` where the host waits for the device -> number of times."""
        self.products: Counter[tuple[torch.dtype, str]] = Counter()
        """(dtype, ``file:line``) of matrix products in forward passes -> number of elements of their results."""
        self.linear: Counter[int] = Counter()
        """``id`` of a parameter -> number of linear layers in forward passes that have used it."""
        self.linear_at: dict[int, str] = {}
        """``id`` of a parameter -> ``file:line`` of the last linear layer in a forward pass that has used it."""
        self.memory = MemoryRecord()
        self.batch_at: str | None = None
        """``file:line`` of the batch of transfers that is being issued; None outside of a batch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls operations on shards, which come here
        name = str(func)
        space, operation, *_ = name.split(".")
        call = read_call(space, operation, args) if space in COLLECTIVES else None
        if call is not None:
            self._note(operation, *call)
        if name in HOST_READS and isinstance(args[0], FakeTensor):  # not meshes, which are on the host
            self.waits[calling_line()] += 1
            if name == HOST_READS[0]:
                return 1.0 if args[0].dtype.is_floating_point else 1  # in place of the unknown value
        results = func(*args, **(kwargs or {}))
        if name in PRODUCTS and not in_backward():
            self.products[args[0].dtype, calling_line()] += results.numel()
        self.memory.add(results)
        return results

    def _note(self, operation: str, group: dist.ProcessGroup, tensors: list[Tensor], peer: int | None) -> None:
        self.collectives.append(
            Collective(
                operation=operation.strip("_"),
                group=self._group_name(group),
                dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
                bytes=sum(t.numel() * t.element_size() for t in tensors),
                peer=None if peer is None else dist.get_global_rank(group, peer),
                place=self.batch_at or calling_line(),
                batched=self.batch_at is not None,
            )
        )

    def _group_name(self, group: dist.ProcessGroup) -> str:
        ranks = tuple(dist.get_process_group_ranks(group))
        label = group.group_desc.removeprefix("mesh_")
        label = "world" if label == "default_pg" else label
        name = f"{label}#{zlib.crc32(repr(ranks).encode()):08x}"
        self.groups[name] = RankGroup(label, ranks)
        return name


class Calls(TorchFunctionMode):
    """Context that records copies to the host, and the parameters of linear layers, in a ``Recorder``.

    In a rehearsal all tensors are on a CPU, so torch makes no operation for a copy to the host. So this class records
    the calls that would copy on a GPU, and for which the host would wait: ``cpu()``, ``numpy()``, ``to("cpu")``, and
    the text of a tensor, as in ``print(loss)``.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_copy = func in (Tensor.cpu, Tensor.numpy, Tensor.__repr__)
        is_copy |= func is Tensor.to and "cpu" in (*args[1:2], kwargs.get("device")) and not kwargs.get("non_blocking")
        if is_copy:
            self._recorder.waits[calling_line()] += 1
        if func is linear and not in_backward():
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if isinstance(weight, nn.Parameter):  # another tensor may get the id of a former one
                self._recorder.linear[id(weight)] += 1
                self._recorder.linear_at[id(weight)] = calling_line()
        return func(*args, **kwargs)


@contextmanager
def recording(recorder: Recorder, copies: bool = False) -> Iterator[None]:
    """Return a context in which operations are recorded in ``recorder``, with batches of transfers and changes of the
    sizes of storages.

    If ``copies`` is True, copies to the host count as waits, and linear layers are counted. If it is False, neither is
    recorded.
    """
    batch, resize = dist.batch_isend_irecv, torch.UntypedStorage.resize_

    def recorded_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        recorder.batch_at = calling_line()
        try:
            return batch(operations)
        finally:
            recorder.batch_at = None

    def recorded_resize(storage: torch.UntypedStorage, size: int) -> Any:
        resized = resize(storage, size)
        recorder.memory.resize(storage)
        return resized

    dist.batch_isend_irecv, torch.UntypedStorage.resize_ = recorded_batch, recorded_resize  # type: ignore
    try:
        with recorder, Calls(recorder) if copies else nullcontext():
            yield
    finally:
        dist.batch_isend_irecv, torch.UntypedStorage.resize_ = batch, resize  # type: ignore
