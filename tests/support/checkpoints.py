"""For tests of checkpoints: a small model that is trained, states compared, and disk calls that fail."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt.checkpoint import Saved, final_for
from gpt.checkpoint.manager import CheckpointManager


class Checkpoints(CheckpointManager):
    """The checkpoints of a run, with a save that is waited for."""

    def save(
        self,
        step: int,
        state: Any,
        rank_state: dict[str, Any],
        meta: dict[str, Any],
        may_commit: Callable[[], object] = os.getpid,  # a process id allows it
    ) -> Path:
        """Write the checkpoint of a step, try again where it fails, and return its folder."""
        self.start(step, state, rank_state, meta, may_commit)  # type: ignore[arg-type]
        while not isinstance(self.finish(), Saved):
            assert self.is_pending
        return final_for(self.folder, step)


WIDTH = 10  # not a multiple of 4: the last rank's shard is smaller


class Trained:
    """A model and AdamW on ``dist``'s default group; another seed gives other weights."""

    def __init__(self, strategy: str, seed: int, lr: float = 0.01) -> None:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
        model: nn.Module = layers
        if strategy == "ddp":
            model = DistributedDataParallel(layers)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (layers[0], layers[3], layers):
                fully_shard(part, mesh=mesh)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(self, number: int) -> None:
        """One update on data that only the step's number decides."""
        data = torch.Generator().manual_seed(number)
        self.model(torch.randn(4, WIDTH, generator=data)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """The state dict that a checkpoint takes."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def take(self, state: dict[str, Any]) -> None:
        """Put a loaded state dict into model and optimizer."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def digests(self) -> dict[str, str]:
        """Name to digest of every whole tensor and every number of the state, the same however it is sharded."""
        return dict(_digests("", self.state()))


def _digests(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _digests(f"{name}/{key}", value[key])
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _digests(f"{name}/{number}", entry)
    elif isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        yield name, f"{tuple(whole.shape)} {hashlib.sha256(whole.detach().numpy().tobytes()).hexdigest()}"
    else:
        yield name, repr(value)


def state(step: float) -> dict[str, Any]:
    """A state of a few numbers, which show its step."""
    return {"model": {"w": torch.full((5,), float(step))}, "optimizer": {"lr": 0.5}}


def read_weights(run: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer of the checkpoint of a step, flattened."""
    file = scratch / "whole.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step_{step:08d}", file)
    flat: dict[str, torch.Tensor] = {}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{prefix}/{key}")

    walk(torch.load(file, weights_only=False), "")
    return flat


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys() and len(one) > 10
    return [name for name in one if not torch.equal(one[name], other[name])]


class DiskCalls:
    """Calls that change a disk. From number ``first`` on, ``fail`` is called in their place; a write is half done.

    Args:
        fail: raises, or ends the process.
        first: counted from 0.
    """

    def __init__(self, fail: Callable[[], Any], first: int) -> None:
        self.made = 0
        self._fail = fail
        self._first = first

    def count(self) -> None:
        """Count one call, or have it fail."""
        self.made += 1
        if self.made > self._first:
            self._fail()

    @contextmanager
    def watch(self) -> Iterator[DiskCalls]:
        """Watch the calls of this process, and of those that it forks, each with a count of its own."""
        with ExitStack() as stack:
            for owner, name in (
                *((Path, n) for n in ("rename", "unlink", "mkdir")),
                *((os, n) for n in ("fsync",)),
                *((shutil, n) for n in ("rmtree",)),
            ):
                stack.enter_context(mock.patch.object(owner, name, self._counted(getattr(owner, name))))
            stack.enter_context(mock.patch.object(Path, "open", self._opening(Path.open)))
            yield self

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return call(*args, **kwargs)

        return counted

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return call(path, mode, *args, **kwargs)
            self.count()
            return _Written(call(path, mode, *args, **kwargs), self)

        return opened


class _Written:
    """A file whose writes are counted; one that fails has written its first half."""

    def __init__(self, file: Any, calls: DiskCalls) -> None:
        self._file = file
        self._calls = calls

    def write(self, data: Any) -> int:
        try:
            self._calls.count()
        except BaseException:
            self._file.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            raise
        written: int = self._file.write(data)
        return written

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
