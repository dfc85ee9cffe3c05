"""Python's garbage collector during training.

Left to itself it runs whenever a process has made enough objects, on each rank in another step, and all ranks wait for
the one that collects. Owns when it runs instead. Must not know what a step is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

YOUNG = 1
"""Generation up to which is collected: objects that lived through a collection are not looked at again."""


@contextmanager
def collect_together(interval: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage in steps that ``interval`` divides only, for the length of a ``with`` block; 0 changes nothing.

    Collects all there is once at the beginning. Yields the function to call with the number of each step.
    """
    if interval == 0:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield lambda step: None if step % interval else _collect_young()
    finally:
        if was_enabled:
            gc.enable()


def _collect_young() -> None:
    gc.collect(YOUNG)
