"""Quick starts and ends of processes that import torch.

Such an import makes some 300,000 objects that live as long as the process. Python's collector of reference cycles goes
through them again and again while they come, and once more at the exit: about 40 % of what a rank needs to start and to
leave. Owns the pause of the collector. Torch-free.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import in a ``with`` block what stays to the end: the collector rests, and never looks at it afterwards."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
