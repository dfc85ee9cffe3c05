"""Files of tests on workers: the last worker takes those that wait, so that the others compute meanwhile.

Owns the choice. Must not know how long a file takes: they come in the order in which they are to be started.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling

from tests.support.cost import WAITS


class WaitingBesideComputing(LoadFileScheduling):
    """A worker takes the first file of its own kind that is left, and one of the other kind where there is none."""

    def _assign_work_unit(self, node: Any) -> None:
        for_waiting = len(self.nodes) > 1 and node is self.nodes[-1]
        of_its_kind = [scope for scope in self.workqueue if (f"{WAITS}/" in scope) == for_waiting]
        if of_its_kind:
            self.workqueue.move_to_end(of_its_kind[0], last=False)
        super()._assign_work_unit(node)
