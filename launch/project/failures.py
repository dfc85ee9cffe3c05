"""Cost of failing nodes for a run of so many of them. The arithmetic is ``launch.runs.checkpoint_interval``'s."""

from __future__ import annotations

from dataclasses import dataclass

from launch.runs import checkpoint_interval


@dataclass(frozen=True)
class Failures:
    """Cost of failures: seconds that each save holds the steps up, seconds of a restart, hours between failures."""

    mtbf_node_h: float
    """Mean time between failures of one node, hours."""
    save_s: float
    restart_s: float

    def interval_s(self, nodes: int) -> float:
        """Return Young's interval between saves, seconds."""
        return checkpoint_interval.best_interval_s(self.save_s, self.mtbf_s(nodes))

    def mtbf_s(self, nodes: int) -> float:
        """Return the mean time between failures of any of the nodes, seconds: they fail independently."""
        return 3600 * self.mtbf_node_h / nodes

    def goodput(self, nodes: int) -> float:
        """Return the share of the time in steps that count, 0 to 1, where saves are made at Young's interval."""
        return checkpoint_interval.goodput(self.save_s, self.interval_s(nodes), self.restart_s, self.mtbf_s(nodes))
