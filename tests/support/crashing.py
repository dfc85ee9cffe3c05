"""Every write, fsync, rename, unlink, mkdir and rmtree of a save, counted, so that a test can have each fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


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
