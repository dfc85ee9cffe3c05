"""Time that torch takes to compile, as its own compiler tells it: from the outermost begin to the outermost end.

Owns the clock. Must not know what is compiled, nor who shows the time.
"""

from __future__ import annotations

import contextlib
import time


class CompileTime:
    """Clock of this process's compiler: of frames, of backward passes that wait for their first use, of CUDA graphs.

    Args:
        compiles: whether the run compiles; else nothing is loaded and no time ever known.
    """

    def __init__(self, compiles: bool) -> None:
        self._began = 0.0
        self._spent_s = 0.0
        self._compiles = compiles
        if compiles:
            # The counters of torch._dynamo.utils add up nested phases and threads; these callbacks tell wall time.
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def take(self) -> float | None:
        """Return the seconds since it was last asked; None where nothing was compiled."""
        if not self._spent_s:
            return None
        seconds, self._spent_s = self._spent_s, 0.0
        return seconds

    def close(self) -> None:
        """Listen no longer."""
        if self._compiles:
            from torch._dynamo.callback import callback_handler

            with contextlib.suppress(ValueError):  # torch._dynamo.reset() has dropped them
                callback_handler.remove_start_callback(self._begin)
                callback_handler.remove_end_callback(self._end)

    def _begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self._spent_s += time.perf_counter() - self._began
