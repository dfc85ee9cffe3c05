"""Files of tests on workers: the last two take those that wait, so that the others compute meanwhile.

Owns the choice. Must not know how long a file takes: they come in the order in which they are to be started.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling

from tests.support.cost import WAITS


def waiting(workers: int) -> int:
    """Number of workers that begin with the files that wait: each starts a sandbox of its own."""
    return 2 if workers > 3 else min(1, workers - 1)


class WaitingBesideComputing(LoadFileScheduling):
    """A worker takes the first file of its own kind that is left, and one of the other kind where there is none."""

    def _assign_work_unit(self, node: Any) -> None:
        for_waiting = any(node is one for one in self.nodes[len(self.nodes) - waiting(len(self.nodes)) :])
        of_its_kind = [scope for scope in self.workqueue if (f"{WAITS}/" in scope) == for_waiting]
        if of_its_kind:
            self.workqueue.move_to_end(of_its_kind[0], last=False)
        super()._assign_work_unit(node)
