"""Memory of the host that a training process has freed: kept for its next step.

The C library gives blocks of some 32 MB and more back to the kernel at once, and a step that computes on a CPU asks for
the same ones again: logits, their gradients, large activations. Each page is then found and zeroed anew. Owns that
setting of the C library. Must not know what is computed.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Names of the settings in glibc's malloc.h."""
NEVER = -1
CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees; returns False where it cannot, or the user has set it.

    For processes whose memory is the same in every step: what they once had at their highest stays theirs.
    """
    tuned = any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned or "LD_PRELOAD" in os.environ:  # the last is how other allocators are chosen
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return bool(set_option(MMAP_MAX, 0)) and bool(set_option(TRIM_THRESHOLD, NEVER))
