"""Share of a run's time that is left for steps where nodes fail: Young's checkpoint interval and Daly's first order.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), equation 12 to first order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """What failures cost: seconds that each save holds the steps up, seconds of a restart, hours between failures."""

    mtbf_node_h: float
    """Mean time between failures of one node, hours."""
    save_s: float
    restart_s: float

    def interval_s(self, nodes: int) -> float:
        """Young's interval between saves, seconds: the square root of 2 x save x mean time between failures."""
        return math.sqrt(2 * self.save_s * self.mtbf_s(nodes))

    def mtbf_s(self, nodes: int) -> float:
        """Mean time between failures of any of the nodes, seconds: they fail independently."""
        return 3600 * self.mtbf_node_h / nodes

    def goodput(self, nodes: int) -> float:
        """Share of the time in steps that count, 0 to 1, where saves are made at Young's interval.

        Lost are the saves, and for each failure half an interval, which is done again, and the restart.
        """
        mtbf, interval = self.mtbf_s(nodes), self.interval_s(nodes)
        saving = self.save_s / (interval + self.save_s) if interval else 0.0
        return max(0.0, 1 - saving - (interval / 2 + self.restart_s) / mtbf)
