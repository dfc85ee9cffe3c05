"""Best interval between checkpoints where nodes fail, and the share of the time left for steps. Pure arithmetic.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), to first order: its further
terms matter only where a save takes a good part of the time between failures.
"""

from __future__ import annotations

import math


def best_interval_s(save_s: float, between_failures_s: float) -> float:
    """Return the time of computing between two saves that loses least, seconds: ``sqrt(2 C M)`` (Young 1974).

    Saving more often costs more than the steps that it spares.

    Args:
        save_s: seconds for which a save holds the steps up.
        between_failures_s: mean time between failures, seconds.
    """
    return math.sqrt(2 * save_s * between_failures_s)


def goodput(save_s: float, interval_s: float, restart_s: float, between_failures_s: float) -> float:
    """Return the share of the time that goes into steps that count, 0 to 1.

    Each interval costs a save, each failure a restart and half of what was done since the last save: at most one
    failure an interval (Daly 2006).

    Args:
        save_s: seconds for which a save holds the steps up.
        interval_s: seconds of computing between two saves.
        restart_s: seconds from a failure to the next step.
        between_failures_s: mean time between failures, seconds.
    """
    cycle = interval_s + save_s
    lost = (restart_s + cycle / 2) / between_failures_s
    return (interval_s / cycle if cycle else 1.0) * max(0.0, 1 - lost)
